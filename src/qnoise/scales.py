"""The scale of every block: which number each scale mode stores, and what that number multiplies.

All rules start from ``amax``, the largest magnitude of the block, in fp32: ``amax = m * 2**e``, 1 <= m <
2. ``emax`` and ``max`` are those of the element.

E8M0 scales 2**s, with s clamped to [-127, 127] and stored as the byte s + 127:

* ``floor``: s = e - emax (OCP Microscaling v1.0, section 6.3). Clips a block maximum with m > max /
  2**emax.
* ``rceil``: s = ceil(log2(amax / max)), the smallest power of two that clips nothing (NVIDIA, cuBLAS).
* ``ceil``: s = e - emax + (m > 1).
* ``even``: s = e - emax + (m >= 2 - 2**-(mantissa_bits + 1)): one up where m would round to 2.
* ``mse``: the one of floor - 1, floor and floor + 1 with the least squared error over the block.

E4M3 scales S under one fp32 divisor gs (NVFP4; arXiv 2509.25149); the block is multiplied by S / gs:

* ``two_level``: gs = 448 * 6 / amax_tensor, S = E4M3(amax / 6 * gs).
* ``single_level``: gs = 1, S = E4M3(amax / 6). Blocks with amax < 6 * 2**-6 = 0.094 have subnormal scales
  and lose precision; weights are often that small.
* ``four_over_six``: gs = 256 * 6 / amax_tensor and the one of S = E4M3(amax / 6 * gs) and S = E4M3(amax /
  6 * gs * 1.5) with the lower squared error: the maximum lands on 6 or on 4 (arXiv 2512.02010).
* ``four_over_six_mae``, ``four_over_six_absmax``: the same, with the lower sum of absolute errors, or the lower largest
  absolute error.
* ``mse``: gs as in ``two_level``; the S of least squared error among the 17 E4M3 codes within 8 of the
  code of ``two_level``, clamped to codes 1 to 126.

Errors, squared or absolute, are summed in fp32 by a halving tree over the zero-padded block (first half plus second
half, again and again), every product and sum rounded on its own, with elements rounded to nearest
whatever the final rounding. They are measured in units of the ``floor`` scale or of 1 / gs, so that they
neither overflow nor depend on a factor 2**k. Equal errors go to the larger scale. A block of zeros keeps
the scale of the plain rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formats import E4M3, ElementFormat, QuantSpec
from .rounding import BIAS, MANTISSA, power_of_two, round_magnitude, split_fp32

_FOUR_OVER_SIX = {"four_over_six": "mse", "four_over_six_mae": "mae", "four_over_six_absmax": "absmax"}
"""The modes that choose between 6 and 4 as the place of the maximum, and the error each compares."""
_LARGEST_DIVISOR = 2.0**126
"""Bound of gs, so that 1 / gs stays a normal number: reached where amax_tensor < 2688 * 2**-126."""


class Scales(NamedTuple):
    """The scales of a blocked tensor.

    Attributes:
        codes: the bytes of E8M0 or E4M3 numbers, uint8 (..., blocks), NaN where a block holds NaN or Inf.
            uint8 and not one of torch's float8 dtypes, which not every device has.
        per_tensor: the fp32 divisor gs of E4M3 scales, 0-d or (..., 1); None for E8M0.
    """

    codes: Tensor
    per_tensor: Tensor | None

    def value(self) -> Tensor:
        """What multiplies the elements of each block, fp32 (..., blocks): 2**s, or S / gs."""
        if self.per_tensor is None:
            return e8m0_value(self.codes)
        return e4m3_value(self.codes) / self.per_tensor


def finite_amax(x: Tensor) -> Tensor:
    """max |x| over the finite elements, 0-d fp32; 0 if there is none."""
    magnitude = x.abs().to(torch.float32)
    magnitude = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
    return magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())


def per_tensor_divisor(amax: Tensor, spec: QuantSpec) -> Tensor:
    """gs of ``spec`` from the amax that fixes it: fp32, of ``amax``'s shape; 1 where ``amax`` is 0."""
    if spec.scale_mode == "single_level":
        return torch.ones_like(amax)
    top = 256.0 if spec.scale_mode in _FOUR_OVER_SIX else E4M3.max
    divisor = (torch.full_like(amax, top * spec.block_format.element.max) / amax).clamp_(max=_LARGEST_DIVISOR)
    # A negative or NaN amax is a caller's error that must show: NaN everywhere.
    return divisor.masked_fill_(amax == 0, 1.0).masked_fill_(amax < 0, torch.nan)


def select_scales(blocks: Tensor, spec: QuantSpec, divisor: Tensor | None = None) -> Scales:
    """Choose the scale of every block by ``spec.scale_mode``.

    Args:
        blocks: fp32 (..., blocks, block_size), zero-padded.
        spec: format and scale mode.
        divisor: fp32 gs, 0-d or (..., 1), of a format with E4M3 scales; None for E8M0.

    Returns:
        The scales; those of blocks with NaN or Inf are NaN.
    """
    magnitude = blocks.abs()
    peak = magnitude.amax(-1)
    if divisor is None:
        return Scales(_e8m0_codes(magnitude, peak, spec), None)
    return Scales(_e4m3_codes(magnitude, peak, spec, divisor), divisor)


def e8m0_value(codes: Tensor) -> Tensor:
    """fp32 values of E8M0 bytes: 2**(byte - 127), and NaN for 255."""
    exponent = codes.to(torch.int32) - BIAS
    return torch.where(exponent > BIAS, torch.nan, power_of_two(exponent))


def e4m3_value(codes: Tensor) -> Tensor:
    """fp32 values of the bytes of non-negative E4M3 numbers; the sign bit is ignored, 127 is NaN."""
    code = codes.to(torch.int32) & 127
    field, mantissa = code >> 3, code & 7
    ladder = torch.where(field > 0, mantissa + 8, mantissa).to(torch.float32)
    return torch.where(code == 127, torch.nan, ladder * power_of_two(field.clamp(min=1) - 10))


def e4m3_code(value: Tensor) -> Tensor:
    """uint8 codes of fp32 numbers that are non-negative E4M3 numbers, or NaN."""
    subnormal = value < 2.0**-6
    # With 2**-6 added, a subnormal has the exponent field 1 and its own mantissa.
    bits = torch.where(subnormal, value + 2.0**-6, value).view(torch.int32)
    code = (bits >> (MANTISSA - 3)) - ((BIAS - 7) << 3) - 8 * subnormal.to(torch.int32)
    return torch.where(torch.isnan(value), 127, code).to(torch.uint8)


def _e8m0_codes(magnitude: Tensor, peak: Tensor, spec: QuantSpec) -> Tensor:
    element, mode = spec.block_format.element, spec.scale_mode
    exponent, mantissa = split_fp32(peak)
    exponent = exponent - element.emax
    if mode in ("rceil", "ceil", "even"):
        exponent = exponent + (mantissa + e8m0_carry(spec) >> MANTISSA)
    exponent = exponent.clamp(-BIAS, BIAS)
    if mode == "mse":
        exponent = _least_error_exponent(magnitude, exponent, element)
    return torch.where(torch.isfinite(peak), exponent + BIAS, 255).to(torch.uint8)


def e8m0_carry(spec: QuantSpec) -> int:
    """What, added to the fp32 mantissa bits of a block's amax, overflows into the exponent where the mode of ``spec``
    takes the next power of two."""
    element, mode = spec.block_format.element, spec.scale_mode
    if mode == "rceil":
        return (1 << MANTISSA) - 1 - _mantissa_bits(element.max / 2.0**element.emax)
    if mode == "ceil":
        return (1 << MANTISSA) - 1
    if mode == "even":
        return (1 << MANTISSA) - _mantissa_bits(2 - 2.0 ** -(element.mantissa_bits + 1))
    return 0


def _mantissa_bits(m: float) -> int:
    """The fp32 mantissa bits of 1 <= m < 2."""
    return round((m - 1) * 2**MANTISSA)


def _least_error_exponent(magnitude: Tensor, floor: Tensor, element: ElementFormat) -> Tensor:
    unit = magnitude / power_of_two(floor).unsqueeze(-1)
    best = torch.full_like(unit[..., 0], torch.inf)
    chosen = floor
    for step in (1, 0, -1):  # largest scale first: it keeps a tie
        candidate = (floor + step).clamp(-BIAS, BIAS)
        ratio = power_of_two(candidate - floor).unsqueeze(-1)
        error = halving_sum((round_magnitude(unit / ratio, element) * ratio - unit).square())
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, candidate, chosen)
    return torch.where(magnitude.amax(-1) > 0, chosen, floor)


def _e4m3_codes(magnitude: Tensor, peak: Tensor, spec: QuantSpec, divisor: Tensor) -> Tensor:
    element, mode = spec.block_format.element, spec.scale_mode
    # Divisor and dividend are tensors throughout: torch turns a Python number in a division into a multiplication
    # by its reciprocal (number / tensor always, tensor / number on CUDA), which is rounded twice.
    target = peak / torch.full_like(peak, element.max) * divisor
    scale = round_magnitude(target, E4M3)
    if mode in _FOUR_OVER_SIX:
        candidates = [round_magnitude(target * 1.5, E4M3), scale]
        scale = _least_error_scale(magnitude, candidates, divisor, element, _FOUR_OVER_SIX[mode])
    elif mode == "mse":
        code = e4m3_code(scale).to(torch.int32)
        candidates = [e4m3_value((code + step).clamp(1, 126)) for step in range(8, -9, -1)]
        scale = torch.where(peak > 0, _least_error_scale(magnitude, candidates, divisor, element), scale)
    return e4m3_code(torch.where(torch.isfinite(peak), scale, torch.nan))


def _least_error_scale(
    magnitude: Tensor, candidates: list[Tensor], divisor: Tensor, element: ElementFormat, norm: str = "mse"
) -> Tensor:
    """The candidate of least error per block; ``candidates`` run from the largest to the smallest."""
    chosen = candidates[0]
    best = torch.full_like(chosen, torch.inf)
    for candidate in candidates:
        scale = (candidate / divisor).unsqueeze(-1)
        rounded = round_magnitude(divide(magnitude, scale), element) * scale
        errors = ((rounded - magnitude) * divisor.unsqueeze(-1)).abs()
        if norm == "absmax":
            error = errors.amax(-1)
        else:
            error = halving_sum(errors if norm == "mae" else errors.square())
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, candidate, chosen)
    return chosen


def divide(magnitude: Tensor, scale: Tensor) -> Tensor:
    """``magnitude / scale``, and 0 where the scale is 0 (an E4M3 scale that underflowed)."""
    return torch.where(scale == 0, 0.0, magnitude / scale)


def halving_sum(values: Tensor) -> Tensor:
    """Sum over the last axis, of a power-of-two length: first half plus second half, until one is left."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
