"""Quantize and dequantize in one pass over the tensor."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantSpec
from .launch import WARPS, layout, quantizer_arguments, signed64
from .rounding import as_bits, as_float, larger, round_units
from .scales import block_scales, units

_TILE = 2048  # elements of a program: two or four 16-byte loads for each thread


def fake_quantize_rows(
    x: Tensor, spec: QuantSpec, divisor: Tensor | None, seed: tuple[int, int] | None, out: Tensor
) -> None:
    """Write the fake-quantized ``x`` to ``out``; bits as in ``qnoise.reference``.

    Args:
        x: (R, K) contiguous, fp64, fp32, bf16 or fp16, on the GPU; blocks along K.
        spec: format, scale mode and rounding.
        divisor: fp32 gs, 0-d or (R,) contiguous; None for E8M0 formats.
        seed: (seed, offset) for stochastic rounding, unused otherwise.
        out: of ``x``'s shape and dtype, contiguous; may be ``x``.
    """
    rows, columns = x.shape
    cut = layout(rows, columns, spec.block_format.block_size, divisor, _TILE)
    if not x.numel():
        return
    key, offset = seed or (0, 0)
    with torch.cuda.device_of(x):
        _kernel[cut.grid](
            x,
            out,
            divisor,
            cut.columns,
            signed64(key),
            signed64(offset),
            BLOCKS=cut.tile_blocks,
            ONE_ROW=cut.one_row,
            PER_ROW=divisor is not None and divisor.ndim == 1,
            **quantizer_arguments(spec),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _kernel(
    x_pointer,
    out_pointer,
    divisor_pointer,
    columns,
    seed: tl.int64,
    offset: tl.int64,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PER_ROW: tl.constexpr,
    E4M3: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BUMP: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.cast(0 if ONE_ROW else tl.program_id(0), tl.int64)
    first = tl.program_id(0 if ONE_ROW else 1).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    column = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = column < columns - first
    start = row * columns + first
    x = tl.load(x_pointer + start + column, mask=inside, other=0.0).to(tl.float32)
    divisor = 1.0
    if E4M3:
        divisor = tl.load(divisor_pointer + row) if PER_ROW else tl.load(divisor_pointer)
    magnitude = tl.abs(x)
    peak = tl.reduce(magnitude, 1, larger)
    value, byte = block_scales(magnitude, peak, divisor, SCALE_MODE, E4M3, BUMP, MANTISSA, EMIN, EMAX, MAX)
    u = units(magnitude, value, byte, E4M3, ROUNDING, MANTISSA, MAX)
    # A 16-bit number divided by a power of two keeps its few bits.
    SHORT: tl.constexpr = not E4M3 and x_pointer.dtype.element_ty.primitive_bitwidth == 16
    rounded = round_units(u, offset + start + column, seed, ROUNDING, MANTISSA, EMIN, EMAX, SHORT)
    sign = as_bits(x) & -0x80000000
    if INTEGER:
        # Adding 0 turns -0 into the +0 of two's complement.
        values = (as_float(as_bits(rounded) | sign) + 0.0) * value[:, None]
    else:
        values = as_float(as_bits(rounded * value[:, None]) | sign)
    tl.store(out_pointer + start + column, values.to(out_pointer.dtype.element_ty), mask=inside)
