"""Device functions: rounding of magnitudes to the grid of an element, the twin of ``qnoise.rounding``.

What compiled code may not change, and how it is kept from it: no product is contracted with a sum (kernels are
launched with ``enable_fp_fusion=False``; the fused operations of an exact quotient are written out), subnormal
numbers are not flushed, and a division is :func:`quotient` or ``tl.div_rn``, because ``/`` is approximate on a GPU.
"""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import triton
import triton.language as tl

from .philox import uniform

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def larger(a, b):
    """The larger of two numbers; NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def as_bits(x):
    """The bits of fp32 numbers, as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """The fp32 numbers with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_nearest(u, MANTISSA: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr):
    """Magnitudes rounded to nearest, ties to even; they must not exceed the grid's maximum.

    Adding a large number whose last place is one step, and subtracting it again, leaves a whole number of steps,
    rounded once by the addition. A tie goes to the even number of steps if the large number is an even one.

    u itself, times 2**K with K = 23 - MANTISSA, has that last place; there is no need to cut u down to its exponent.
    The 4 taken off 2**K keeps the sum below the next binade, and a tie has few bits, so that its product is exact and
    even. Where the 4 leaves the product below its own binade, u is closer to a power of two than to any tie.
    Below the first binade the number is that of its middle.
    """
    if EMIN >= EMAX:  # one step for all of the grid
        magic: tl.constexpr = 1.5 * 2.0 ** (EMAX + 23 - MANTISSA)
        return (u + magic) - magic
    else:
        large = tl.maximum(u, 1.5 * 2.0**EMIN) * (2.0 ** (23 - MANTISSA) - 4)
        return (u + large) - large


@triton.jit
def round_units(
    u,
    index,
    seed,
    ROUNDING: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
):
    """Magnitudes rounded as ``ROUNDING`` says; ``index`` (int64) and ``seed`` are read by "stochastic" only."""
    if ROUNDING == "nearest":
        return round_nearest(u, MANTISSA, EMIN, EMAX)
    elif ROUNDING == "half_away":
        even = round_nearest(u, MANTISSA, EMIN, EMAX)
        half = _binade(u, EMIN, EMAX) * 2.0 ** (-MANTISSA - 1)
        # u - even is exact; half a step is left where a tie went down.
        return tl.where(u - even == half, even + 2 * half, even)
    else:
        tl.static_assert(ROUNDING == "stochastic")
        step = _binade(u, EMIN, EMAX) * 2.0**-MANTISSA
        ladder = u * as_float(0x7F000000 - as_bits(step))
        # The ladder has fewer than 2**22 steps, so a large number takes it to whole ones, up or down.
        whole = (ladder + 1.5 * 2.0**23) - 1.5 * 2.0**23
        below = tl.where(whole > ladder, whole - 1.0, whole)
        up = uniform(index, seed) < ladder - below
        return tl.where(up, below + 1.0, below) * step


@triton.jit
def _binade(u, EMIN: tl.constexpr, EMAX: tl.constexpr):
    """2**e for the binade a magnitude lies in, at least 2**EMIN."""
    if EMIN >= EMAX:
        return tl.full(u.shape, 2.0**EMAX, tl.float32)
    else:
        return as_float(tl.maximum(as_bits(u), (EMIN + 127) << 23) & 0x7F800000)


@triton.jit
def reciprocal(value):
    """What :func:`quotient` needs of divisors: ``(unit, divisor, 1 / divisor)``.

    ``unit`` is the power of two that takes ``value`` into [1, 2) (2**127 at most, which still leaves subnormal ones
    above 2**-9), ``divisor = value * unit``. Where ``value`` is 0, Inf or NaN the last two are 0, and so are quotients.

    The reciprocal is correctly rounded, without a division and its branches. Mirroring the bits of the divisor gives
    it to 1/8; two cubic steps and a Newton step do the rest. Like the first guess, a cubic step keeps to the larger
    side, which the last number below 2 needs: from below a Newton step ends one unit too low there. All 2**23
    divisors are a test.
    """
    unit = as_float(tl.maximum(0x7F000000 - (as_bits(value) & 0x7F800000), 0))
    good = (value > 0) & (value < _INFINITY)
    divisor = tl.where(good, value * unit, 0.0)
    inverse = as_float(0x7F000000 - as_bits(divisor))
    for _ in tl.static_range(2):
        error = tl.fma(inverse, -divisor, 1.0)
        inverse = tl.fma(tl.fma(error, error, error), inverse, inverse)
    inverse = tl.fma(tl.fma(inverse, -divisor, 1.0), inverse, inverse)
    return unit, divisor, tl.where(good, inverse, 0.0)


@triton.jit
def quotient(a, divisor, inverse, CORRECTIONS: tl.constexpr = 2):
    """``a / divisor``, correctly rounded, where neither the quotient nor a residual leaves the normal range.

    Two corrections of a first quotient by its residual (Markstein, "IA-64 and Elementary Functions", 2000, section
    8.3): with a correctly rounded reciprocal, a quotient within one unit in the last place of the true one becomes
    the correctly rounded one. The first correction brings it there, and nearly always all the way.
    """
    q = a * inverse
    for _ in tl.static_range(CORRECTIONS):
        q = tl.fma(tl.fma(q, -divisor, a), inverse, q)
    return q
