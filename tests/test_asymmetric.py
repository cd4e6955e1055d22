"""Inputs of the quantized model beside those of the full-precision one, and GPTQ against the latter's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qnoise
from patching import logits
from qnoise.nn import FakeQuantLinear
from qnoise.nn.tokens import quantize_tokens
from qnoise.repairs.asymmetric import PairedMoments, by_input
from qnoise.repairs.calibration import second_moments
from qnoise.repairs.gptq import gptq
from qnoise.repairs.recipe import Recipe
from tiny_models import tiny_model, with_lora


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 99, (6, 12), generator=torch.Generator().manual_seed(3))


def linears(model: nn.Module) -> dict[str, FakeQuantLinear]:
    return {m._qnoise.name: m for m in model.modules() if isinstance(m, FakeQuantLinear)}


@torch.no_grad()
def inputs_of(model: nn.Module, batch: dict, wanted: str) -> Tensor:
    """What the linear is given, (batch, tokens, features), seen without the code under test."""
    kept = []
    handle = linears(model)[wanted].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(**batch)
    handle.remove()
    return kept[0].double()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * b.abs().max().item())


GROUPS = [
    names
    for layer in range(2)
    for names in (
        [f"model.layers.{layer}.self_attn.{kind}_proj" for kind in "qkv"],
        [f"model.layers.{layer}.self_attn.o_proj"],
        [f"model.layers.{layer}.mlp.{kind}_proj" for kind in ("gate", "up")],
        [f"model.layers.{layer}.mlp.down_proj"],
    )
]


@pytest.mark.parametrize("lora", [False, True])
def test_moments_of_both_models_input_after_input(ids, lora) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    if lora:
        model = with_lora(model)
    model.train()
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[3, 2:] = 0
    given = [{"input_ids": ids[:2]}, {"input_ids": ids, "attention_mask": mask}]
    seen = []
    for moments in by_input(model, given):
        seen.append(list(moments.names))
        now, stock = [], []
        with qnoise.full_precision(model):
            stock = [inputs_of(model, batch, moments.names[-1]) for batch in given]
        now = [inputs_of(model, batch, moments.names[-1]) for batch in given]
        rows = [torch.cat([x[0].flatten(0, 1), x[1][mask.bool()]]) for x in (now, stock)]
        assert moments.tokens == len(rows[0]) == 24 + int(mask.sum())
        close(moments.now, rows[0].T @ rows[0] / len(rows[0]))
        close(moments.cross, rows[1].T @ rows[0] / len(rows[0]))
        close(moments.stock, rows[1].T @ rows[1] / len(rows[0]))
        assert moments.paired
        # The first input is the same in both; from then on what was done to the linears before is in it.
        assert torch.equal(moments.now, moments.stock) == (len(seen) == 1)
        for name in moments.names:
            linears(model)[name].pin(qnoise.quantize(torch.zeros_like(linears(model)[name].weight), "mxfp4"))
    assert seen == GROUPS
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_quantized_inputs_are_those_that_the_product_sees(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "nvfp4", act_fmt="nvfp4")
    moments = next(iter(by_input(model, ids)))
    stock = inputs_of(model, {"input_ids": ids}, moments.names[0]).flatten(0, 1)
    now = quantize_tokens(stock.float(), qnoise.QuantSpec("nvfp4"), None).double()
    close(moments.now, now.T @ now / len(now))
    close(moments.cross, stock.T @ now / len(now))


def moments_and_inputs(width: int = 24, tokens: int = 300) -> tuple[PairedMoments, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    stock = torch.randn(tokens, width, generator=g, dtype=torch.float64) * torch.logspace(0, -2, width)
    now = stock + 0.05 * torch.randn(tokens, width, generator=g, dtype=torch.float64) @ torch.randn(
        width, width, generator=g, dtype=torch.float64
    )
    pairs = ((now, now), (stock, now), (stock, stock))
    return PairedMoments(("a",), *(a.T @ b / tokens for a, b in pairs), tokens), stock, now


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_target_is_the_damped_least_squares_solution(damping) -> None:
    moments, stock, now = moments_and_inputs()
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    target = moments.target(weight, damping)
    held = (damping * now.square().mean() * len(now)) ** 0.5 * torch.eye(24, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([now, held]), torch.cat([stock @ weight.T, held @ weight.T])).solution.T
    torch.testing.assert_close(target, expected, rtol=1e-8, atol=1e-10)
    for values in (weight, target):
        error = (now @ values.T - stock @ weight.T).norm() / (stock @ weight.T).norm()
        assert moments.error(weight, values) == pytest.approx(error.item(), rel=1e-9)
    if damping == 0:
        assert moments.error(weight, target) < 0.9 * moments.error(weight, weight)


def test_inputs_that_always_move_together_have_a_target_too() -> None:
    _, stock, now = moments_and_inputs()
    now = torch.cat([now, now[:, :3]], 1)
    stock = torch.cat([stock, stock[:, :3]], 1)
    pairs = ((now, now), (stock, now), (stock, stock))
    doubled = PairedMoments(("a",), *(a.T @ b / len(now) for a, b in pairs), len(now))
    weight = torch.randn(5, 27, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert doubled.error(weight, doubled.target(weight, 0.0)) < doubled.error(weight, weight)


def test_moments_that_are_not_paired_leave_the_weight_alone() -> None:
    moments, _, _ = moments_and_inputs()
    same = PairedMoments.same("a", moments.now, moments.tokens)
    weight = torch.randn(5, 24, dtype=torch.float64)
    assert not same.paired
    assert same.target(weight, 0.01) is weight
    assert same.error(weight, weight) == 0.0
    assert same.to(torch.device("cpu")) is same


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_the_model_comes_nearer_to_full_precision(ids, fmt) -> None:
    """On a model that a symmetric GPTQ has brought near already, on the calibration text and on another."""
    model = tiny_model(num_hidden_layers=4).requires_grad_(False)
    text = torch.randint(3, 99, (40, 12), generator=torch.Generator().manual_seed(4))
    stock = [logits(model, x) for x in (text, ids)]
    qnoise.patch_model(model, fmt)
    errors = {}
    for asymmetric in (False, True):
        report = gptq(model, text, asymmetric=asymmetric)
        errors[asymmetric] = [(logits(model, x) - y).norm().item() for x, y in zip((text, ids), stock, strict=True)]
        assert [row.name for row in report.rows] == list(linears(model))
        attention = [linears(model)[f"model.layers.1.self_attn.{kind}_proj"].quantized() for kind in "qkv"]
        if fmt == "nvfp4":
            assert len({codes.per_tensor_scale.item() for codes in attention}) == 1
        assert all(row.output_error_after < row.output_error_before for row in report.rows)
        report.undo()
    assert errors[True][0] < 0.85 * errors[False][0]
    assert errors[True][1] < errors[False][1]


def test_where_nothing_is_before_it_is_the_symmetric_one(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    found = {}
    for asymmetric in (False, True):
        report = gptq(model, ids, asymmetric=asymmetric)
        found[asymmetric] = {row.name: linears(model)[row.name].quantized().codes for row in report.rows}
        report.undo()
    for name, codes in found[True].items():
        first = name in GROUPS[0]
        assert not first or (codes == found[False][name]).float().mean() > 0.995  # a rare tie goes the other way
        assert first or not torch.equal(codes, found[False][name])


class Chosen(nn.Module):
    """Tokens go to one of two linears, by the sign of what the first one gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.last = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        which = (x[:, 0] > 0).long()
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (which == number).any():
                out[which == number] = expert(x[which == number])
        return self.last(out)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Chosen()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_tokens_that_cannot_be_paired_are_not() -> None:
    model = qnoise.patch_model(OneLayer().requires_grad_(False), "mxfp4")
    g = torch.Generator().manual_seed(2)
    given = [torch.randn(40, 32, generator=g) for _ in range(3)]
    # The first batch has tokens for one expert only: the other one gets its turn all the same.
    with torch.no_grad(), qnoise.full_precision(model):
        given[0] = given[0][model.layers[0].first(given[0])[:, 0] > 0.2]
        assert len(given[0]) > 2
        assert (model.layers[0].first(given[1])[:, 0] < 0).any()
    moments = list(by_input(model, given))
    names = ["first", "experts.0", "experts.1", "last"]
    assert [m.names for m in moments] == [(f"layers.0.{name}",) for name in names]
    assert [m.paired for m in moments] == [True, False, False, True]
    assert moments[1].tokens + moments[2].tokens == moments[0].tokens == moments[3].tokens
    report = gptq(model, given, asymmetric=True)
    assert len(report.rows) == 4


def test_bad_input(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    for arguments in ({"inputs": ids, "sequential": False}, {"hessians": second_moments(model, ids)}):
        with pytest.raises(ValueError, match="asymmetric=True goes from one input to the next"):
            gptq(model, asymmetric=True, **arguments)
    with pytest.raises(ValueError, match="inputs holds no batch"):
        gptq(model, [], asymmetric=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: NaN or Inf in its input"):
        gptq(model, torch.full((1, 4), 5), asymmetric=True)
    assert qnoise.state(model)["pinned"] == 0


def test_it_is_a_step_of_recipes(ids) -> None:
    model, twin = (tiny_model().requires_grad_(False) for _ in range(2))
    stock = logits(model, ids)
    undo = Recipe("nvfp4", "gptaq").apply(model, ids)
    gptq(qnoise.patch_model(twin, "nvfp4"), ids, asymmetric=True)
    assert torch.equal(logits(model, ids), logits(twin, ids))
    undo()
    assert torch.equal(logits(model, ids), stock)
