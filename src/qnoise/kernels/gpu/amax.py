"""The largest finite magnitude of a tensor, or of each row; as it is, with noise, or rotated."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantSpec
from .blocks import with_noise
from .launch import WARPS, check_noise
from .rotation import hadamard
from .rounding import as_bits, larger

_TILE = 4096
_PROGRAMS = 1024
_INFINITY = tl.constexpr(float("inf"))
_Noise = tuple[Tensor, float]


def tensor_amax(x: Tensor, noise: _Noise | None = None) -> Tensor:
    """The largest magnitude among the finite values of a contiguous tensor, fp32 0-d; 0 if there is none.

    A maximum does not depend on its order, so neither do the bits of the result. ``noise``: as for
    ``fake_quantize_rows``, whose errors are raised here too.
    """
    return _row_maxima(x, 1, x.numel(), 1, noise).reshape(())


def rotated_amax(x: Tensor, spec: QuantSpec, noise: _Noise | None = None) -> Tensor:
    """:func:`tensor_amax` of a contiguous (R, K) tensor whose blocks along K are rotated as ``spec`` says."""
    rows, columns = x.shape
    size = spec.block_format.block_size
    if columns % size == 0:
        rows, columns = min(rows, 1), rows * columns
    return _row_maxima(x, rows, columns, size, noise).amax() if x.numel() else x.new_zeros((), dtype=torch.float32)


def amax_rows(x: Tensor) -> Tensor:
    """:func:`tensor_amax` of each row of a contiguous (R, K) tensor: fp32 (R,)."""
    rows, columns = x.shape
    return _row_maxima(x, rows, columns, 1, None)


def _row_maxima(x: Tensor, rows: int, columns: int, turned: int, noise: _Noise | None) -> Tensor:
    """``turned``: the size of the blocks that are rotated, 1 for none."""
    z, sigma = check_noise(x, noise)
    result = torch.zeros(rows, dtype=torch.float32, device=x.device)
    if not x.numel():
        return result
    tile = max(turned, min(_TILE, triton.next_power_of_2(columns)))
    tiles = -(-columns // tile)
    programs = min(tiles, max(1, _PROGRAMS // rows))
    with torch.cuda.device_of(x):
        _kernel[(rows * programs,)](
            x,
            z,
            result.view(torch.int32),
            sigma,
            columns,
            programs,
            -(-tiles // programs),
            TILE=tile,
            TURNED=turned,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return result


@triton.jit
def _kernel(
    x_pointer,
    z_pointer,
    result_pointer,
    sigma,
    columns,
    programs,
    tiles_each,
    TILE: tl.constexpr,
    TURNED: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    tile = (program % programs).to(tl.int64) * TILE
    offset = tl.arange(0, TILE)
    peak = 0.0
    for _ in range(tiles_each):
        start = row * columns + tile
        x = tl.load(x_pointer + start + offset, mask=offset < columns - tile, other=0.0)
        if z_pointer is not None:
            x = with_noise(x, tl.load(z_pointer + start + offset, mask=offset < columns - tile, other=0.0), sigma)
        x = x.to(tl.float32)
        if TURNED > 1:
            x = tl.reshape(hadamard(tl.reshape(x, [TILE // TURNED, TURNED])), [TILE])
        magnitude = tl.abs(x)
        found = tl.reduce(magnitude, 0, larger)
        if not found < _INFINITY:
            found = tl.max(tl.where(magnitude < _INFINITY, magnitude, 0.0), axis=0)
        peak = tl.maximum(peak, found)
        tile += programs.to(tl.int64) * TILE
    # Bits of numbers >= 0 are ordered as the numbers are.
    tl.atomic_max(result_pointer + row, as_bits(peak))
