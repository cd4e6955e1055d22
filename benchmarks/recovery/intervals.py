"""95 % intervals of accuracies and of paired differences.

Both cover the chance in the choice of problems only. The chance in training (another seed, other samples) is not in
them; the A/A arm and the spread over seeds show it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Z = 1.959964  # two-sided 95 %


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Interval of a share (E. B. Wilson, 1927); sensible at 0 and 1 too. `trials` must be positive."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials; there must be at least one trial")
    share = successes / trials
    scale = 1 + Z * Z / trials
    centre = (share + Z * Z / (2 * trials)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """(mean, low, high) of accuracy `ours` - `theirs` on the same problems.

    Each argument holds one sequence of outcomes (0 or 1) per seed, in the same order of seeds and problems. Outcomes of
    a problem are averaged over seeds first, so that a problem counts once; the interval is normal over problems.
    """
    if len(ours) != len(theirs) or any(len(a) != len(b) for a, b in zip(ours, theirs, strict=False)):
        raise ValueError("a paired difference needs the same seeds and the same problems on both sides")
    differences = [
        statistics.fmean(a - b for a, b in zip(mine, other, strict=True))
        for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    mean = statistics.fmean(differences)
    half = Z * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return mean, mean - half, mean + half
