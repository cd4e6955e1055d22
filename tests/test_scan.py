"""The scan of weights and activations, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, snapshot
from qnoise.formats import FORMATS, QuantSpec
from qnoise.metrics import decompose, error_report
from qnoise.sensitivity import ScanReport, scan
from qnoise.sensitivity import figures as figures_module
from qnoise.sensitivity.figures import Figures, row_chunks
from qnoise.sensitivity.gaussian import gaussian_figures
from qnoise.sensitivity.thresholds import issues
from tiny_models import tiny_model, with_lora


class Net(nn.Module):
    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        with torch.no_grad():
            for linear, weight in zip(self.layers, weights, strict=True):
                linear.weight.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [*FORMATS, QuantSpec("mxfp4", "rceil"), QuantSpec("nvfp4", "four_over_six")], ids=str)
def test_figures_gathered_in_chunks_are_those_of_metrics(fmt, dtype, monkeypatch) -> None:
    monkeypatch.setattr(figures_module, "CHUNK", 1000)
    spec = QuantSpec(fmt) if isinstance(fmt, str) else fmt
    x = (normal(65, 80) * 0.02).to(dtype)
    x[3, 7], x[:, 40:] = 1.0, x[:, 40:] * 1e-3
    gathered = Figures(spec)
    chunks = list(row_chunks(x))
    assert len(chunks) > 5
    assert torch.equal(torch.cat(chunks), x)
    for chunk in chunks:
        gathered.add(chunk, x.abs().amax().float() if spec.per_tensor_scale else None)
    result = gathered.result()
    x_hat = qnoise.fake_quantize(x, spec)
    for key, value in error_report(x, x_hat, spec).items():
        assert result[key] == pytest.approx(value, rel=3e-6, abs=1e-9), key
    for key, value in decompose(x, spec).items():
        if key in gathered.decomposition():
            assert gathered.decomposition()[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    double = x.double()
    centred = double - double.mean()
    assert result["kurtosis"] == pytest.approx((centred**4).mean().item() / (centred**2).mean().item() ** 2, rel=1e-5)
    assert result["norm"] == pytest.approx(double.norm().item(), rel=1e-6)
    rows = [error_report(a, b, spec, amax=x.abs().amax().float() if spec.per_tensor_scale else None)["sqnr_db"]
            for a, b in zip(x, x_hat, strict=True)]  # fmt: skip
    assert result["row_sqnr_db"] == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    assert (result["worst_channel"], result["worst_channel_sqnr_db"]) == (
        rows.index(min(rows)),
        pytest.approx(min(rows), rel=1e-5),
    )
    size = spec.block_format.block_size
    blocks = [block.double() for line in x for block in line.split(size)]
    crest = [(block.abs().max() / block.square().mean().sqrt()).item() for block in blocks]
    assert result["block_crest"] == pytest.approx(sum(crest) / len(crest), rel=1e-5)
    top = x_hat.double().abs()
    assert result["at_maximum"] == pytest.approx((top >= 0.99 * top.max()).double().mean().item())


def test_figures_worked_by_hand() -> None:
    """Two blocks: the first has amax 7 (scale 1, clips at 6), the second is 3 throughout (exact)."""
    x = torch.cat([torch.tensor([7.0, 0.2] + [0.0] * 30), torch.full((32,), 3.0)]).unsqueeze(0)
    gathered = Figures(QuantSpec("mxfp4"))
    gathered.add(x)
    result = gathered.result()
    assert result["clipped_blocks"] == 0.5
    assert result["clipped"] == 1 / 64
    assert result["deadzone"] == 1 / 64
    assert result["mean_abs_error"] == pytest.approx(1.2 / 64)
    first = 7 / math.sqrt((49 + 0.04) / 32)
    assert result["block_crest"] == pytest.approx((first + 1) / 2, rel=1e-6)
    assert result["at_maximum"] == 1 / 64
    assert gathered.histogram is not None
    assert sum(gathered.histogram.magnitudes) == sum(gathered.histogram.errors) == 64


def test_the_scale_of_a_tensor_is_that_of_all_its_chunks(monkeypatch) -> None:
    monkeypatch.setattr(figures_module, "CHUNK", 512)
    weight = normal(64, 64) * 10.0 ** torch.linspace(-4, 0, 64).unsqueeze(1)
    figures = scan(Net(weight), "nvfp4").rows[0].figures
    expected = error_report(weight, qnoise.fake_quantize(weight, "nvfp4"), "nvfp4")
    assert figures["mean_relative_error"] == pytest.approx(expected["mean_relative_error"], rel=1e-5)
    assert figures["deadzone"] == pytest.approx(expected["deadzone"])


def test_values_near_the_maximum_are_counted_in_every_chunk() -> None:
    gathered = Figures(QuantSpec("mxfp4"))
    for sizes in ((3.0, 6.0), (6.0, 6.0), (1.0, 6.0)):
        gathered.add(torch.tensor(sizes).repeat_interleave(32).unsqueeze(0))
    assert gathered.result()["at_maximum"] == 4 / 6


@pytest.mark.parametrize("k", [-60, 50])
def test_figures_of_extreme_magnitudes(k) -> None:
    x = normal(8, 64)
    one, other = Figures(QuantSpec("mxfp4")), Figures(QuantSpec("mxfp4"))
    one.add(x)
    other.add(x * 2.0**k)
    a, b = one.result(), other.result()
    for key in ("sqnr_db", "kurtosis", "clipped", "deadzone", "block_crest", "mean_relative_error", "at_maximum"):
        assert b[key] == pytest.approx(a[key], rel=1e-6), key
    assert b["norm"] == pytest.approx(a["norm"] * 2.0**k, rel=1e-6)


def test_nan_blocks_are_left_out_and_said() -> None:
    weight = normal(8, 64)
    weight[2, 40] = math.nan
    weight[5, 0] = math.inf
    report = scan(Net(weight), ["mxfp4", "nvfp4"])
    assert [f.serious for f in report.findings] == [True]
    assert "64 of 512" in report.findings[0].what
    clean = weight.clone()
    clean[2, 32:], clean[5, :32] = 0.0, 0.0
    expected = scan(Net(clean), "mxfp4").rows[0].figures
    assert report.rows[0].figures["sqnr_db"] == pytest.approx(expected["sqnr_db"])
    assert report.rows[0].figures["max_abs_error"] == expected["max_abs_error"]
    assert report.recommendation.action == "reconsider"
    nothing_left = scan(Net(torch.full((4, 32), math.nan), normal(4, 32)), "mxfp4")
    assert [r.name for r in nothing_left.rows] == ["layers.1"]


@pytest.mark.parametrize(
    "fmt",
    [
        *("mxfp4", "nvfp4", "mxfp8_e4m3", "mxint8"),
        QuantSpec("nvfp4", "single_level"),
        QuantSpec("mxfp4", rotation="hadamard"),
        QuantSpec("mxfp4", residual=1.0),
    ],
    ids=str,
)
def test_gaussian_weights_are_never_flagged_and_the_classic_limits_always_do(fmt) -> None:
    flagged = {"gaussian": 0, "classic": 0}
    shapes = [(8, 16), (16, 48), (64, 64), (96, 320), (200, 1000)]
    cases = [(shape, 10.0**-exponent * 1.37, seed) for shape in shapes for exponent in (0, 2, 4) for seed in range(4)]
    for shape, sigma, seed in cases:
        report = scan(Net(normal(*shape, seed=seed) * sigma), fmt)
        flagged["gaussian"] += bool(report.rows[0].issues)
        flagged["classic"] += bool(report.judged("classic").rows[0].issues)
    assert flagged["gaussian"] == 0
    if fmt in ("mxfp4", "nvfp4"):
        assert flagged["classic"] == len(cases)


def test_what_is_worse_than_gaussian_is_flagged() -> None:
    planted = normal(64, 256)
    planted[:, ::37] *= 30
    tails = torch.distributions.StudentT(2.0)
    torch.manual_seed(0)
    report = scan(Net(planted, tails.sample((256, 256)), normal(256, 256)), "mxfp4")
    assert "low_sqnr" in report.rows[0].issues
    assert "high_deadzone" in report.rows[0].issues
    assert report.rows[1].issues
    assert not report.rows[2].issues
    assert report.rows[0].figures["kurtosis"] > 10


def test_the_gaussian_reference_has_the_published_figures() -> None:
    """`numerics`: mxfp4 floor 18.8 dB at sigma 1 with 8.8 % deadzone; nvfp4 20.4 dB at any sigma."""
    figures = gaussian_figures(QuantSpec("mxfp4"), 1.0, 4096)
    assert figures["sqnr_db"] == pytest.approx(18.8, abs=0.06)
    assert figures["deadzone"] == pytest.approx(0.088, abs=0.002)
    for sigma in (1e-3, 1.3, 100.0):
        assert gaussian_figures(QuantSpec("nvfp4"), sigma, 4096)["sqnr_db"] == pytest.approx(20.44, abs=0.06)
    single = QuantSpec("nvfp4", "single_level")
    assert gaussian_figures(single, 1e-3, 4096)["sqnr_db"] < 14 < gaussian_figures(single, 1.0, 4096)["sqnr_db"]


def test_thresholds_are_checked() -> None:
    with pytest.raises(ValueError, match="gaussian"):
        issues({}, {}, 1, QuantSpec(), "gausian")
    with pytest.raises(ValueError, match="Did you mean 'classic'"):
        scan(Net(normal(32, 32)), thresholds="clasic")


def test_a_model_is_scanned_where_it_would_be_patched() -> None:
    model = tiny_model()
    report = scan(model, ["mxfp4", "nvfp4"])
    patched = set(qnoise.summary(qnoise.patch_model(tiny_model())).patched)
    assert {row.name for row in report.rows} == patched
    assert {row.kind for row in report.rows} == {"weight"}
    assert [(f.name, f.what) for f in report.findings] == [("lm_head", "output head")]
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    row = next(r for r in report.rows if r.name == "model.layers.1.mlp.up_proj" and r.fmt == "nvfp4")
    assert (row.layer, row.stack, row.module_kind, row.shape) == (1, "model.layers", "up_proj", (96, 64))
    assert row.scale_shared_with == ("model.layers.1.mlp.gate_proj",)
    # What is scanned is what the patched model computes with, the scale that siblings share included.
    patched_model = qnoise.patch_model(tiny_model(), "nvfp4")
    served = patched_model.model.layers[1].mlp.up_proj.effective_weight().detach()
    assert not torch.equal(served, qnoise.fake_quantize(weight, "nvfp4"))
    assert row.figures["sqnr_db"] == pytest.approx(error_report(weight, served, "nvfp4")["sqnr_db"])
    alone = scan(model, "nvfp4", include="up_proj").rows[1]
    assert alone.scale_shared_with == ()
    expected = error_report(weight, qnoise.fake_quantize(weight, "nvfp4"), "nvfp4")["sqnr_db"]
    assert alone.figures["sqnr_db"] == pytest.approx(expected)
    # A patched model is scanned by its stored weights.
    assert scan(qnoise.patch_model(tiny_model()), "mxfp4").rows == report.select(fmt="mxfp4")


def test_gpt2_is_scanned_along_its_contraction_axis(ids) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=32)).eval()
    report = scan(model, "mxfp4", inputs=ids)
    weight = model.transformer.h[0].attn.c_attn.weight.detach()
    row = next(r for r in report.select("weight") if r.name.endswith("c_attn"))
    assert (tuple(weight.shape), row.shape) == ((32, 96), (96, 32))
    hat = qnoise.fake_quantize(weight, "mxfp4", axis=0)
    assert row.figures["sqnr_db"] == pytest.approx(error_report(weight, hat, "mxfp4", axis=0)["sqnr_db"])
    assert 0 < row.figures["output_relative_rms"] < 1
    qnoise.patch_model(model, fmt=scan(model, ["mxfp4", "mxfp8_e4m3"]).plan(bits=6.0))


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_scanned_along_their_contraction_axis(transposed) -> None:
    class TinyExperts(nn.Module):
        is_transposed = transposed

        def __init__(self) -> None:
            super().__init__()
            up, down = normal(3, 96, 32) * 10.0 ** torch.arange(-8, 1, 4).view(3, 1, 1), normal(3, 32, 48, seed=1)
            self.gate_up_proj = nn.Parameter(up.mT.contiguous() if transposed else up)
            self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)

    experts = nn.ModuleDict({"experts": TinyExperts()})
    report = scan(experts, ["mxfp4", "nvfp4"])
    assert {row.name: row.shape for row in report.rows} == {
        "experts.gate_up_proj": (3, 96, 32),
        "experts.down_proj": (3, 32, 48),
    }
    # Each expert has an NVFP4 scale of its own, as the patched model has it.
    up = experts["experts"].gate_up_proj.detach()
    row = next(r for r in report.select(fmt="nvfp4") if r.name == "experts.gate_up_proj")
    served = qnoise.patch_model(experts, "nvfp4")["experts"].effective_weight("gate_up_proj").detach()
    assert row.figures["norm"] == pytest.approx(up.double().norm().item())
    expected = ((served - up).abs() / up.abs()).double().mean()
    assert row.figures["mean_relative_error"] == pytest.approx(expected.item(), rel=1e-5)


def test_specs_that_do_more_than_quantize() -> None:
    heavy = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    weight = heavy.sample((64, 256)) * 0.02
    specs = [
        QuantSpec("mxfp4"),
        QuantSpec("mxfp4", macro_block=128),
        QuantSpec("mxfp4", residual=1.0),
        QuantSpec("mxfp4", rotation="hadamard"),
        QuantSpec("nvfp4", rotation="hadamard"),
    ]
    report = scan(Net(weight), specs)
    for row, spec in zip(report.rows, specs, strict=True):
        expected = error_report(weight, qnoise.fake_quantize(weight, spec), spec)
        for key in ("sqnr_db", "deadzone", "clipped", "mean_relative_error", "max_abs_error"):
            assert row.figures[key] == pytest.approx(expected[key], rel=1e-5), (spec, key)
        assert (row.histogram is None) != spec.plain
    plain, _, residual, rotated, _ = (row.figures["sqnr_db"] for row in report.rows)
    assert residual > plain + 8
    assert rotated > plain
    assert report.rows[3].figures["clipped"] < 0.1
    assert ScanReport.from_json(report.to_json()) == report
    for text in (report.to_html(), report.to_markdown()):
        for name, bits in (("macro_block=128", "4.3125"), ("residual=1", "8.5"), ("hadamard", "4.25")):
            assert name in text
            assert bits in text


def test_adapters_are_in_the_scan() -> None:
    model = with_lora(tiny_model())
    report = scan(model, "mxfp4")
    assert report.kinds == ("weight", "merged", "delta")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    for kind, tensor in (("weight", base), ("merged", base + delta), ("delta", delta)):
        row = next(r for r in report.rows if r.name == name and r.kind == kind)
        expected = error_report(tensor, qnoise.fake_quantize(tensor, "mxfp4"), "mxfp4")
        assert row.figures["sqnr_db"] == pytest.approx(expected["sqnr_db"], rel=1e-4), kind
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3.0)
    comparison = report.compare(scan(model, "mxfp4"))
    assert comparison.changed
    changed = {(a.name, a.kind) for a, b in comparison.pairs if dict(a.figures) != dict(b.figures)}
    assert changed == {(name, "merged"), (name, "delta")}
    with model.disable_adapter():
        assert scan(model, "mxfp4").kinds == ("weight",)
    model.merge_adapter()
    merged = scan(model, "mxfp4")
    assert merged.kinds == ("merged",)
    assert merged.findings[0].what.startswith("adapter 'default' is merged")


def test_dora_is_merged_as_it_is_trained() -> None:
    model = with_lora(tiny_model(), use_dora=True)
    report = scan(model, "mxfp4", include="q_proj")
    with torch.no_grad():
        stock = {n: t for n, t in qnoise.rl.rollout_weights(model) if n.endswith("q_proj.weight")}
    for row in report.select("merged"):
        weight = stock[row.name + ".weight"]
        expected = error_report(weight, qnoise.fake_quantize(weight, "mxfp4"), "mxfp4")["sqnr_db"]
        assert row.figures["sqnr_db"] == pytest.approx(expected, rel=1e-5)


def test_the_experiment_on_baked_bases() -> None:
    """Base, baked base, baked base + two adapters, merged either way: equal where they must be, and nowhere else."""
    base = tiny_model()
    baked = qnoise.bake(qnoise.patch_model(tiny_model(), "mxfp4"))
    adapters = []
    for scale in (1.0, 2.0):
        model = with_lora(copy.deepcopy(baked))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
        adapters.append(model)
    reports = {
        "base": scan(base, "mxfp4"),
        "baked": scan(baked, "mxfp4"),
        "first": scan(adapters[0], "mxfp4"),
        "second": scan(adapters[1], "mxfp4"),
        "first, merged": scan(copy.deepcopy(adapters[0]).merge_and_unload(), "mxfp4"),
        "requantized": scan(
            qnoise.bake(qnoise.patch_model(copy.deepcopy(adapters[0]).merge_and_unload(), "mxfp4")), "mxfp4"
        ),
    }
    sqnr = {
        (name, kind): [row.figures["sqnr_db"] for row in report.select(kind)]
        for name, report in reports.items()
        for kind in report.kinds
    }
    # Q(Q(W)) = Q(W): a baked base has no error left, with an adapter beside it or not.
    for name in ("baked", "first", "second"):
        assert sqnr[name, "weight"] == [math.inf] * 14
    assert sqnr["requantized", "weight"] == [math.inf] * 14
    assert all(15 < value < 20 for value in sqnr["base", "weight"])
    # An adapter takes the weights off the grid again, each in its own way.
    assert all(10 < value < 30 for value in sqnr["first", "merged"])
    assert sqnr["first", "merged"] != sqnr["second", "merged"] != sqnr["base", "weight"]
    assert sqnr["first, merged", "weight"] == pytest.approx(sqnr["first", "merged"], rel=1e-4)


def test_activations_leave_the_model_as_it_was(ids) -> None:
    model = qnoise.patch_model(tiny_model(), "mxfp4", noise="rmsnorm").train()
    model.model.layers[0].eval()
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 4).step()
    before = snapshot(model)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    training = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    report = scan(model, "mxfp4", inputs=ids)
    assert_same(before, snapshot(model))
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert training == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert report.kinds == ("weight", "input", "output")


def test_hooks_are_taken_off_after_a_failure() -> None:
    model = tiny_model()
    with pytest.raises(IndexError):
        scan(model, "mxfp4", inputs=torch.full((1, 4), 1000))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_figures_of_activations(ids) -> None:
    model = tiny_model()
    seen = {}
    mlp = model.model.layers[1].mlp.gate_proj
    report = scan(model, ["mxfp4", "nvfp4"], inputs=[ids[:1], {"input_ids": ids[1:]}])
    with torch.no_grad():
        handle = mlp.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
        model(ids)
        handle.remove()
    x = seen["x"].reshape(-1, 64)
    weight = mlp.weight.detach()
    for fmt in ("mxfp4", "nvfp4"):
        row = next(r for r in report.select("input", fmt) if r.name == "model.layers.1.mlp.gate_proj")
        amax = x.abs().amax(-1, keepdim=True) if fmt == "nvfp4" else None
        x_hat = qnoise.fake_quantize(x, fmt, amax=amax)
        tokens = [10 * math.log10(a.square().sum() / (b - a).square().sum()) for a, b in zip(x, x_hat, strict=True)]
        assert row.shape == (20, 64)
        assert row.figures["sqnr_db"] == pytest.approx(sum(tokens) / 20, abs=1e-3)
        whole = error_report(x, x_hat, fmt, amax=amax)
        assert row.figures["pooled_sqnr_db"] == pytest.approx(whole["sqnr_db"], abs=1e-3)
        error = x @ (qnoise.fake_quantize(weight, fmt) - weight).T
        weight_row = next(r for r in report.select("weight", fmt) if r.name == row.name)
        expected = (error.norm() / (x @ weight.T).norm()).item()
        assert weight_row.figures["output_relative_rms"] == pytest.approx(expected, rel=1e-4)


def test_one_massive_token_does_not_decide() -> None:
    x = normal(64, 256)
    massive = x.clone()
    massive[7, 3] = 3000.0
    net = Net(normal(256, 256) * 0.05)
    plain, with_massive = (
        next(r for r in scan(net, "mxfp4", inputs=each).rows if r.kind == "input") for each in (x, massive)
    )
    assert plain.figures["sqnr_db"] == pytest.approx(plain.figures["pooled_sqnr_db"], abs=0.1)
    # Most of the energy is in one element, whose rounding is the pooled figure: between 15 and 60 dB, by chance.
    assert abs(with_massive.figures["pooled_sqnr_db"] - plain.figures["pooled_sqnr_db"]) > 1
    assert abs(with_massive.figures["sqnr_db"] - plain.figures["sqnr_db"]) < 0.6
    assert with_massive.figures["worst_channel"] != 3


def test_padding_is_left_out(ids) -> None:
    model = tiny_model()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    report = scan(model, "mxfp4", inputs=[{"input_ids": ids, "attention_mask": mask}])
    assert {row.shape[0] for row in report.rows if row.kind == "input"} == {16}


def test_bad_arguments() -> None:
    net = Net(normal(32, 32))
    with pytest.raises(ValueError, match="fmts is empty"):
        scan(net, [])
    with pytest.raises(ValueError, match="Did you mean 'mxfp4'"):
        scan(net, "mxfp44")
    with pytest.raises(TypeError, match="not int"):
        scan(3)
    with pytest.raises(ValueError, match="no batch"):
        scan(net, inputs=[])
    with pytest.raises(ValueError, match=r"include names 'q_pro'.*Did you mean 'q_proj'"):
        scan(tiny_model(), include="q_pro")
    with pytest.raises(ValueError, match="no weight to scan"):
        scan(nn.LayerNorm(3))
    report = scan(nn.Sequential(nn.Linear(4, 0), nn.Linear(4, 4)), "mxfp4")
    assert [(f.name, f.serious) for f in report.findings] == [("0", True)]


def test_packed_weights_are_said_to_be_gone() -> None:
    model = tiny_model().requires_grad_(False)
    qnoise.patch_model(model, storage="packed", include="q_proj")
    with pytest.raises(ValueError, match="packed"):
        scan(model, "mxfp4", include="q_proj")
    report = scan(model, "mxfp4")
    assert {f.name for f in report.findings if f.serious} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


def test_a_report_survives_json() -> None:
    baked = qnoise.bake(qnoise.patch_model(tiny_model(), "mxfp4", include="q_proj"))
    report = scan(baked, ["mxfp4", QuantSpec("nvfp4", "four_over_six")], thresholds="classic")
    text = report.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert ScanReport.from_json(text) == report
    for broken, match in (
        ("[1]", "schema is None"),
        ('{"schema": "qnoise-scan-9"}', "qnoise-scan-9"),
        ('{"schema": "qnoise-scan-1"}', "damaged.*source"),
        ("[" * 100000, "JSON|nested|Expecting|recursion"),
    ):
        with pytest.raises(ValueError, match=match):
            ScanReport.from_json(broken)
