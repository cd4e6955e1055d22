"""Device functions: the scale of every block, the twin of ``qnoise.scales``.

``magnitude`` is an fp32 tile (blocks, block size), ``peak`` its maxima (blocks,), NaN where a block has a NaN.
``divisor`` is the fp32 scalar gs; E8M0 formats do not read it.
"""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import as_bits, as_float, larger, quotient, reciprocal, round_nearest

_QUIET_NAN = tl.constexpr(0x7FC00000)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def block_scales(
    magnitude,
    peak,
    divisor,
    SCALE_MODE: tl.constexpr,
    E4M3: tl.constexpr,
    BUMP: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
):
    """``(value, byte)``: what multiplies each block, fp32, and the byte that is stored, int32."""
    if E4M3:
        # Up to this bound (gs is above 2**-118) the divisions of a block need no care for the ends of the fp32 range:
        # S / gs is a normal number, and where peak / MAX is not, S = 0 whatever that quotient is rounded to.
        if (divisor > 0) & (divisor <= 2.0**80):
            scale, value = _e4m3_scale(magnitude, peak, divisor, True, SCALE_MODE, MANTISSA, EMIN, EMAX, MAX)
        else:
            scale, value = _e4m3_scale(magnitude, peak, divisor, False, SCALE_MODE, MANTISSA, EMIN, EMAX, MAX)
        return value, e4m3_byte(scale)
    else:
        byte = _e8m0_byte(magnitude, peak, SCALE_MODE, BUMP, MANTISSA, EMIN, EMAX, MAX)
        return e8m0_value(byte), byte


@triton.jit
def e8m0_value(byte):
    """2**(byte - 127); NaN for 255."""
    power = as_float(tl.maximum(byte << 23, 0x400000))
    return tl.where(byte == 255, as_float(tl.full(byte.shape, _QUIET_NAN, tl.int32)), power)


@triton.jit
def e8m0_inverse(byte):
    """2**(127 - byte), of no meaning for 255."""
    return as_float(tl.maximum((254 - byte) << 23, 0x400000))


@triton.jit
def e4m3_value(byte):
    """The E4M3 number of a byte."""
    magnitude = as_float((byte & 127) << 20) * 2.0**120
    bits = as_bits(magnitude) | ((byte & 128) << 24)
    return as_float(tl.where((byte & 127) == 127, _QUIET_NAN, bits))


@triton.jit
def e4m3_byte(scale):
    """The byte of E4M3 numbers >= 0; 127 for NaN. A step of 2**-9 is one unit after the factor 2**-120."""
    return tl.where(scale == scale, as_bits(scale * 2.0**-120) >> 20, 127)


@triton.jit
def units(
    magnitude,
    value,
    byte,
    E4M3: tl.constexpr,
    ROUNDING: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX: tl.constexpr,
):
    """``magnitude / value``, clipped at ``MAX``, and 0 in blocks whose scale is 0 or NaN."""
    if not E4M3:
        # A power of two: the product is the quotient, subnormal results included.
        limit = tl.where(byte == 255, 0.0, MAX)
        return tl.minimum(magnitude * e8m0_inverse(byte)[:, None], limit[:, None])
    elif ROUNDING == "stochastic":
        # A draw of 0 rounds up whatever is not 0, so here the smallest quotients count too.
        good = (value > 0)[:, None]
        return tl.minimum(tl.where(good, tl.div_rn(magnitude, value[:, None]), 0.0), MAX)
    else:
        return _clipped_quotient(magnitude, value, MANTISSA, MAX)


@triton.jit
def _clipped_quotient(magnitude, value, MANTISSA: tl.constexpr, MAX: tl.constexpr):
    """``magnitude / value`` as far as rounding to the grid sees it: from 2**-24 up to ``MAX`` on the same side of
    every tie as the correctly rounded quotient; for larger quotients ``MAX`` or a number next to it.

    With one mantissa bit one correction is enough. A quotient that is off by less than 2**-23 of its last place
    could be on another side of a tie t only if a / b is that close to t plus or minus half a last place, and as
    t is a small odd number times a power of two, that needs b within a few last places of 1, 1.5 or 2: a test tries
    those.
    """
    unit, divisor, inverse = reciprocal(value)
    a = tl.minimum(magnitude * unit[:, None], (divisor * MAX)[:, None])
    return quotient(a, divisor[:, None], inverse[:, None], 1 if MANTISSA == 1 else 2)


@triton.jit
def halving_sum(values):
    """Sum over the last axis of (blocks, size): first half plus second half, until one is left.

    Every sum here has two terms, so no compiler has an order to choose.
    """
    BLOCKS: tl.constexpr = values.shape[0]
    SIZE: tl.constexpr = values.shape[1]
    if SIZE == 1:
        return tl.reshape(values, [BLOCKS])
    else:
        return halving_sum(tl.sum(tl.reshape(values, [BLOCKS, 2, SIZE // 2]), axis=1))


@triton.jit
def _e8m0_byte(
    magnitude,
    peak,
    SCALE_MODE: tl.constexpr,
    BUMP: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
):
    bits = as_bits(peak)
    if EMAX == 0:
        # Only here can a subnormal peak reach a scale above 2**-127: give it the exponent below those of normal ones.
        bits = tl.where(bits < 1 << 23, as_bits(bits.to(tl.float32)) - (149 << 23), bits)
    # BUMP carries into the exponent where the scale mode takes the next power of two.
    byte = tl.minimum(tl.maximum(((bits + BUMP) >> 23) - EMAX, 0), 254)
    if SCALE_MODE == "mse":
        unit = magnitude * e8m0_inverse(byte)[:, None]
        best = tl.full(peak.shape, _INFINITY, tl.float32)
        chosen = byte
        for i in tl.static_range(3):  # largest scale first: it keeps a tie
            candidate = tl.minimum(tl.maximum(byte + (1 - i), 0), 254)
            ratio = as_float((127 + candidate - byte) << 23)[:, None]
            inverse = as_float((127 - candidate + byte) << 23)[:, None]
            rounded = round_nearest(tl.minimum(unit * inverse, MAX), MANTISSA, EMIN, EMAX)
            difference = rounded * ratio - unit
            error = halving_sum(difference * difference)
            better = error < best
            best = tl.where(better, error, best)
            chosen = tl.where(better, candidate, chosen)
        byte = tl.where(peak > 0, chosen, byte)
    return tl.where(peak < _INFINITY, byte, 255)


@triton.jit
def _e4m3_scale(
    magnitude,
    peak,
    divisor,
    ORDINARY: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
):
    """``(S, S / gs)``."""
    target = (quotient(peak, MAX, 1.0 / MAX) if ORDINARY else tl.div_rn(peak, MAX)) * divisor
    scale = _to_e4m3(target)
    if SCALE_MODE == "mse":
        code = e4m3_byte(scale)
        best = tl.full(peak.shape, _INFINITY, tl.float32)
        chosen = e4m3_value(tl.minimum(tl.maximum(code + 8, 1), 126))
        for i in range(17):
            candidate = e4m3_value(tl.minimum(tl.maximum(code + (8 - i), 1), 126))
            error = _e4m3_error(magnitude, candidate, divisor, ORDINARY, SCALE_MODE, MANTISSA, EMIN, EMAX, MAX)
            better = error < best
            best = tl.where(better, error, best)
            chosen = tl.where(better, candidate, chosen)
        scale = tl.where(peak > 0, chosen, scale)
    elif SCALE_MODE != "two_level" and SCALE_MODE != "single_level":  # four_over_six and its variants
        larger_scale = _to_e4m3(target * 1.5)
        larger_error = _e4m3_error(magnitude, larger_scale, divisor, ORDINARY, SCALE_MODE, MANTISSA, EMIN, EMAX, MAX)
        error = _e4m3_error(magnitude, scale, divisor, ORDINARY, SCALE_MODE, MANTISSA, EMIN, EMAX, MAX)
        # A NaN or infinite error is never the better one; the larger scale keeps a tie.
        best = tl.where(larger_error < _INFINITY, larger_error, _INFINITY)
        scale = tl.where(error < best, scale, larger_scale)
    scale = tl.where(peak < _INFINITY, scale, as_float(tl.full(peak.shape, _QUIET_NAN, tl.int32)))
    return scale, _over_divisor(scale, divisor, ORDINARY)


@triton.jit
def _over_divisor(scale, gs, ORDINARY: tl.constexpr):
    if ORDINARY:
        unit, divisor, inverse = reciprocal(gs)
        return quotient(scale * unit, divisor, inverse)
    else:
        return tl.div_rn(scale, gs)


@triton.jit
def _to_e4m3(target):
    rounded = round_nearest(tl.minimum(target, 448.0), 3, -6, 8)
    return tl.where(target == target, rounded, target)


@triton.jit
def _e4m3_error(
    magnitude,
    scale,
    gs,
    ORDINARY: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
):
    """The error of each block under ``scale`` that ``SCALE_MODE`` compares, in units of 1 / gs."""
    value = _over_divisor(scale, gs, ORDINARY)
    u = _clipped_quotient(magnitude, value, MANTISSA, MAX)
    difference = (round_nearest(u, MANTISSA, EMIN, EMAX) * value[:, None] - magnitude) * gs
    if SCALE_MODE == "four_over_six_absmax":
        return tl.reduce(tl.abs(difference), 1, larger)
    elif SCALE_MODE == "four_over_six_mae":
        return halving_sum(tl.abs(difference))
    else:
        return halving_sum(difference * difference)
