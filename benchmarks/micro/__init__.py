"""Microbenchmarks: one file an operation; `python -m benchmarks run` times them.

To add one: a file beside this one with `TITLE: str` (what is compared, in one line) and
`cases(quick: bool) -> Iterator[Case]` (see `measure.py`), and its name in `ENTRIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Protocol, cast

from benchmarks.micro.measure import Case

ENTRIES = ("fake_quantize", "pack", "norm", "modules", "scan", "rl_log_probs", "rl_dapo_loss", "rl_rollout", "cuda")
"""The names of the entries, in the order they run and are shown."""


class Entry(Protocol):
    """What an entry's file holds."""

    TITLE: str

    def cases(self, quick: bool) -> Iterator[Case]:
        """The cases, one by one; `quick` asks for sizes that take a second or two."""


def entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ValueError: no entry is called so, or its file is not there.
    """
    if name not in ENTRIES:
        raise ValueError(f"no benchmark is called {name!r}; there are: {', '.join(ENTRIES)}")
    module = f"{__name__}.{name}"
    try:
        return cast(Entry, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"benchmarks/micro/{name}.py is listed in ENTRIES but is not there") from error
