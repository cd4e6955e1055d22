"""Noise as a pure function of (seed, step, module name).

Nothing is drawn from a generator that advances, so nothing can get out of step: every rank, a resumed run and the
recomputation inside gradient checkpointing see the same bits, whatever else draws random numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Noise:
    """The noise a module has now: standard deviation, and the two numbers (with its name) that fix the draw."""

    sigma: float = 0.0
    seed: int = 0
    step: int = -1


def unit_normal(seed: int, step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal values, fp32, of `shape`: a function of its arguments alone.

    numpy's Philox4x64-10 counter generator, keyed with the 128-bit blake2b hash of "seed:step:name".
    `name` is the canonical name of the module (`qnoise.names.canonical_name`).
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
