"""Outcomes of problems, right or wrong, in little room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(outcomes: Sequence[bool]) -> str:
    """Outcomes as hexadecimal digits, four problems each, the first in the highest bit; filled up with zeros."""
    bits = "".join("1" if right else "0" for right in outcomes)
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))


def unpack(digits: str, count: int) -> np.ndarray:
    """The outcomes that `pack` wrote: (count,) uint8 of 0 and 1."""
    padded = digits + "0" * (len(digits) % 2)
    return np.unpackbits(np.frombuffer(bytes.fromhex(padded), np.uint8))[:count]
