"""The logs of several runs made into one result: a row per arm, curves, settings. Everything printed comes from it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import code_hash, device, git_commit, versions
from benchmarks.recovery.intervals import paired_difference, wilson
from benchmarks.recovery.runs import Run
from qnoise import FORMATS

SCHEMA = 1
REFERENCE = "mxfp4"
METRICS = ("strict", "flexible")
CURVES = (
    "strict", "flexible", "reward", "response_length", "entropy", "mismatch_kl", "mismatch_abs", "clip_fraction",
    "informative", "sigma",
)  # fmt: skip
LAST = 5  # steps that "at the end" is averaged over


def summarize(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """One JSON-able value of everything that is finished among `runs`; what is not is listed under "unfinished".

    Raises:
        ValueError: a log is damaged, or was made with other settings than the run asks for.
    """
    finished = [run for run in runs if run.finished()]
    logs = {run.name: run.rows() for run in finished}
    arms = list(dict.fromkeys(run.arm for run in runs))
    by_arm = {arm.name: [run for run in finished if run.arm == arm] for arm in arms}
    rows = [_row(by_arm[arm.name], by_arm.get(REFERENCE, []), logs) for arm in arms if by_arm[arm.name]]
    headers = [log[0] for log in logs.values()]
    return {
        "schema": SCHEMA,
        "command": command,
        "preset": dataclasses.asdict(runs[0].preset),
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "seeds": sorted({run.seed for run in runs}),
        "rows": rows,
        "curves": {
            run.name: {"arm": run.arm.name, "seed": run.seed, **{name: _curve(logs[run.name], name) for name in CURVES}}
            for run in finished
        },
        "runs": {run.name: logs[run.name][0]["config_hash"] for run in finished},
        "unfinished": [run.name for run in runs if run not in finished],
        "commits": sorted({header["commit"] for header in headers} or {git_commit()}),
        "code_hashes": sorted({header["code_hash"] for header in headers} or {code_hash()}),
        "versions": headers[0]["versions"] if headers else versions(),
        "device": headers[0]["device"] if headers else device(),
    }


def _row(runs: list[Run], reference: list[Run], logs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    arm, preset = runs[0].arm, runs[0].preset
    steps = [_steps(logs[run.name]) for run in runs]
    results = [logs[run.name][-1] for run in runs]
    first = [_evaluation(logs[run.name], 0) for run in runs]
    final = [_evaluation(logs[run.name], preset.steps) for run in runs]
    row: dict[str, Any] = {
        "arm": arm.name,
        "label": arm.label,
        "note": arm.note,
        "bits_per_weight": FORMATS[arm.fmt].bits_per_element if arm.fmt else 16.0,
        "seeds": [run.seed for run in runs],
        "problems": len(final[0]["flexible_outcomes"]),
    }
    for metric in METRICS:
        row[f"initial_{metric}"] = _accuracy(first, metric)
        row[f"final_{metric}"] = _accuracy(final, metric)
        row[f"difference_{metric}"] = None
        shared = [(run, other) for run in runs for other in reference if run.seed == other.seed]
        if shared and arm.name != REFERENCE:
            ours = [_outcomes(logs[run.name], preset.steps, metric) for run, _ in shared]
            theirs = [_outcomes(logs[other.name], preset.steps, metric) for _, other in shared]
            mean, low, high = paired_difference(ours, theirs)
            seeds = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(ours, theirs, strict=True)]
            row[f"difference_{metric}"] = {"mean": mean, "low": low, "high": high, "seeds": seeds}
    for name in ("entropy", "reward", "response_length", "strict", "flexible"):
        row[f"end_{name}"] = _mean([line[name] for log in steps for line in log[-LAST:]])
    for name in ("mismatch_kl", "mismatch_abs", "clip_fraction", "seconds", "cpu_seconds"):
        row[f"mean_{name}"] = _mean([line[name] for log in steps for line in log if line.get(name) is not None])
    row["sigma"] = [line["sigma"] for line in steps[0]]
    row["trainable_parameters"] = results[0]["trainable_parameters"]
    row["parameters"] = results[0]["parameters"]
    row["peak_memory_mb"] = max(result["peak_memory_mb"] for result in results)
    return row


def _accuracy(evaluations: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    outcomes = "".join(evaluation[f"{metric}_outcomes"] for evaluation in evaluations)
    low, high = wilson(outcomes.count("1"), len(outcomes))
    return {
        "mean": outcomes.count("1") / len(outcomes),
        "low": low,
        "high": high,
        "seeds": [evaluation[metric] for evaluation in evaluations],
    }


def _steps(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in log if row["event"] == "step"]


def _evaluation(log: list[dict[str, Any]], step: int) -> dict[str, Any]:
    return next(row for row in log if row["event"] == "evaluation" and row["step"] == step)


def _outcomes(log: list[dict[str, Any]], step: int, metric: str) -> list[int]:
    return [int(outcome) for outcome in _evaluation(log, step)[f"{metric}_outcomes"]]


def _curve(log: list[dict[str, Any]], name: str) -> list[float | None]:
    return [_rounded(row.get(name)) for row in _steps(log)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
