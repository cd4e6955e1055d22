"""Paired differences between arms with 95 % intervals, and the share of a loss that was recovered.

Two intervals, for two reasons to doubt a difference. The *bootstrap* (B. Efron, 1979) draws checkpoints with
replacement, seeds within each of them (A. Davison and D. Hinkley, Bootstrap Methods, 1997, 3.8), and problems for all
runs alike (A. Owen, The pigeonhole bootstrap, 2007). It speaks about other checkpoints, seeds and problems. It is
wider than need be where checkpoints do not differ, because what varies within a level is counted again on the level
above, and too narrow where three checkpoints differ far more than seeds do. The *t interval* is that of the runs'
differences: right for few normal runs, of these checkpoints and on these problems. A verdict goes by both, from the
lower of the two lower ends to the higher of the two higher ends.

All sums are whole numbers until the last division, so that every machine prints the same digits.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from benchmarks.recovery.study import student
from benchmarks.recovery.study.rows import Key, Stage

RESAMPLES = 2000
LEVEL = 0.95
POWER = 0.80
GAP = 4.0
"""Points between full precision and the unrepaired format from which a share of the loss means something."""


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies in points: `by_run` (runs,), `replicates` (RESAMPLES,) of its mean.

    `standard_error` and `freedom` are those of the mean over runs.
    """

    mean: float
    by_run: np.ndarray = field(repr=False)
    replicates: np.ndarray = field(repr=False)
    standard_error: float
    freedom: int
    keys: tuple[Key, ...] = ()
    """Checkpoint and seed of each run, where they are of one stage."""

    @property
    def runs(self) -> int:
        return len(self.by_run)

    @property
    def sd(self) -> float:
        """Of the differences between runs; NaN with less than two."""
        return statistics.stdev(self.by_run.tolist()) if self.runs > 1 else math.nan

    @cached_property
    def interval(self) -> tuple[float, float]:
        """(low, high), 95 %, of the bootstrap; without bounds for a single run, which shows no spread."""
        return percentiles(self.replicates) if self.freedom > 0 else (-math.inf, math.inf)

    @property
    def t_interval(self) -> tuple[float, float]:
        """(low, high), 95 %, of the runs; without bounds for a single run."""
        if self.freedom < 1:
            return -math.inf, math.inf
        half = student.quantile((1 + LEVEL) / 2, self.freedom) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def outer(self) -> tuple[float, float]:
        """(low, high): from the lowest to the highest end of the two intervals."""
        lows, highs = zip(self.interval, self.t_interval, strict=True)
        return min(lows), max(highs)

    @property
    def detectable(self) -> float:
        """The smallest effect, in points, that such runs find with 80 % power: whose outer interval leaves out 0."""
        if self.freedom < 1:
            return math.inf
        half = max((high - low) / 2 for low, high in (self.interval, self.t_interval))
        return half + student.quantile(POWER, self.freedom) * self.standard_error


@dataclass(frozen=True)
class Share:
    """(arm - unrepaired) / (full precision - unrepaired); `interval` is that of the bootstrap, `gap` in points."""

    mean: float
    interval: tuple[float, float]
    gap: float
    runs: int


class Bootstrap:
    """The comparisons of a stage. The same problems and runs are drawn for all of them."""

    def __init__(self, stage: Stage, resamples: int = RESAMPLES) -> None:
        self.stage, self.resamples = stage, resamples
        self._stream = zlib.crc32(stage.name.encode())
        self._totals: dict[tuple[str, Key, str, str], tuple[int, np.ndarray]] = {}

    def difference(
        self, weights: Mapping[str, int], how: str = "greedy", metric: str = "flexible"
    ) -> Difference | None:
        """The sum of the arms' final accuracies with these weights, over the runs that all of them share.

        `{"mxfp4": 1, "bf16": -1}` is a paired difference, with four arms a difference of differences. Accuracies are
        "greedy" or "sampled", "flexible" or "strict". None where no run is shared or the accuracy was not measured.
        """
        keys = self._keys(tuple(weights), how)
        if not keys:
            return None
        count = self._count(next(iter(weights)), keys[0], how)
        exact = [sum(w * self._total(arm, key, how, metric)[0] for arm, w in weights.items()) for key in keys]
        by_run = 100 * np.array(exact, float) / count
        error = statistics.stdev(by_run.tolist()) / math.sqrt(len(keys)) if len(keys) > 1 else math.inf
        return Difference(
            100 * sum(exact) / (count * len(keys)),
            by_run,
            100 * self._replicates(keys, weights, how, metric) / count,
            error,
            len(keys) - 1,
            keys,
        )

    def share(
        self, arm: str, unrepaired: str, reference: str, how: str = "greedy", metric: str = "flexible"
    ) -> Share | None:
        """Share of the loss of `unrepaired` that `arm` recovers; NaN where the loss is under 4 points or none."""
        keys = self._keys((arm, unrepaired, reference), how)
        if not keys:
            return None
        weights = {"won": {arm: 1, unrepaired: -1}, "lost": {reference: 1, unrepaired: -1}}
        exact = {
            name: sum(w * self._total(each, key, how, metric)[0] for each, w in pair.items() for key in keys)
            for name, pair in weights.items()
        }
        gap = 100 * exact["lost"] / (self._count(arm, keys[0], how) * len(keys))
        won, lost = (self._replicates(keys, pair, how, metric) for pair in weights.values())
        if gap < GAP or lost.min() <= 0:
            return Share(math.nan, (math.nan, math.nan), gap, len(keys))
        bounds = percentiles(won / lost) if len(keys) > 1 else (-math.inf, math.inf)
        return Share(exact["won"] / exact["lost"], bounds, gap, len(keys))

    def _keys(self, arms: tuple[str, ...], how: str) -> tuple[Key, ...]:
        shared = self.stage.shared(arms)
        return tuple(key for key in shared if all(self._count(arm, key, how) for arm in arms))

    def _count(self, arm: str, key: Key, how: str) -> int:
        return self._arms[arm][key].problems("final", how)

    @cached_property
    def _arms(self) -> dict[str, dict]:
        return self.stage.arms

    def _total(self, arm: str, key: Key, how: str, metric: str) -> tuple[int, np.ndarray]:
        """Right answers of a run, and (resamples,) of them among the problems that were drawn."""
        if (arm, key, how, metric) not in self._totals:
            runs = self._arms[arm]
            outcomes = np.stack(
                [run.outcomes("final", how, metric) for run in runs.values() if self._count(arm, run.key, how)]
            )
            drawn = outcomes.astype(np.float32) @ problem_draws(outcomes.shape[1], self.resamples, self._stream)
            present = (run.key for run in runs.values() if self._count(arm, run.key, how))
            for found, right, sums in zip(present, outcomes.sum(1), drawn, strict=True):
                self._totals[arm, found, how, metric] = (int(right), sums)
        return self._totals[arm, key, how, metric]

    def _replicates(self, keys: tuple[Key, ...], weights: Mapping[str, int], how: str, metric: str) -> np.ndarray:
        """(resamples,): right answers a run, times `weights`, averaged over the runs that were drawn."""
        drawn = run_draws(tuple(checkpoint for checkpoint, _ in keys), self.resamples, self._stream)
        total = np.zeros(self.resamples)
        for place, key in enumerate(keys):
            right = sum(w * self._total(arm, key, how, metric)[1].astype(float) for arm, w in weights.items())
            total += drawn[place] * right
        return total / drawn.sum(0)


def pooled(parts: Sequence[Difference]) -> Difference:
    """The mean of differences from several stages, each counting alike; their runs are independent of one another."""
    if len(parts) == 1:
        return parts[0]
    variances = [(part.standard_error / len(parts)) ** 2 for part in parts]
    total = sum(variances)
    if not math.isfinite(total) or not total:
        freedom = min(part.freedom for part in parts)
    else:  # Satterthwaite, rounded down
        freedom = int(total**2 / sum(v**2 / part.freedom for v, part in zip(variances, parts, strict=True)))
    return Difference(
        sum(part.mean for part in parts) / len(parts),
        np.concatenate([part.by_run for part in parts]),
        np.mean([part.replicates for part in parts], axis=0),
        math.sqrt(total),
        freedom,
    )


@lru_cache(maxsize=2)
def problem_draws(count: int, resamples: int, stream: int) -> np.ndarray:
    """(count, resamples) float32: how often a problem is among `count` drawn with replacement."""
    picks = np.random.default_rng([0, stream]).integers(count, size=(resamples, count), dtype=np.int32)
    places = picks + (np.arange(resamples, dtype=np.int32) * count)[:, None]
    counts = np.bincount(places.ravel(), minlength=resamples * count).reshape(resamples, count)
    return np.ascontiguousarray(counts.T.astype(np.float32))


@lru_cache(maxsize=64)
def run_draws(checkpoints: tuple[str, ...], resamples: int, stream: int) -> np.ndarray:
    """(runs, resamples) float64: how often a run is drawn, as many checkpoints and seeds within each as there are.

    `checkpoints` names that of each run.
    """
    names = list(dict.fromkeys(checkpoints))
    runs = [np.array([place for place, each in enumerate(checkpoints) if each == name]) for name in names]
    sizes = np.array([len(each) for each in runs])
    table = np.stack([np.resize(each, sizes.max()) for each in runs])
    rng = np.random.default_rng([1, stream])
    drawn = rng.integers(len(names), size=(resamples, len(names)))
    seeds = (rng.random((resamples, len(names), sizes.max())) * sizes[drawn][:, :, None]).astype(int)
    chosen = table[drawn[:, :, None], seeds]
    counted = np.arange(sizes.max()) < sizes[drawn][:, :, None]
    rows = np.broadcast_to(np.arange(resamples)[:, None, None], chosen.shape)
    found = np.zeros((len(checkpoints), resamples))
    np.add.at(found, (chosen[counted], rows[counted]), 1)
    return found


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """(low, high) of the middle 95 %."""
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
