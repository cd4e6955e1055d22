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
  of x_hat. NVFP4 clips where its block scale was rounded down.
* ``max_abs_error`` = max |e|, in the unit of x.

The figures do not depend on the scale of the tensor (``max_abs_error`` follows it). Published scans add
1e-10 to |x| in the relative error and count the deadzone above 1e-10 only; on tensors of larger elements
that is the same. NaN or Inf in x or x_hat gives NaN for the figures that contain it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import QuantSpec, as_spec
from .reference import block_scales


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
    for name, tensor in (("x", x), ("x_hat", x_hat)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if x.shape != x_hat.shape or x.device != x_hat.device:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device}, x_hat is {tuple(x_hat.shape)} on {x_hat.device}; "
            "they must have the same shape and device"
        )
    with torch.no_grad():
        reference, error = x.double(), x_hat.double() - x.double()
        scales = block_scales(x, spec, axis=axis, amax=amax).double()
        size, peak = reference.abs(), spec.block_format.element.max
        # fp64 squares of fp64 tensors may overflow; dividing by the largest magnitude keeps the ratio.
        unit = torch.cat([size.flatten(), error.abs().flatten(), size.new_zeros(1)]).max()
        unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1.0)
        signal, noise = ((t / unit).square().sum().item() for t in (reference, error))
        relative = torch.where(error == 0, 0.0, error.abs() / size)
        count = max(x.numel(), 1)
        return {
            "sqnr_db": _decibels(signal, noise),
            "relative_rms": math.sqrt(_ratio(noise, signal)),
            "mean_relative_error": relative.sum().item() / count,
            "deadzone": ((reference != 0) & (x_hat == 0)).sum().item() / count,
            "clipped": (size > peak * scales).sum().item() / count,
            "max_abs_error": error.abs().max().item() if x.numel() else 0.0,
        }


def _ratio(part: float, whole: float) -> float:
    """``part / whole`` with 0 / 0 = 0 and part / 0 = inf."""
    if whole == 0:
        return math.inf if part else 0.0
    return part / whole


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)
