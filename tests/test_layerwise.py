"""Forwards that begin at a layer: the same bits, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qnoise
from patching import logits
from qnoise.nn import FakeQuantLinear
from qnoise.repairs import asymmetric
from qnoise.repairs.asymmetric import by_input
from qnoise.repairs.layerwise import Outputs, can_skip, layers_with, output_of
from tiny_models import ARCHITECTURES, tiny_model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(3))


def all_layers(model: nn.Module):
    return list(layers_with(model, {m for m in model.modules() if isinstance(m, nn.Linear)}))


def test_layers_and_what_is_before_them() -> None:
    model = tiny_model(num_hidden_layers=3)
    layers = all_layers(model)
    assert [layer.name for layer in layers] == [f"model.layers.{n}" for n in range(3)]
    assert [layer.before for layer in layers] == [tuple(model.model.layers)[:n] for n in range(3)]
    some = {model.model.layers[1].mlp.up_proj}
    assert [layer.name for layer in layers_with(model, some)] == ["model.layers.1"]


def test_the_layers_before_are_not_run(ids) -> None:
    model = tiny_model(num_hidden_layers=3)
    layers = all_layers(model)
    runs: list[int] = []
    for number, layer in enumerate(layers):
        layer.module.mlp.register_forward_hook(lambda *_, number=number: runs.append(number))
    kept = output_of(model, ids, layers[1].module)
    assert runs == [0, 1]
    stock = output_of(model, ids, layers[2].module)
    runs.clear()
    with Outputs(layers[1].module, (kept,)).skipping(layers[2], 0):
        again = output_of(model, ids, layers[2].module)
    assert runs == [2]
    assert torch.equal(stock, again)
    # Everything is as it was, a forward that somebody else had bound included.
    assert all("forward" not in layer.module.__dict__ for layer in layers)
    layers[0].module.forward = bound = layers[0].module.forward
    with Outputs(layers[1].module, (kept,)).skipping(layers[2], 0):
        pass
    assert layers[0].module.__dict__["forward"] is bound
    # What is not the output of the layer right before does not stand for it.
    runs.clear()
    with Outputs(layers[0].module, (kept,)).skipping(layers[2], 0):
        output_of(model, ids, layers[2].module)
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moments_do_not_depend_on_skipping(ids, architecture, monkeypatch) -> None:
    model = qnoise.patch_model(tiny_model(architecture).requires_grad_(False), "mxfp4")
    given = [ids, {"input_ids": ids[:, :7], "attention_mask": torch.ones_like(ids[:, :7])}]
    found = {}
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(asymmetric, "can_skip", lambda *_: False)
        else:
            assert can_skip(model, ids[:1], all_layers(model))
        found[skips] = list(by_input(model, given))
    assert len(found[True]) == len(found[False]) > 4
    for a, b in zip(found[True], found[False], strict=True):
        assert a.names == b.names
        assert all(torch.equal(x, y) for x, y in ((a.now, b.now), (a.cross, b.cross), (a.stock, b.stock)))


def test_layers_that_are_done_are_not_run_again(ids) -> None:
    """Each runs for the batch in full precision, up to each of its four inputs, and for its output."""
    model = qnoise.patch_model(tiny_model(num_hidden_layers=5).requires_grad_(False), "mxfp4")
    runs = dict.fromkeys(range(5), 0)

    def count(number: int, module: nn.Module, args: tuple) -> None:
        runs[number] += len(args[0]) == len(ids)

    for number, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *given, number=number: count(number, *given))
    for _ in by_input(model, ids):
        pass
    assert set(runs.values()) == {6}


class Remembers(nn.Module):
    """The second layer also uses what the first one left for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x + (first if number == 2 else 0))
            first = x if number == 0 else first
        return x


def test_a_model_that_needs_more_than_the_last_output_is_run_whole(monkeypatch) -> None:
    model = qnoise.patch_model(Remembers().requires_grad_(False), "mxfp4")
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    assert not can_skip(model, x[:1], all_layers(model))
    usual = list(by_input(model, x))
    monkeypatch.setattr(asymmetric, "can_skip", lambda *_: True)
    wrong = list(by_input(model, x))
    assert torch.equal(usual[1].now, wrong[1].now)
    assert not torch.equal(usual[2].now, wrong[2].now)


def test_a_fault_on_the_way_leaves_the_model_as_it_was(ids) -> None:
    model = qnoise.patch_model(tiny_model(num_hidden_layers=3).requires_grad_(False), "mxfp4")
    before = logits(model, ids)
    for moments in by_input(model, ids):
        if moments.names[0].startswith("model.layers.2"):
            break
    with torch.no_grad():
        kept = model.model.layers[2].mlp.up_proj.weight[0, 0].clone()
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj: NaN or Inf in its input"):
        list(by_input(model, ids))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = kept
    assert torch.equal(logits(model, ids), before)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not (isinstance(module, FakeQuantLinear) and module._forward_pre_hooks)


class Short(nn.Module):
    """Batches of five rows leave after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: 1 if len(x) == 5 else 3]:
            x = layer(x)
        return x


def test_batches_that_do_not_reach_a_layer_do_not_get_the_outputs_of_others(monkeypatch) -> None:
    model = qnoise.patch_model(Short().requires_grad_(False), "mxfp4")
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(rows, 32, generator=g) for rows in (7, 5, 9)]
    usual = list(by_input(model, given))
    assert [moments.tokens for moments in usual] == [21, 16, 16]
    monkeypatch.setattr(asymmetric, "can_skip", lambda *_: False)
    for a, b in zip(usual, by_input(model, given), strict=True):
        assert torch.equal(a.now, b.now)
        assert torch.equal(a.cross, b.cross)
