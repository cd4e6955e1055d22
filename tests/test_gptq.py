"""GPTQ for block formats: against a slow implementation, and what it promises."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qnoise
from exact_model import ELEMENT_OF, mx_block, nearest, nv_block
from patching import logits
from qnoise import QuantSpec
from qnoise.nn import FakeQuantLinear
from qnoise.repairs.calibration import second_moments
from qnoise.repairs.gptq import gptq
from tiny_models import tiny_model, with_lora

f32 = np.float32


def correlated(tokens: int = 400, width: int = 70, seed: int = 0) -> Tensor:
    """Inputs of which a few directions and a few channels matter much more than the others, as in language models."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width).unsqueeze(1)
    x = torch.randn(tokens, width, generator=g) @ mix
    x[:, ::17] *= 8
    return x


def one_linear(fmt="mxfp4", width: int = 70, rows: int = 16, **kwargs) -> nn.Sequential:
    torch.manual_seed(1)
    return qnoise.patch_model(nn.Sequential(nn.Linear(width, rows)).requires_grad_(False), fmt, **kwargs)


def moment_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def same(a: qnoise.BlockQuantized, b: qnoise.BlockQuantized) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale_codes, b.scale_codes)


def slow_row(w: np.ndarray, h: np.ndarray, fmt: str, mode: str, amax: float, way: str) -> tuple:
    """One row: the optimal step of each column from the inverse over the columns that are left, made anew each time."""
    size = 16 if fmt == "nvfp4" else 32
    left = w.astype(np.float64).copy()
    values, scales = np.zeros(len(w)), np.zeros(len(w))
    for j in range(len(w)):
        if j % size == 0:
            block = (w if way == "before" else left)[j : j + size].astype(f32)
            block = np.pad(block, (0, size - len(block)))
            if fmt == "nvfp4":
                scale = f32(nv_block(block, amax, mode)[0]) / (f32(448 * 6) / f32(amax))
            else:
                scale = f32(2.0) ** mx_block(block, fmt, mode)[0]
        x = f32(left[j])
        code = nearest(Fraction(float(abs(x) / scale)), ELEMENT_OF.get(fmt, "e2m1"))
        values[j] = np.copysign(f32(float(code)) * scale, x)
        inverse = np.linalg.inv(h[j:, j:])
        left[j + 1 :] -= (left[j] - values[j]) / inverse[0, 0] * inverse[0, 1:]
        scales[j] = scale
    return values, scales


def slow_sweep(w: np.ndarray, h: np.ndarray, fmt: str, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Each column set to the minimum of the quadratic in it."""
    values = values.copy()
    for j in range(len(w)):
        others = np.arange(len(w)) != j
        x = f32(w[j] - h[j, others] @ (values - w)[others] / h[j, j])
        code = nearest(Fraction(float(abs(x) / f32(scales[j]))), ELEMENT_OF.get(fmt, "e2m1"))
        values[j] = np.copysign(f32(float(code)) * f32(scales[j]), x)
    return values


@pytest.mark.parametrize(("fmt", "mode"), [("mxfp4", "floor"), ("mxfp4", "mse"), ("nvfp4", "two_level")])
def test_the_slow_implementation_gives_the_same_values(fmt, mode) -> None:
    width, rows = 150, 5  # two ragged ends: of a block, and of the columns between lazy updates
    model = one_linear(QuantSpec(fmt, mode), width, rows)
    weight = model[0].weight.detach().clone()
    h = moment_of(correlated(300, width))
    report = gptq(model, hessians={"0": h}, damping=0.02, sweeps=0)
    got = model[0].effective_weight().double().numpy()
    gptq(model, hessians={"0": h}, damping=0.02, sweeps=2)
    swept = model[0].effective_weight().double().numpy()
    damped = (h + 0.02 * h.diagonal().mean() * torch.eye(width)).numpy()
    plain = qnoise.fake_quantize(weight, fmt, mode).double().numpy()
    w, amax = weight.double().numpy(), float(weight.abs().max())
    took = dict.fromkeys(("nearest", "entered", "before"), 0)
    for row in range(rows):
        ways = {way: slow_row(w[row], damped, fmt, mode, amax, way) for way in ("entered", "before")}
        ways = {"nearest": (plain[row], None), **ways}
        error = {way: (v - w[row]) @ damped @ (v - w[row]) for way, (v, _) in ways.items()}
        best = min(error, key=error.get)
        took[best] += 1
        assert np.array_equal(got[row], ways[best][0]), (row, best)
        values, scales = ways[best]
        for _ in range(2):
            values = slow_sweep(w[row], damped, fmt, values, scales)
        assert np.array_equal(swept[row], values), (row, best)
    assert report.rows[0].rows == took
    assert took["nearest"] == 0
    if fmt == "nvfp4":
        assert took["entered"]
        assert took["before"]


SPECS = [QuantSpec(name) for name in qnoise.FORMATS] + [
    QuantSpec("mxfp4", "mse"),
    QuantSpec("mxfp4", "rceil", "half_away"),
    QuantSpec("nvfp4", "mse"),
    QuantSpec("nvfp4", "four_over_six"),
    QuantSpec("nvfp4", "single_level"),
    QuantSpec("mxfp4", rotation="hadamard"),
    QuantSpec("nvfp4", rotation="hadamard"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_output_error_falls_in_every_format(spec) -> None:
    """Ragged rows. No row gets worse on the calibration inputs; on others of the kind the output is better too."""
    model = one_linear(spec)
    x, other = correlated(), correlated(seed=0)[:1] + correlated(200, seed=0)
    linear = model[0]
    weight, plain = linear.weight.detach().clone().double(), linear.effective_weight().double()
    report = gptq(model, x)
    (row,) = report.rows
    pinned = linear.effective_weight()
    assert torch.equal(pinned, linear.quantized().dequantize())
    assert linear.quantized().spec == spec
    assert row.output_error_after < 0.85 * row.output_error_before
    assert row.weight_error_after > row.weight_error_before
    assert sum(row.rows.values()) == 16
    h = moment_of(x)
    before, after = (((w - weight) @ h * (w - weight)).sum(1) for w in (plain, pinned.double()))
    whole = ((weight @ h) * weight).sum()
    assert row.output_error_before == pytest.approx((before.sum() / whole).sqrt().item(), rel=1e-4)
    assert row.output_error_after == pytest.approx((after.sum() / whole).sqrt().item(), rel=1e-4)
    x64 = other.double()
    assert ((pinned.double() - weight) @ x64.T).norm() < ((plain - weight) @ x64.T).norm()
    report.undo()
    assert torch.equal(linear.effective_weight().double(), plain)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_correlation_it_is_rounding_to_nearest(spec) -> None:
    width = 64 if spec.rotation else 70  # the padding of a ragged end would be one with its rotated block
    model = one_linear(spec, width)
    plain = model[0].quantized()
    report = gptq(model, hessians={"0": torch.eye(width)})
    assert report.rows[0].rows == {"nearest": 16, "entered": 0, "before": 0}
    assert same(model[0].quantized(), plain)
    assert torch.equal(model[0].effective_weight(), plain.dequantize())
    assert torch.equal(torch.signbit(model[0].effective_weight()), torch.signbit(plain.dequantize()))


@pytest.mark.parametrize("sweeps", [0, 1])
def test_no_row_gets_worse_where_there_is_little_to_gain(sweeps) -> None:
    """Inputs that hang together little: feedback makes some rows worse, and those are left as they are."""
    model = one_linear("nvfp4", 64, 200)
    weight, plain = model[0].weight.detach().double(), model[0].effective_weight().double()
    h = torch.eye(64, dtype=torch.float64) + 0.3 * moment_of(torch.randn(90, 64, generator=torch.Generator()))
    (row,) = gptq(model, hessians={"0": h}, damping=0.0, sweeps=sweeps).rows
    assert min(row.rows.values()) > 5
    before, after = (((w - weight) @ h * (w - weight)).sum(1) for w in (plain, model[0].effective_weight().double()))
    assert (after <= before * (1 + 1e-12)).all()
    if sweeps == 0:
        assert (after == before).sum() >= row.rows["nearest"]


def test_columns_that_see_no_input_are_rounded_to_nearest() -> None:
    x = correlated()
    x[:, 3:20] = 0
    for damping in (0.01, 0.0):
        model = one_linear("mxint8")  # in which no scale moves
        plain = model[0].effective_weight().clone()
        gptq(model, x, damping=damping)
        pinned = model[0].effective_weight()
        assert torch.isfinite(pinned).all()
        assert torch.equal(pinned[:, 3:20], plain[:, 3:20])
        assert not torch.equal(pinned, plain)
    report = gptq(one_linear(), torch.zeros(5, 70))
    assert report.rows[0].output_error_after == 0.0
    assert report.rows[0].rows["nearest"] == 16


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 99, (6, 20), generator=torch.Generator().manual_seed(3))


def small_model() -> nn.Module:
    return tiny_model(hidden_size=32, intermediate_size=40)


def linears(model: nn.Module) -> dict[str, FakeQuantLinear]:
    return {m._qnoise.name: m for m in model.modules() if isinstance(m, FakeQuantLinear)}


def test_a_model_one_layer_after_the_other(ids) -> None:
    model = small_model().requires_grad_(False)
    stock = logits(model, ids)
    qnoise.patch_model(model, "nvfp4")
    plain = logits(model, ids)
    first = second_moments(model, ids)
    report = gptq(model, {"input_ids": ids})
    assert [row.name for row in report.rows] == list(linears(model))
    assert qnoise.state(model)["pinned"] == 14
    repaired = logits(model, ids)
    assert (repaired - stock).norm() < 0.8 * (plain - stock).norm()
    codes = {name: m.quantized() for name, m in linears(model).items()}
    # Fused siblings keep one per-tensor scale.
    attention = [codes[f"model.layers.0.self_attn.{kind}_proj"].per_tensor_scale for kind in "qkv"]
    assert torch.equal(attention[0], attention[1])
    assert torch.equal(attention[0], attention[2])
    # The second layer was seen as it is behind the first one's new codes; the errors say the same.
    sequential = {row.name: row for row in report.rows}
    report.undo()
    assert torch.equal(logits(model, ids), plain)
    at_once = gptq(model, ids, sequential=False)
    for row in at_once.rows:
        assert same(codes[row.name], linears(model)[row.name].quantized()) == (".0." in row.name)
        assert (row == sequential[row.name]) == (".0." in row.name)
    again = gptq(model, hessians=first)
    assert [row.output_error_after for row in again.rows] == [row.output_error_after for row in at_once.rows]
    assert all(row.output_error_before == row.output_error_after for row in again.rows)  # what it was then
    names = [f"model.layers.0.self_attn.{kind}_proj" for kind in "qk"]
    gptq(model, hessians={name: first.of[name] for name in names}, share_siblings=False)
    assert not torch.equal(*[linears(model)[name].quantized().per_tensor_scale for name in names])
    qnoise.unpatch_model(model)
    assert torch.equal(logits(model, ids), stock)


def test_moments_from_a_file_give_what_inputs_give(ids, tmp_path) -> None:
    model = qnoise.patch_model(small_model().requires_grad_(False), "mxfp4")
    gptq(model, ids, sequential=False)
    expected = {name: m.quantized() for name, m in linears(model).items()}
    second_moments(model, ids).save(tmp_path / "h.safetensors")
    twin = qnoise.patch_model(small_model().requires_grad_(False), "mxfp4")
    second_moments(twin, ids).save(tmp_path / "h.safetensors")
    gptq(twin, hessians=tmp_path / "h.safetensors")
    agree = [(a.dequantize() == linears(twin)[name].effective_weight()).float().mean() for name, a in expected.items()]
    assert min(agree) > 0.97  # the file keeps fp32: a rare tie goes the other way


@pytest.mark.parametrize("patched_first", [True, False])
def test_with_adapters(ids, patched_first) -> None:
    """Either order; what the adapters add is part of what a linear is given, and no part of what is quantized."""
    model = small_model()
    if patched_first:
        model = with_lora(qnoise.patch_model(model, "mxfp4", layers=[1]))
    else:
        model = qnoise.patch_model(with_lora(model), "mxfp4", layers=[1])
    moments = second_moments(model, ids)
    report = gptq(model, ids, sequential=False)
    assert not report.skipped
    assert [row.name for row in report.rows][:2] == [f"model.layers.1.self_attn.{kind}_proj" for kind in "qk"]
    down = linears(model)["model.layers.1.mlp.down_proj"]
    alone = one_linear("mxfp4", 40, 32)
    with torch.no_grad():
        alone[0].weight.copy_(down.weight)
    gptq(alone, hessians={"0": moments.of["model.layers.1.mlp.down_proj"]})
    assert same(alone[0].quantized(), down.quantized())
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    if patched_first:
        report.undo()
        model.merge_adapter()
        merged = down.weight.detach().clone()
        gptq(model, hessians={"model.layers.1.mlp.down_proj": moments.of["model.layers.1.mlp.down_proj"]})
        assert torch.equal(down.weight, merged)
        assert (down.effective_weight() - merged).norm() < 0.3 * merged.norm()


def test_what_is_left_alone_is_listed(ids) -> None:
    model = small_model().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    stochastic, wide = QuantSpec("mxfp4", rounding="stochastic"), QuantSpec("mxfp4", residual=1.0)
    qnoise.patch_model(model, {"*": "mxfp4", "layers.1.*.q_proj": stochastic, "layers.1.*.k_proj": wide})
    report = gptq(model, hessians={"model.layers.0.self_attn.q_proj": torch.eye(32)})
    assert [row.name for row in report.rows] == ["model.layers.0.self_attn.q_proj"]
    assert "is trained" in report.skipped["model.layers.0.mlp.up_proj"]
    assert "stochastic" in report.skipped["model.layers.1.self_attn.q_proj"]
    assert "residual" in report.skipped["model.layers.1.self_attn.k_proj"]
    assert report.skipped["model.layers.1.self_attn.v_proj"] == "hessians has nothing of it"
    assert "left as it is: hessians has nothing of it" in str(report)
    assert len(report.rows) + len(report.skipped) == 14


def test_what_cannot_be_done_says_why_and_leaves_the_pins(ids) -> None:
    model = qnoise.patch_model(small_model().requires_grad_(False))
    first = linears(model)["model.layers.0.self_attn.q_proj"]
    first.pin(qnoise.quantize(first.weight * 2, "mxfp4"))
    before = first.effective_weight().clone()
    last = linears(model)["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        last.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: NaN or Inf in its weight"):
        gptq(model, ids)
    assert qnoise.state(model)["pinned"] == 1
    assert torch.equal(first.effective_weight(), before)
    for arguments, what in (
        ({}, "inputs or hessians=, one of the two"),
        ({"inputs": ids, "hessians": {}}, "one of the two"),
        ({"inputs": ids, "damping": -1.0}, "damping=-1.0"),
        ({"inputs": ids, "sweeps": -1}, "sweeps=-1"),
        ({"inputs": []}, "no batch"),
        ({"hessians": {}}, "no linear of Qwen2ForCausalLM could be done.*nothing of it"),
        ({"hessians": {first._qnoise.name: torch.eye(3)}}, r"q_proj: .*shape \(3, 3\), and must have \(32, 32\)"),
        ({"hessians": {first._qnoise.name: torch.eye(32) * torch.inf}}, "q_proj: NaN or Inf in its second moment"),
        ({"inputs": ids[:1, :5], "damping": 0.0}, "q_proj: .*not positive definite with damping=0.0.*Raise damping"),
    ):
        with pytest.raises(ValueError, match=what):
            gptq(model, **arguments)
    with pytest.raises(ValueError, match="not patched"):
        gptq(small_model(), ids)
    packed = qnoise.patch_model(small_model().requires_grad_(False), storage="packed")
    with pytest.raises(ValueError, match="q_proj: its weight is packed already"):
        gptq(packed, ids)
    with pytest.raises(ValueError, match="has no linear that gptq can do.*is trained"):
        gptq(qnoise.patch_model(small_model()), ids)
