"""Weights that several processes hold together: how they are recognised, and what is refused.

Under `fully_shard` a module's parameter is its shard (a DTensor) between forwards, and during its forward an ordinary
tensor gathered from all ranks. Whatever else divides a weight is refused by name: a block, or a scale of the whole
matrix, would need what other ranks hold.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

_SHARD = "Patch the whole model first, then shard it: patch_model -> PEFT -> fully_shard."


def is_sharded(parameter: object) -> bool:
    """Whether each rank holds a part of it (DTensor)."""
    return hasattr(parameter, "device_mesh")


@torch.no_grad()
def local_part(shard: Any) -> Tensor:
    """What this rank holds of a sharded parameter: the tensor itself, whose version counter tells of writes."""
    return cast(Tensor, shard.to_local())


def largest_over_ranks(shard: Any, peak: Tensor) -> Tensor:
    """The largest of the ranks' values, 0-d; a collective over the mesh of the sharded parameter."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = shard.device_mesh
    return DTensor.from_local(peak.to(mesh.device_type), mesh, [Partial("max")] * mesh.ndim).full_tensor()


def check_whole_model(model: nn.Module) -> None:
    """Raise ValueError if the model is divided in a way that hides its parameters from their modules."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1), which keeps the weights in flat "
                f"parameters of its own. {_SHARD} With accelerate that is fsdp_version: 2."
            )


def check_whole(parameter: object, name: str) -> None:
    """Raise ValueError if this process holds only a part of a parameter that is to be converted."""
    if is_sharded(parameter):
        raise ValueError(f"{name} is sharded already (DTensor). {_SHARD} Tensor parallelism is not supported.")
    if hasattr(parameter, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported. {_SHARD}")


def check_gathered(weight: object, name: str) -> None:
    """Raise ValueError if what is to be quantized now is a part of a parameter."""
    if is_sharded(weight):
        raise ValueError(
            f"{name} is sharded (DTensor) here. fully_shard gathers it for the forward; outside, call unshard() of the "
            "module it was applied to. Tensor parallelism is not supported."
        )
    if hasattr(weight, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported. {_SHARD}")
