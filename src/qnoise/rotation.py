"""The Hadamard transform of blocks, in one fixed order of operations.

H has entries +-1 / sqrt(n) in Sylvester's order, H = H' = H^-1 in real numbers. It is computed as a butterfly: for h =
1, 2, 4, ..., n / 2 the elements whose index differs in the bit h become (a + b, a - b), each sum rounded to fp32; then
every element is multiplied once by fp32(1 / sqrt(n)). So all backends give the same bits. For n = 16 the factor is
exactly 1/4; for n = 32 it is rounded. Turning a tensor there and back changes it by a few units in the last place.

A block with NaN has NaN in every element afterwards, one with Inf has Inf or NaN in every element. Sums can overflow
where a magnitude is above FLT_MAX / n (about 1e37): then elements of the block become Inf or NaN. The sign of a zero is
that of the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(blocks: Tensor) -> Tensor:
    """The transform along the last axis.

    Args:
        blocks: fp32 (..., n), n a power of two.

    Returns:
        A new fp32 tensor of the same shape.
    """
    length = blocks.shape[-1]
    turned = blocks
    half = 1
    while half < length:
        pairs = turned.unflatten(-1, (length // (2 * half), 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        turned = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return turned * (1 / math.sqrt(length))


def positive_nan(blocks: Tensor) -> Tensor:
    """``blocks`` with NaN in one form: the sign of one that came out of a sum depends on the machine, and codes keep
    the sign of their element."""
    return torch.where(torch.isnan(blocks), torch.nan, blocks)
