"""What the tests of patching compare."""

from __future__ import annotations

import copy

import torch
from torch import nn

import qnoise


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that patching could disturb."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": {name: set(module.__dict__) for name, module in model.named_modules()},
        "parameters": [(name, id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)],
        "values": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "forwards": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
    }


def assert_same(before: dict, after: dict) -> None:
    for key in ("modules", "attributes", "parameters", "forwards"):
        assert before[key] == after[key], key
    assert before["values"].keys() == after["values"].keys()
    assert all(torch.equal(v, after["values"][k]) for k, v in before["values"].items())


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def manually_quantized(model: nn.Module, fmt: str) -> nn.Module:
    """A stock model whose linears (not the head) hold Q(W), made without the patcher."""
    twin = copy.deepcopy(model)
    head = twin.get_output_embeddings()
    for module in twin.modules():
        if type(module) is nn.Linear and module is not head:
            module.weight.data = qnoise.fake_quantize(module.weight.data, fmt)
    return twin
