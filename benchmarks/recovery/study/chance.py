"""What chance does: the A/A arms, and where each noise arm lies among them.

An A/A arm is its format once more with other random samples. Its difference to the format has mean 0, so the root
mean square of its runs is the size of chance for one run. A mean over n runs is judged by that over sqrt(n), on
Student's t with as many degrees of freedom as there are A/A runs. p-values of several noise arms are corrected for
their number (S. Holm, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.recovery.study import student
from benchmarks.recovery.study.bootstrap import LEVEL, Bootstrap, Difference


@dataclass(frozen=True)
class Chance:
    """The A/A runs of a format: `difference` is that of the A/A arm to the format, in points."""

    difference: Difference

    @property
    def size(self) -> float:
        """Root mean square of the runs' differences, in points."""
        return math.sqrt(float(np.mean(self.difference.by_run**2)))

    def half_width(self, runs: int) -> float:
        """A mean over so many runs stays within ± this, in points, 95 times in 100, by chance alone."""
        return student.quantile((1 + LEVEL) / 2, self.difference.runs) * self.size / math.sqrt(runs)

    def p(self, found: Difference) -> float:
        """Probability that chance alone gives a mean as far from 0 as this one."""
        if self.size == 0:
            return float(found.mean == 0)
        return 2 * student.cdf(-abs(found.mean) / (self.size / math.sqrt(found.runs)), self.difference.runs)


def chance(source: Bootstrap, fmt: str, how: str = "greedy") -> Chance | None:
    """From the arms `fmt` and `fmt-aa`; None where they share no run."""
    difference = source.difference({f"{fmt}-aa": 1, fmt: -1}, how)
    return Chance(difference) if difference else None


def holm(values: Sequence[float]) -> list[float]:
    """The p-values, each corrected for all of them; NaN stays, and counts for nothing."""
    order = sorted((index for index, p in enumerate(values) if not math.isnan(p)), key=lambda index: values[index])
    corrected = list(values)
    before = 0.0
    for rank, index in enumerate(order):
        before = max(before, min(1.0, (len(order) - rank) * values[index]))
        corrected[index] = before
    return corrected
