"""JSON with infinities and NaN, which JSON itself does not have: written as the strings "Infinity", "-Infinity" and
"NaN", and read back as numbers where a number is expected (`float` takes them)."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON of plain values."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(text: str) -> Any:
    """What `dumps` wrote, with strings in place of infinities and NaN.

    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
