"""Device function: the uniform numbers of ``qnoise.philox``."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(index, seed):
    """fp32 numbers in [0, 1) for int64 counters ``index`` (offset included) and an int64 key ``seed``."""
    zero = tl.zeros(index.shape, tl.int32)
    low = index.to(tl.int32)
    high = (index >> 32).to(tl.int32)
    first, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return (first >> 8).to(tl.float32) * 2.0**-24
