"""How long the study takes on two cores."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.recovery.stages import STAGES
from benchmarks.recovery.study.rows import Stage
from benchmarks.recovery.study.tables import Table

CORES = 2
RECENT = 36
"""Runs of a stage, the last ones made, that tell how long one takes: earlier ones were made by slower code."""


def table(stages: Iterable[Stage]) -> Table:
    """Runs planned and made, and hours for all that are planned, at the mean of the runs that were made last."""
    header = ["stage", "runs planned", "made", "CPU seconds a run", f"hours on {CORES} cores, all planned"]
    cells = []
    total = [0, 0, 0.0]
    for each in stages:
        plan = STAGES[each.name]
        # A line of an arm or a seed that is planned no more is not of the plan.
        made = [row for row in each.rows if row.key[1] in plan.seeds]
        if not made:
            continue
        runs = len(plan.arms) * len(plan.seeds)
        seconds = statistics.fmean(row.data["cost"]["cpu_seconds"] for row in made[-RECENT:])
        hours = runs * seconds / CORES / 3600
        cells.append([each.name, f"{runs:,}", f"{len(made):,}", f"{seconds:.0f}", f"{hours:.1f}"])
        total = [total[0] + runs, total[1] + len(made), total[2] + hours]
    if len(cells) > 1:
        cells.append(["all of these", f"{total[0]:,}", f"{total[1]:,}", "", f"{total[2]:.1f}"])
    return header, cells
