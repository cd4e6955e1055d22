"""Packed codes and block scales back to values."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantSpec
from .launch import WARPS, element_arguments, layout, words
from .rotation import hadamard
from .rounding import as_bits, as_float
from .scales import e4m3_value, e8m0_value

_TILE = 4096  # elements of a program: with 4-bit codes one 16-byte load for each thread


def dequantize_rows(codes: Tensor, scales: Tensor, divisor: Tensor | None, spec: QuantSpec, out: Tensor) -> None:
    """Write the values of packed codes to ``out``; bits as in ``BlockQuantized.dequantize``.

    Args:
        codes: uint8 (R, blocks * block_size * element bits / 8), contiguous, layout of ``qnoise.packing.pack``.
        scales: uint8 (R, blocks), contiguous.
        divisor: fp32 gs, 0-d or (R,) contiguous; None for E8M0 formats.
        spec: the format and the rotation.
        out: (R, K) contiguous, any floating-point dtype.
    """
    rows, columns = out.shape
    cut = layout(rows, columns, spec.block_format.block_size, divisor, _TILE)
    if not out.numel():
        return
    element = spec.block_format.element
    with torch.cuda.device_of(out):
        _kernel[cut.grid](
            words(codes),
            scales,
            divisor,
            out,
            cut.columns,
            cut.row_blocks,
            BLOCKS=cut.tile_blocks,
            ONE_ROW=cut.one_row,
            BITS=element.bits,
            LAST_CODE=_last_code(spec),
            PER_ROW=divisor is not None and divisor.ndim == 1,
            **element_arguments(spec),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _last_code(spec: QuantSpec) -> int:
    """The code of the largest value; larger ones are never written and mean NaN."""
    element = spec.block_format.element
    if element.is_integer:
        return (1 << element.bits) - 1
    binade = max(element.emax - element.emin, 0)
    ladder = element.max * 2.0 ** (element.mantissa_bits - element.emin - binade)
    return (binade << element.mantissa_bits) + round(ladder)


@triton.jit
def _kernel(
    words_pointer,
    scales_pointer,
    divisor_pointer,
    out_pointer,
    columns,
    row_blocks,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    LAST_CODE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PER_ROW: tl.constexpr,
    E4M3: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    ROTATED: tl.constexpr,
):
    row = tl.cast(0 if ONE_ROW else tl.program_id(0), tl.int64)
    first_block = tl.program_id(0 if ONE_ROW else 1).to(tl.int64) * BLOCKS
    left = row_blocks - first_block
    block = tl.arange(0, BLOCKS)
    byte = tl.load(scales_pointer + row * row_blocks + first_block + block, mask=block < left, other=0).to(tl.int32)
    if E4M3:
        divisor = tl.load(divisor_pointer + row) if PER_ROW else tl.load(divisor_pointer)
        value = tl.div_rn(e4m3_value(byte), divisor)
    else:
        value = e8m0_value(byte)

    TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
    words_start = (row * row_blocks + first_block) * (BLOCK_SIZE * BITS // 32)
    words_left = left * (BLOCK_SIZE * BITS // 32)
    if BITS == 6:
        # Three words hold four times 24 bits, and each of those four codes.
        word = 3 * tl.arange(0, TILE // 16)
        pointer = words_pointer + words_start + word
        w0 = tl.load(pointer, mask=word < words_left, other=0)
        w1 = tl.load(pointer + 1, mask=word < words_left, other=0)
        w2 = tl.load(pointer + 2, mask=word < words_left, other=0)
        b = ((w0 >> 24) & 0xFF) | (w1 << 8)
        c = ((w1 >> 16) & 0xFFFF) | (w2 << 16)
        quarters = tl.join(tl.join(w0, c), tl.join(b, w2 >> 8))
        codes = _split_codes(tl.reshape(quarters, [TILE // 4]), 4, BITS)
    else:
        word = tl.arange(0, TILE * BITS // 32)
        packed = tl.load(words_pointer + words_start + word, mask=word < words_left, other=0)
        codes = _split_codes(packed, 32 // BITS, BITS)
    codes = tl.reshape(codes, [BLOCKS, BLOCK_SIZE])

    values = _decode(codes, value[:, None], BITS, LAST_CODE, MANTISSA, EMIN, INTEGER)
    if ROTATED:
        values = hadamard(values)
    column = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    start = row * columns + first_block * BLOCK_SIZE
    inside = column < columns - first_block * BLOCK_SIZE
    tl.store(out_pointer + start + column, values.to(out_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _split_codes(packed, PER_GROUP: tl.constexpr, BITS: tl.constexpr):
    """(groups,) int32 to (groups, PER_GROUP), the low bits first; bits above a code are left in."""
    return packed[:, None] >> (tl.arange(0, PER_GROUP) * BITS)[None, :]


@triton.jit
def _decode(
    codes,
    scale,
    BITS: tl.constexpr,
    LAST_CODE: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Values of the codes in the low bits of int32 numbers, times ``scale``, fp32."""
    if INTEGER:
        count = (codes << (32 - BITS)) >> (32 - BITS)
        return count.to(tl.float32) * 2.0**-MANTISSA * scale
    else:
        MASK: tl.constexpr = (1 << (BITS - 1)) - 1
        # As bits of fp32 a code is 2**-126 / 2**EMIN times its value, subnormal codes included.
        magnitude = as_float((codes << (23 - MANTISSA)) & (MASK << (23 - MANTISSA))) * 2.0 ** (126 + EMIN)
        if LAST_CODE < MASK:
            magnitude = tl.where((codes & MASK) > LAST_CODE, float("nan"), magnitude)
        sign = (codes << (32 - BITS)) & -0x80000000
        return as_float(as_bits(magnitude * scale) ^ sign)
