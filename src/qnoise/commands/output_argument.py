"""Where a command writes: `--out`, checked before the work and not after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def check_files(paths: Iterable[Path], suffixes: Sequence[str]) -> None:
    """Make the folders that the files go to.

    Raises:
        ValueError: another suffix, or a folder of that name.
    """
    for path in paths:
        if path.suffix not in suffixes:
            raise ValueError(f"--out {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)


def check_new_folder(option: str, path: Path) -> None:
    """
    Raises:
        FileExistsError: there is something in it, or it is a file.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{option} {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{option} {path}: the folder is not empty; name another")
