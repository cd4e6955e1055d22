"""Files that are never half-written, and JSON lines whose faults are named by file and line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
"""Where committed results lie."""


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError naming file and line when the text is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise ValueError(f"{path}, line {line}: not JSON ({error}); the file is cut off or damaged") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process while the context lasts; the system gives it back if the process dies.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder} is in use by another process; wait until it ends, or stop it, or name another folder "
                "with --out"
            ) from None
        yield


def drop_half_line(path: Path) -> None:
    """Cut off half a line at the end of a file, which a process left that died while it wrote."""
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        path.write_bytes(raw[: raw.rfind(b"\n") + 1])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One object a line; blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object; file and line are named.
    """
    rows = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:
            shown = raw[:60].decode("utf-8", "replace")
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); the line reads {shown!r}. "
                "The file is cut off or damaged: restore it, or delete that line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__} where a JSON object should be")
        rows.append(row)
    return rows
