"""The result files of the study, read and checked: `benchmarks/results/recovery/STAGE.jsonl`, a line for each run.

Whatever does not belong together is refused by name. Rows of a stage come from one code and one set of settings an arm;
finals are measured on the stream "test", what settings are chosen by on "dev"; a run stands in a file once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.files import RESULTS, read_jsonl
from benchmarks.recovery.choices import hint
from benchmarks.recovery.outcomes import unpack

SCHEMA = "qnoise-recovery-1"
FOLDER = RESULTS / "recovery"
TASKS = ("words", "walks")
DEV_STAGES = ("tuning", "finalists")
STAGES = (*TASKS, "large", "arms", *DEV_STAGES)
HOWS = ("greedy", "sampled")
METRICS = {"greedy": ("flexible", "strict"), "sampled": ("flexible",)}
"""What is kept of each evaluation, problem by problem."""
ONE_LEVEL_BITS = 4.5
"""Four bits an element, and a scale of eight for sixteen of them."""

Key = tuple[str, int]
"""(checkpoint, seed): runs that share it saw the same prompts and evaluation problems."""

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str, "arm": str, "seed": int, "checkpoint": str, "config_hash": str, "code_hash": str, "commit": str,
    "versions": dict, "device": str, "command": str, "config": dict, "initial": dict, "final": dict, "curves": dict,
    "cost": dict, "bits_per_weight": (int, float), "trainable_parameters": int, "parameters": int,
    "peak_memory_mb": (int, float),
}  # fmt: skip
_PAIRED = ("task", "model", "checkpoints", "data", "split", "instruction", "max_new_tokens")
"""Fields of a preset that no arm may change, if its runs are to be compared with others."""


@dataclass(frozen=True, eq=False)
class Row:
    """One finished run; `place` says where it stands, for messages."""

    place: str
    data: dict[str, Any]

    @property
    def arm(self) -> str:
        return self.data["arm"]

    @property
    def key(self) -> Key:
        return self.data["checkpoint"], self.data["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        """The arm's own settings: "fmt", "tuning" and so on; empty where the file does not say."""
        return self.data["config"].get("arm", {})

    @property
    def preset(self) -> dict[str, Any]:
        return self.data["config"].get("preset", {})

    @property
    def bits(self) -> float:
        """Of a frozen weight. One-level NVFP4 is written into plain weights, which the model itself counts as 16."""
        return ONE_LEVEL_BITS if self.settings.get("one_level") else self.data["bits_per_weight"]

    def problems(self, when: str, how: str) -> int:
        """Number of problems of an evaluation: 0 where it was not made."""
        return self.data[when].get(how, {}).get("problems", 0)

    def outcomes(self, when: str, how: str, metric: str) -> np.ndarray:
        """(problems,) uint8: 1 where the answer was right."""
        found = self.data[when][how]
        return unpack(found[metric], found["problems"])

    def accuracy(self, when: str, how: str, metric: str = "flexible") -> float | None:
        """In percent; None where it was not measured."""
        return 100 * float(self.outcomes(when, how, metric).mean()) if self.problems(when, how) else None

    def curve(self, name: str) -> list[float | None]:
        """A value for each RL step, None where nothing was trained; empty where the run did not record it."""
        return self.data["curves"].get(name, [])


@dataclass(frozen=True, eq=False)
class Stage:
    """The runs of one file. `arms`: name -> key -> row, arms and keys in the order of the file and sorted."""

    name: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def arms(self) -> dict[str, dict[Key, Row]]:
        found: dict[str, dict[Key, Row]] = {}
        for row in self.rows:
            found.setdefault(row.arm, {})[row.key] = row
        return {arm: dict(sorted(runs.items())) for arm, runs in found.items()}

    def shared(self, arms: list[str] | tuple[str, ...]) -> list[Key]:
        """The keys that every one of these arms has run, sorted; empty where an arm is missing."""
        found = self.arms
        if not arms or any(arm not in found for arm in arms):
            return []
        return sorted(set.intersection(*(set(found[arm]) for arm in arms)))


def config_hash(config: dict[str, Any]) -> str:
    """The hash that `runs.Run` gives its settings."""
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8).hexdigest()


def stage(name: str, folder: Path = FOLDER) -> Stage:
    """The checked rows of a stage; none where its file is not there.

    Raises:
        ValueError: the name is no stage, or a line of the file is damaged or does not belong to the others.
    """
    if name not in STAGES:
        raise ValueError(f"no stage {name!r}{hint(name, STAGES)}; there are {', '.join(STAGES)}")
    path = folder / f"{name}.jsonl"
    return _stage(name, path, path.stat().st_mtime_ns if path.is_file() else None)


@lru_cache(maxsize=16)
def _stage(name: str, path: Path, changed: int | None) -> Stage:
    if changed is None:
        return Stage(name, ())
    rows: list[Row] = []
    for number, data in enumerate(read_jsonl(path), start=1):
        where = f"{path.name}, line {number}"
        rows.append(_row(where, name, data))
    _check_together(rows, tuning=name == "tuning")
    return Stage(name, tuple(rows))


def with_baselines(cell: Stage, lender: Stage, arms: Sequence[str]) -> Stage:
    """The stage, and the runs of `lender` for those `arms` that it has not run itself, where checkpoint and seed agree.

    Runs that were made by other code are not borrowed, and a note says so.

    Raises:
        ValueError: a run that would be borrowed was not evaluated on the same problems.
    """
    if not cell.rows:
        return cell
    keys = {row.key for row in cell.rows}
    wanted = [row for row in lender.rows if row.key in keys and row.arm in arms and row.arm not in cell.arms]
    code = cell.rows[0].data["code_hash"]
    same = [row for row in wanted if row.data["code_hash"] == code]
    notes = list(cell.notes)
    if left := [arm for arm in arms if any(row.arm == arm for row in wanted) and not same]:
        notes.append(
            f"Not compared with {', '.join(f'`{arm}`' for arm in left)} of the stage {lender.name}: those runs were "
            "made by other code."
        )
    _check_pairs([*cell.rows, *same])
    return Stage(cell.name, (*same, *cell.rows), tuple(notes))


def _row(where: str, stage: str, data: dict[str, Any]) -> Row:
    arm = data.get("arm")
    place = f"{where}, arm {arm!r}"
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{place}: schema {data.get('schema')!r} where {SCHEMA!r} should be; remove the line")
    for name, kind in _FIELDS.items():
        if name not in data:
            raise ValueError(f"{place}: the field {name!r} is missing; make the run again")
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise ValueError(f"{place}: {name} is {data[name]!r}, of the wrong type; make the run again")
    if data["stage"] != stage:
        raise ValueError(f"{place}: a run of the stage {data['stage']!r}; move the line to {data['stage']}.jsonl")
    found = config_hash(data["config"])
    if found != data["config_hash"]:
        raise ValueError(
            f"{place}: config_hash is {data['config_hash']}, but its config has {found}; the line was changed by "
            "hand or damaged: restore it, or make the run again"
        )
    row = Row(place, data)
    for name in ("seed", "checkpoint"):
        if name in data["config"] and data["config"][name] != data[name]:
            raise ValueError(f"{place}: {name} is {data[name]!r}, but its config has {data['config'][name]!r}")
    _check_split(row, "dev" if stage in DEV_STAGES else "test")
    _check_evaluations(row)
    _check_numbers(row)
    return row


def _check_split(row: Row, wanted: str) -> None:
    split = row.preset.get("split", wanted)
    if split != wanted:
        raise ValueError(
            f"{row.place}: measured on the stream {split!r}; settings are chosen on 'dev' (stages "
            f"{', '.join(DEV_STAGES)}), and every other table is made on 'test'"
        )


def _check_evaluations(row: Row) -> None:
    for when in ("initial", "final"):
        for how, found in row.data[when].items():
            if how not in HOWS:
                raise ValueError(f"{row.place}: no evaluation {how!r} is known; there are {', '.join(HOWS)}")
            count = found.get("problems", 0)
            if count < 1:
                raise ValueError(f"{row.place}: {when} {how} has {count} problems; there must be at least one")
            for metric in METRICS[how]:
                digits = found.get(metric)
                if not isinstance(digits, str) or len(digits) != -(-count // 4):
                    length = f"{len(digits)} digits" if isinstance(digits, str) else repr(digits)
                    raise ValueError(f"{row.place}: {when} {how} {metric} has {length} for {count} problems")
                try:
                    int(digits, 16)
                except ValueError:
                    raise ValueError(f"{row.place}: {when} {how} {metric} is not hexadecimal") from None
    if not row.problems("final", "greedy"):
        raise ValueError(f"{row.place}: there is no final greedy evaluation; make the run again")


def _check_numbers(row: Row) -> None:
    lengths = {name: len(values) for name, values in row.data["curves"].items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{row.place}: curves of different lengths: {lengths}")
    for path, value in _numbers({name: row.data[name] for name in ("curves", "cost", "initial", "final")}):
        if not math.isfinite(value):
            raise ValueError(f"{row.place}: {path} is {value}; a step that trained nothing is written as null")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, f"{path}[{index}]")
    elif isinstance(value, (int, float)):
        yield path, value


def _check_together(rows: list[Row], tuning: bool) -> None:
    seen: dict[Any, Row] = {}
    for row in rows:
        key = (row.arm, *row.key, row.data["config_hash"])
        if key in seen:
            raise ValueError(f"{row.place}: seed {row.data['seed']} stands in {seen[key].place} already; remove one")
        seen[key] = row
    if tuning:
        return
    first: dict[str, Row] = {}
    for row in rows:
        if row.data["code_hash"] != rows[0].data["code_hash"]:
            raise ValueError(
                f"{row.place}: made by the code {row.data['code_hash']}, {rows[0].place} by "
                f"{rows[0].data['code_hash']}; a stage is measured by one code: make the older runs again"
            )
        before = first.setdefault(row.arm, row)
        if differing := _differences(_shared_settings(before), _shared_settings(row)):
            raise ValueError(f"{row.place}: other settings than {before.place}: {differing}")
    _check_pairs(rows)


def _check_pairs(rows: list[Row]) -> None:
    """Rows that will be compared were asked the same problems, and start from the same weights."""
    weights: dict[str, Row] = {}
    for row in rows:
        one, other = rows[0], row
        sizes = [[each.problems(when, how) for when in ("initial", "final") for how in HOWS] for each in (one, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{row.place}: evaluated on {sizes[1]} problems (initial and final, greedy and sampled), "
                f"{one.place} on {sizes[0]}; runs are compared on the same problems only"
            )
        own = ({*one.settings.get("preset", ()), *other.settings.get("preset", ())}) - {*_PAIRED}
        presets = [{name: value for name, value in each.preset.items() if name not in own} for each in (one, other)]
        if differing := _differences(*presets):
            raise ValueError(f"{row.place}: cannot be paired with {one.place}: {differing}")
        before = weights.setdefault(row.data["checkpoint"], row)
        if differing := _differences(*({"weights": each.data["config"].get("weights")} for each in (before, row))):
            raise ValueError(f"{row.place}: another checkpoint than {before.place} under the same name: {differing}")


def _shared_settings(row: Row) -> dict[str, Any]:
    """What the runs of an arm have in common."""
    config = {name: value for name, value in row.data["config"].items() if name not in ("seed", "checkpoint")}
    config.pop("weights", None)
    return config


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "; ".join(f"{key} is {after.get(key)!r} instead of {before.get(key)!r}" for key in keys)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path, value


_WHICH_PART = re.compile(r" --(arms|seeds|workers)( [^-\s]\S*)+")
"""Options of a command that choose among a stage's runs, and do not change what a run is."""


def provenance(rows: tuple[Row, ...] | list[Row]) -> str:
    """Commands, versions, device, commit and code of these rows, in one line."""
    commands = sorted({_WHICH_PART.sub("", row.data["command"]) for row in rows})
    commits = sorted({row.data["commit"][:12] + "+changes" * ("+" in row.data["commit"]) for row in rows})
    torch = sorted({str(row.data["versions"].get("torch", "?")) for row in rows})
    parts = [
        ", ".join(f"`{command}`" for command in commands),
        f"torch {', '.join(torch)}",
        ", ".join(sorted({row.data["device"] for row in rows})),
        f"commit {', '.join(commits)}",
        f"code {', '.join(sorted({row.data['code_hash'] for row in rows}))}",
    ]
    return "; ".join(part for part in parts if part)
