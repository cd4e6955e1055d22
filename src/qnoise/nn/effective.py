"""The weight a forward uses, computed or kept: Q(W), Q(W (1 + sigma z)), or pinned codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qnoise.functional import fake_quantize
from qnoise.nn import weight_cache
from qnoise.nn.linear_record import LinearRecord, named
from qnoise.nn.patched import noise_of, unit_noise_of
from qnoise.nn.pinning import check_pinned
from qnoise.nn.sharding import check_gathered
from qnoise.nn.shared_scale import joint_amax, peers_amax
from qnoise.ops import fake_quantize_noisy, fuses_noise

if TYPE_CHECKING:
    from qnoise.nn.linear import FakeQuantLinear


class StraightThrough(torch.autograd.Function):
    """A kept Q(W) with the gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def trained(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def kept_is_right(record: LinearRecord, weight: Tensor) -> bool:
    """Whether a forward done now is served from the cache."""
    if record.full_precision or (record.weight_spec is None and not record.acts):
        return False
    if record.pin is not None:
        return not record.shards
    if record.shards:
        return False
    return record.storage == "cached" or (record.storage == "auto" and not trained(weight))


def kept_weight(record: LinearRecord, weight: Tensor) -> Tensor:
    """Q(W), made if the cache has none."""
    if record.pin is not None:
        return weight_cache.derived(weight, slot=record.pin, key=None, compute=lambda w: effective_weight(record, w))
    group = record.scale_group
    peers = tuple([_serial(peer) for peer in group if peer._qnoise is not record]) if group else ()
    noise = record.noise if record.acts else None
    return weight_cache.derived(
        weight,
        slot=record.weight_spec,
        key=(noise, record.name if noise else None, peers),
        compute=lambda w: effective_weight(record, w),
    )


def effective_weight(record: LinearRecord, weight: Tensor) -> Tensor:
    """Q(W) or Q(W (1 + sigma z)), computed."""
    spec = record.weight_spec
    if record.full_precision:
        return weight
    if not torch.compiler.is_compiling():
        check_gathered(weight, f"{named(record)}.weight")
    if record.pin is not None:
        check_pinned(record, weight)
        return record.pin.quantized.to(weight.device).dequantize(weight.dtype)
    if record.acts and spec is not None and not trained(weight) and fuses_noise(weight, spec):
        z = unit_noise_of(record, weight)
        return fake_quantize_noisy(weight, spec, z, record.sigma, peers_amax(record, weight))
    used = _with_relative_noise(weight, record) if record.acts else weight
    if spec is None:
        return used
    return fake_quantize(used, spec, amax=joint_amax(record, weight, used))


def _serial(peer: FakeQuantLinear) -> int | None:
    weight = peer._parameters.get("weight")
    return None if weight is None else weight_cache.serial(weight)


def _with_relative_noise(weight: Tensor, record: LinearRecord) -> Tensor:
    """W (1 + sigma z) in fp32, one z per weight."""
    noise = noise_of(record, weight)
    return (weight.to(noise.dtype) * (1.0 + noise)).to(weight.dtype)
