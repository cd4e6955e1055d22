"""`NoiseScheduler`: sets sigma, seed and step of every noisy module, once per generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qnoise.names import layer_index, matches
from qnoise.noise import Noise
from qnoise.patch import patched_modules
from qnoise.schedules import EntropyTarget

Multiplier = float | Callable[[float], float]


class NoiseScheduler:
    """Drives the noise of a patched model through a schedule.

    There is no noise before the first `step()`. The k-th call (k = 0, 1, ...) sets sigma to
    schedule(k / total_steps) and draws new noise, a function of (seed, k, module name) alone. Call it once per
    *generation*: a rollout reused over several optimizer steps keeps its noise.

    Args:
        model: a model patched with `noise=`.
        schedule: sigma as a function of progress in [0, 1] (`qnoise.schedules`).
        total_steps: number of generations; further calls stay at progress 1.
        seed: of the noise; the same on all ranks.
        multipliers: factors on sigma by module glob or layer index, each a number or a function of progress; the last
            match wins, what matches nothing has factor 1, and 0 switches a module off.

    Raises:
        ValueError: no module of the model is noisy; total_steps < 1; a multiplier that matches no noisy module.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Callable[[float], float],
        total_steps: int,
        seed: int = 0,
        multipliers: Mapping[str | int, Multiplier] | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}; it must be at least 1")
        self.model = model
        self.schedule = schedule
        self.total_steps = total_steps
        self.seed = seed
        self.multipliers = dict(multipliers or {})
        self.steps_taken = 0
        self._sigma = 0.0
        names = [module._qnoise.name for module in self._noisy()]
        if not names:
            raise ValueError(
                "no module of the model is noisy; patch it with qnoise.patch_model(model, ..., noise='rmsnorm')"
            )
        for key in self.multipliers:
            if not any(_matches(name, key) for name in names):
                raise ValueError(f"multiplier {key!r} matches no noisy module; there are: {', '.join(names[:6])}, ...")

    @property
    def sigma(self) -> float:
        """The sigma of the last step, before multipliers; 0 before the first."""
        return self._sigma

    def step(self, entropy: float | None = None) -> float:
        """Begin the next generation: new sigma, new noise. Returns sigma.

        Args:
            entropy: of the policy in the last generation, nats per token; only for `schedules.EntropyTarget`, which
                moves sigma by it. None leaves its sigma as it is.

        Raises:
            ValueError: an entropy for a schedule that does not use it.
        """
        sigma: float | None = None
        if isinstance(self.schedule, EntropyTarget):
            if self.steps_taken and entropy is not None:
                sigma = self.schedule.after(self._sigma, entropy)
            elif self.steps_taken:
                sigma = self._sigma
        elif entropy is not None:
            raise ValueError(
                f"{self.schedule!r} does not use the entropy; step(entropy=) is for schedules.EntropyTarget"
            )
        self._set(self.steps_taken, sigma)
        self.steps_taken += 1
        return self._sigma

    def state_dict(self) -> dict[str, Any]:
        """What is needed to continue: plain values, JSON-able."""
        return {
            "steps_taken": self.steps_taken,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "schedule": repr(self.schedule),
            "sigma": self._sigma,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue bit for bit: the noise of the last step taken acts again.

        Raises:
            ValueError: the state belongs to another schedule or number of steps.
        """
        for key, own in (("schedule", repr(self.schedule)), ("total_steps", self.total_steps)):
            if state[key] != own:
                raise ValueError(
                    f"the state was saved with {key}={state[key]}, this scheduler has {own}; "
                    "make the scheduler with the same arguments"
                )
        self.seed = int(state["seed"])
        self.steps_taken = int(state["steps_taken"])
        if self.steps_taken:
            # What feedback made of sigma is no function of the step. States written without it had no feedback.
            sigma = state.get("sigma") if isinstance(self.schedule, EntropyTarget) else None
            self._set(self.steps_taken - 1, sigma)
        else:
            self._sigma = 0.0
            for module in self._noisy():
                module._qnoise.noise = Noise()

    def _noisy(self) -> list[Any]:
        # Looked up each time: PEFT may have copied or wrapped modules since.
        return [module for module in patched_modules(self.model) if module._qnoise.noise_during]

    def _set(self, step: int, sigma: float | None = None) -> None:
        progress = min(1.0, step / self.total_steps)
        self._sigma = float(self.schedule(progress)) if sigma is None else sigma
        for module in self._noisy():
            factor: Multiplier = 1.0
            for key, value in self.multipliers.items():
                if _matches(module._qnoise.name, key):
                    factor = value
            sigma = self._sigma * float(factor(progress) if callable(factor) else factor)
            module._qnoise.noise = Noise(sigma=sigma, seed=self.seed, step=step)


def _matches(name: str, key: str | int) -> bool:
    return layer_index(name) == key if isinstance(key, int) else matches(name, key)
