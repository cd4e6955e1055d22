"""Accuracy, greedy or of samples, under whatever quantization the model has; noise is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import qnoise
from benchmarks.recovery.data import Example, prompt_ids
from qnoise.rl import generate_groups, gsm8k_reward

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """One entry a problem: right with the ending `#### N` (strict), right by the last number (flexible)."""

    strict: tuple[bool, ...]
    flexible: tuple[bool, ...]
    mean_length: float

    @property
    def strict_accuracy(self) -> float:
        return sum(self.strict) / len(self.strict)

    @property
    def flexible_accuracy(self) -> float:
        return sum(self.flexible) / len(self.flexible)


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    instruction: str = "",
    batch_size: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Evaluation:
    """Answer every example once, in the "evaluation" phase: quantization on, noise off. Temperature 0 is greedy."""
    prompts = [prompt_ids(tokenizer, example, instruction) for example in examples]
    with qnoise.phase(model, "evaluation"):
        rollout = generate_groups(
            model,
            tokenizer,
            prompts,
            1,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
    answers = [example.answer for example in examples]
    right = {mode: gsm8k_reward(rollout.texts, answers, mode=mode) for mode in ("strict", "flexible")}
    return Evaluation(
        strict=tuple(bool(value) for value in right["strict"]),
        flexible=tuple(bool(value) for value in right["flexible"]),
        mean_length=rollout.lengths.float().mean().item(),
    )
