"""PEFT: adapters before and after patching, and merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, logits, manually_quantized, snapshot
from qnoise.nn import FakeQuantLinear, NoisyRMSNorm
from tiny_models import tiny_model, with_lora

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["norm"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_patching_before_and_after_peft_is_the_same(kind, fmt, ids) -> None:
    before = with_lora(qnoise.patch_model(tiny_model(), fmt, noise="rmsnorm"), **KINDS[kind])
    after = qnoise.patch_model(with_lora(tiny_model(), **KINDS[kind]), fmt, noise="rmsnorm")
    assert torch.equal(logits(before, ids), logits(after, ids))
    assert qnoise.summary(before).patched == qnoise.summary(after).patched
    for model in (before, after):
        qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10, seed=1).step()
    assert torch.equal(logits(before, ids), logits(after, ids))
    assert sum(isinstance(m, FakeQuantLinear) for m in after.modules()) == 14


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_adapter_on_the_quantized_base(kind, ids) -> None:
    """Q(W) x + BA x: the base is quantized and the adapter is not."""
    model = qnoise.patch_model(with_lora(tiny_model(), **KINDS[kind]))
    if kind == "dora":
        # DoRA's norm reads the raw weight; its logits are checked against the other order above.
        assert not torch.equal(logits(model, ids), logits(with_lora(tiny_model(), **KINDS[kind]), ids))
    else:
        expected = with_lora(manually_quantized(tiny_model(), "mxfp4"), **KINDS[kind])
        assert torch.equal(logits(model, ids), logits(expected, ids))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(manually_quantized(tiny_model(), "mxfp4"), ids))


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_the_adapter_and_nothing_else(kind, ids) -> None:
    model = qnoise.patch_model(with_lora(tiny_model(), **KINDS[kind]), "nvfp4", noise="rmsnorm").train()
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.05), 10).step()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_unpatching_a_peft_model_is_exact(ids) -> None:
    model = with_lora(tiny_model(), modules_to_save=["norm"])
    before, stock = snapshot(model), logits(model, ids)
    qnoise.patch_model(model, "nvfp4", noise="rmsnorm")
    logits(model, ids)
    qnoise.unpatch_model(model)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), stock)


def test_adapter_matrices_are_listed_and_left_alone() -> None:
    model = qnoise.patch_model(with_lora(tiny_model()))
    skipped = qnoise.summary(model).skipped
    reasons = {reason for name, reason in skipped.items() if "lora_" in name}
    assert reasons == {"adapter matrix"}
    assert sum("lora_" in name for name in skipped) == 28


@pytest.mark.parametrize("order", ["patch first", "peft first"])
def test_the_active_copy_of_a_saved_norm_is_noisy(order, ids) -> None:
    arguments = {"modules_to_save": ["norm"], "target_modules": ["q_proj"]}
    if order == "patch first":
        model = with_lora(qnoise.patch_model(tiny_model(), noise="rmsnorm"), **arguments)
    else:
        model = qnoise.patch_model(with_lora(tiny_model(), **arguments), noise="rmsnorm")
    active = model.base_model.model.model.norm.modules_to_save["default"]
    assert isinstance(active, NoisyRMSNorm)
    clean = logits(model, ids)
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10, multipliers={"*": 0, "model.norm": 1})
    scheduler.step()
    assert active.noise_state() == {"name": "model.norm", "sigma": 0.1, "seed": 0, "step": 0, "active": True}
    assert not torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_merging_and_unmerging_never_serves_a_stale_weight(safe, fmt, ids) -> None:
    model = qnoise.patch_model(with_lora(tiny_model()), fmt, storage="cached")
    stock = with_lora(tiny_model())
    logits(model, ids)
    for _ in range(2):
        model.merge_adapter(safe_merge=safe)
        stock.merge_adapter(safe_merge=safe)
        expected = qnoise.patch_model(copy.deepcopy(stock), fmt, storage="dynamic")
        assert torch.equal(logits(model, ids), logits(expected, ids)), "merged: Q(W + BA)"
        model.unmerge_adapter()
        stock.unmerge_adapter()
        expected = qnoise.patch_model(copy.deepcopy(stock), fmt, storage="dynamic")
        assert torch.equal(logits(model, ids), logits(expected, ids)), "unmerged"


def test_merge_and_unload_leaves_a_patched_stock_model(ids) -> None:
    merged = qnoise.patch_model(with_lora(tiny_model())).merge_and_unload()
    assert sum(isinstance(m, FakeQuantLinear) for m in merged.modules()) == 14
    reference = with_lora(tiny_model()).merge_and_unload()
    assert torch.equal(logits(merged, ids), logits(manually_quantized(reference, "mxfp4"), ids))
    qnoise.unpatch_model(merged)
    assert torch.equal(logits(merged, ids), logits(reference, ids))
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear


def test_adapters_are_saved_and_loaded(ids, tmp_path) -> None:
    from peft import PeftModel

    model = qnoise.patch_model(with_lora(tiny_model()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(qnoise.patch_model(tiny_model()), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_lora_runs_under_gradient_checkpointing(ids) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = qnoise.patch_model(with_lora(tiny_model()), noise="rmsnorm").train()
        qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.05), 10).step()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
