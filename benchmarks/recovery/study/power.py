"""How many paired runs and problems the study needs, computed before it is run.

The paired difference of a run has the variance `run_sd`² + discordance / problems: chance in training, and in the
evaluation, where `discordance` is the share of problems that exactly one of the two policies answers rightly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from benchmarks.recovery.study import student
from benchmarks.recovery.study.bootstrap import LEVEL, POWER

MARGIN = 1.0
"""Points that a recipe may be below its reference and count as not inferior."""
_MOST = 2000


@dataclass(frozen=True)
class Pilot:
    """What a prototype measured: `sd`, in points, of paired differences between runs on `problems` problems."""

    sd: float
    problems: int = 1500
    discordance: float = 0.15

    @property
    def run_sd(self) -> float:
        """The part that comes from training, in points.

        Raises:
            ValueError: the choice of problems alone varies more than `sd`.
        """
        rest = self.sd**2 - 1e4 * self.discordance / self.problems
        if rest < 0:
            raise ValueError(
                f"a paired SD of {self.sd:g} points is less than {self.problems} problems of discordance "
                f"{self.discordance:g} give by chance ({100 * math.sqrt(self.discordance / self.problems):.2f})"
            )
        return math.sqrt(rest)

    def sd_with(self, problems: int) -> float:
        """Of paired differences between runs on so many problems, in points."""
        return math.sqrt(self.run_sd**2 + 1e4 * self.discordance / problems)


PILOTS = (Pilot(1.3), Pilot(1.6))
"""The range of the prototypes: 1.3 to 1.6 points on 1,500 problems, greedy."""


def power(
    pilot: Pilot, runs: int, problems: int, *, margin: float = MARGIN, true: float = 0.0, checkpoints: int = 0
) -> float:
    """Probability that the lower end of the 95 % interval is at least -margin, if the difference is `true` points.

    With `checkpoints` the interval is the outer one of `bootstrap`: for m runs on each of C checkpoints that do not
    differ, the variance of its replicates is (C - 1) / C + (m - 1) / m times that of the mean, and twice the
    evaluation's on top. Without, it is that of t.
    """
    error = pilot.sd_with(problems) / math.sqrt(runs)
    freedom = runs - 1
    if checkpoints:
        per = runs / checkpoints
        levels = (checkpoints - 1) / checkpoints + max(0.0, per - 1) / per
        evaluation = 2e4 * pilot.discordance / (problems * runs)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(levels * error**2 + evaluation)
        half = max(half, student.quantile((1 + LEVEL) / 2, freedom) * error)
    else:
        half = student.quantile((1 + LEVEL) / 2, freedom) * error
    return student.cdf((true + margin - half) / error, freedom)


def runs_needed(
    pilot: Pilot, problems: int, *, margin: float = MARGIN, true: float = 0.0, checkpoints: int = 0
) -> int | None:
    """The fewest paired runs an arm with 80 % power; None where not even 2,000 have it."""
    if true + margin <= 0:
        raise ValueError(f"a true difference of {true:g} points lies below the margin of -{margin:g}")
    least = max(2, checkpoints)
    enough = (
        runs
        for runs in range(least, _MOST)
        if power(pilot, runs, problems, margin=margin, true=true, checkpoints=checkpoints) >= POWER
    )
    return next(enough, None)


def table(
    pilots: Sequence[Pilot] = PILOTS, problems: Sequence[int] = (1500, 3000, 6000, 12000), checkpoints: int = 3
) -> tuple[list[str], list[list[str]]]:
    """Header and cells: paired runs an arm for non-inferiority with a margin of 1 point at 80 % power."""
    header = ["paired SD of the pilot", "problems", "SD expected", "runs, t interval", "runs, t and bootstrap"]
    cells = []
    for pilot in pilots:
        for count in problems:
            needed = [runs_needed(pilot, count, checkpoints=each) for each in (0, checkpoints)]
            cells.append(
                [
                    f"{pilot.sd:g} on {pilot.problems:,}",
                    f"{count:,}",
                    f"{pilot.sd_with(count):.2f}",
                    *(str(runs) if runs else f"over {_MOST:,}" for runs in needed),
                ]
            )
    return header, cells


def sentence(checkpoints: int = 3) -> str:
    """What the table assumes."""
    return (
        f"Paired runs an arm, over {checkpoints} checkpoints, so that the lower end of the 95 % interval is at least "
        f"-{MARGIN:g} point with {100 * POWER:.0f} % power if the true difference is 0. SD in points; discordance "
        f"{', '.join(sorted({f'{100 * pilot.discordance:g} %' for pilot in PILOTS}))}."
    )
