"""The noise of a run: the library's scheduler, or the noise that accumulates, as the report's runs had it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

import qnoise
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.presets import Preset
from qnoise.names import canonical_name
from qnoise.noise import unit_normal

if TYPE_CHECKING:
    from torch import Tensor, nn


def noise_of(model: nn.Module, preset: Preset, arm: Arm, seed: int) -> Any:
    """What drives the noise of the run, or None: it has `step(entropy)`, `sigma`, `state_dict`, `load_state_dict`."""
    if not arm.noise_during:
        return None
    staged = qnoise.schedules.StagedExponential(preset.sigma_start, preset.sigma_end, preset.noise_stages)
    if arm.noise == "accumulating":
        return Accumulating(model, staged, preset.steps, seed)
    schedule: Any = staged
    if arm.noise == "entropy":
        schedule = qnoise.schedules.EntropyTarget(preset.entropy_target, preset.sigma_start, sigma_max=preset.sigma_max)
    factors = None
    if arm.multipliers:
        with qnoise.full_precision(model):
            factors = qnoise.scan(model, fmts=arm.fmt).multipliers(arm.multipliers)
    return qnoise.NoiseScheduler(model, schedule, preset.steps, seed=seed, multipliers=factors)


class Accumulating:
    """Noise that is added to what was there: after k steps, the sum of k draws.

    That is what in-place injection does to norms which nothing restores in between. The norms are noisy in the rollout
    and in evaluation, where nothing took it off, and clean in training, which had another copy of them.
    """

    def __init__(self, model: nn.Module, schedule: Any, total_steps: int, seed: int) -> None:
        self.schedule, self.total_steps, self.seed = schedule, total_steps, seed
        self.steps_taken = 0
        self.norms = {
            canonical_name(name): module
            for name, module in model.named_modules()
            if "rmsnorm" in type(module).__name__.lower()
        }
        self.sums: dict[str, Tensor] = {name: torch.zeros_like(m.weight) for name, m in self.norms.items()}
        self.sigma = 0.0

    def step(self, entropy: float | None = None) -> float:
        self.sigma = self.schedule(min(1.0, self.steps_taken / self.total_steps))
        for name, total in self.sums.items():
            total += self.sigma * torch.from_numpy(unit_normal(self.seed, self.steps_taken, name, tuple(total.shape)))
        self.steps_taken += 1
        return self.sigma

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The norms with everything that was added so far; clean again afterwards."""
        clean = {name: module.weight.detach().clone() for name, module in self.norms.items()}
        try:
            for name, module in self.norms.items():
                module.weight.data.add_(self.sums[name])
            yield
        finally:
            for name, module in self.norms.items():
                module.weight.data.copy_(clean[name])

    def state_dict(self) -> dict[str, Any]:
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for total in self.sums.values():
            total.zero_()
        self.steps_taken = 0
        for _ in range(state["steps_taken"]):
            self.step()
