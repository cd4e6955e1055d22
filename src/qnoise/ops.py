"""The operators ``torch.ops.qnoise.*``, and which backend serves them on which device.

    fake_quantize(Tensor x, str fmt, str scale_mode, str rounding, int axis, Tensor? amax, SymInt seed, SymInt offset,
        int? macro_block=None, float? residual=None, str? rotation=None) -> Tensor
    fake_quantize_out(the same up to offset, Tensor(a!) out, the other three) -> ()
    quantize(the same as fake_quantize up to offset, str? rotation=None)
        -> (Tensor codes, Tensor scales, Tensor divisor)
    dequantize(Tensor codes, Tensor scales, Tensor divisor, str fmt, str scale_mode, SymInt[] shape, int axis,
        ScalarType dtype, str? rotation=None) -> Tensor

They check nothing: ``functional.py`` is the public door. ``amax`` is fp32, 0-d or of ``x``'s shape with ``axis``
reduced to 1, of the rotated ``x`` where there is a rotation. ``seed`` and ``offset`` are read by stochastic rounding
only. ``scales`` are bytes; ``divisor`` is fp32, 0-d or (..., 1), and of shape (0,) for formats with E8M0 scales.
``out`` may be ``x`` itself. Only ``fake_quantize`` has a gradient: that of the identity (Bengio et al., arXiv
1308.3432).

The blocks of a backend run along the rows of a contiguous matrix. An input that is not laid out so is copied once: a
strided one into the output, one whose block axis is not the last into a transposed buffer of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import QuantSpec
from .kernels import chunked, native
from .reference import amax_of
from .scales import per_tensor_divisor


class Backend(NamedTuple):
    """The functions of one backend, on rows; ``kernels/chunked.py`` tells their arguments."""

    fake_quantize_rows: Callable[[Tensor, QuantSpec, Tensor | None, tuple[int, int] | None, Tensor], None]
    quantize_rows: Callable[[Tensor, QuantSpec, Tensor | None, tuple[int, int] | None, Tensor, Tensor], None]
    dequantize_rows: Callable[[Tensor, Tensor, Tensor | None, QuantSpec, Tensor], None]
    tensor_amax: Callable[[Tensor], Tensor]
    rotated_amax: Callable[[Tensor, QuantSpec], Tensor]


_CHUNKED, _NATIVE = (
    Backend(
        module.fake_quantize_rows,
        module.quantize_rows,
        module.dequantize_rows,
        module.tensor_amax,
        module.rotated_amax,
    )
    for module in (chunked, native)
)
_TRITON_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = "Tensor x, str fmt, str scale_mode, str rounding, int axis, Tensor? amax, SymInt seed, SymInt offset"
_ROTATION = "str? rotation=None"
_AROUND = f"int? macro_block=None, float? residual=None, {_ROTATION}"
_LIBRARY = torch.library.Library("qnoise", "FRAGMENT")
_LIBRARY.define(f"fake_quantize({_ARGUMENTS}, {_AROUND}) -> Tensor")
_LIBRARY.define(f"fake_quantize_out({_ARGUMENTS}, Tensor(a!) out, {_AROUND}) -> ()")
_LIBRARY.define(f"quantize({_ARGUMENTS}, {_ROTATION}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "dequantize(Tensor codes, Tensor scales, Tensor divisor, str fmt, str scale_mode, SymInt[] shape, int axis, "
    f"ScalarType dtype, {_ROTATION}) -> Tensor"
)


def backend(device: torch.device | str) -> str:
    """Which code serves tensors on ``device``, and why no faster one does: a sentence for people."""
    kind = torch.device(device).type
    if kind == "cpu":
        served = "compiled C" if native.available() else "chunked PyTorch"
        return f"{served} ({native.status()})"
    if kind == "cuda":
        kernels, reason = _triton()
        return "Triton kernels" if kernels is not None else f"chunked PyTorch ({reason})"
    if kind == "meta":
        return "shapes only"
    return f"chunked PyTorch (no kernels for {kind})"


def triton_serves() -> bool:
    """Whether Triton kernels can be launched here: asked once, by launching one."""
    return _triton()[0] is not None


def _serving(device: torch.device, dtype: torch.dtype, spec: QuantSpec) -> Backend:
    if device.type == "cpu":
        if native.available() and native.supports(spec, dtype):
            return _NATIVE
    elif device.type == "cuda":
        kernels = _triton()[0]
        if kernels is not None and dtype in _TRITON_DTYPES and _triton_supports(spec):
            return kernels
    return _CHUNKED


@lru_cache
def _triton() -> tuple[Backend | None, str]:
    """The Triton kernels, or None and the reason."""
    try:
        from .kernels.gpu import amax, fake_quantize, pack, unpack

        amax.tensor_amax(torch.ones(1, device="cuda"))  # a first launch needs a compiler and a driver that fit
    except Exception as error:
        return None, f"Triton kernels do not run here: {type(error).__name__}: {error}"
    functions = (fake_quantize.fake_quantize_rows, pack.quantize_rows, unpack.dequantize_rows)
    return Backend(*functions, amax.tensor_amax, amax.rotated_amax), ""


@lru_cache(maxsize=256)
def _triton_supports(spec: QuantSpec) -> bool:
    from .kernels.gpu import launch

    return launch.supports(spec)


_spec = lru_cache(maxsize=1024)(QuantSpec)


def fake_quantize(
    x: Tensor,
    fmt: str,
    scale_mode: str,
    rounding: str,
    axis: int,
    amax: Tensor | None,
    seed: int,
    offset: int,
    macro_block: int | None = None,
    residual: float | None = None,
    rotation: str | None = None,
) -> Tensor:
    spec = _spec(fmt, scale_mode, rounding, macro_block, residual, rotation)
    if _is_rows(x, axis):
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        _run(_rows(x), spec, axis, amax, seed, offset, _rows(result))
        return result
    # A copy of our own, with the block axis last, is worked on in place.
    moved = x.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
    _run(_rows(moved), spec, axis, amax, seed, offset, _rows(moved))
    return moved.movedim(-1, axis).contiguous()


def fake_quantize_out(
    x: Tensor,
    fmt: str,
    scale_mode: str,
    rounding: str,
    axis: int,
    amax: Tensor | None,
    seed: int,
    offset: int,
    out: Tensor,
    macro_block: int | None = None,
    residual: float | None = None,
    rotation: str | None = None,
) -> None:
    around = (macro_block, residual, rotation)
    if _is_rows(x, axis) and _is_rows(out, axis) and not _overlap_askew(x, out):
        _run(_rows(x), _spec(fmt, scale_mode, rounding, *around), axis, amax, seed, offset, _rows(out))
    else:
        out.copy_(fake_quantize(x, fmt, scale_mode, rounding, axis, amax, seed, offset, *around))


def quantize(
    x: Tensor,
    fmt: str,
    scale_mode: str,
    rounding: str,
    axis: int,
    amax: Tensor | None,
    seed: int,
    offset: int,
    rotation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(fmt, scale_mode, rounding, None, None, rotation)
    moved = x if x.ndim == 0 else x.movedim(axis, -1)
    codes, scales, _ = _empty_quantized(x, spec, axis, amax)
    rows = _rows(moved.contiguous())
    serving = _serving(x.device, x.dtype, spec)
    divisor = _divisor(rows, spec, axis, amax, serving)
    pair = (seed, offset) if rounding == "stochastic" else None
    if rows.numel():
        serving.quantize_rows(rows, spec, _per_row(divisor), pair, _rows(codes), _rows(scales))
    if divisor is None:
        divisor = torch.empty(0, dtype=torch.float32, device=x.device)
    return codes, scales, divisor


def dequantize(
    codes: Tensor,
    scales: Tensor,
    divisor: Tensor,
    fmt: str,
    scale_mode: str,
    shape: Sequence[int],
    axis: int,
    dtype: torch.dtype,
    rotation: str | None = None,
) -> Tensor:
    spec = _spec(fmt, scale_mode, "nearest", None, None, rotation)
    moved = list(shape)
    if moved:
        moved.append(moved.pop(axis))
    result = torch.empty(moved, dtype=dtype, device=codes.device)
    if result.numel():
        gs = divisor if spec.block_format.per_tensor_scale else None
        serving = _serving(codes.device, dtype, spec)
        serving.dequantize_rows(
            _rows(codes.contiguous()), _rows(scales.contiguous()), _per_row(gs), spec, _rows(result)
        )
    return result.movedim(-1, axis).contiguous() if shape else result


def dequantize_rows(codes: Tensor, scales: Tensor, divisor: Tensor | None, spec: QuantSpec, out: Tensor) -> None:
    """The values of packed rows into ``out``, contiguous (R, K), by the backend that serves it. Eager only; the
    arguments are those of ``kernels/chunked.py``."""
    serving = _serving(out.device, out.dtype, spec)
    serving.dequantize_rows(codes.contiguous(), scales.contiguous(), divisor, spec, out)


def tensor_amax(x: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """max |x| over the finite elements, fp32 0-d, by the backend that serves ``x``; 0 if there is none. Eager only.

    With a ``spec`` that rotates, that of the rotated ``x``, with its blocks along the last axis: what fixes the
    per-tensor scale.
    """
    rows = _rows(x.detach().contiguous())
    return _amax(rows, spec or QuantSpec("nvfp4"), _serving(x.device, x.dtype, spec or QuantSpec("nvfp4")))


def fuses_noise(x: Tensor, spec: QuantSpec) -> bool:
    """Whether :func:`fake_quantize_noisy` takes ``x``: an ordinary tensor that the Triton kernels serve, eager."""
    return (
        x.device.type == "cuda"
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.is_contiguous()
        and x.dtype != torch.float64
        and spec.rounding != "stochastic"
        and _serving(x.device, x.dtype, spec) is _triton()[0]
    )


def fake_quantize_noisy(x: Tensor, spec: QuantSpec, z: Tensor, sigma: float, amax: Tensor | None = None) -> Tensor:
    """Q(x (1 + sigma z)) without the noisy tensor in memory; no gradient. For what :func:`fuses_noise`.

    Args:
        x: blocks along its last axis.
        z: fp32, of ``x``'s shape and device, contiguous.
        amax: 0-d fp32; the per-tensor scale is fixed by the larger of it and that of the noisy ``x``.
    """
    from .kernels.gpu import amax as maxima
    from .kernels.gpu.fake_quantize import fake_quantize_rows

    rows, noise = _rows(x.detach()), (_rows(z), sigma)
    own = None
    if spec.per_tensor_scale:
        own = maxima.rotated_amax(rows, spec, noise) if spec.rotation else maxima.tensor_amax(rows, noise)
        own = own if amax is None else torch.maximum(own, amax)
    result = torch.empty_like(rows)
    fake_quantize_rows(rows, spec, _divisor(rows, spec, -1, own, _CHUNKED), None, result, noise)
    return result.view(x.shape)


def _run(rows: Tensor, spec: QuantSpec, axis: int, amax: Tensor | None, seed: int, offset: int, out: Tensor) -> None:
    if not rows.numel():
        return
    serving = _serving(rows.device, rows.dtype, spec)
    divisor = _per_row(_divisor(rows, spec, axis, amax, serving))
    serving.fake_quantize_rows(rows, spec, divisor, (seed, offset) if spec.rounding == "stochastic" else None, out)


def _divisor(rows: Tensor, spec: QuantSpec, axis: int, amax: Tensor | None, serving: Backend) -> Tensor | None:
    """gs, 0-d or (..., 1) with the reduced axis last; None for E8M0."""
    if not spec.block_format.per_tensor_scale:
        return None
    if not spec.per_tensor_scale:
        return torch.ones((), dtype=torch.float32, device=rows.device)
    if amax is None:
        amax = _amax(rows, spec, serving)
    return per_tensor_divisor(amax if amax.ndim == 0 else amax.movedim(axis, -1), spec)


def _amax(rows: Tensor, spec: QuantSpec, serving: Backend) -> Tensor:
    return serving.tensor_amax(rows) if spec.rotation is None else serving.rotated_amax(rows, spec)


def _per_row(divisor: Tensor | None) -> Tensor | None:
    return divisor if divisor is None or divisor.ndim == 0 else divisor.reshape(-1)


def _is_rows(x: Tensor, axis: int) -> bool:
    return x.is_contiguous() and (x.ndim == 0 or axis in (-1, x.ndim - 1))


def _rows(x: Tensor) -> Tensor:
    """A contiguous tensor as (rows, length of its last axis)."""
    length = x.shape[-1] if x.ndim else 1
    return x.view(math.prod(x.shape[:-1]), length)


def _overlap_askew(x: Tensor, out: Tensor) -> bool:
    """Whether two contiguous tensors share memory, but not element for element: then writing to ``out`` would change
    elements of ``x`` that are still to be read."""
    return 0 < abs(x.data_ptr() - out.data_ptr()) < x.numel() * x.element_size()


def _empty_quantized(x: Tensor, spec: QuantSpec, axis: int, amax: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and divisor of the right shapes."""
    block_format = spec.block_format
    leading = list(x.shape)
    length = leading.pop(axis) if leading else 1
    blocks = -(-length // block_format.block_size)
    bytes_per_block = block_format.block_size * block_format.element.bits // 8
    codes = x.new_empty([*leading, blocks * bytes_per_block], dtype=torch.uint8)
    scales = x.new_empty([*leading, blocks], dtype=torch.uint8)
    if not block_format.per_tensor_scale:
        shape = [0]
    elif not spec.per_tensor_scale or amax is None or amax.ndim == 0:
        shape = []
    else:
        shape = [*leading, 1]
    return codes, scales, x.new_empty(shape, dtype=torch.float32)


def _fake_quantize_meta(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_quantize_out_meta(*_: Any) -> None:
    return None


def _quantize_meta(
    x: Tensor,
    fmt: str,
    scale_mode: str,
    rounding: str,
    axis: int,
    amax: Tensor | None,
    seed: int,
    offset: int,
    rotation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_quantized(x, _spec(fmt, scale_mode, rounding), axis, amax)


def _dequantize_meta(
    codes: Tensor,
    scales: Tensor,
    divisor: Tensor,
    fmt: str,
    scale_mode: str,
    shape: Sequence[int],
    axis: int,
    dtype: torch.dtype,
    rotation: str | None = None,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _pass_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, *[None] * 10


def _fake_quantize_batched(
    info: Any,
    in_dims: Sequence[int | None],
    x: Tensor,
    fmt: str,
    scale_mode: str,
    rounding: str,
    axis: int,
    amax: Tensor | None,
    seed: int,
    offset: int,
    macro_block: int | None = None,
    residual: float | None = None,
    rotation: str | None = None,
) -> tuple[Tensor, int]:
    """The rule of ``torch.vmap``: the batch becomes the first axis, and each example keeps its own per-tensor scale.
    Stochastic rounding draws other numbers for each example."""
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    numbers = x.ndim == 1
    if numbers:
        x, axis = x.unsqueeze(-1), -1
    axis = axis + 1 if axis >= 0 else axis
    around = (macro_block, residual, rotation)
    spec = _spec(fmt, scale_mode, rounding, *around)
    if spec.per_tensor_scale:
        if amax is None:
            amax = torch.stack([amax_of(example, spec, axis if axis < 0 else axis - 1) for example in x])
        elif in_dims[5] is not None:
            amax = amax.movedim(in_dims[5], 0)
        else:
            amax = amax.unsqueeze(0)
        reduced = list(x.shape)
        reduced[axis] = 1
        amax = amax.reshape(amax.shape[0], *(amax.shape[1:] or [1] * (x.ndim - 1))).expand(reduced)
    y = torch.ops.qnoise.fake_quantize.default(x, fmt, scale_mode, rounding, axis, amax, seed, offset, *around)
    return (y.squeeze(-1) if numbers else y), 0


for _function, _fake in (
    (fake_quantize, _fake_quantize_meta),
    (fake_quantize_out, _fake_quantize_out_meta),
    (quantize, _quantize_meta),
    (dequantize, _dequantize_meta),
):
    _LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qnoise::{_function.__name__}", _fake, lib=_LIBRARY)
torch.library.register_autograd("qnoise::fake_quantize", _pass_gradient, lib=_LIBRARY)
torch.library.register_vmap("qnoise::fake_quantize", _fake_quantize_batched, lib=_LIBRARY)
