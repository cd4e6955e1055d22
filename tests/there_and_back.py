"""What every architecture has to stand: patch, forward, backward, unpatch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import qnoise
from qnoise.patch import effective_weight_of, patched_modules

# Why a linear may be left alone by default.
REASONS = ("output head", "router or gate", "no exact nn.Linear", "its weight is read and written past its forward")


def picture(model: nn.Module) -> dict[str, object]:
    """What unpatching has to bring back: classes, hooks, keys, and the identity and bits of every tensor."""
    modules = {name: (id(m), type(m), sorted(m.__dict__), _hooks(m)) for name, m in model.named_modules()}
    tensors = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return {"modules": modules, "tensors": tensors}


def _hooks(module: nn.Module) -> list[int]:
    return [len(hooks) for name, hooks in sorted(module.__dict__.items()) if name.endswith("_hooks")]


def same(a: dict, b: dict) -> bool:
    return (
        a["modules"] == b["modules"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(a["tensors"][k][0] == i and torch.equal(a["tensors"][k][1], t) for k, (i, t) in b["tensors"].items())
    )


def there_and_back(model: nn.Module, run: Callable[[nn.Module], Tensor], fmt: str = "mxfp4") -> qnoise.PatchSummary:
    """`run` computes with the model and returns what depends on its weights, any shape. The summary of the patch."""
    # The same model, to have Q(W) written into its weights: what is read past a module's forward would show.
    written = copy.deepcopy(model)
    stock = run(model)
    stock.float().square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached
    model.zero_grad()
    before = picture(model)  # after a forward: in its first one transformers puts hooks on
    matrices = {
        name
        for name, m in model.named_modules()
        if not isinstance(m, nn.Embedding | nn.modules.conv._ConvNd)
        and any(p is not None and p.dim() >= 2 for p in m._parameters.values())
    }
    linears = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)}

    qnoise.patch_model(model, fmt=fmt)
    summary = qnoise.summary(model)
    assert summary.patched
    assert summary.patched.keys() | summary.skipped.keys() >= matrices | linears | norms
    for name in linears - summary.patched.keys():
        assert summary.skipped[name].endswith(REASONS), name
    weights = dict(written.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        done = set()
        for name, module in model.named_modules():
            for key in getattr(module, "effective_names", ("weight",) if hasattr(module, "effective_weight") else ()):
                if id(weight := weights[f"{name}.{key}"]) not in done:
                    done.add(id(weight))
                    weight.copy_(effective_weight_of(module, key))
    assert done
    torch.manual_seed(1)
    patched = run(model)
    torch.manual_seed(1)
    assert torch.equal(patched, run(written))
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
    return summary
