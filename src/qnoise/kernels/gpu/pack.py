"""Quantize to packed codes and block scales."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantSpec
from .blocks import load_blocks, quantize_blocks
from .launch import WARPS, layout, quantizer_arguments, signed64
from .rounding import as_bits

_TILE = 4096  # elements of a program: with 4-bit codes one 16-byte store for each thread


def quantize_rows(
    x: Tensor, spec: QuantSpec, divisor: Tensor | None, seed: tuple[int, int] | None, codes: Tensor, scales: Tensor
) -> None:
    """Write the packed codes and the scale bytes of ``x``; bits as in ``qnoise.reference``.

    Args:
        x, spec, divisor, seed: as for ``fake_quantize_rows``.
        codes: uint8 (R, blocks * block_size * element bits / 8), contiguous, layout of ``qnoise.packing.pack``.
        scales: uint8 (R, blocks), contiguous.
    """
    rows, columns = x.shape
    cut = layout(rows, columns, spec.block_format.block_size, divisor, _TILE)
    if not x.numel():
        return
    key, offset = seed or (0, 0)
    with torch.cuda.device_of(x):
        _kernel[cut.grid](
            x,
            codes.view(torch.int32),
            scales,
            divisor,
            cut.columns,
            cut.row_blocks,
            signed64(key),
            signed64(offset),
            BLOCKS=cut.tile_blocks,
            ONE_ROW=cut.one_row,
            BITS=spec.block_format.element.bits,
            PER_ROW=divisor is not None and divisor.ndim == 1,
            **quantizer_arguments(spec),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _kernel(
    x_pointer,
    words_pointer,
    scales_pointer,
    divisor_pointer,
    columns,
    row_blocks,
    seed: tl.int64,
    offset: tl.int64,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr,
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
    ROTATED: tl.constexpr,
):
    row = tl.cast(0 if ONE_ROW else tl.program_id(0), tl.int64)
    first_block = tl.program_id(0 if ONE_ROW else 1).to(tl.int64) * BLOCKS
    column = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    start = row * columns + first_block * BLOCK_SIZE
    x = load_blocks(x_pointer + start, columns - first_block * BLOCK_SIZE, BLOCKS, BLOCK_SIZE, E4M3)
    x, rounded, _, byte = quantize_blocks(
        x, divisor_pointer, row, offset + start + column, seed,
        PER_ROW, ROTATED, E4M3, SCALE_MODE, ROUNDING, BUMP, MANTISSA, EMIN, EMAX, MAX,
    )  # fmt: skip
    if ROTATED:
        # NaN becomes Inf, as far as signs go: the sign of one that came out of a sum depends on the machine.
        x = tl.minimum(x, float("inf"))
    codes = _encode(rounded, as_bits(x), BITS, MANTISSA, EMIN, INTEGER)

    block = tl.arange(0, BLOCKS)
    left = row_blocks - first_block
    tl.store(scales_pointer + row * row_blocks + first_block + block, byte.to(tl.uint8), mask=block < left)
    TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
    # 32 bits hold a whole number of 4- and 8-bit codes; 96 bits hold sixteen 6-bit codes.
    words_start = (row * row_blocks + first_block) * (BLOCK_SIZE * BITS // 32)
    words_left = left * (BLOCK_SIZE * BITS // 32)
    if BITS == 6:
        quarters = _join_codes(codes, TILE // 4, 4, BITS, MANTISSA)
        even, odd = tl.split(tl.reshape(quarters, [TILE // 16, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        word = 3 * tl.arange(0, TILE // 16)
        pointer = words_pointer + words_start + word
        tl.store(pointer, a | (b << 24), mask=word < words_left)
        tl.store(pointer + 1, (b >> 8) | (c << 16), mask=word < words_left)
        tl.store(pointer + 2, (c >> 16) | (d << 8), mask=word < words_left)
    else:
        word = tl.arange(0, TILE * BITS // 32)
        packed = _join_codes(codes, TILE * BITS // 32, 32 // BITS, BITS, MANTISSA)
        tl.store(words_pointer + words_start + word, packed, mask=word < words_left)


@triton.jit
def _encode(rounded, x_bits, BITS: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, INTEGER: tl.constexpr):
    """Codes of magnitudes on the grid and the signs of ``x_bits``, as int32, shifted left by 23 - MANTISSA."""
    if INTEGER:
        count = (rounded * 2.0**MANTISSA).to(tl.int32)
        return (tl.where(x_bits < 0, -count, count) & ((1 << BITS) - 1)) << (23 - MANTISSA)
    else:
        # The factor takes the element's subnormal numbers to those of fp32: its bits are the code, where it is wanted.
        SIGN: tl.constexpr = 22 - MANTISSA + BITS
        return as_bits(rounded * 2.0 ** (-126 - EMIN)) | ((x_bits >> (31 - SIGN)) & (1 << SIGN))


@triton.jit
def _join_codes(codes, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """``PER_GROUP`` neighbouring codes in one int32, the first in the low bits.

    By halves, so that one shift to the right takes every code from where :func:`_encode` left it to its place.
    """
    HALF: tl.constexpr = PER_GROUP // 2
    shift = (23 - MANTISSA) - tl.arange(0, HALF) * BITS
    halves = tl.sum(tl.reshape(codes, [GROUPS, 2, HALF]) >> shift[None, None, :], axis=2)
    return tl.sum(halves << (tl.arange(0, 2) * (HALF * BITS))[None, :], axis=1)
