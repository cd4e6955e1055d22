"""What a format does to gaussian data: the yardstick for a tensor.

The figures of a format with E8M0 scales depend on where in an octave the magnitude lies, those of an NVFP4 tensor with
fixed scales on the magnitude itself, and a row that is no multiple of the block has a short last block. So the
reference has the rms and the row length of the tensor it stands beside.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from qnoise.formats import QuantSpec
from qnoise.scales import finite_amax
from qnoise.sensitivity.figures import Figures, row_chunks

_ELEMENTS = 1 << 17
_STEPS_PER_OCTAVE = 16


def gaussian_figures(spec: QuantSpec, rms: float, length: int, per_row: bool = False) -> dict[str, float]:
    """The figures of a gaussian matrix.

    Args:
        spec: the format.
        rms: standard deviation, rounded to 1/16 octave.
        length: row length; only what its last block has to do with it matters.
        per_row: fix a per-tensor scale by each row's own amax, as for tokens.

    Returns:
        `Figures.result` of 131,072 values from a fixed seed: sqnr_db is good to about 0.03 dB.
    """
    size = spec.block_format.block_size
    octaves = math.log2(rms) if 0 < rms < math.inf else 0.0
    # A power of two changes nothing but for the scales of fixed range; away from the ends of E8M0, that is.
    step = round(octaves * _STEPS_PER_OCTAVE)
    if spec.scale_mode != "single_level":
        step %= _STEPS_PER_OCTAVE
    tail = length % size
    whole = min(length // size, 32 if per_row or tail else 1) * size
    # The amax of a row, or of the tensor, matters little beyond a thousand elements.
    return dict(_figures(spec, step, max(1, whole + tail), per_row))


@lru_cache(maxsize=512)
def _figures(spec: QuantSpec, step: int, length: int, per_row: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(-(-_ELEMENTS // length), length, generator=generator) * 2.0 ** (step / _STEPS_PER_OCTAVE)
    figures = Figures(spec, "column" if per_row else "row", sample_every=1 << 30)
    whole = finite_amax(x) if spec.per_tensor_scale and not per_row else None
    for rows in row_chunks(x):
        figures.add(rows, rows.abs().amax(-1, keepdim=True) if spec.per_tensor_scale and per_row else whole)
    return figures.result()
