"""Rounding of magnitudes to the grid of an element, exactly, with powers of two built out of fp32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import ElementFormat

MANTISSA = 23
"""Mantissa bits of fp32."""
BIAS = 127
"""Exponent bias of fp32 and of E8M0."""


def split_fp32(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and mantissa of non-negative fp32 numbers, exact for subnormals too.

    Returns:
        Two int32 tensors: ``e = floor(log2(m))`` and the 23 mantissa bits of ``m / 2**e - 1``. Zero gives
        an exponent below that of every fp32 number; NaN and Inf give 128.
    """
    bits = magnitude.view(torch.int32)
    subnormal = bits < 1 << MANTISSA
    # The bits of a subnormal are an integer count of 2**-149; as an fp32 number that count is normal.
    shift = BIAS + 149 * subnormal.to(torch.int32)
    bits = torch.where(subnormal, bits.to(torch.float32).view(torch.int32), bits)
    return (bits >> MANTISSA) - shift, bits & ((1 << MANTISSA) - 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in fp32, exactly, for an int32 tensor in [-127, 127] (2**-127 is subnormal)."""
    normal = (exponent + BIAS) << MANTISSA
    return torch.where(exponent < -126, 1 << (MANTISSA - 1), normal).view(torch.float32)


def round_magnitude(
    magnitude: Tensor, element: ElementFormat, rounding: str = "nearest", uniform: Tensor | None = None
) -> Tensor:
    """Round non-negative fp32 numbers to the grid of ``element``; above ``element.max`` they saturate.

    Within a binade the grid is a ladder of steps ``2**(e - mantissa_bits)``; dividing by the step is exact,
    so the only rounding is that of ``torch.round`` (ties to even; ``half_away``: ties up; ``stochastic``:
    up with the probability of the remainder). NaN stays NaN.

    Args:
        magnitude: fp32, any shape, >= 0 or NaN.
        element: the grid.
        rounding: ``"nearest"``, ``"half_away"`` or ``"stochastic"``.
        uniform: fp32 numbers in [0, 1) of the same shape; needed for ``"stochastic"`` only.

    Returns:
        fp32 tensor of the same shape.
    """
    clipped = magnitude.clamp(max=element.max)
    exponent = (clipped.view(torch.int32) >> MANTISSA) - BIAS
    # NaN has exponent 128; the upper bound keeps its step finite.
    step = power_of_two(exponent.clamp(min=element.emin, max=element.emax) - element.mantissa_bits)
    ladder = clipped / step
    if rounding == "nearest":
        return torch.round(ladder) * step
    below = torch.floor(ladder)
    remainder = ladder - below  # exact: a fraction of an fp32 number is an fp32 number
    if rounding == "half_away":
        return (below + (remainder >= 0.5)) * step
    if rounding == "stochastic" and uniform is not None:
        return (below + (uniform < remainder)) * step
    raise ValueError(f"rounding={rounding!r} is unknown, or is 'stochastic' without uniform numbers")
