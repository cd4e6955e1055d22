"""Philox4x32-10 in plain integer tensor operations: random bits as a function of (seed, counter).

Random numbers that stochastic rounding needs are not drawn from a stream but computed from the position
of the element, so that any backend (a kernel, a chunked loop, another device) draws the same bits.

The generator is that of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), ten rounds;
its published known answers are the test. This module only fixes how counter and key are filled:

* key = the 64-bit seed, low word first;
* counter = (low word, high word, 0, 0) of the 64-bit sum ``offset + index``, where ``index`` is the
  element's linear index in the row-major tensor whose last axis is the block axis (padding is not
  counted);
* uniform = the upper 24 bits of the first output word, times 2**-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each holding an unsigned 32-bit word.
        key: two unsigned 32-bit words.

    Returns:
        Four int64 tensors holding the unsigned 32-bit output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 products wrap modulo 2**64; shift and mask still give their two unsigned words.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(index: Tensor, seed: int, offset: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) on a grid of 2**-24, one for each linear index.

    Args:
        index: int64 tensor of linear element indices, any shape.
        seed: 64-bit key; taken modulo 2**64.
        offset: added to every index; taken modulo 2**64. A slice that starts at element ``n`` draws the
            bits of the whole tensor with ``offset + n``.

    Returns:
        fp32 tensor of ``index``'s shape and device.
    """
    shift = offset % 2**64
    counter = index + (shift - 2**64 if shift >= 2**63 else shift)
    zero = torch.zeros((), dtype=torch.int64, device=index.device)
    words = (counter & _MASK, (counter >> 32) & _MASK, zero, zero)
    first = philox4x32(words, (seed & _MASK, (seed >> 32) & _MASK))[0]
    return (first >> 8).to(torch.float32) * 2.0**-24


def seed_from(generator: torch.Generator | None) -> tuple[int, int]:
    """A (seed, offset) pair drawn from ``generator``, or from torch's default CPU generator for ``None``.

    The generator advances, so consecutive calls give different pairs and the same state gives the same
    pair.
    """
    device = torch.device("cpu") if generator is None else generator.device
    pair = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=device)
    seed, offset = pair.tolist()
    return seed, offset
