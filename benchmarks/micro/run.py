"""Run entries: check, time, measure memory, print, and append to the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import micro
from benchmarks.environment import environment, machine, place
from benchmarks.micro.measure import Case, check, measure
from benchmarks.micro.peak import measure_peak

SCHEMA = 2
QUICK_ROUNDS = 5


def run(
    names: Sequence[str],
    *,
    only: Mapping[str, str] | None = None,
    quick: bool = False,
    out: Path | None = None,
    command: str = "",
    entry: Callable[[str], micro.Entry] = micro.entry,
    stream: TextIO | None = None,
) -> None:
    """Run the entries, and append one JSON line a case to `out`/<operation>.jsonl as soon as it is done.

    Args:
        names: which entries, in this order.
        only: parameters by name, as text: other cases are left out. None for all cases.
        quick: small sizes and at most 5 rounds: whether everything runs and is right, not how fast.
        out: the folder; None to write nothing.
        command: what the user typed, kept beside the results.
        entry: name to entry.
        stream: where the table is printed; None for the standard output.

    Raises:
        GateError: a case gave a wrong result. It and what follows it are not timed.
        ValueError: an unknown name; `only` leaves no case.
    """
    stream = stream or sys.stdout
    entries = [(name, entry(name)) for name in names]
    where = environment() | machine()
    threads = torch.get_num_threads()
    seen: set[str] = set()
    done = 0
    places = {kind: place(kind) for kind in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]}
    print(f"torch {where['versions']['torch']}", file=stream)
    for each in places.values():
        print(f"{each['device']}: {each['backend']}", file=stream)
    try:
        for name, module in entries:
            print(f"\n{name}: {module.TITLE}", file=stream, flush=True)
            for index, case in enumerate(module.cases(quick)):
                seen |= {f"{key}={value}" for key, value in case.parameters.items()}
                if any(str(case.parameters.get(key)) != value for key, value in (only or {}).items()):
                    continue
                done += 1
                check(case)
                rows = measure(case, QUICK_ROUNDS if quick else None)
                if case.memory_unit is not None:
                    _add_peaks(rows, case, name, index, quick)
                print(*text(case, rows), sep="\n", file=stream, flush=True)
                line = {
                    "schema": SCHEMA,
                    "benchmark": name,
                    "operation": case.operation,
                    "parameters": case.parameters,
                    "threads": case.parameters.get("threads", 1),
                    "quick": quick,
                    "rows": rows,
                    "command": command,
                    "environment": where | places[case.device],
                }
                if out is not None:
                    _append(out / f"{case.operation}.jsonl", line)
    finally:
        torch.set_num_threads(threads)
    if only and not done:
        asked = " ".join(f"{key}={value}" for key, value in only.items())
        raise ValueError(f"no case has {asked}; there are: {', '.join(sorted(seen))}")


def _add_peaks(rows: list[dict[str, Any]], case: Case, entry: str, index: int, quick: bool) -> None:
    for row, contender in zip(rows, case.contenders, strict=True):
        if "absent" in row or case.memory_unit is None:
            continue
        try:
            row["peak_bytes"] = measure_peak(entry, index, contender.name, quick)
            row["peak_per_unit"] = row["peak_bytes"] / case.memory_unit
        except RuntimeError as error:
            if not contender.foreign:
                raise
            row["absent"] = str(error).splitlines()[-1]


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def text(case: Case, rows: list[dict[str, Any]]) -> list[str]:
    """The lines a user sees for a case."""
    lines = [f"  {case.title}"]
    for row in rows:
        cells = [f"    {row['contender']:<28}"]
        if "absent" in row:
            cells.append(f"not run: {row['absent']}")
        if "wall_ms" in row:
            wall, ratio = row["wall_ms"], row["ratio"]
            cells.append(f"{wall['median']:10.3f} ms ({wall['p20']:.3f} to {wall['p80']:.3f})")
            cells.append(f"{ratio['median']:8.2f}x")
            if ratio["low"] is not None:
                cells.append(f"[{ratio['low']:.2f}, {ratio['high']:.2f}]")
        if "share_of_bound" in row:
            cells.append(f"{row['gb_per_s']:.1f} GB/s, {row['share_of_bound']:.2f} of the bound")
        if "peak_per_unit" in row:
            cells.append(f"peak {row['peak_per_unit']:.2f} per unit")
        cells += [f"{key} {value}" for key, value in row.get("figures", {}).items()]
        lines.append("  ".join(cells))
    return lines
