"""What the same cost buys in full precision: bf16 with more RL steps, interpolated between the runs there are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.recovery.study.rows import HOWS, Key, Row


def mean_of_both(row: Row) -> float | None:
    """Greedy and sampled accuracy at the end, averaged, in percent; None where one was not measured."""
    ends = [row.accuracy("final", how) for how in HOWS]
    return None if None in ends else statistics.fmean(end for end in ends if end is not None)


class LongerRuns:
    """Accuracy of bf16 with LoRA by its number of RL steps, run by run.

    The runs are those of the one learning rate that was tried with several numbers of steps. Costs are counted in RL
    steps of the repaired run: the CPU seconds of its preparation over those of one of its steps.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        plain = [row for row in rows if not row.settings.get("fmt") and row.settings.get("tuning", "lora") == "lora"]
        tried: dict[float, set[int]] = {}
        for row in plain:
            tried.setdefault(row.preset.get("lr", 0.0), set()).add(row.preset.get("steps", 0))
        several = [lr for lr, steps in tried.items() if len(steps) > 1]
        self.curves: dict[Key, dict[int, float]] = {}
        for row in plain:
            if several == [row.preset.get("lr")] and (accuracy := mean_of_both(row)) is not None:
                self.curves.setdefault(row.key, {})[row.preset["steps"]] = accuracy

    def difference(self, row: Row) -> tuple[float, bool] | None:
        """Points above bf16 of equal cost, and whether the cost is beyond the longest run (so that it is an upper end).

        None for full precision, for full fine-tuning, and where bf16 did not run with this seed.
        """
        own, cost = mean_of_both(row), row.data["cost"]
        curve = self.curves.get(row.key, {})
        kind = row.settings.get("fmt"), row.settings.get("tuning", "lora")
        if own is None or len(curve) < 2 or not kind[0] or kind[1] != "lora" or not cost.get("step_seconds"):
            return None
        steps = row.preset["steps"] + cost["prepare_seconds"] / cost["step_seconds"]
        known = sorted(curve)
        return own - float(np.interp(steps, known, [curve[each] for each in known])), steps > known[-1]

    def text(self, rows: Sequence[Row]) -> str:
        """Mean and standard deviation over runs, for a table."""
        found = [difference for row in rows if (difference := self.difference(row)) is not None]
        if not found:
            return "–"
        values = [value for value, _ in found]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{'below ' if any(beyond for _, beyond in found) else ''}{statistics.fmean(values):+.2f}{spread}"
