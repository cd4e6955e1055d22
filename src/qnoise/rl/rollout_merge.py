"""LoRA added to the weights while a rollout lasts: one product a linear and token where there were three.

Decoding goes through every linear once a token with few rows, so that the two thin products of a LoRA cost as much time
as the base they are added to. The weights do not change inside a rollout; so W + s B A is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import active_adapters, adapter_bias, is_adapted, merged_weight

SMALL = 2**28
"""Bytes of merged weights up to which nobody has to ask for them."""


@contextmanager
def adapters_merged(model: nn.Module, wanted: bool | None) -> Iterator[None]:
    """Inside, the linears of the model compute with one weight that has the active LoRA in it; then all is as before.

    Parameters are not touched. A layer stays as it is where the forward is more than F.linear(x, W) + s B A x: another
    kind of adapter, a quantized input, hooks inside it, weights that are sharded or offloaded; and all of them do where
    a compiled graph or autocast would see something else than it did.

    Args:
        wanted: True merges what can be, rounded to the dtype of the base; None only where that loses nothing (fp32) and
            takes at most `SMALL` bytes; False nothing.
    """
    layers: list[Any] = [] if wanted is False or _out_of_reach(model) else list(filter(_mergeable, model.modules()))
    if wanted is None:
        exact = all(_weight_dtype(layer) == torch.float32 for layer in layers)
        if not exact or sum(4 * layer.in_features * layer.out_features for layer in layers) > SMALL:
            layers = []
    merged: list[nn.Module] = []
    try:
        for layer in layers:
            if adapters := active_adapters(layer, "adapter"):
                weight = merged_weight(layer, adapters, _used(layer.base_layer))
                layer.__dict__["forward"] = partial(_forward, weight, layer.base_layer.bias)
                merged.append(layer)
        yield
    finally:
        for layer in merged:
            del layer.__dict__["forward"]


def _forward(weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    return F.linear(input, weight, bias)


def _used(base: Any) -> Tensor:
    """The weight the forward of the base computes with."""
    effective = getattr(base, "effective_weight", None)
    return effective() if callable(effective) else base.weight


def _weight_dtype(layer: Any) -> torch.dtype | None:
    weight = layer.base_layer._parameters.get("weight")
    return None if weight is None else weight.dtype


def _out_of_reach(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule" or any(
        torch.is_autocast_enabled(device) for device in {parameter.device.type for parameter in model.parameters()}
    )


def _mergeable(layer: Any) -> bool:
    """Whether it is a plain LoRA on a plain linear, of which each part computes nothing else and is at hand."""
    if not is_adapted(layer) or layer.merged_adapters or layer.disable_adapters:
        return False
    base = layer.base_layer
    if not isinstance(base, nn.Linear) or is_adapted(base) or getattr(layer, "fan_in_fan_out", False):
        return False
    if not hasattr(layer, "lora_A") or not callable(getattr(layer, "get_delta_weight", None)):
        return False
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    others = [name for name in layer.adapter_layer_names if not name.startswith("lora_") and len(getattr(layer, name))]
    if not active or others or any(adapter in getattr(layer, "lora_variant", {}) for adapter in active):
        return False
    if any(adapter_bias(layer, adapter) is not None for adapter in active):
        return False
    record: Any = base.__dict__.get("_qnoise")
    if getattr(record, "act_spec", None) is not None and not record.full_precision:
        return False
    inside = [base, *(part for adapter in active for part in (layer.lora_A[adapter], layer.lora_B[adapter]))]
    return all(map(_is_plain, inside)) and "forward" not in layer.__dict__


def _is_plain(module: nn.Module) -> bool:
    """Without hooks, with a forward of its class, and with ordinary tensors that are there."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        and not hasattr(module, "parametrizations")
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" for t in tensors if t is not None)
    )
