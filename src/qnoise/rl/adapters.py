"""PEFT's layers read as what they compute: one weight and one bias, the active adapters added as they are trained.

The layers are known by their attributes; nothing of PEFT is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_adapted(module: nn.Module) -> bool:
    """Whether this is a PEFT layer around a module of the model (its `base_layer`)."""
    return "base_layer" in module._modules and hasattr(module, "adapter_layer_names")


def is_token_layer(layer: Any) -> bool:
    """Whether it trains rows of an embedding in place of adding to it."""
    return callable(getattr(layer, "get_merged_weights", None))


def active_adapters(layer: Any, name: str, wanted: bool = True) -> list[str]:
    """The adapters whose part a forward done now adds to the base; none if they are not `wanted`.

    Raises:
        ValueError: an adapter is merged into the base weight, but they are disabled or not wanted.
    """
    merged = getattr(layer, "merged_adapters", ())
    if merged and (layer.disable_adapters or not wanted):
        why = "the adapters are disabled" if layer.disable_adapters else "merge_adapters=False asks for the base alone"
        raise ValueError(
            f"{name}: {why}, but adapter {merged[0]!r} is merged into the weight; call unmerge_adapter() first"
        )
    if merged or layer.disable_adapters or not wanted:
        return []
    known = {adapter for attribute in layer.adapter_layer_names for adapter in getattr(layer, attribute)}
    return [adapter for adapter in layer.active_adapters if adapter in known]


def check_mergeable(layer: Any, adapter: str, name: str) -> None:
    """Raise ValueError unless the adapter can be added to the weight so that the forward stays the same.

    It can for LoRA on linears, embeddings and convolutions, and for DoRA on linears.
    """
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    known = hasattr(layer, "lora_A") and callable(getattr(layer, "get_delta_weight", None))
    # PEFT's layers around a single parameter and around attention add to something else than `base_layer.weight`.
    known = known and not hasattr(layer, "parameter_name") and not hasattr(layer.base_layer, "in_proj_weight")
    if variant is not None:
        dora = adapter in getattr(layer, "lora_magnitude_vector", {}) and type(variant).__name__.startswith("Dora")
        known = known and dora and adapter in layer.lora_A and layer.lora_A[adapter].weight.dim() == 2
    if not known or is_adapted(layer.base_layer):
        raise ValueError(
            f"{name}: adapter {adapter!r} is a {type(variant or layer).__name__} of {type(layer).__module__}, which "
            "cannot be merged here as it is trained (LoRA on linears, embeddings and convolutions can, and DoRA on "
            "linears). Use merge_adapters=False and the engine's own support for adapters."
        )
    if adapter_bias(layer, adapter) is not None and layer.base_layer.bias is None:
        raise ValueError(
            f"{name}: adapter {adapter!r} has a bias (lora_bias=True), but the stock module has none to add it to; use "
            "merge_adapters=False"
        )


def adapter_bias(layer: Any, adapter: str) -> Tensor | None:
    """The bias of the adapter's B."""
    return getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None


def merged_weight(layer: Any, adapters: list[str], base: Tensor) -> Tensor:
    """`base` with the adapters added one after the other, as the forward of PEFT does; dtype of `base`.

    LoRA: W + s B A. DoRA: (W + s B A) · m / ‖W_raw + s B A‖ with a norm for each output (arXiv 2402.09353, eq. 5).
    """
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for adapter in adapters:
        delta = layer.get_delta_weight(adapter).to(total)
        factor = _dora_factor(layer, adapter, delta)
        total = total + delta
        if factor is not None:
            total = total * (factor if _stored_transposed(layer) else factor[:, None])
    return total.to(base.dtype)


def merged_bias(layer: Any, adapters: list[str], base: Tensor) -> Tensor:
    """`base` with the biases of the adapters added; dtype of `base`."""
    # DoRA scales what the adapters before it have added, and leaves the bias of the base as it is.
    shift = torch.zeros_like(base, dtype=torch.promote_types(base.dtype, torch.float32))
    for adapter in adapters:
        bias = adapter_bias(layer, adapter)
        if bias is not None:
            shift = shift + bias.to(shift) * layer.scaling[adapter]
        factor = _dora_factor(layer, adapter, layer.get_delta_weight(adapter).to(shift))
        if factor is not None:
            shift = shift * factor
    return (base.to(shift) + shift).to(base.dtype)


def _dora_factor(layer: Any, adapter: str, delta: Tensor) -> Tensor | None:
    """(out_features,) what DoRA multiplies the outputs by; None for plain LoRA."""
    if adapter not in getattr(layer, "lora_magnitude_vector", {}):
        return None
    base = layer.base_layer
    raw = base._parameters.get("weight")
    raw = (base.weight if raw is None else raw).to(delta)
    norm = torch.linalg.norm(raw + delta, dim=0 if _stored_transposed(layer) else 1)
    return layer.lora_magnitude_vector[adapter].weight.to(norm) / norm


def _stored_transposed(layer: Any) -> bool:
    """Whether the weight is (in, out), as in GPT-2's `Conv1D`."""
    return bool(getattr(layer, "fan_in_fan_out", False))
