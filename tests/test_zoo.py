"""Every causal language model of transformers: patch, forward, backward, unpatch. See zoo.py."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import qnoise
from qnoise.patch import effective_weight_of, patched_modules
from tests.zoo import MODEL_TYPES, logits, tiny


def picture(model: nn.Module) -> dict[str, object]:
    """What unpatching has to bring back: classes, hooks, keys, and the identity and bits of every tensor."""
    modules = {name: (type(m), sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules()}
    tensors = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return {"modules": modules, "tensors": tensors}


def same(a: dict, b: dict) -> bool:
    return (
        a["modules"] == b["modules"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(a["tensors"][k][0] == i and torch.equal(a["tensors"][k][1], t) for k, (i, t) in b["tensors"].items())
    )


PECULIAR = ("qwen2", "gpt2", "falcon", "mixtral", "llama4_text", "gpt_oss", "jamba", "zamba", "longcat_flash")


@pytest.mark.parametrize(
    "model_type", [name if name in PECULIAR else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]
)
def test_every_architecture(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny(model_type)
        if model_type == "reformer":  # its backward runs in train mode only
            model.train()
    # The same model, to have Q(W) written into its weights: what is read past a module's forward would show.
    written = copy.deepcopy(model)
    before = picture(model)
    stock = logits(model)
    stock.float().square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    qnoise.patch_model(model, fmt="mxfp4")
    summary = qnoise.summary(model)
    assert summary.patched
    weights = dict(written.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        done = set()
        for name, module in model.named_modules():
            for key in getattr(module, "effective_names", ("weight",) if hasattr(module, "effective_weight") else ()):
                if id(weight := weights[f"{name}.{key}"]) not in done:
                    done.add(id(weight))
                    weight.copy_(effective_weight_of(module, key))
    torch.manual_seed(1)
    patched = logits(model)
    torch.manual_seed(1)
    assert torch.equal(patched, logits(written))
    assert torch.isfinite(patched).all()
    assert not torch.equal(patched, stock)

    patched.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() >= reached
    assert all(torch.isfinite(g).all() for g in gradients.values())
    model.zero_grad()

    assert qnoise.unpatch_model(model) is model
    assert not list(patched_modules(model))
    assert same(before, picture(model))
