"""Device function: the Hadamard transform of blocks, the twin of ``qnoise.rotation``."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard(blocks):
    """The transform along the last axis of an fp32 tile (blocks, block size): at most 256 in a block.

    An element gets its partner, 2**stage away, from the integer sum of both: a GPU takes that from a neighbouring
    thread in one step, and drops it where the partner is at hand. b * -1 + a is a - b to the bit.
    """
    BLOCKS: tl.constexpr = blocks.shape[0]
    SIZE: tl.constexpr = blocks.shape[1]
    tl.static_assert(SIZE <= 256)
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)[None, :, None]
    for stage in tl.static_range(8):
        if 2**stage < SIZE:
            own = tl.reshape(blocks, [BLOCKS * SIZE // 2 ** (stage + 1), 2, 2**stage])
            bits = own.to(tl.int32, bitcast=True)
            partner = (tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.int32).to(tl.float32, bitcast=True)
            blocks = tl.reshape(own * sign + partner, [BLOCKS, SIZE])
    return blocks * SIZE**-0.5
