"""The quantizers once more, written to be obviously right instead of fast: one block, rational arithmetic.

Grids are enumerated from the definition of the codes, exponents are found by comparing rationals, and only the
operations whose fp32 rounding is part of the contract (NVFP4's scales, the search errors) are done in fp32, by numpy.
"""

from bisect import bisect_left
from fractions import Fraction

import numpy as np

EXPONENT_BIAS = {"e2m1": 1, "e2m3": 1, "e3m2": 3, "e4m3": 7, "e5m2": 15}
MANTISSA_BITS = {"e2m1": 1, "e2m3": 3, "e3m2": 2, "e4m3": 3, "e5m2": 2, "int8": 6}
LARGEST = {"e2m1": 6, "e2m3": 7.5, "e3m2": 28, "e4m3": 448, "e5m2": 57344, "int8": 127 / 64}
ELEMENT_OF = {
    "mxfp4": "e2m1",
    "mxfp6_e2m3": "e2m3",
    "mxfp6_e3m2": "e3m2",
    "mxfp8_e4m3": "e4m3",
    "mxfp8_e5m2": "e5m2",
    "mxint8": "int8",
}
f32 = np.float32


def grid(element):
    """The non-negative values in the order of their codes; an even position is an even code."""
    if element == "int8":
        return [Fraction(n, 64) for n in range(128)]
    m, bias = MANTISSA_BITS[element], EXPONENT_BIAS[element]
    values = []
    while not values or values[-1] < LARGEST[element]:
        field, mantissa = divmod(len(values), 2**m)
        lead = mantissa + (2**m if field else 0)
        values.append(Fraction(lead) * Fraction(2) ** (max(field, 1) - bias - m))
    return values


GRIDS = {element: grid(element) for element in MANTISSA_BITS}


def nearest(u, element, ties="nearest"):
    """The value of the grid nearest to u >= 0; a tie goes to the even code, or away from zero; saturating."""
    values = GRIDS[element]
    above = bisect_left(values, u)
    if above == len(values):
        return values[-1]
    if values[above] == u:
        return u
    low, high = values[above - 1], values[above]
    if u - low != high - u:
        return low if u - low < high - u else high
    up = above % 2 == 0 if ties == "nearest" else True
    return high if up else low


def floor_log2(value):
    exponent = 0
    while Fraction(2) ** exponent > value:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    return exponent


def e8m0_exponent(amax, element, mode):
    if amax == 0:
        return -127
    largest, e = Fraction(LARGEST[element]), floor_log2(amax)
    s = e - floor_log2(largest)
    m = amax / Fraction(2) ** e
    if mode == "rceil":
        # The smallest power of two whose grid reaches amax.
        s = floor_log2(amax / largest)
        s += amax > largest * Fraction(2) ** s
    elif mode == "ceil":
        s += m > 1
    elif mode == "even":
        # Round m to the element's mantissa, ties up at this one place; at 2 it belongs to the next binade.
        s += m >= 2 - Fraction(1, 2 ** (MANTISSA_BITS[element] + 1))
    return min(max(s, -127), 127)


def tree_sum(values):
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def mx_block(block, fmt, mode, ties="nearest"):
    """(exponent, magnitudes) of one zero-padded block of fp32 numbers."""
    element = ELEMENT_OF[fmt]
    exact = [abs(Fraction(float(x))) for x in block]
    floor = e8m0_exponent(max(exact), element, "floor" if mode == "mse" else mode)

    def rounded(s, how):
        return [nearest(x / Fraction(2) ** s, element, how) * Fraction(2) ** s for x in exact]

    if mode == "mse" and max(exact):
        unit = np.array([float(x / Fraction(2) ** floor) for x in exact], f32)
        best = None
        for s in (floor + 1, floor, floor - 1):
            s = min(max(s, -127), 127)
            values = np.array([float(v / Fraction(2) ** floor) for v in rounded(s, "nearest")], f32)
            error = tree_sum((values - unit) * (values - unit))
            if best is None or error < best[0]:
                best = (error, s)
        floor = best[1]
    with np.errstate(over="ignore"):
        return floor, np.array([float(v) for v in rounded(floor, ties)], f32)


def nv_block(block, amax, mode, ties="nearest"):
    """(E4M3 scale, magnitudes) of one zero-padded block of fp32 numbers, given the amax of the tensor."""
    magnitude = np.abs(block.astype(f32))
    top = None if mode == "single_level" else 256 if mode.startswith("four_over_six") else 448
    gs = f32(top * 6) / f32(amax) if top else f32(1)
    target = f32(magnitude.max() / f32(6)) * gs

    def values(scale, how):
        c = f32(float(scale)) / gs
        if c == 0:
            return np.zeros_like(magnitude)
        codes = [nearest(Fraction(float(f32(x) / c)), "e2m1", how) for x in magnitude]
        return np.array([f32(float(k)) * c for k in codes], f32)

    def error(scale):
        with np.errstate(over="ignore"):
            difference = np.abs((values(scale, "nearest") - magnitude) * gs)
            if mode.endswith("absmax"):
                return difference.max()
            return tree_sum(difference if mode.endswith("mae") else difference * difference)

    scale = nearest(Fraction(float(target)), "e4m3")
    candidates = [scale]
    if mode.startswith("four_over_six"):
        candidates = [nearest(Fraction(float(target * f32(1.5))), "e4m3"), scale]
    elif mode == "mse" and magnitude.max():
        code = GRIDS["e4m3"].index(scale)
        candidates = [GRIDS["e4m3"][min(max(code + step, 1), 126)] for step in range(8, -9, -1)]
    errors = [error(candidate) for candidate in candidates]
    scale = candidates[int(np.argmin(errors))]  # the first of equals: the largest scale
    return float(scale), values(scale, ties)
