"""Tables of the committed microbenchmark results, and the goals beside the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.files import RESULTS, read_jsonl

Line = dict[str, Any]
"""One case as it stands in a result file."""


def latest(operation: str, folder: Path | None = None) -> list[Line]:
    """The newest full (not `--quick`) line of each case of an operation, in the order the cases first appeared; none
    if it was not measured.

    Raises:
        ValueError: a line of the file is damaged, or of a schema this cannot read.
    """
    path = (folder or RESULTS) / f"{operation}.jsonl"
    if not path.is_file():
        return []
    found: dict[str, Line] = {}
    for line in read_jsonl(path):
        if line.get("schema") != 2:
            raise ValueError(f"{path}: a line of schema {line.get('schema')!r}; this reads schema 2")
        if not line["quick"]:
            found[json.dumps(line["parameters"], sort_keys=True)] = line
    return list(found.values())


def row(line: Line, contender: str) -> Line | None:
    """The row of a contender, None if it is not in the case or did not run."""
    for each in line["rows"]:
        if each["contender"] == contender and "absent" not in each:
            return dict(each)
    return None


def where(lines: Iterable[Line]) -> str:
    """Command, versions, machine and commits of the lines; what differs in nothing but `--only` or the commit is said
    once."""
    sets: dict[tuple[str, str], tuple[dict[str, None], bool]] = {}
    for line in lines:
        environment = line["environment"]
        command, only, _ = line["command"].partition(" --only")
        place = (
            f"torch {environment['versions']['torch']}; {environment['device']}, "
            f"{environment['cores']} cores; {environment['backend'].partition(' (')[0]}"
        )
        commits, some = sets.get((command, place), ({}, False))
        commits[f"{environment['commit'][:12]}{'+changes' * environment['commit'].endswith('+changes')}"] = None
        sets[command, place] = commits, some or bool(only)
    return "; and ".join(
        f"`{command}`{', parts of it with `--only`' * some}; {place}; commit {', '.join(commits)}"
        for (command, place), (commits, some) in sets.items()
    )


def number(value: float) -> str:
    """Three figures, and no fewer than the whole part has."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def times(found: Line | None) -> str:
    """`1.23 [1.20, 1.26]`, the ratio with its 95 % interval; its 20th to 80th percentile where rounds were too few."""
    if found is None or "ratio" not in found:
        return "–"
    ratio = found["ratio"]
    if ratio["low"] is None:
        return f"{number(ratio['median'])} ({found['rounds']} round{'s' * (found['rounds'] > 1)})"
    return f"{number(ratio['median'])} [{number(ratio['low'])}, {number(ratio['high'])}]"


def milliseconds(found: Line | None) -> str:
    return "–" if found is None or "wall_ms" not in found else number(found["wall_ms"]["median"])


def cases(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Any operation as one table: a row for each contender of each case, a column for each parameter that varies."""
    names = list(dict.fromkeys(name for line in lines for name in line["parameters"]))
    varying = [name for name in names if len({str(line["parameters"].get(name)) for line in lines}) > 1]
    rows = [each for line in lines for each in line["rows"]]
    firsts = {line["rows"][0]["contender"] for line in lines}
    unit = f"times {firsts.pop()}" if len(firsts) == 1 else "times the first"
    shown: dict[str, Callable[[Line], str]] = {"ms": milliseconds, unit: times}
    if not any("ratio" in each for each in rows):
        shown = {}
    if any("share_of_bound" in each for each in rows):
        shown["GB/s"] = lambda each: number(each["gb_per_s"]) if "gb_per_s" in each else "–"
        shown["share of the bound"] = lambda each: number(each["share_of_bound"]) if "share_of_bound" in each else "–"
    if any("peak_per_unit" in each for each in rows):
        shown["peak memory"] = lambda each: number(each["peak_per_unit"]) if "peak_per_unit" in each else "–"
    for name in dict.fromkeys(key for each in rows for key in each.get("figures", {})):
        shown[name] = lambda each, name=name: plain(each.get("figures", {}).get(name, "–"))  # type: ignore[misc]
    table = []
    for line in lines:
        for each in line["rows"]:
            parameters = [plain(line["parameters"].get(name, "–")) for name in varying]
            if "absent" in each:
                cells = [f"not run: {each['absent']}"] + ["–"] * (len(shown) - 1)
            else:
                cells = [show(each) for show in shown.values()]
            table.append([*parameters, each["contender"], *cells])
    return [*varying, "", *shown], table


def grid(lines: Sequence[Line], cell: Callable[[Line], str]) -> tuple[list[str], list[list[str]], list[str]]:
    """A row for each contender, a column for each case; and a sentence for each contender that did not run."""
    names = list(dict.fromkeys(name for line in lines for name in line["parameters"]))
    varying = [name for name in names if len({str(line["parameters"].get(name)) for line in lines}) > 1]
    heads = [", ".join(plain(line["parameters"].get(name)) for name in varying) for line in lines]
    table, notes = [], []
    for name in dict.fromkeys(each["contender"] for line in lines for each in line["rows"]):
        cells = []
        for line, head in zip(lines, heads, strict=True):
            found = next((each for each in line["rows"] if each["contender"] == name), None)
            if found is not None and "absent" in found:
                notes.append(f"{name}, {head}: {found['absent']}.")
            cells.append("–" if found is None else "not run" if "absent" in found else cell(found))
        table.append([name, *cells])
    return ["", *heads], table, notes


def plain(value: Any) -> str:
    """A parameter or figure as it is read: shapes with a cross, numbers with three figures."""
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return number(value) if isinstance(value, float) else str(value)


def constants(lines: Sequence[Line]) -> str:
    """The parameters that are the same in all lines, as `name value`."""
    names = list(dict.fromkeys(name for line in lines for name in line["parameters"]))
    same = [
        f"{name} {plain(lines[0]['parameters'].get(name))}"
        for name in names
        if len({str(line["parameters"].get(name)) for line in lines}) == 1
    ]
    return ", ".join(same)


@dataclass(frozen=True)
class Goal:
    """A figure that was to be reached.

    Attributes:
        text: the goal in words.
        operation: where the figure is.
        limit: it is to be at most this, or at least where `least`.
        figure: the figure of a line; None for a line it does not concern.
        least: whether more is better.
    """

    text: str
    operation: str
    limit: float
    figure: Callable[[Line], float | None]
    least: bool = False

    def worst(self, lines: Sequence[Line]) -> float | None:
        """The worst figure among the lines; None if there is none."""
        figures = [value for line in lines if (value := self.figure(line)) is not None]
        return (min if self.least else max)(figures, default=None)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit


@dataclass(frozen=True)
class Pick:
    """The figure of one contender in the lines whose parameters are as given.

    Attributes:
        contender: whose.
        parameters: a value, or a tuple of the values allowed, for each parameter that matters.
        key: the path of the figure in the row, with dots: "ratio.median", "ratio.high", "peak_per_unit", ...
        over: the figure of this contender divided by that of `contender` instead: how many times faster `contender` is.
    """

    contender: str
    parameters: dict[str, Any] = field(default_factory=dict)
    key: str = "ratio.median"
    over: str | None = None

    def __call__(self, line: Line) -> float | None:
        for name, allowed in self.parameters.items():
            if line["parameters"].get(name) not in (allowed if isinstance(allowed, tuple) else (allowed,)):
                return None
        value = self._of(row(line, self.contender))
        if self.over is None or value is None:
            return value
        other = self._of(row(line, self.over))
        return None if other is None else other / value

    def _of(self, found: Any) -> float | None:
        for name in self.key.split("."):
            found = None if found is None else found.get(name)
        return None if found is None else float(found)


def goals(listed: Sequence[Goal], folder: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """One row a goal: the limit, the worst figure it concerns, and whether it was met."""
    table = []
    for goal in listed:
        value = goal.worst(latest(goal.operation, folder))
        limit = f"{'at least' if goal.least else 'at most'} {number(goal.limit)}"
        if value is None:
            table.append([goal.text, limit, "not measured", "–"])
        else:
            table.append([goal.text, limit, number(value), "yes" if goal.met(value) else "**missed**"])
    return ["", "goal", "measured", "met"], table
