"""The largest finite magnitude of a tensor, or of each row."""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPS
from .rounding import as_bits, larger

_TILE = 4096
_PROGRAMS = 1024
_INFINITY = tl.constexpr(float("inf"))


def tensor_amax(x: Tensor) -> Tensor:
    """The largest magnitude among the finite values of a contiguous tensor, fp32 0-d; 0 if there is none.

    A maximum does not depend on its order, so neither do the bits of the result.
    """
    return _row_maxima(x, 1, x.numel()).reshape(())


def amax_rows(x: Tensor) -> Tensor:
    """The same for each row of a contiguous (R, K) tensor: fp32 (R,)."""
    rows, columns = x.shape
    return _row_maxima(x, rows, columns)


def _row_maxima(x: Tensor, rows: int, columns: int) -> Tensor:
    result = torch.zeros(rows, dtype=torch.float32, device=x.device)
    if not x.numel():
        return result
    tile = min(_TILE, triton.next_power_of_2(columns))
    tiles = -(-columns // tile)
    programs = min(tiles, max(1, _PROGRAMS // rows))
    with torch.cuda.device_of(x):
        _kernel[(rows * programs,)](
            x,
            result.view(torch.int32),
            columns,
            programs,
            -(-tiles // programs),
            TILE=tile,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return result


@triton.jit
def _kernel(x_pointer, result_pointer, columns, programs, tiles_each, TILE: tl.constexpr):
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    tile = (program % programs).to(tl.int64) * TILE
    offset = tl.arange(0, TILE)
    peak = 0.0
    for _ in range(tiles_each):
        x = tl.load(x_pointer + row * columns + tile + offset, mask=offset < columns - tile, other=0.0)
        magnitude = tl.abs(x.to(tl.float32))
        found = tl.reduce(magnitude, 0, larger)
        if not found < _INFINITY:
            found = tl.max(tl.where(magnitude < _INFINITY, magnitude, 0.0), axis=0)
        peak = tl.maximum(peak, found)
        tile += programs.to(tl.int64) * TILE
    # Bits of numbers >= 0 are ordered as the numbers are.
    tl.atomic_max(result_pointer + row, as_bits(peak))
