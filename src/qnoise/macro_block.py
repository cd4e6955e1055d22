"""Macro-block scaling: one factor f = 1 + m for 128 neighbours, and x_hat = Q(f x) / f (arXiv 2603.08713, 2605.20402).

A power-of-two block scale misses the ideal one by up to a factor of 2. The factor, one byte a macro-block, moves all
of its blocks against their powers of two:

* static: f = r / 2**floor(log2 r), r = max / amax of the macro-block, truncated to 8 bits of mantissa, where max is the
  largest value of the element. The largest of the 128 elements then lands at the top of the grid, never above it.
* searched (``scale_mode="mse"``): of f = 1, 1 + 1/16, ..., 1 + 15/16 the one of least squared error, each with the
  block scales that ``mse`` chooses for it. Squared errors ((Q(f x) / f - x) / 2**floor(log2 amax))**2, elements rounded
  to nearest whatever the final rounding, are summed in fp32 by a halving tree over the zero-padded macro-block. Equal
  errors go to the smaller factor.

``amax`` is over the finite elements; other elements count as zeros in the search. The factor is 1 where amax is 0, or
where f times amax is no finite number. A macro-block does not run over the end of a row: the last one may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import QuantSpec
from .rounding import BIAS, MANTISSA, power_of_two, round_magnitude, split_fp32
from .scales import divide, halving_sum, select_scales

_KEPT = 0xFF << (MANTISSA - 8)
"""The upper 8 of the mantissa bits of fp32."""
_CANDIDATES = 16


def macro_factors(blocks: Tensor, spec: QuantSpec) -> Tensor:
    """The factor of every block, equal within a macro-block.

    Args:
        blocks: fp32 (..., blocks, block_size), zero-padded; macro-blocks start at the first block.
        spec: with ``macro_block`` set.

    Returns:
        fp32 (..., blocks), in [1, 2).
    """
    count, size = blocks.shape[-2:]
    together = (spec.macro_block or size) // size
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, -count % together))
    groups = padded.unflatten(-2, (padded.shape[-2] // together, together))
    groups = torch.where(torch.isfinite(groups), groups, 0.0)
    peak = groups.abs().amax((-2, -1))
    factor = _searched(groups.abs(), peak, spec) if spec.scale_mode == "mse" else _static(peak, spec)
    factor = torch.where((peak > 0) & torch.isfinite(factor * peak), factor, 1.0)
    return factor.unsqueeze(-1).expand(*factor.shape, together).flatten(-2)[..., :count]


def _static(peak: Tensor, spec: QuantSpec) -> Tensor:
    one = BIAS << MANTISSA
    mantissa = (split_fp32(peak)[1] | one).view(torch.float32)  # amax / 2**floor(log2 amax)
    ratio = torch.full_like(mantissa, spec.block_format.element.max) / mantissa
    return ((ratio.view(torch.int32) & _KEPT) | one).view(torch.float32)


def _searched(magnitude: Tensor, peak: Tensor, spec: QuantSpec) -> Tensor:
    unit = power_of_two(split_fp32(peak)[0].clamp(-BIAS, BIAS))[..., None, None]
    best, chosen = torch.full_like(peak, torch.inf), torch.ones_like(peak)
    for step in range(_CANDIDATES):  # smallest factor first: it keeps a tie
        factor = torch.full_like(peak, 1 + step / _CANDIDATES)
        by = factor[..., None, None]
        raised = magnitude * by
        scale = select_scales(raised, spec).value().unsqueeze(-1)
        values = round_magnitude(divide(raised, scale), spec.block_format.element) * scale / by
        error = halving_sum(((values - magnitude) / unit).square().flatten(-2))
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, factor, chosen)
    return chosen
