"""The table of repairs, made from the lines that `ptq` has measured.

Intervals are of the paired bootstrap over problems (B. Efron, 1979): a problem that is drawn is drawn for all policies,
and for both sides of a difference. They cover the chance in the choice of problems, not that of another policy, nor of
other texts to calibrate on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.recovery.outcomes import unpack
from benchmarks.recovery.ptq import BASELINE, REFERENCE, ROWS

Line = dict[str, Any]

RESAMPLES = 2000
GOALS = (("without an adapter", False, 0.85), ("with a rank-8 adapter", True, 0.98))
BITS = 4.5  # of the goals; the fp32 scale of each NVFP4 tensor comes on top


@dataclass(frozen=True)
class Result:
    """A row over all policies; shares and accuracies with their (low, high) of 95 %."""

    name: str
    recipe: dict[str, Any]
    bits: float
    adapter_bits: float
    accuracy: float
    by_policy: tuple[float, ...]
    difference: tuple[float, float, float]
    kl: float
    won_back: tuple[float, float, float]  # of what plain MXFP4 loses
    won_back_of_format: float  # of what the same format loses by its defaults
    weight_error: float
    seconds: float


def results(lines: Sequence[Line]) -> list[Result]:
    """One for each row that was measured on every policy of the file, in the order of `ptq.ROWS`.

    Raises:
        ValueError: full precision or plain MXFP4 is not there to compare with.
    """
    settings = lines[0]["settings"]
    found: dict[str, dict[int, Line]] = {}
    for line in lines[1:]:
        found.setdefault(line["row"], {})[line["policy"]] = line
    complete = {
        name: [each[p] for p in settings["policies"]]
        for name, each in found.items()
        if set(settings["policies"]) <= set(each)
    }
    for name in (REFERENCE, BASELINE):
        if name not in complete:
            raise ValueError(f"the row {name!r} is not measured on every policy; nothing can be compared with it")
    count = settings["problems"]
    # (problems,): the mean over the policies, so that a problem is drawn for all of them
    right = {name: np.mean([unpack(line["outcomes"], count) for line in each], 0) for name, each in complete.items()}
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    loss = right[REFERENCE] - right[BASELINE]
    order = [row.name for row in ROWS if row.name in complete]
    rows = []
    for name in [*order, *(name for name in complete if name not in order)]:
        policies = complete[name]
        lost = right[REFERENCE] - right[name]
        own = (policies[0]["recipe"]["spec"] or {"fmt": BASELINE})["fmt"]
        own_loss = (right[REFERENCE] - right[own]).mean() if own in right else float("nan")
        rows.append(
            Result(
                name,
                policies[0]["recipe"],
                _mean(policies, "bits_per_weight"),
                _mean(policies, "adapter_bits_per_weight"),
                float(right[name].mean()),
                tuple(line["flexible"] for line in policies),
                (float(-lost.mean()), *_interval(-(draws @ lost))),
                _mean(policies, "kl"),
                (float(1 - lost.mean() / loss.mean()), *_interval(1 - (draws @ lost) / (draws @ loss))),
                float(1 - lost.mean() / own_loss),
                _mean(policies, "weight_error"),
                _mean(policies, "seconds"),
            )
        )
    return rows


def missing(rows: Sequence[Result]) -> list[str]:
    """Names of the benchmark's rows that are not among these."""
    return [row.name for row in ROWS if row.name not in {each.name for each in rows}]


def _mean(lines: Sequence[Line], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def grid(rows: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    header = [
        "base and repairs", "bits", "accuracy, %", "against full precision", "of MXFP4's loss won back",
        "of the format's own", "KL", "weight error", "seconds",
    ]  # fmt: skip
    cells = []
    for row in rows:
        reference = row.name == REFERENCE
        adapter = f" + {row.adapter_bits:.2f}" if row.adapter_bits else ""
        plain = reference or row.name == BASELINE
        default = plain or row.name == row.recipe["spec"]["fmt"]
        cells.append(
            [
                f"`{row.name}`" if not reference else row.name,
                f"{row.bits:.4g}{adapter}",
                f"{100 * row.accuracy:.2f}",
                "–" if reference else _signed(*(100 * value for value in row.difference)),
                "–" if plain else _share(*row.won_back),
                "–" if default else f"{100 * row.won_back_of_format:.0f} %",
                f"{row.kl:.5f}",
                f"{row.weight_error:.3f}",
                f"{row.seconds:.1f}",
            ]
        )
    return header, cells


def _signed(mean: float, low: float, high: float) -> str:
    return f"{mean:+.2f} ({low:+.2f} … {high:+.2f})"


def _share(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} % ({100 * low:.1f} … {100 * high:.1f})"


def judged(rows: Sequence[Result]) -> list[str]:
    """A sentence for each goal: the row of the least KL within the bits, with and without folding."""
    sentences = []
    for what, adapter, goal in GOALS:
        for how, folds in (("", True), (", nothing folded", False)):
            allowed = [
                row
                for row in rows
                if row.bits < BITS + 0.1 and row.name != REFERENCE and (row.recipe["adapter"] is not None) == adapter
                and (folds or "fold_scales" not in row.recipe["steps"])
            ]  # fmt: skip
            if not allowed:
                continue
            best = min(allowed, key=lambda row: row.kl)
            verdict = "met" if best.won_back[0] >= goal else "**missed**"
            sentences.append(
                f"Least KL at {BITS:g} bits {what}{how}: `{best.name}`, {_share(*best.won_back)} of the loss won back "
                f"(goal {100 * goal:.0f} %: {verdict})."
            )
    plain = [row for row in rows if row.name != REFERENCE and row.name == row.recipe["spec"]["fmt"]]
    wide = max(plain, key=lambda row: row.bits)
    if wide.bits > BITS + 0.1:
        sentences.append(f"For scale: `{wide.name}` with {wide.bits:g} bits wins back {_share(*wide.won_back)}.")
    return sentences
