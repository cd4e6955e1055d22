"""Names that must exist: found, or refused with what there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qnoise.spelling import nearest


def find(what: str, name: str, table: dict[str, Any]) -> Any:
    """`table[name]`, or a ValueError with what there is."""
    if name not in table:
        raise ValueError(f"no {what} {name!r}{hint(name, table)}; there are {', '.join(table)}")
    return table[name]


def refuse(owner: str, field: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"{owner}: {field} is {value!r}; it must be one of {', '.join(allowed)}{hint(str(value), allowed)}"
        )


def hint(name: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?", where a name is near."""
    near = nearest(name, known)
    return f", did you mean {near!r}?" if near else ""
