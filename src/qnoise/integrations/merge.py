"""Merging an adapter into a quantized base, in the two ways there are.

Q(W) + BA is what was trained. Q(W + BA) is what a 4-bit format can hold of it. They are different models, and how far
apart is measured here for every linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.functional import quantize
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.packing import BlockQuantized
from qnoise.patch import quiet, unpatch_model
from qnoise.rl.adapters import active_adapters, is_adapted, merged_weight
from qnoise.rl.weights import rollout_weights
from qnoise.spelling import check_choice


@torch.no_grad()
def merge(model: nn.Module, mode: str = "as_trained") -> tuple[nn.Module, dict[str, float]]:
    """Merge the active adapters of a patched PEFT model, which is used up.

    Args:
        model: a PEFT model whose base is patched, in either order.
        mode: "as_trained" gives a stock model that holds Q(W) + BA: what was trained, in full precision. "requantized"
            gives a patched model on W + BA, whose forward uses Q(W + BA): what the format can hold.

    Returns:
        The merged model without PEFT, and ||Q(W + BA) - (Q(W) + BA)|| / ||Q(W) + BA|| of every linear whose codes an
        adapter changes; empty where packed or pinned codes do not come from W, and "requantized" is refused.

    Raises:
        TypeError: `model` is no PEFT model.
        ValueError: unknown mode; an adapter that cannot be merged as trained; "requantized" of packed or pinned codes.
    """
    check_choice("mode", mode, ("as_trained", "requantized"))
    if not hasattr(model, "merge_and_unload"):
        raise TypeError(f"merge takes a PEFT model, not {type(model).__name__}; there is no adapter to merge")
    peft: Any = model
    inner = peft.get_base_model()
    linears = {
        canonical_name(name): m
        for name, m in inner.named_modules()
        if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec is not None
    }
    fixed = any(m._parameters.get("weight") is None or m._qnoise.pin is not None for m in linears.values())
    with quiet(model):
        error = {} if fixed and mode == "as_trained" else {k: e for k, (_, e) in merged_codes(model, linears).items()}
        if mode == "requantized":
            return cast(nn.Module, peft.merge_and_unload()), error
        tensors = {name: tensor.clone() for name, tensor in rollout_weights(model, merge_adapters=True, quantized=True)}
    stock = unpatch_model(cast(nn.Module, peft.unload()), dequantize=True)
    own = stock.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
    return stock, error


def merged_codes(model: nn.Module, chosen: Mapping[str, FakeQuantLinear]) -> dict[str, tuple[BlockQuantized, float]]:
    """Q(W + BA) of the linears with an adapter and of those that share a scale with them, and its relative distance
    from Q(W) + BA."""
    layers = {canonical_name(f"{path}.base_layer"): m for path, m in model.named_modules() if is_adapted(m)}
    raw: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for name, linear in chosen.items():
        if name not in layers:
            continue
        if linear._parameters.get("weight") is None or linear._qnoise.pin is not None:
            raise ValueError(
                f"{name}: its codes are packed or pinned, and merging would quantize W + BA anew from a weight they "
                "do not come from. Keep the adapter apart, or merge as trained."
            )
        active = active_adapters(cast(Any, layers[name]), name, True)
        raw[name] = merged_weight(cast(Any, layers[name]), active, cast(Tensor, linear._parameters["weight"]))
        trained[name] = merged_weight(cast(Any, layers[name]), active, linear.effective_weight())
    result = {}
    for name, linear in chosen.items():
        group = [m._qnoise.name for m in linear._qnoise.scale_group] or [name]
        if not any(each in raw for each in group):
            continue
        spec = cast(QuantSpec, linear._qnoise.weight_spec)
        weights = {each: raw.get(each, chosen[each]._parameters["weight"]) for each in group}
        amax = None
        if spec.per_tensor_scale:
            amax = torch.stack([cast(Tensor, w).abs().amax().float() for w in weights.values()]).amax()
        codes = quantize(cast(Tensor, weights[name]), spec, amax=amax)
        want = trained.get(name, linear.effective_weight()).float()
        error = (codes.dequantize().float() - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        result[name] = (codes, float(error))
    return result
