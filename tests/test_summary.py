from __future__ import annotations

import torch

import qnoise
from patching import logits
from tiny_models import tiny_model, with_lora


def test_bytes_and_bits(ids) -> None:
    model = qnoise.patch_model(tiny_model(), "nvfp4", storage="cached")
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" in n)
    everything = sum(p.numel() for p in model.parameters())
    before = qnoise.summary(model)
    assert before.nbytes == (4 * everything, 4 * everything)
    logits(model, ids)
    after = qnoise.summary(model)
    assert after.nbytes == (4 * everything, 4 * (everything + weights)), "a kept Q(W) doubles the weight's memory"
    assert "kept beside the weights" in str(after)
    assert after.bits_per_weight == 4.5
    assert after.nbytes_deployed == 4 * (everything - weights) + weights * 4.5 / 8
    assert after.trainable == after.parameters == everything


def test_bits_of_a_plan_are_weighted_by_size() -> None:
    model = qnoise.patch_model(tiny_model(), {"*": "mxfp4", "down_proj": "mxfp8_e4m3"})
    sizes = {n: p.numel() for n, p in model.named_parameters() if "proj.weight" in n}
    down = sum(size for name, size in sizes.items() if "down_proj" in name)
    expected = (4.25 * (sum(sizes.values()) - down) + 8.25 * down) / sum(sizes.values())
    assert qnoise.summary(model).bits_per_weight == expected


def test_presets() -> None:
    for arguments, preset in [
        ({"fmt": "mxfp4"}, "MXFP4A16"),
        ({"fmt": "nvfp4"}, "NVFP4A16"),
        ({"fmt": "nvfp4", "act_fmt": "nvfp4"}, "NVFP4"),
        ({"fmt": "mxfp4", "act_fmt": "mxfp8_e4m3"}, None),
        ({"fmt": "mxint8"}, None),
    ]:
        assert qnoise.summary(qnoise.patch_model(tiny_model(), **arguments)).preset == preset


def test_printed_table() -> None:
    model = qnoise.patch_model(with_lora(tiny_model()), "nvfp4", noise="rmsnorm")
    text = str(qnoise.summary(model))
    assert "2 x model.layers.*.self_attn.q_proj" in text
    assert "per-tensor scale shared by 3" in text
    assert "output head" in text
    assert "adapter matrix" in text
    assert "noise in rollout, training" in text
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable parameters: {trainable:,} of" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_modules_added_after_patching_are_not_passed_over() -> None:
    model = qnoise.patch_model(tiny_model())
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    assert "added after patching" in qnoise.summary(model).skipped["model.layers.0.mlp.up_proj"]
    qnoise.patch_model(model)
    assert "model.layers.0.mlp.up_proj" in qnoise.summary(model).patched


def test_fused_experts_and_routers_are_listed() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=50, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    summary = qnoise.summary(qnoise.patch_model(AutoModelForCausalLM.from_config(config)))
    skipped = summary.skipped
    assert summary.patched["model.layers.0.mlp.experts"] == "mxfp4; in gate_up_proj, down_proj"
    assert "TopKRouter" in skipped["model.layers.0.mlp.gate"]
    assert "model.embed_tokens" not in skipped
