"""The amax that fixes a per-tensor scale: of one weight, or of siblings that share the scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.functional import rotate
from qnoise.nn import weight_cache
from qnoise.nn.linear_record import LinearRecord
from qnoise.nn.sharding import is_sharded, largest_over_ranks, local_part
from qnoise.ops import tensor_amax

if TYPE_CHECKING:
    from qnoise.nn.linear import FakeQuantLinear


def joint_amax(record: LinearRecord, weight: Tensor, used: Tensor | None = None) -> Tensor | None:
    """What fixes the per-tensor scale the linear shares with its siblings; None: the weight's own amax, or no such
    scale. `used` is the weight with its noise."""
    peers = peers_amax(record, weight)
    if peers is None:
        return None
    spec = record.weight_spec
    own = amax_of(record, weight, weight.dtype) if used is None or used is weight else weight_amax(used, spec)
    return torch.maximum(own, peers)


def peers_amax(record: LinearRecord, weight: Tensor) -> Tensor | None:
    """The largest amax among the siblings, without the linear itself; None: no shared scale."""
    spec = record.weight_spec
    if spec is None or not spec.per_tensor_scale or len(record.scale_group) < 2:
        return None
    each = [_peer_amax(peer, weight.dtype) for peer in record.scale_group if peer._qnoise is not record]
    return torch.stack([amax.to(weight.device) for amax in each]).amax() if each else None


def weight_amax(weight: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """max |w| over the finite values, 0-d fp32: what fixes a per-tensor scale. With a spec that rotates, that of the
    rotated weight."""
    if type(weight) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and weight.device.type != "meta":
        return tensor_amax(weight, spec)
    magnitude = turned(weight.detach(), spec).abs().float()
    return magnitude.nan_to_num_(nan=0.0, posinf=0.0).amax() if weight.numel() else magnitude.new_zeros(())


def kept_amax(weight: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """`weight_amax`, computed once for each change of the weight."""
    if torch.compiler.is_compiling():
        return weight_amax(weight, spec)
    if spec is None or spec.rotation is None:
        return weight_cache.derived(weight, slot="amax", key=None, compute=weight_amax)
    slot = ("amax", spec.rotation, spec.block_format.block_size)
    return weight_cache.derived(weight, slot=slot, key=None, compute=lambda w: weight_amax(w, spec))


def turned(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """What `spec` quantizes: x, or x rotated."""
    return x if spec is None or spec.rotation is None else rotate(x, spec)


def _peer_amax(peer: FakeQuantLinear, dtype: torch.dtype) -> Tensor:
    weight = peer._parameters.get("weight")
    reachable = weight is not None and (torch.compiler.is_compiling() or weight_cache.cacheable(weight))
    if weight is not None and (reachable or is_sharded(weight)):
        return amax_of(peer._qnoise, weight, dtype)
    if peer._qnoise.patched_amax is None:
        raise ValueError(
            f"{peer._qnoise.name}: its weight is out of reach (offloaded) and its amax was not recorded, "
            "so the per-tensor scale it shares with its siblings is unknown. Patch before offloading, or patch with "
            "PatchConfig(share_scales=False)."
        )
    return peer._qnoise.patched_amax


def amax_of(record: LinearRecord, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The amax of a linear's weight in that dtype, computed once for each change of the weight."""
    spec, shard = record.weight_spec, record.shards.get("weight")
    if shard is None or torch.compiler.is_compiling():
        return kept_amax(weight, spec)
    # The memory a weight is gathered into says nothing of its changes; the shard does, on all ranks at once.
    return weight_cache.derived(
        local_part(shard),
        slot=("amax", spec, dtype),
        key=None,
        compute=lambda part: (
            largest_over_ranks(shard, weight_amax(part.to(dtype), spec))
            if is_sharded(weight)
            else weight_amax(weight, spec)
        ),
    )
