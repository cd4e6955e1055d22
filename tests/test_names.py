from __future__ import annotations

import pytest

from qnoise.names import canonical_name, layer_index, matches
from tiny_models import tiny_model, with_lora

STOCK = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    "wrapped",
    [
        STOCK,
        f"base_model.model.{STOCK}",
        f"base_model.model.{STOCK}.base_layer",
        f"module.{STOCK}",
        f"_orig_mod.{STOCK}",
        f"module._orig_mod.base_model.model.{STOCK}.base_layer",
        "model.layers.3._checkpoint_wrapped_module.self_attn.q_proj",
        "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.self_attn.q_proj",
        f"base_model.model.{STOCK}.modules_to_save.default",
        f"base_model.model.{STOCK}.original_module",
    ],
)
def test_canonical_name_is_the_stock_name(wrapped: str) -> None:
    assert canonical_name(wrapped) == STOCK


def test_canonical_names_of_a_peft_model_are_those_of_the_stock_model() -> None:
    stock = {name for name, _ in tiny_model().named_modules() if name.endswith("proj") or name.endswith("norm")}
    model = with_lora(tiny_model(), modules_to_save=["norm"])
    wrapped = {canonical_name(name) for name, _ in model.named_modules()}
    assert len(stock) == 19
    assert stock <= wrapped


def test_layer_index() -> None:
    assert layer_index("model.layers.12.mlp.experts.3.up_proj") == 12
    assert layer_index("transformer.h.0.attn") == 0
    assert layer_index("lm_head") is None


def test_matches_from_some_component_on() -> None:
    for glob in ("q_proj", "self_attn.q_proj", "layers.3.*", "model.layers.*.q_proj", "*", STOCK):
        assert matches(STOCK, glob), glob
    for glob in ("proj", "k_proj", "layers.30.*", "self_attn"):
        assert not matches(STOCK, glob), glob
