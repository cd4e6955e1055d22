"""The compiled way to the figures of an error: `error_sums.c`, one pass over a matrix and its reconstruction.

The definitions are those of ``metrics.py``; ``sensitivity/figures.py`` computes the same sums in PyTorch where this
path does not serve. Built and kept as ``compiler.py`` says, turned off with ``native.py``, and never without it.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import QuantSpec
from . import native
from .compiler import compiled

FIELDS = (
    "x", "x2", "x3", "x4", "e2", "abs_error", "relative", "dead", "clipped", "clipped_blocks", "crest",
    "filled_blocks", "bias", "deadzone", "grid", "bias_grid", "bias_dead", "left_out", "blocks",
    "amax", "max_abs_error", "top",
)  # fmt: skip
"""What is gathered, in the order of error_sums.c. Sums: of x, x**2, x**3 and x**4, of the squared error, of its
magnitude and of that over |x|; counts of elements that become zero, of elements and of blocks beyond the largest value
of their block; over the blocks that are not zero, of amax / rms and how many they are; of the squares and products of
the three parts of the error; elements in blocks with NaN or Inf, and blocks without. Then the largest: of |x|, of the
error, of |x_hat|."""
MAXIMA = FIELDS[-3:]
"""Those of `FIELDS` that are largest values and no sums."""

_SOURCE = Path(__file__).with_name("error_sums.c")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_MAX_BLOCK = 256
_ROOM = 64
_ELEMENTS_PER_THREAD = 1 << 15
"""Below this a thread costs more to start than it saves."""

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []


class _Plan(ctypes.Structure):
    """`Plan` of error_sums.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "block_size", "mantissa_bits", "emin", "parts")),
        ("max", ctypes.c_float),
    ]


def serves(x: Tensor, spec: QuantSpec) -> bool:
    """Whether this path computes the sums of ``x`` in the format of ``spec``. The first call builds or loads it."""
    block, element = spec.block_format, spec.block_format.element
    inside = element.emin - element.mantissa_bits >= -32 and element.emin <= element.emax <= 32
    return (
        x.dtype in _DTYPES
        and x.device.type == "cpu"
        and block.block_size <= _MAX_BLOCK
        and inside
        and _library() is not None
    )


def new_totals() -> Tensor:
    """fp64 zeros for each of `FIELDS`."""
    return torch.zeros(len(FIELDS), dtype=torch.float64)


def add(
    x: Tensor,
    x_hat: Tensor,
    scales: Tensor,
    spec: QuantSpec,
    totals: Tensor,
    *,
    parts: bool,
    columns: Tensor | None = None,
) -> Tensor:
    """Add a matrix to ``totals``, row after row.

    Args:
        x: fp32 or bf16, contiguous (R, K) on the CPU; blocks run along K. A block with NaN or Inf counts in
            ``left_out`` and nowhere else.
        x_hat: its reconstruction, of the same shape and dtype.
        scales: fp32, contiguous (R, blocks): what multiplies the elements of each block.
        spec: its format gives the block size and the grid.
        totals: fp64, of `FIELDS`, changed. It depends neither on the number of threads nor on how rows come in pieces.
        parts: whether the three parts of the error are wanted.
        columns: fp64 (2, K), changed: energies of x and of the error are added for each column. None to leave it out.

    Returns:
        fp64 (R, `FIELDS`): the same for each row alone.

    Raises:
        ValueError: an operand does not fit.
        RuntimeError: the path does not serve (`serves`).
    """
    library = _library()
    if library is None or not serves(x, spec):
        raise RuntimeError(f"no compiled sums for {x.dtype} on {x.device} in {spec}: {native.status()}")
    block, element = spec.block_format, spec.block_format.element
    blocks = -(-x.shape[-1] // block.block_size)
    for name, tensor, shape, dtype in (
        ("x", x, tuple(x.shape[:2]), x.dtype),
        ("x_hat", x_hat, tuple(x.shape), x.dtype),
        ("scales", scales, (x.shape[0], blocks), torch.float32),
        ("totals", totals, (len(FIELDS),), torch.float64),
        *([] if columns is None else [("columns", columns, (2, x.shape[-1]), torch.float64)]),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
    per_row = torch.empty(x.shape[0], len(FIELDS), dtype=torch.float64)
    library.qnoise_error_sums(
        _plan(x.dtype, block.block_size, element.mantissa_bits, element.emin, parts, element.max),
        x.data_ptr(),
        x_hat.data_ptr(),
        scales.data_ptr(),
        *x.shape,
        per_row.data_ptr(),
        None if columns is None else columns.data_ptr(),
        totals.data_ptr(),
        min(torch.get_num_threads(), 1 + x.numel() // _ELEMENTS_PER_THREAD),
    )
    return per_row


def values_from(x_hat: Tensor, per_row: Tensor, least: float) -> dict[float, int] | None:
    """How often each magnitude that is at least ``least`` occurs in ``x_hat``; None if they are more than 64.

    Args:
        x_hat: what :func:`add` was given.
        per_row: what it returned.
        least: a positive number; it is rounded up to fp32.
    """
    library = _library()
    if library is None:
        raise RuntimeError(f"no compiled sums: {native.status()}")
    bound = torch.tensor(least, dtype=torch.float32)
    if bound.item() < least:
        bound = torch.nextafter(bound, torch.tensor(torch.inf))
    values, counts = torch.empty(_ROOM, dtype=torch.float32), torch.empty(_ROOM, dtype=torch.int64)
    found = library.qnoise_values_from(
        _DTYPES[x_hat.dtype],
        x_hat.data_ptr(),
        *x_hat.shape,
        per_row.data_ptr(),
        bound.item(),
        values.data_ptr(),
        counts.data_ptr(),
        _ROOM,
    )
    return None if found < 0 else dict(zip(values[:found].tolist(), counts[:found].tolist(), strict=True))


@lru_cache(maxsize=256)
def _plan(dtype: torch.dtype, block_size: int, mantissa_bits: int, emin: int, parts: bool, largest: float) -> Any:
    return ctypes.byref(_Plan(_DTYPES[dtype], block_size, mantissa_bits, emin, parts, largest))


def _library() -> ctypes.CDLL | None:
    if not native.available():
        return None
    if not _loaded:
        with _lock:
            if not _loaded:
                try:
                    _loaded.append(compiled(_SOURCE, _bind)[0])
                except OSError:
                    _loaded.append(None)  # a compiler without vector extensions: PyTorch serves
    return _loaded[0]


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    address, size = ctypes.c_void_p, ctypes.c_int64
    sums, values = library.qnoise_error_sums, library.qnoise_values_from
    plan = ctypes.POINTER(_Plan)
    sums.argtypes = [plan, address, address, address, size, size, address, address, address, ctypes.c_int]
    sums.restype = None
    values.argtypes = [ctypes.c_int, address, size, size, address, ctypes.c_float, address, address, size]
    values.restype = size
    return library
