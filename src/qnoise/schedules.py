"""Noise schedules: `schedule(progress) -> sigma`, with progress in [0, 1].

Pure values without state: what is not a function of progress alone does not belong here. Sigma is absolute (it is
added to RMSNorm weights near 1) or relative (on linear weights); a schedule does not care.

`Exponential`, `Linear`, `Cosine` and `Logarithmic` are the decays compared by QeRL (arXiv 2510.11696, section 3.3);
`StagedExponential` is the staircase its released code runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


def _check_progress(progress: float) -> float:
    progress = float(progress)
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress!r}; a schedule takes the share of training done, in [0, 1]")
    return progress


def _check_sigma(owner: object, *, positive: bool, **sigmas: float) -> None:
    for name, value in sigmas.items():
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            need = "a positive number (a geometric decay cannot reach 0)" if positive else "a number >= 0"
            raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; it must be {need}")


def _check_count(owner: object, minimum: int, why: str = "", **counts: int) -> None:
    for name, value in counts.items():
        if int(value) != value or value < minimum:
            raise ValueError(
                f"{type(owner).__name__}: {name} is {value!r}; it must be a whole number >= {minimum}{why}"
            )


def _stage(progress: float, num_stages: int) -> int:
    """floor(progress * num_stages), exact for every progress that is a ratio of integers below 1e6.

    A product such as 0.29 * 100 falls an ulp short of the boundary it stands for, and floor would then return the
    stage before.
    """
    x = progress * num_stages
    nearest = round(x)
    return nearest if abs(x - nearest) < 1e-9 else math.floor(x)


@dataclass(frozen=True)
class Constant:
    """sigma, always."""

    sigma: float

    def __post_init__(self) -> None:
        _check_sigma(self, positive=False, sigma=self.sigma)

    def __call__(self, progress: float) -> float:
        _check_progress(progress)
        return self.sigma


@dataclass(frozen=True)
class _Decay:
    """What the decays share: the sigma they start from and the one they end at."""

    sigma_start: float
    sigma_end: float
    geometric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_sigma(self, positive=self.geometric, sigma_start=self.sigma_start, sigma_end=self.sigma_end)


@dataclass(frozen=True)
class Linear(_Decay):
    """S + (E - S) u."""

    def __call__(self, progress: float) -> float:
        u = _check_progress(progress)
        return self.sigma_start * (1.0 - u) + self.sigma_end * u


@dataclass(frozen=True)
class Cosine(_Decay):
    """E + (S - E) (1 + cos(pi u)) / 2."""

    def __call__(self, progress: float) -> float:
        w = (1.0 + math.cos(math.pi * _check_progress(progress))) / 2.0
        return self.sigma_start * w + self.sigma_end * (1.0 - w)


@dataclass(frozen=True)
class Logarithmic(_Decay):
    """S + (E - S) log(1 + (e - 1) u): fast at first, slow at the end.

    QeRL names a logarithmic decay without giving its formula; this one is ours.
    """

    def __call__(self, progress: float) -> float:
        u = _check_progress(progress)
        w = 1.0 if u == 1.0 else math.log1p((math.e - 1.0) * u)
        return self.sigma_start * (1.0 - w) + self.sigma_end * w


@dataclass(frozen=True)
class Exponential(_Decay):
    """S (E / S)^u: a straight line in log sigma."""

    geometric: ClassVar[bool] = True

    def __call__(self, progress: float) -> float:
        return _geometric(self.sigma_start, self.sigma_end, _check_progress(progress))


@dataclass(frozen=True)
class StagedExponential(_Decay):
    """QeRL's staircase: `num_stages` equal intervals; the first is silent, the others fall from S to E.

    Stage i >= 1 has sigma S (E/S)^((i-1)/(num_stages-2)), so the last stage is exactly E. With the released settings
    (1e-2, 1e-4, 10) the stages are 0, 1e-2, 5.62e-3, 3.16e-3, 1.78e-3, 1e-3, 5.62e-4, 3.16e-4, 1.78e-4, 1e-4.

    Source: NVlabs/QeRL, `trl_trainer/noise_scheduler.py`. There two stages divide by zero; here they are refused.
    There the stage is the floor of a float quotient, which rounding can put on the wrong side of a boundary; here
    the boundaries are exact.
    """

    num_stages: int = 10
    geometric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(
            self,
            3,
            ": one silent stage and at least the two ends (two stages divide by zero in the original rule)",
            num_stages=self.num_stages,
        )

    def __call__(self, progress: float) -> float:
        stage = min(_stage(_check_progress(progress), self.num_stages), self.num_stages - 1)
        if stage == 0:
            return 0.0
        return _geometric(self.sigma_start, self.sigma_end, (stage - 1) / (self.num_stages - 2))


@dataclass(frozen=True)
class PerEpoch(_Decay):
    """A staged decay inside every epoch, under a geometric decay over the epochs.

    Epoch e of N runs from b_e to b_(e+1) with b_i = S (E/S)^(i/N). It has `stages_per_epoch` + 1 equal intervals: the
    first is silent, then sigma falls geometrically from b_e to b_(e+1). With one stage per epoch sigma is b_e.
    """

    num_epochs: int
    stages_per_epoch: int = 5
    geometric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, 1, num_epochs=self.num_epochs, stages_per_epoch=self.stages_per_epoch)

    def __call__(self, progress: float) -> float:
        intervals = self.stages_per_epoch + 1
        total = self.num_epochs * intervals
        epoch, stage = divmod(min(_stage(_check_progress(progress), total), total - 1), intervals)
        if stage == 0:
            return 0.0
        within = (stage - 1) / (self.stages_per_epoch - 1) if self.stages_per_epoch > 1 else 0.0
        return _geometric(self.sigma_start, self.sigma_end, (epoch + within) / self.num_epochs)


@dataclass(frozen=True)
class EntropyTarget:
    """Feedback in place of a plan: more noise while the entropy of the sampled policy is below `target`, else less.

    sigma_(k+1) = sigma_k (target / entropy_k)^gain, within [sigma_min, sigma_max]; it starts at `sigma_start`. The rule
    is ours: QeRL plans sigma and reports that entropy rises with it. Drive it by `NoiseScheduler.step(entropy=...)`;
    called as a schedule it gives the sigma to start from.

    Args:
        target: mean entropy per sampled token, nats, > 0.
        sigma_start, sigma_min, sigma_max: 0 < sigma_min <= sigma_start <= sigma_max. `sigma_min` is not 0, because
            nothing could raise it again.
        gain: > 0; how strongly a ratio of entropies moves sigma.
    """

    target: float
    sigma_start: float
    sigma_min: float = 1e-5
    sigma_max: float = 0.1
    gain: float = 1.0

    def __post_init__(self) -> None:
        _check_sigma(
            self,
            positive=True,
            target=self.target,
            sigma_start=self.sigma_start,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            gain=self.gain,
        )
        if not self.sigma_min <= self.sigma_start <= self.sigma_max:
            raise ValueError(
                f"EntropyTarget: sigma_start is {self.sigma_start!r}; it must be between sigma_min "
                f"({self.sigma_min!r}) and sigma_max ({self.sigma_max!r})"
            )

    def __call__(self, progress: float) -> float:
        _check_progress(progress)
        return self.sigma_start

    def after(self, sigma: float, entropy: float) -> float:
        """The sigma that follows `sigma`, under which `entropy` was measured.

        Raises:
            ValueError: an entropy that is negative or no number.
        """
        if not (math.isfinite(entropy) and entropy >= 0):
            raise ValueError(f"entropy is {entropy!r}; it must be a number >= 0 (nats per token)")
        if entropy == 0:
            return self.sigma_max
        # In logarithms: a tiny entropy must not overflow.
        moved = math.log(sigma) + self.gain * (math.log(self.target) - math.log(entropy))
        return min(max(math.exp(min(moved, math.log(self.sigma_max))), self.sigma_min), self.sigma_max)


def _geometric(start: float, end: float, u: float) -> float:
    # The ends are returned as given: start * (end / start) ** 1.0 may miss `end` by an ulp.
    return end if u == 1.0 else start * (end / start) ** u
