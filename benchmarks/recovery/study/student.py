"""Student's t distribution for a whole number of degrees of freedom, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache


def cdf(t: float, freedom: int) -> float:
    """P(T <= t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Raises:
        ValueError: less than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom; a t distribution has at least 1")
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd + 1, freedom, 2):  # each term is the one before, times cos^2 (k / (k + 1))
        total += term
        term *= cosine * cosine * (k / (k + 1))
    inside = (2 / math.pi) * (angle + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


@lru_cache(maxsize=512)
def quantile(share: float, freedom: int) -> float:
    """t with `cdf(t, freedom) == share`, for a share in (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"a quantile needs a share between 0 and 1, not {share}")
    if share < 0.5:
        return -quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2
