"""Adapters that start from the damage: optimality, what is kept in which dtype, the base, undo, refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import qnoise
from patching import assert_same, logits, snapshot
from qnoise.repairs import asymmetric
from qnoise.repairs.calibration import SecondMoments, second_moments
from qnoise.repairs.gptq import gptq
from qnoise.repairs.residual_adapter import _best_product, init_lora_from_residual
from test_repairs_distill import fresh_lora, loud, text
from tiny_models import tiny_model, with_lora


def adapted_linears(model) -> dict:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def parts(layer, adapter: str = "default"):
    """Raw weight, quantized weight and s B A, fp64."""
    delta = layer.scaling[adapter] * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    base = layer.base_layer
    return base._parameters["weight"].double(), base.effective_weight().double(), delta.detach()


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24), (5, 40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_product_of_that_rank_is_nearer(shape, weighted) -> None:
    """Against the SVD of M H^(1/2), with the root taken by eigenvectors; more rank than there is gives M itself."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    h = None
    root = torch.eye(shape[1], dtype=torch.float64)
    if weighted:
        x = torch.randn(200, shape[1], generator=generator, dtype=torch.float64) * torch.logspace(0, 2, shape[1])
        h = x.T @ x / 200
        values, vectors = torch.linalg.eigh(h)
        root = vectors @ values.sqrt().diag() @ vectors.T
    for rank in (1, 4, min(shape) + 3):
        b, a = _best_product(target, h, rank, 0.0)
        assert b.shape == (shape[0], rank)
        assert a.shape == (rank, shape[1])
        left = torch.linalg.svdvals(target @ root)[rank:].square().sum().sqrt()
        torch.testing.assert_close(((target - b @ a) @ root).norm(), left, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}], ids=["lora", "rslora"])
def test_residual_is_the_truncated_svd_of_the_damage(fmt, options, ids) -> None:
    model = qnoise.patch_model(fresh_lora(tiny_model(), **options), fmt)
    stock = logits(tiny_model(), ids)
    before = (logits(model, ids) - stock).square().mean()
    report = init_lora_from_residual(model)
    assert len(report.rows) == 14
    assert not report.skipped
    assert report.kl is None
    for row, layer in zip(report.rows, adapted_linears(model).values(), strict=True):
        w, q, delta = parts(layer)
        u, s, v = torch.linalg.svd(w - q, full_matrices=False)
        torch.testing.assert_close(delta, u[:, : row.rank] * s[: row.rank] @ v[: row.rank], rtol=0, atol=1e-6)
        assert row.rank == (2 if options and "q_proj" in row.name else 4)
        assert not row.weighted
        assert row.before == pytest.approx((s.norm() / w.norm()).item(), rel=1e-5)
        assert row.after == pytest.approx((s[row.rank :].norm() / w.norm()).item(), rel=1e-4)
    assert (logits(model, ids) - stock).square().mean() < before


@pytest.mark.parametrize("method", ["residual", "principal"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_turns_pin_the_base_and_keep_the_best(method, fmt, ids) -> None:
    model = qnoise.patch_model(fresh_lora(tiny_model()), fmt)
    raw = {n: layer.base_layer._parameters["weight"].clone() for n, layer in adapted_linears(model).items()}
    reports = []
    for iterations in (1, 4):
        report = init_lora_from_residual(model, method=method, iterations=iterations)
        reports.append(report)
        for row, (name, layer) in zip(report.rows, adapted_linears(model).items(), strict=True):
            w, q, delta = parts(layer)
            assert torch.equal(layer.base_layer._parameters["weight"], raw[name])
            assert row.after == pytest.approx(((w - q - delta).norm() / w.norm()).item(), rel=1e-6)
            if method == "principal" and iterations == 1:
                codes = layer.base_layer.quantized()
                assert torch.equal(codes.dequantize(torch.float32).double(), q)
                peers = [p._parameters["weight"] for p in layer.base_layer._qnoise.scale_group]
                amax = torch.stack([p.abs().max() for p in peers]).max() if peers else None
                expected = qnoise.quantize((w - delta).float(), fmt, amax=amax)
                assert torch.equal(codes.codes, expected.codes)
                assert torch.equal(codes.scale_codes, expected.scale_codes)
        report.undo()
    once, often = (sum(row.after for row in r.rows) for r in reports)
    assert often < once
    assert any(row.iteration > 1 for row in reports[1].rows)


@pytest.mark.parametrize(
    "spec", [qnoise.QuantSpec("nvfp4"), qnoise.QuantSpec("nvfp4", "mse", rotation="hadamard")], ids=str
)
def test_a_base_quantized_anew_keeps_the_scale_of_its_siblings(spec) -> None:
    """A kernel for fused siblings has one per-tensor scale for all of them, of the weights as they are quantized."""
    model = qnoise.patch_model(fresh_lora(tiny_model()), spec)
    shared = [layer.base_layer for layer in adapted_linears(model).values() if layer.base_layer._qnoise.scale_group]
    assert len(shared) == 10
    before = [linear.quantized().per_tensor_scale for linear in shared]
    init_lora_from_residual(model, method="principal")
    assert [linear._qnoise.pin is not None for linear in shared] == [True] * 10
    for linear, scale in zip(shared, before, strict=True):
        assert torch.equal(linear.quantized().per_tensor_scale, scale)


def test_more_turns_are_never_worse() -> None:
    """A turn may be worse than the one before; the best is kept, and its adapter and codes are those that are set."""
    model = qnoise.patch_model(fresh_lora(tiny_model(), r=1), "nvfp4")
    errors, last = [], None
    for iterations in range(1, 9):
        report = init_lora_from_residual(model, iterations=iterations)
        errors.append([row.after for row in report.rows])
        last = report.rows
        for row, layer in zip(report.rows, adapted_linears(model).values(), strict=True):
            w, q, delta = parts(layer)
            assert row.after == pytest.approx(((w - q - delta).norm() / w.norm()).item(), rel=1e-6)
        report.undo()
    assert all(b <= a for one, two in itertools.pairwise(errors) for a, b in zip(one, two, strict=True))
    assert any(row.iteration < 8 for row in last)


def test_inputs_weigh_the_error() -> None:
    """The output error it reports is that of the outputs, and is less than without inputs; so is the KL."""
    batch = text(rows=8)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model = qnoise.patch_model(fresh_lora(loud(tiny_model())), "mxfp4")
    with qnoise.full_precision(model):
        moments = second_moments(model, inputs)
    report = init_lora_from_residual(model, inputs, damping=0.0)
    assert all(row.weighted for row in report.rows)

    def output_error(layer, name):
        w, q, delta = parts(layer)
        e, h = w - q - delta, moments.of[name].double()
        return ((e @ h * e).sum() / (w @ h * w).sum()).sqrt().item()

    weighted = [
        output_error(layer, row.name) for row, layer in zip(report.rows, adapted_linears(model).values(), strict=True)
    ]
    assert weighted == pytest.approx([row.after for row in report.rows], rel=1e-5)
    assert report.kl is not None
    assert report.kl[1] < report.kl[0]
    report.undo()
    plain = init_lora_from_residual(model)
    unweighted = [
        output_error(layer, row.name) for row, layer in zip(plain.rows, adapted_linears(model).values(), strict=True)
    ]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(weighted, unweighted, strict=True))
    assert sum(weighted) < 0.98 * sum(unweighted)
    plain.undo()
    # What was collected before serves as well, and a linear that saw nothing is fitted without weights.
    partly = SecondMoments({k: v for k, v in moments.of.items() if "q_proj" in k}, moments.tokens)
    again = init_lora_from_residual(model, moments=partly, damping=0.0)
    assert [row.weighted for row in again.rows] == ["q_proj" in row.name for row in again.rows]


@pytest.mark.parametrize(
    "spec",
    [
        qnoise.QuantSpec("mxfp4", macro_block=128),
        qnoise.QuantSpec("mxfp4", residual=0.5),
        qnoise.QuantSpec("nvfp4", residual=0.5),
    ],
    ids=str,
)
def test_residual_of_formats_that_codes_cannot_hold(spec, ids) -> None:
    """The adapter makes up for what the forward really uses; what would need pinned codes says so."""
    model = qnoise.patch_model(fresh_lora(tiny_model()), spec)
    clean = snapshot(model)
    for arguments in ({"method": "principal"}, {"iterations": 2}):
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .*codes cannot hold all of .*method='res"):
            init_lora_from_residual(model, **arguments)
    report = init_lora_from_residual(model)
    assert len(report.rows) == 14
    for row, layer in zip(report.rows, adapted_linears(model).values(), strict=True):
        w, q, delta = parts(layer)
        left = torch.linalg.svdvals(w - q)[row.rank :].square().sum().sqrt() / w.norm()
        assert row.before == pytest.approx(((w - q).norm() / w.norm()).item(), rel=1e-6)
        assert ((w - q - delta).norm() / w.norm()).item() == pytest.approx(left.item(), rel=1e-4)
        assert row.after < row.before
    report.undo()
    assert_same({**clean, "parameters": 0}, {**snapshot(model), "parameters": 0})


def test_undo_is_exact_and_pins_are_put_back(ids) -> None:
    model = qnoise.patch_model(fresh_lora(tiny_model()), "mxfp4")
    linear = next(iter(adapted_linears(model).values())).base_layer
    linear.pin(qnoise.quantize(linear._parameters["weight"] * 1.01, "mxfp4"))
    pinned, before, said = linear.effective_weight().clone(), snapshot(model), logits(model, ids)
    for arguments in ({"method": "principal"}, {"iterations": 2}):
        with pytest.raises(ValueError, match="pinned.*iterations=1"):
            init_lora_from_residual(model, **arguments)
    report = init_lora_from_residual(model)
    w, q, delta = parts(next(iter(adapted_linears(model).values())))
    assert torch.equal(q, pinned.double())
    assert (w - q - delta).norm() < (w - q).norm()
    report.undo()
    assert torch.equal(logits(model, ids), said)
    after = snapshot(model)
    before.pop("parameters"), after.pop("parameters")
    assert_same({**before, "parameters": 0}, {**after, "parameters": 0})
    linear.pin(None)
    said = logits(model, ids)
    init_lora_from_residual(model, method="principal", iterations=2).undo()
    assert torch.equal(logits(model, ids), said)
    assert qnoise.state(model)["pinned"] == 0


def test_bf16_adapters_and_the_rest_left_to_the_base(ids) -> None:
    """The base takes what a 16-bit adapter rounds away."""
    model = qnoise.patch_model(
        fresh_lora(tiny_model().to(torch.bfloat16), autocast_adapter_dtype=False)
        if False
        else fresh_lora(tiny_model()).to(torch.bfloat16),
        "mxfp8_e4m3",
    )
    report = init_lora_from_residual(model, method="principal")
    for row, layer in zip(report.rows, adapted_linears(model).values(), strict=True):
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16
        w, q, delta = parts(layer)
        assert row.after == pytest.approx(((w - q - delta).norm() / w.norm()).item(), rel=1e-6)


def test_what_it_leaves_alone_and_what_it_refuses(ids) -> None:
    model = fresh_lora(
        tiny_model(tie_word_embeddings=False), target_modules=["q_proj", "k_proj", "lm_head", "embed_tokens"]
    )
    qnoise.patch_model(model, "mxfp4", exclude=["layers.1.self_attn.k_proj"])
    report = init_lora_from_residual(model)
    assert [row.name for row in report.rows] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    assert set(report.skipped) == {"model.embed_tokens", "lm_head", "model.layers.1.self_attn.k_proj"}
    assert "left alone: lm_head" in str(report)
    with pytest.raises(ValueError, match="does something already.*undo"):
        init_lora_from_residual(model)
    with pytest.raises(ValueError, match="no LoRA adapter 'other'; it has 'default'"):
        init_lora_from_residual(model, adapter_name="other")
    with pytest.raises(ValueError, match="not patched"):
        init_lora_from_residual(with_lora(tiny_model()))
    with pytest.raises(ValueError, match="use plain LoRA"):
        init_lora_from_residual(qnoise.patch_model(with_lora(tiny_model(), use_dora=True)))
    packed = fresh_lora(qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4", storage="packed"))
    with pytest.raises(ValueError, match="packed: the weight before quantization is gone"):
        init_lora_from_residual(packed)
    for arguments, match in (
        ({"method": "svd"}, "principal"),
        ({"iterations": 0}, "iterations is 0"),
        ({"damping": -1.0}, "damping"),
    ):
        with pytest.raises(ValueError, match=match):
            init_lora_from_residual(model, **arguments)


def test_a_failure_half_way_leaves_the_model_as_it_was(ids) -> None:
    model = qnoise.patch_model(fresh_lora(tiny_model()), "mxfp4")
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight[0, 0] = float("nan")
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight has NaN"):
        init_lora_from_residual(model, method="principal")
    assert all(torch.equal(v, values[k]) or v.isnan().any() for k, v in model.state_dict().items())
    assert qnoise.state(model)["pinned"] == 0


def test_two_adapters_are_kept_apart(ids) -> None:
    from peft import LoraConfig

    model = fresh_lora(tiny_model())
    model.add_adapter("second", LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    qnoise.patch_model(model, "mxfp4")
    report = init_lora_from_residual(model, adapter_name="second")
    assert {row.rank for row in report.rows} == {6}
    assert len(report.rows) == 2
    assert len(report.skipped) == 12
    layer = next(iter(adapted_linears(model).values()))
    assert not layer.lora_B["default"].weight.any()
    assert layer.lora_B["second"].weight.any()


@pytest.mark.parametrize(("fmt", "skips"), [("mxfp4", True), ("nvfp4", True), ("mxfp4", False)])
def test_on_codes_that_make_good_what_was_lost_before(fmt, skips, ids, monkeypatch) -> None:
    """The adapter takes what the output lacks against full precision, those before it being at work."""
    if not skips:
        monkeypatch.setattr(asymmetric, "can_skip", lambda *_: False)
    texts = torch.randint(3, 99, (24, 12), generator=torch.Generator().manual_seed(5))
    model = qnoise.patch_model(loud(tiny_model()).requires_grad_(False), fmt)
    gptq(model, texts, asymmetric=True)
    model = fresh_lora(model)
    pinned = {name: layer.base_layer.quantized().codes.clone() for name, layer in adapted_linears(model).items()}
    layer = adapted_linears(model)["base_model.model.model.layers.1.mlp.up_proj"]
    stock = given_to(model, texts, layer, full=True)
    report = init_lora_from_residual(model, texts)
    assert len(report.rows) == 14
    assert report.kl is not None
    assert report.kl[1] < 0.9 * report.kl[0]
    now = given_to(model, texts, layer, full=False)
    w, q, delta = parts(layer)
    row = next(row for row in report.rows if row.name == "model.layers.1.mlp.up_proj")
    wanted = stock @ w.T
    for expected, values in ((row.before, q), (row.after, q + delta)):
        assert ((now @ values.T - wanted).norm() / wanted.norm()).item() == pytest.approx(expected, rel=1e-4)
    # No other product of that rank is better by the damped error.
    ridge = (0.01 * now.square().mean() * len(now)) ** 0.5
    seen = torch.cat([now, ridge * torch.eye(now.shape[1], dtype=torch.float64)])
    target = torch.linalg.lstsq(seen, torch.cat([wanted, ridge * w.T])).solution.T
    h = now.T @ now / len(now)
    b, a = _best_product(target - q, h, row.rank, 0.01)
    torch.testing.assert_close(delta, b @ a, rtol=0, atol=1e-4 * delta.abs().max().item())
    for name, each in adapted_linears(model).items():
        assert torch.equal(pinned[name], each.base_layer.quantized().codes)
    after = logits(model, ids)
    report.undo()
    assert not torch.equal(logits(model, ids), after)
    assert all(not each.lora_B["default"].weight.any() for each in adapted_linears(model).values())
    # Against the weights alone such codes look worse than they are.
    with pytest.raises(ValueError, match="make good what was lost before each linear"):
        init_lora_from_residual(model)
    with pytest.raises(ValueError, match="make good what was lost before each linear"):
        init_lora_from_residual(model, texts, moments=second_moments(model, texts))
    layer.base_layer.pin(None)
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.(up_proj\.weight has NaN|down_proj: NaN or Inf in its input)"
    ):
        init_lora_from_residual(model, texts)
    assert all(not each.lora_B["default"].weight.any() for each in adapted_linears(model).values())


def given_to(model, batch, layer, full: bool) -> torch.Tensor:
    """(tokens, in_features) of a linear, in full precision without adapters or as the model is."""
    kept = []
    handle = layer.base_layer.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        if full:
            with qnoise.full_precision(model), model.disable_adapter():
                logits(model, batch)
        else:
            logits(model, batch)
    handle.remove()
    return kept[0].double().flatten(0, 1)


def test_pins_know_how_their_codes_were_chosen(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    linear = model.model.layers[0].mlp.up_proj
    first = gptq(model, ids, asymmetric=True)
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].mlp.up_proj._qnoise.pin.asymmetric
    second = gptq(model, ids)
    assert not linear._qnoise.pin.asymmetric
    second.undo()
    assert linear._qnoise.pin.asymmetric
    first.undo()
    assert linear._qnoise.pin is None
