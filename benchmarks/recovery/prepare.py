"""A base made ready for training: patched, repaired, with its adapter; and what that cost.

Text to calibrate and to distil on is written by the full-precision base itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.recovery.arms import Adapter
from benchmarks.recovery.data import Example, prompt_ids
from qnoise.formats import E2M1
from qnoise.repairs.distill import distill
from qnoise.repairs.recipe import STEPS
from qnoise.repairs.residual_adapter import init_lora_from_residual
from qnoise.repairs.text import self_generated
from qnoise.rounding import round_magnitude

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Texts = list[dict[str, "Tensor"]]


@dataclass
class Cost:
    """CPU seconds and tokens (sampled, or gone through in a forward pass) that came before RL."""

    seconds: float = 0.0
    tokens: int = 0


def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Texts:
    """What the model writes on the examples, in batches."""
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    return self_generated(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed)


def repair(model: nn.Module, names: Sequence[str], calibration: Texts | None) -> None:
    """Apply repairs to a patched model, in order."""
    for name in names:
        STEPS[name](model, calibration)


def with_adapter(
    model: Any, adapter: Adapter, calibration: Callable[[], Texts], texts: Callable[[], Texts]
) -> PeftModel:
    """A LoRA on every linear, started and distilled; the texts are asked for where they are needed."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear", bias="none")
    model = get_peft_model(model, lora)
    if adapter.start == "weighted":
        init_lora_from_residual(model, calibration())
    elif adapter.start != "zero":
        inputs = calibration() if adapter.turns > 1 else None
        init_lora_from_residual(model, inputs, method=adapter.start, iterations=adapter.turns)
    if adapter.steps:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=adapter.lr, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, adapter.steps)
        distill(model, texts(), optimizer, steps=adapter.steps, scheduler=decay, teacher="base")
    return model


@torch.no_grad()
def borrow(model: PeftModel, other: PeftModel) -> None:
    """Give `model` the adapter of `other`, and take its product out of the base: the function stays what it was."""
    theirs = dict(other.named_modules())
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            twin = theirs[name]
            for key in layer.lora_A:
                layer.lora_A[key].weight.copy_(twin.lora_A[key].weight)
                layer.lora_B[key].weight.copy_(twin.lora_B[key].weight)
                layer.base_layer.weight.sub_(layer.get_delta_weight(key).to(layer.base_layer.weight.dtype))


@torch.no_grad()
def make_one_level(model: nn.Module) -> None:
    """Write into every linear but the head what the report's faulty NVFP4 made of it.

    Its block scale is amax / 6 rounded to E4M3 without a scale for the tensor, without subnormals, and at least 2^-6.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for linear in model.modules():
        if isinstance(linear, torch.nn.Linear) and linear is not head:
            weight = linear.weight
            blocks = weight.float().unflatten(-1, (-1, 16))
            scale = blocks.abs().amax(-1, keepdim=True) / torch.full((), 6.0)
            scale = scale.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn).float()
            codes = round_magnitude(blocks.abs() / scale, E2M1).copysign(blocks)
            weight.copy_((codes * scale).flatten(-2).to(weight.dtype))


class Clock:
    """Adds the CPU seconds of a `with` block to a cost."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def __enter__(self) -> None:
        self.began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.cost.seconds += time.process_time() - self.began
