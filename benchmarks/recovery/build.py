"""The policy of a run: its base, patched and prepared as the arm says, with what is trained."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

import qnoise
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.data import GENERATED, Example, generated
from benchmarks.recovery.policy import load_policy
from benchmarks.recovery.prepare import Clock, Cost, Texts, borrow, make_one_level, repair, with_adapter, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from benchmarks.recovery.presets import Preset
    from benchmarks.recovery.runs import Run

CALIBRATION_TEXTS = 160


def build_model(run: Run) -> tuple[Any, PreTrainedTokenizerBase, Cost]:
    """(model, tokenizer, cost of the preparation) of a run.

    What is random in it (the adapter's start, the texts) depends on the seed of the run alone.
    """
    return _build(run, run.arm)


def _build(run: Run, arm: Arm) -> tuple[Any, PreTrainedTokenizerBase, Cost]:
    preset, cost = run.preset, Cost()
    base, tokenizer = _load(run)
    if arm.one_level:
        make_one_level(base)
    noise = None
    if arm.noise_during and arm.noise != "accumulating":
        noise = qnoise.NoiseConfig(target="rmsnorm", during=arm.noise_during)
    fmt = qnoise.QuantSpec(arm.fmt, **arm.spec) if arm.fmt else None
    if fmt or noise:
        qnoise.patch_model(base, fmt=fmt, act_fmt=arm.act_fmt, noise=noise)
    if arm.tuning == "full":
        model = base.requires_grad_(True)
    else:
        texts = _Texts(run, cost)
        base.requires_grad_(False)
        if arm.repairs:
            calibration = texts.calibration()
            with Clock(cost):
                repair(base, arm.repairs, calibration)
        torch.manual_seed(run.seed)
        adapter = dataclasses.replace(arm.adapter, rank=preset.lora_rank, alpha=preset.lora_alpha)
        calibration = texts.calibration() if adapter.turns > 1 or adapter.start == "weighted" else []
        distillation = texts.distillation(adapter.steps, adapter.batch) if adapter.steps else []
        with Clock(cost):
            model = with_adapter(base, adapter, lambda: calibration, lambda: distillation)
        if arm.borrow:
            other, _, cost = _build(run, arm.borrow)
            borrow(model, other)
        # Calibration and distillation read every text once each.
        cost.tokens += sum(int(text["attention_mask"].sum()) for text in [*calibration, *distillation])
    if preset.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # nothing is dropped out; transformers checkpoints gradients in this mode only
    return model, tokenizer, cost


def _load(run: Run) -> tuple[Any, PreTrainedTokenizerBase]:
    model, tokenizer = load_policy(run.model_path, getattr(torch, run.preset.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


class _Texts:
    """Text of the full-precision base, written when it is asked for; the writing is part of the cost."""

    def __init__(self, run: Run, cost: Cost) -> None:
        self.run, self.cost = run, cost
        self.kept: Texts | None = None

    def calibration(self) -> Texts:
        if self.kept is None:
            self.kept = self._write("calibration", CALIBRATION_TEXTS, 80)
        return self.kept

    def distillation(self, steps: int, batch: int) -> Texts:
        return self._write("distillation", steps * batch, batch)

    def _write(self, purpose: str, count: int, batch: int) -> Texts:
        preset, seed = self.run.preset, self.run.seed
        with Clock(self.cost):
            texts = written(
                *_load(self.run),
                _prompts(preset, seed, purpose, count),
                max_new_tokens=preset.max_new_tokens,
                batch_size=batch,
                seed=seed,
            )
        self.cost.tokens += sum(int((text["labels"] != -100).sum()) for text in texts)
        return texts


def _prompts(preset: Preset, seed: int, purpose: str, count: int) -> list[Example]:
    """Prompts of the stream "rl" of a generated task, others than those the run trains on."""
    if preset.task not in GENERATED:
        raise ValueError(
            f"repairs that need text are for the generated tasks {', '.join(GENERATED)}, not {preset.task}"
        )
    return generated(preset.task, "rl", {"calibration": 1_000_000, "distillation": 2_000_000}[purpose] + seed, count)
