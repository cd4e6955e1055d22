"""Error figures of a quantized tensor, each defined once. All are computed in fp64 and returned as floats.

With e = x_hat - x, over all elements of the tensor, zeros included:

* ``sqnr_db`` = 10 log10(sum x^2 / sum e^2), in dB. A perfect reconstruction gives +inf (that of a zero or
  empty tensor too); a zero tensor that is not reconstructed as zero gives -inf.
* ``relative_rms`` = sqrt(sum e^2 / sum x^2), the relative Frobenius error. 0 for a perfect
  reconstruction, +inf for a zero tensor that is not reconstructed as zero.
* ``mean_relative_error`` = mean of |e| / |x|, where 0 / 0 counts as 0. Every element rounded to zero
  counts 1, so it is dominated by small elements. An element that is zero and is not reconstructed as zero
  makes it +inf.
* ``deadzone`` = share of elements with x != 0 and x_hat == 0.
* ``clipped`` = share of elements with |x| > max * scale, where scale is that of their block under the
  plain quantizer of the format and max the element's largest value: a property of x and the format, not
  of x_hat. NVFP4 clips where its block scale was rounded down. With a rotation it is about the rotated x, with a
  residual about the first pass.
* ``max_abs_error`` = max |e|, in the unit of x.

The figures do not depend on the scale of the tensor (``max_abs_error`` follows it). Published scans add
1e-10 to |x| in the relative error and count the deadzone above 1e-10 only; on tensors of larger elements
that is the same. NaN or Inf in x or x_hat gives NaN for the figures that contain it.

:func:`decompose` tells the three causes of an error apart, after arXiv 2605.20402. With the ideal block scale
s* = amax / max (max the element's largest value), Q* the quantizer that uses it, and D the elements with
|x| < s* min / 2 (min the element's smallest positive value), which Q* rounds to zero:

* scale bias e_S = Q(x) - Q*(x): what the coarse block scale costs;
* deadzone e_D = Q*(x) - x = -x on D, 0 elsewhere;
* grid noise e_G = Q*(x) - x outside D, 0 on D.

They add up to the error exactly, e = e_S + e_D + e_G, and e_D and e_G are orthogonal. Where no scale is below the
ideal one (``rceil``, ``ceil``) e_D and e_S are so too, because what Q* rounds to zero Q does: then the squares add up
to |e|^2 but for one product, 2 <e_S, e_G>.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .formats import ElementFormat, QuantSpec, as_spec
from .reference import block_scales, fake_quantize, rotated_blocks, to_blocks
from .rounding import round_magnitude


def error_report(
    x: Tensor, x_hat: Tensor, fmt: str | QuantSpec, *, axis: int = -1, amax: Tensor | None = None
) -> dict[str, float]:
    """The error figures of ``x_hat`` as a reconstruction of ``x``; the module's text defines each.

    Args:
        x: the original, any shape and floating-point dtype.
        x_hat: the reconstruction, of ``x``'s shape and device.
        fmt: the format (name or spec) whose scales decide what counts as clipped.
        axis: the axis the blocks lie along.
        amax: what fixes the per-tensor scale of NVFP4, as in ``fake_quantize``: 0-d, or of ``x``'s shape with
            ``axis`` reduced to 1.

    Returns:
        ``sqnr_db``, ``relative_rms``, ``mean_relative_error``, ``deadzone``, ``clipped`` and
        ``max_abs_error``. Shares lie in [0, 1]; an empty tensor is a perfect reconstruction.

    Raises:
        TypeError: ``x`` or ``x_hat`` is not a floating-point tensor.
        ValueError: shapes or devices differ, or an unknown format.
    """
    spec = as_spec(fmt)
    _check_floating(x=x, x_hat=x_hat)
    if x.shape != x_hat.shape or x.device != x_hat.device:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device}, x_hat is {tuple(x_hat.shape)} on {x_hat.device}; "
            "they must have the same shape and device"
        )
    with torch.no_grad():
        reference, error = x.double(), x_hat.double() - x.double()
        size = reference.abs()
        # fp64 squares of fp64 tensors may overflow; dividing by the largest magnitude keeps the ratio.
        unit = torch.cat([size.flatten(), error.abs().flatten(), size.new_zeros(1)]).max()
        unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1.0)
        signal, noise = ((t / unit).square().sum().item() for t in (reference, error))
        relative = torch.where(error == 0, 0.0, error.abs() / size)
        count = max(x.numel(), 1)
        return {
            "sqnr_db": decibels(signal, noise),
            "relative_rms": math.sqrt(_ratio(noise, signal)),
            "mean_relative_error": relative.sum().item() / count,
            "deadzone": ((reference != 0) & (x_hat == 0)).sum().item() / count,
            "clipped": _clipped(x, spec, axis, amax) / count,
            "max_abs_error": error.abs().max().item() if x.numel() else 0.0,
        }


def _clipped(x: Tensor, spec: QuantSpec, axis: int, amax: Tensor | None) -> float:
    """How many elements exceed the largest value of their block."""
    if spec.rotation is not None:
        x = rotated_blocks(x, spec, axis).flatten(-2)
        amax = amax if amax is None or amax.ndim == 0 else amax.movedim(axis, -1)
        spec, axis = replace(spec, rotation=None), -1
    scales = block_scales(x, spec, axis=axis, amax=amax).double()
    return (x.double().abs() > spec.block_format.element.max * scales).sum().item()


class ErrorParts(NamedTuple):
    """What :func:`split_error` gives, each of the shape of the blocks.

    Attributes:
        scale_bias, deadzone, grid: the parts of the error.
        dead: bool, the elements that the ideal scale rounds to zero.
    """

    scale_bias: Tensor
    deadzone: Tensor
    grid: Tensor
    dead: Tensor


def split_error(blocks: Tensor, blocks_hat: Tensor, element: ElementFormat) -> ErrorParts:
    """The three parts of the error of quantized blocks; the module's text defines each.

    Args:
        blocks: fp32 (..., block_size); a short block may be padded with zeros.
        blocks_hat: Q(x), of the same shape.
        element: the element of the format, whose rounding to nearest Q* uses.

    Returns:
        fp32 tensors; those of a block with NaN or Inf are NaN. Of zeros all are zero.
    """
    size = blocks.abs()
    peak = size.amax(-1, keepdim=True)
    ideal = peak / torch.full_like(peak, element.max)
    unit = torch.where(ideal > 0, size / ideal, 0.0)
    rounded = torch.copysign(round_magnitude(unit, element) * ideal, blocks)
    smallest = 2.0 ** (element.emin - element.mantissa_bits)
    dead = unit < smallest / 2
    # Q* is zero where `dead`, so that Q*(x) - x is one expression for both parts.
    loss = rounded - blocks
    return ErrorParts(blocks_hat - rounded, torch.where(dead, loss, 0.0), torch.where(dead, 0.0, loss), dead)


def decompose(x: Tensor, fmt: str | QuantSpec, *, axis: int = -1, amax: Tensor | None = None) -> dict[str, float]:
    """How much of the error of ``Q(x)`` is scale bias, deadzone and grid noise; the module's text defines each.

    On gaussian data in MXFP4 about 1.73, 0.02 and 0.73 of |e|^2 with a cosine of -0.66: much of the scale bias and of
    the grid noise cancel.

    Args:
        x: any shape and floating-point dtype; computed in fp32 and summed in fp64.
        fmt: a name or a spec. A name of a format with E8M0 scales stands for its ``rceil`` mode, in which deadzone and
            scale bias are orthogonal; a spec is taken as it is. Rounding to nearest only.
        axis: the axis the blocks lie along.
        amax: what fixes the per-tensor scale of NVFP4, as in ``fake_quantize``.

    Returns:
        ``scale_bias``, ``deadzone`` and ``grid``: |part|^2 / |e|^2, all 0 where there is no error. ``cosine``: between
        scale bias and grid noise; ``cosine_deadzone``: between scale bias and deadzone, 0 for ``rceil`` and ``ceil``.
        The three shares, 2 cosine sqrt(scale_bias grid) and 2 cosine_deadzone sqrt(scale_bias deadzone) add up to 1.
        ``dead``: share of the elements in the deadzone of the ideal scale. ``inflation``: mean over the blocks that
        are not zero of log2(s / s*), in octaves; -inf where a block scale underflows to 0.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: an unknown format; a spec that does not round to nearest, or that has a rotation or a residual:
            the parts are about one pass in the basis of ``x``.
    """
    spec = as_spec(fmt)
    if isinstance(fmt, str) and spec.block_format.scale == "e8m0":
        spec = QuantSpec(fmt, "rceil")
    _check_floating(x=x)
    if spec.rounding != "nearest":
        raise ValueError(
            f"{spec} rounds {spec.rounding!r}; the parts are defined for rounding to nearest: leave rounding out"
        )
    if spec.rotation is not None or spec.residual is not None:
        what = "rotation" if spec.rotation is not None else "residual"
        raise ValueError(
            f"{spec}: the parts are about one pass in the basis of x; leave {what} out"
            + (" and decompose qnoise.functional.rotate(x, spec)" if what == "rotation" else "")
        )
    with torch.no_grad():
        blocks, blocks_hat, scales = (
            to_blocks(t, axis, spec)
            for t in (x, fake_quantize(x, spec, axis=axis, amax=amax), block_scales(x, spec, axis=axis, amax=amax))
        )
        parts = split_error(blocks, blocks_hat, spec.block_format.element)
        peak = blocks.abs().amax(-1)
        ideal = (peak / torch.full_like(peak, spec.block_format.element.max)).double()
        octaves = torch.log2(scales[..., 0].double()[peak != 0] / ideal[peak != 0])
        # The largest magnitude as the unit: squares neither overflow nor vanish.
        unit = torch.where(torch.isfinite(peak), peak, 0.0).amax().double() if peak.numel() else peak.new_ones(())
        unit = torch.where(unit > 0, unit, 1.0)
        bias, dead, grid = (part.double() / unit for part in parts[:3])
        error = (blocks_hat.double() - blocks.double()) / unit
        return shares(
            error.square().sum().item(), bias.square().sum().item(), dead.square().sum().item(),
            grid.square().sum().item(), (bias * grid).sum().item(), (bias * dead).sum().item(),
        ) | {
            # Padding is in the deadzone of its block as far as `dead` knows; it is no element.
            "dead": (parts.dead & (blocks != 0)).sum().item() / max(1, x.numel()),
            "inflation": octaves.mean().item() if octaves.numel() else 0.0,
        }  # fmt: skip


def shares(error: float, bias: float, dead: float, grid: float, bias_grid: float, bias_dead: float) -> dict[str, float]:
    """The shares and cosines of :func:`decompose` from sums of squares and products."""
    return {
        "scale_bias": _ratio(bias, error),
        "deadzone": _ratio(dead, error),
        "grid": _ratio(grid, error),
        "cosine": _ratio(bias_grid, math.sqrt(bias * grid)),
        "cosine_deadzone": _ratio(bias_dead, math.sqrt(bias * dead)),
    }


def _check_floating(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")


def _ratio(part: float, whole: float) -> float:
    """``part / whole`` with 0 / 0 = 0 and part / 0 = inf."""
    if whole == 0:
        return math.inf if part else 0.0
    return part / whole


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares; +inf without noise, -inf with noise alone."""
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)
