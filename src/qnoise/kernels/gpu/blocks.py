"""Device functions: what the kernels that quantize have in common, from loading blocks to rounded elements."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import triton
import triton.language as tl

from .rotation import hadamard
from .rounding import larger, round_units
from .scales import block_scales, units


@triton.jit
def load_blocks(pointer, left, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCKS, BLOCK_SIZE) elements, of which ``left`` exist; the others are 0.

    With WHOLE each thread gets whole blocks, if those are two loads of 128 bits, so that no other thread repeats the
    arithmetic of their scales.
    """
    PER_LOAD: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    if WHOLE and BLOCK_SIZE == 2 * PER_LOAD:
        half = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, PER_LOAD)[None, :]
        first = tl.load(pointer + half, mask=half < left, other=0.0)
        second = tl.load(pointer + half + PER_LOAD, mask=half + PER_LOAD < left, other=0.0)
        return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [BLOCKS, BLOCK_SIZE])
    else:
        column = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        return tl.load(pointer + column, mask=column < left, other=0.0)


@triton.jit
def with_noise(x, z, sigma):
    """x (1 + sigma z), in fp32 with one cast back to the dtype of ``x``."""
    return (x.to(tl.float32) * (1.0 + sigma * z.to(tl.float32))).to(x.dtype)


@triton.jit
def quantize_blocks(
    x,
    divisor_pointer,
    row,
    index,
    seed,
    PER_ROW: tl.constexpr,
    ROTATED: tl.constexpr,
    E4M3: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BUMP: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
):
    """``(x, rounded, value, byte)`` of a tile (blocks, block size) of any dtype.

    ``x`` in fp32 and rotated if so wanted, with the signs of the result; ``rounded``: its magnitudes in units of the
    blocks' scales on the grid of the element, fp32; ``value``: what multiplies each block, fp32; ``byte``: the scale
    as it is stored, int32. ``index`` (int64) and ``seed`` are for stochastic rounding.
    """
    x = x.to(tl.float32)
    if ROTATED:
        x = hadamard(x)
    divisor = 1.0
    if E4M3:
        divisor = tl.load(divisor_pointer + row) if PER_ROW else tl.load(divisor_pointer)
    magnitude = tl.abs(x)
    peak = tl.reduce(magnitude, 1, larger)
    value, byte = block_scales(magnitude, peak, divisor, SCALE_MODE, E4M3, BUMP, MANTISSA, EMIN, EMAX, MAX)
    u = units(magnitude, value, byte, E4M3, ROUNDING, MANTISSA, MAX)
    return x, round_units(u, index, seed, ROUNDING, MANTISSA, EMIN, EMAX), value, byte
