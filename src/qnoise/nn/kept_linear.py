"""A linear served from the cache, as an operator that compiled code can call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from qnoise.nn.effective import kept_weight
from qnoise.nn.linear_record import LinearRecord
from qnoise.nn.patched import autocast_dtype, record_of

# What compiled code calls for a linear served from the cache. The look-up happens when it runs: a write to the weight
# is seen as it is without a compiler, and the compiler cannot take the kept Q(W) for memory of its own.
torch.library.define(
    "qnoise::kept_linear",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor[] peers, Tensor handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.define(
    "qnoise::kept_linear_backward",
    "(Tensor grad, Tensor weight, Tensor[] peers, Tensor handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def kept_linear(record: LinearRecord, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    peers = [w for w in [peer._parameters.get("weight") for peer in record.scale_group] if w is not None]
    input, bias = autocast(input, bias)
    return cast(Tensor, torch.ops.qnoise.kept_linear(input, weight, bias, peers, record.handle))


@torch.library.impl("qnoise::kept_linear", "CompositeExplicitAutograd")
def _kept_linear_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, peers: list[Tensor], handle: Tensor
) -> Tensor:
    kept = kept_weight(cast(LinearRecord, record_of(handle)), weight)
    return F.linear(input, kept.to(input.dtype), bias)


@torch.library.impl("qnoise::kept_linear_backward", "CompositeExplicitAutograd")
def _kept_linear_backward(grad: Tensor, weight: Tensor, peers: list[Tensor], handle: Tensor) -> Tensor:
    kept = kept_weight(cast(LinearRecord, record_of(handle)), weight)
    return grad @ kept.to(grad.dtype)


@torch.library.register_fake("qnoise::kept_linear")
def _kept_linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, peers: list[Tensor], handle: Tensor
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("qnoise::kept_linear_backward")
def _kept_linear_backward_fake(grad: Tensor, weight: Tensor, peers: list[Tensor], handle: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, peers, handle = inputs
    ctx.save_for_backward(weight, handle, *peers)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, list[None], None]:
    weight, handle, *peers = ctx.saved_tensors
    of_input = of_bias = None
    if ctx.needs_input_grad[0]:
        of_input = torch.ops.qnoise.kept_linear_backward(grad, weight, peers, handle)
    if ctx.needs_input_grad[2]:
        of_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return of_input, None, of_bias, [None] * len(peers), None


torch.library.register_autograd("qnoise::kept_linear", _gradients, setup_context=_save_for_backward)


def autocast(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What autocast makes of the operands of a linear: for code that does not call one."""
    dtype = autocast_dtype(input.device)
    if dtype is None or input.dtype == torch.float64:
        return input, bias
    return input.to(dtype), None if bias is None else bias.to(dtype)
