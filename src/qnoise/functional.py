"""The public door to the numerics: checked arguments, straight-through gradients, generators.

What is computed, and in which order, is told in ``reference.py``; who computes it on which device, in ``ops.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401  (defines torch.ops.qnoise)
from .formats import QuantSpec, as_spec, canonical_rounding
from .packing import BlockQuantized
from .philox import seed_from
from .reference import check_storable, rotated_blocks

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fake_quantize(
    x: Tensor,
    fmt: str | QuantSpec,
    scale_mode: str | None = None,
    *,
    axis: int = -1,
    rounding: str | None = None,
    generator: torch.Generator | None = None,
    amax: Tensor | float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize ``x`` to a block-scaled format and dequantize it again, with a straight-through gradient.

    The forward value is ``code * scale`` computed in fp32 and cast once; the gradient passes as through the
    identity.

    Args:
        x: float64 (rounded to float32 first), float32, bfloat16 or float16; any shape, stride and device,
            empty and 0-d too. Integers are refused.
        fmt: a format name or a :class:`QuantSpec`.
        scale_mode: rule for the block scale; None for the one of the spec, or the format's default.
        axis: the axis the blocks lie along (for a weight or an activation: the contraction axis). A length
            that is not a multiple of the block size leaves a short last block.
        rounding: ``"nearest"`` (ties to even; ``"even"`` is a synonym), ``"half_away"`` or
            ``"stochastic"``; None for the one of the spec, or nearest.
        generator: source of randomness for stochastic rounding, unused otherwise; None for torch's default
            CPU generator. Two numbers are drawn from it in each call. In a function under ``torch.compile`` the
            default generator draws anew in each call, as in eager mode; one that is given breaks the graph.
        amax: for formats with a per-tensor scale (NVFP4), the largest magnitude that scale is fixed by: a
            number, a 0-d tensor, or a tensor broadcastable to ``x``'s shape with ``axis`` reduced to 1 (a
            scale per token). Must be >= 0; a negative or NaN entry gives NaN. None: the largest finite
            magnitude of ``x``. For a spec that rotates, this is about the rotated ``x`` (:func:`rotate`): a number
            taken from ``x`` itself is another scale.
        out: written and returned if given; must have ``x``'s shape, dtype and device. May be ``x`` itself.

    Returns:
        Tensor of ``x``'s shape, dtype and device (contiguous, or ``out``).

    Nothing of the size of ``x`` is allocated but the result, unless ``x`` is not contiguous or ``axis`` is not the
    last: then the blocks are copied to where they lie in a row, and back.

    Raises:
        TypeError: ``x`` is not a floating-point tensor of a dtype above, or ``fmt`` is neither a name nor a
            spec.
        ValueError: an unknown name; a ``scale_mode`` or ``rounding`` that contradicts a given spec; an
            ``amax`` for a format or mode without a per-tensor scale, or of a wrong shape; an ``out`` that
            does not fit, or that is given while gradients of ``x`` are recorded.
        IndexError: no such ``axis``.
    """
    spec = _resolve(fmt, scale_mode, rounding)
    _check_input(x, axis)
    reduced = _check_amax(amax, x, axis, spec)
    if out is not None:
        _check_out(out, x)
    seed, offset = seed_from(generator) if spec.rounding == "stochastic" else (0, 0)
    arguments = (x, spec.fmt, spec.scale_mode, spec.rounding, axis, reduced, seed, offset)
    around = () if spec.plain else (spec.macro_block, spec.residual, spec.rotation)
    if out is None:
        if _in_transform(x):
            return _StraightThrough.apply(*arguments, *around)
        return torch.ops.qnoise.fake_quantize.default(*arguments, *around)
    torch.ops.qnoise.fake_quantize_out.default(*arguments, out, *around)
    return out


def quantize(
    x: Tensor,
    fmt: str | QuantSpec,
    scale_mode: str | None = None,
    *,
    axis: int = -1,
    rounding: str | None = None,
    generator: torch.Generator | None = None,
    amax: Tensor | float | None = None,
) -> BlockQuantized:
    """Quantize ``x`` to packed codes and block scales; ``.dequantize()`` equals :func:`fake_quantize` bit
    for bit.

    No gradient is recorded. Arguments and errors are those of :func:`fake_quantize`. With a rotation the codes are
    those of the rotated ``x``, and ``dequantize`` turns the values back.

    Returns:
        A :class:`BlockQuantized` on ``x``'s device.

    Raises:
        ValueError: a spec with ``macro_block`` or ``residual``, which packed codes and scales have no place for.
    """
    spec = _resolve(fmt, scale_mode, rounding)
    check_storable(spec)
    _check_input(x, axis)
    reduced = _check_amax(amax, x, axis, spec)
    seed, offset = seed_from(generator) if spec.rounding == "stochastic" else (0, 0)
    with torch.no_grad():
        codes, scale_codes, divisor = torch.ops.qnoise.quantize.default(
            x, spec.fmt, spec.scale_mode, spec.rounding, axis, reduced, seed, offset, spec.rotation
        )
    return BlockQuantized(
        codes,
        scale_codes,
        divisor if spec.block_format.per_tensor_scale else None,
        x.shape,
        spec,
        axis % max(x.ndim, 1),
        x.dtype,
    )


def rotate(x: Tensor, fmt: str | QuantSpec, *, axis: int = -1) -> Tensor:
    """``x`` in the basis in which ``fmt`` quantizes it: fp32, with ``axis`` last and padded with zeros to whole blocks.

    Its magnitudes are what ``amax=`` of a spec with ``rotation`` is about; without a rotation they are those of ``x``.
    Differentiable, and of any floating-point dtype and shape.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``fmt`` is neither a name nor a spec.
        IndexError: no such ``axis``.
    """
    _check_input(x, axis)
    return rotated_blocks(x, as_spec(fmt), axis).flatten(-2)


class _StraightThrough(torch.autograd.Function):
    """The operator for ``torch.func`` transforms, which do not find the gradient that it has by itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.qnoise.fake_quantize.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * (len(ctx.needs_input_grad) - 1)


def _in_transform(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def _resolve(fmt: str | QuantSpec, scale_mode: str | None, rounding: str | None) -> QuantSpec:
    if rounding is not None:
        rounding = canonical_rounding(rounding)
    if isinstance(fmt, str):
        return QuantSpec(fmt, scale_mode, rounding or "nearest")
    spec = as_spec(fmt)
    for name, given, own in (
        ("scale_mode", scale_mode, spec.scale_mode),
        ("rounding", rounding, spec.rounding),
    ):
        if given is not None and given != own:
            raise ValueError(
                f"{name}={given!r} contradicts the given spec, which has {name}={own!r}; "
                f"leave {name} out, or pass the format's name {spec.fmt!r}"
            )
    return spec


def _check_input(x: Tensor, axis: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(d) for d in _DTYPES)
        raise TypeError(f"cannot quantize a tensor of {x.dtype}; convert it to one of: {allowed}")
    rank = max(x.ndim, 1)
    if not -rank <= axis < rank:
        raise IndexError(f"axis={axis} is out of range for shape {tuple(x.shape)}; choose from {-rank} to {rank - 1}")


def _check_amax(amax: Tensor | float | None, x: Tensor, axis: int, spec: QuantSpec) -> Tensor | None:
    """``amax`` as fp32 on ``x``'s device, 0-d or of ``x``'s shape with ``axis`` reduced to 1."""
    if amax is None:
        return None
    if not spec.per_tensor_scale:
        raise ValueError(
            f"format {spec.fmt!r} with scale_mode={spec.scale_mode!r} has no per-tensor scale "
            "that amax could fix; leave amax out"
        )
    tensor = torch.as_tensor(amax, device=x.device).detach().to(torch.float32)
    if tensor.ndim == 0 or x.ndim == 0:
        if tensor.numel() != 1:
            raise ValueError(f"amax of shape {tuple(tensor.shape)} does not fit a 0-d x; give one number")
        return tensor.reshape(())
    reduced = list(x.shape)
    reduced[axis] = 1
    try:
        return tensor if list(tensor.shape) == reduced else tensor.expand(reduced)
    except RuntimeError:
        raise ValueError(
            f"amax of shape {tuple(tensor.shape)} does not broadcast to {tuple(reduced)}, "
            f"the shape {tuple(x.shape)} of x with its block axis {axis} reduced to 1"
        ) from None


def _check_out(out: Tensor, x: Tensor) -> None:
    for name, has, needs in (
        ("shape", tuple(out.shape), tuple(x.shape)),
        ("dtype", out.dtype, x.dtype),
        ("device", out.device, x.device),
    ):
        if has != needs:
            raise ValueError(f"out has {name} {has}, but x has {name} {needs}; they must be equal")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out= cannot record gradients; leave it out, or call under torch.no_grad()")
