"""Run a stage of the study, and keep a line of results for every run that is done.

Logs and checkpoints lie in a working folder; what is reported is `benchmarks/results/recovery/STAGE.jsonl`, to which a
line is added as soon as a run ends. Runs that have a line are not done again, so a stage can be stopped at any moment.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.files import drop_half_line, read_jsonl
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.outcomes import pack
from benchmarks.recovery.runner import Outcome, run_all
from benchmarks.recovery.runs import Run
from benchmarks.recovery.stages import QUICK, Stage
from benchmarks.recovery.study.rows import METRICS, SCHEMA

CURVES = (
    "reward", "flexible", "entropy", "mismatch_kl", "clip_fraction", "grad_norm", "response_length", "truncated",
    "samples", "sigma",
)  # fmt: skip


def runs_of(stage: Stage, folder: Path, *, quick: bool = False) -> list[Run]:
    """All runs of a stage, seed by seed: whenever it is stopped, the arms have the same seeds but for the last."""
    preset = stage.preset.changed(**QUICK) if quick else stage.preset
    arms = [_short(arm) for arm in stage.arms] if quick else stage.arms
    seeds = stage.seeds[:1] if quick else stage.seeds
    return [Run(preset, arm, seed, folder) for seed in seeds for arm in arms]


def do(stage: Stage, runs: Sequence[Run], results: Path, *, workers: int, command: str) -> Outcome:
    """Do those of the runs that have no line in `results`, and write their lines.

    Raises:
        ValueError: a line of an arm of this stage was made with other settings or by other code; it is named.
    """
    kept = _kept(results)
    by_name = {run.name: run for run in runs}
    for name, line in kept.items():
        if (run := by_name.get(name)) is None:
            continue
        if line["config_hash"] != run.config_hash:
            raise ValueError(f"{results}: {name} was run with other settings; delete its line to run it again")
        if line["code_hash"] != code_hash():
            raise ValueError(
                f"{results}: {name} was run by other code ({line['code_hash']}); delete its line, or the file"
            )

    def keep(run: Run) -> None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(run, stage.name, command), ensure_ascii=False) + "\n")

    todo = [run for run in runs if run.name not in kept]
    return run_all(todo, workers=workers, resume=True, on_done=keep)


def line_of(run: Run, stage: str, command: str) -> dict[str, Any]:
    """The line of a finished run, from its log."""
    rows = run.rows()
    header, result = rows[0], rows[-1]
    steps = [row for row in rows if row["event"] == "step"]
    tokens = sum(row["samples"] * row["response_length"] for row in steps)
    trained = sum(row["trained_samples"] * row["response_length"] for row in steps)
    return {
        "schema": SCHEMA,
        "stage": stage,
        "run": run.name,
        "arm": run.arm.name,
        "label": run.arm.label,
        "seed": run.seed,
        "checkpoint": Path(run.model_path).name,
        "config_hash": run.config_hash,
        "code_hash": code_hash(),
        **{name: header[name] for name in ("commit", "versions", "device")},
        "command": command,
        "config": run.config,
        "initial": _evaluations(rows, 0),
        "final": _evaluations(rows, run.preset.steps),
        "curves": {name: [_rounded(row.get(name)) for row in steps] for name in CURVES},
        "cost": {
            "prepare_seconds": round(result["prepare_seconds"], 3),
            "prepare_tokens": result["prepare_tokens"],
            "step_seconds": round(sum(row["cpu_seconds"] for row in steps) / len(steps), 4),
            "rollout_tokens": round(tokens),
            "train_tokens": round(trained),
            "cpu_seconds": round(result["cpu_seconds"], 2),
        },
        **{name: result[name] for name in ("bits_per_weight", "trainable_parameters", "parameters", "peak_memory_mb")},
    }


@cache
def code_hash() -> str:
    """Hash of what `benchmarks.recovery.train` imports of this benchmark, without comments and docstrings.

    Once for a process: its runs are those of the code it started with. The library is not in it: its versions and the
    commit are in every line, and its tests hold its numbers.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in _imported("benchmarks.recovery.train"):
        digest.update(path.name.encode() + b"\0" + ast.dump(_bare(ast.parse(path.read_text("utf-8")))).encode() + b"\0")
    return digest.hexdigest()


def _imported(module: str) -> list[Path]:
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in found or not path.is_file():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks.recovery"):
                todo += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [found[name] for name in sorted(found)]


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return tree


def _kept(results: Path) -> dict[str, dict[str, Any]]:
    """Run -> its line."""
    if not results.is_file():
        return {}
    drop_half_line(results)
    return {line["run"]: line for line in read_jsonl(results)}


def _evaluations(rows: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    found = {}
    for event, how in (("evaluation", "greedy"), ("sampled evaluation", "sampled")):
        for row in rows:
            if row["event"] == event and row["step"] == step:
                found[how] = {
                    "problems": len(row["flexible_outcomes"]),
                    **{name: _packed(row[f"{name}_outcomes"]) for name in METRICS[how]},
                    "length": round(row["response_length"], 2),
                }
    return found


def _packed(digits: str) -> str:
    return pack([digit == "1" for digit in digits])


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _short(arm: Arm) -> Arm:
    """The arm without what `QUICK` sets, and with little distillation."""
    preset = {name: value for name, value in arm.preset.items() if name != "steps"}
    adapter = dataclasses.replace(arm.adapter, steps=min(arm.adapter.steps, 2), batch=8)
    return dataclasses.replace(arm, preset=preset, adapter=adapter)
