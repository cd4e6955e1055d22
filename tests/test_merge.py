"""`merge`: Q(W) + BA and Q(W + BA) are different models, and the distance is reported."""

from __future__ import annotations

import copy

import pytest
import torch

import qnoise
from tests.tiny_models import tiny_model, with_lora

IDS = torch.arange(3, 20)[None]


def adapted(fmt="nvfp4", **overrides):
    model = qnoise.patch_model(tiny_model("qwen2").requires_grad_(False), fmt=fmt, **overrides)
    return with_lora(model, target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("storage", ["auto", "packed"])
def test_as_trained(storage: str) -> None:
    model = adapted(storage=storage)
    want = model(IDS).logits
    stock, error = qnoise.merge(copy.deepcopy(model))
    assert {type(m) for m in stock.modules()} == {type(m) for m in tiny_model("qwen2").modules()}
    torch.testing.assert_close(stock(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert bool(error) == (storage == "auto")


def test_requantized_is_another_model() -> None:
    model = adapted(noise="rmsnorm")
    want = model(IDS).logits
    merged, error = qnoise.merge(copy.deepcopy(model), "requantized")
    assert qnoise.state(merged)["formats"] == {"nvfp4": 14}
    assert (merged(IDS).logits - want).abs().max() > 1e-3
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    trained = layer.base_layer.effective_weight() + layer.get_delta_weight("default")
    now = merged.model.layers[1].mlp.up_proj.effective_weight()
    # gate_proj shares up_proj's per-tensor scale, k and v that of q: what they hold changes too.
    assert error["model.layers.1.mlp.up_proj"] == pytest.approx(
        float((now - trained).norm() / trained.norm()), rel=1e-5
    )
    assert len(error) == 2 * 5


def test_refusals() -> None:
    with pytest.raises(TypeError, match="no adapter to merge"):
        qnoise.merge(qnoise.patch_model(tiny_model("qwen2")))
    with pytest.raises(ValueError, match="'requantized'"):
        qnoise.merge(adapted(), "requantised")
    packed = adapted(storage="packed")
    with pytest.raises(ValueError, match="packed or pinned"):
        qnoise.merge(packed, "requantized")
    assert packed(IDS).logits.isfinite().all()
