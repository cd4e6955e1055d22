"""Outcomes of problems, right or wrong, in little room."""

from __future__ import annotations

from collections.abc import Sequence


def pack(outcomes: Sequence[bool]) -> str:
    """Outcomes as hexadecimal digits, four problems each, the first in the highest bit; filled up with zeros."""
    bits = "".join("1" if right else "0" for right in outcomes)
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))


def unpack(digits: str, count: int) -> list[int]:
    """The outcomes that `pack` wrote, as 0 and 1."""
    return [int(bit) for digit in digits for bit in f"{int(digit, 16):04b}"][:count]
