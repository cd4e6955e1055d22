"""Names that were mistyped, and the ones that were meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(given: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that begins with what was given, else the one spelt most like it, else None.

    >>> nearest("mxfp8", ["mxfp4", "mxfp8_e4m3"])
    'mxfp8_e4m3'
    """
    text, names = str(given).lower(), list(known)
    beginning = [name for name in names if text and name.startswith(text)]
    return next(iter(beginning or get_close_matches(text, names, n=1, cutoff=cutoff)), None)


def check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError listing what is allowed, and the nearest of it, unless `value` is in it."""
    if value not in allowed:
        near = nearest(value, allowed)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.{hint}")
