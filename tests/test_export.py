"""Checkpoints for compressed-tensors: loaded by transformers they are the patched model, bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qnoise
from qnoise import QuantSpec
from qnoise.config import PatchConfig
from qnoise.integrations.export import export, load_packed
from tests.tiny_models import tiny_model, with_lora

pytest.importorskip("compressed_tensors")
IDS = torch.arange(3, 40)[None]


def stock(seed: int = 0, **overrides):
    config = tiny_model("qwen2", **overrides).config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    # Spread channels, and weights at the amax mantissas where dividing by gs and multiplying by its inverse differ.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "proj" in name:
                weight.mul_(torch.exp(torch.linspace(-3, 3, weight.shape[1]))[None])
        for layer, mantissa in zip(model.model.layers, (147, 217), strict=False):
            weight = layer.mlp.down_proj.weight
            weight[0, 0] = mantissa / 128 * 2.0 ** torch.frexp(weight.abs().max())[1]
    return model


@torch.no_grad()
def logits(model):
    with qnoise.phase(model, "evaluation"):
        return model(input_ids=IDS).logits


def loaded(path, **overrides):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", **overrides).eval()


SPECS = ["mxfp4", QuantSpec("mxfp4", "mse"), "nvfp4", QuantSpec("nvfp4", "four_over_six"), QuantSpec("nvfp4", "mse")]


@pytest.mark.parametrize("spec", [*SPECS, "mxfp8_e4m3"], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_loaded_is_what_was_patched(tmp_path, spec, tied: bool) -> None:
    model = qnoise.patch_model(stock(tie_word_embeddings=tied), fmt=spec, noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.5), 1).step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = export(model, tmp_path / "x")
    assert report.ignored == ("lm_head",)
    assert len(report.quantized) == 14
    want = logits(model)
    assert torch.equal(logits(loaded(tmp_path / "x")), want)
    dense = loaded(tmp_path / "x", quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(dense.get_submodule(name).weight, module.effective_weight()), name
    packed = load_packed(tmp_path / "x")
    assert torch.equal(logits(packed), want)
    assert qnoise.state(packed)["formats"] == {QuantSpec(getattr(spec, "fmt", spec)).fmt: 14}
    assert "packed" in str(qnoise.summary(packed))
    # The model that was exported is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def test_quantized_inputs(tmp_path) -> None:
    model = qnoise.patch_model(stock(), config=PatchConfig("mxfp4", act_fmt=QuantSpec("mxfp4", "even")))
    assert export(model, tmp_path / "mx").preset == "MXFP4"
    assert torch.equal(logits(loaded(tmp_path / "mx")), logits(model))
    assert torch.equal(logits(load_packed(tmp_path / "mx")), logits(model))


def test_static_input_scales(tmp_path) -> None:
    """The library divides by 6 in bfloat16, so blocks of its inputs may differ; what is written does not."""
    amaxes = {"*": 3.7, "*.down_proj": 11.3}
    model = qnoise.patch_model(stock(), config=PatchConfig("nvfp4", act_fmt="nvfp4", act_amax=amaxes))
    assert export(model, tmp_path / "nv").preset == "NVFP4"
    with safe_open(tmp_path / "nv" / "model.safetensors", framework="pt") as file:
        for name in [key for key in file.keys() if key.endswith("input_global_scale")]:  # noqa: SIM118
            amax = torch.tensor(amaxes["*.down_proj" if "down_proj" in name else "*"])
            assert torch.equal(file.get_tensor(name), (2688 / amax.double()).float().reshape(1)), name
    assert torch.equal(logits(load_packed(tmp_path / "nv")), logits(model))
    dense = loaded(tmp_path / "nv", quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(dense.get_submodule(name).weight, module.effective_weight()), name


def test_an_adapter_on_top_is_what_was_trained(tmp_path) -> None:
    from peft import PeftModel

    model = with_lora(qnoise.patch_model(stock(), fmt="nvfp4"))
    report = export(model, tmp_path / "x")
    assert report.adapter == tmp_path / "x" / "adapter"
    base = loaded(tmp_path / "x", quantization_config=CompressedTensorsConfig(dequantize=True))
    want = logits(model)
    assert torch.equal(PeftModel.from_pretrained(base, report.adapter).eval()(IDS).logits, want)
    packed = PeftModel.from_pretrained(load_packed(tmp_path / "x"), report.adapter, is_trainable=True)
    assert torch.equal(logits(packed.eval()), want)
    packed(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in packed.parameters() if p.requires_grad)


def test_merged_is_another_model_and_says_how_far(tmp_path) -> None:
    model = with_lora(qnoise.patch_model(stock(), fmt="nvfp4"), target_modules=["q_proj", "down_proj"])
    report = export(model, tmp_path / "x", adapters="merged")
    assert report.adapter is None
    # k and v share q's per-tensor scale, so they are written anew with it.
    assert {name.rpartition(".")[2] for name in report.merge_error} == {"q_proj", "k_proj", "v_proj", "down_proj"}
    dense = loaded(tmp_path / "x", quantization_config=CompressedTensorsConfig(dequantize=True))
    by_hand = copy.deepcopy(model).merge_and_unload()
    for name, module in by_hand.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(dense.get_submodule(name).weight, module.effective_weight()), name
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    trained = q_proj.base_layer.effective_weight() + q_proj.get_delta_weight("default")
    error = (dense.model.layers[0].self_attn.q_proj.weight - trained).norm() / trained.norm()
    assert report.merge_error["model.layers.0.self_attn.q_proj"] == pytest.approx(float(error), rel=1e-2)
    assert 0.01 < error < 1


def test_pinned_and_packed_codes_are_written_as_they_are(tmp_path) -> None:
    model = qnoise.patch_model(stock(), fmt="nvfp4")
    linear = model.model.layers[0].mlp.down_proj
    other = qnoise.quantize(linear.weight * 0.9, "nvfp4", amax=1000.0)
    linear.pin(other)
    export(model, tmp_path / "pinned")
    dense = loaded(tmp_path / "pinned", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(dense.model.layers[0].mlp.down_proj.weight, other.dequantize())
    again = load_packed(tmp_path / "pinned")
    export(again, tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PatchConfig("mxfp6_e2m3"), "q_proj: mxfp6_e2m3 with 16-bit inputs has no preset"),
        (PatchConfig({"*": "mxfp4", "*mlp*": "nvfp4"}), "one scheme is written for all"),
        (PatchConfig(QuantSpec("mxfp4", rotation="hadamard")), "has no place for rotation"),
        (PatchConfig("mxfp4", act_fmt="mxfp4"), r"QuantSpec\('mxfp4', 'even'\)"),
        (PatchConfig("nvfp4", act_fmt="nvfp4"), "static input scale, and this linear has none"),
        (PatchConfig("mxfp8_e4m3", act_fmt="mxfp8_e4m3"), "has no preset"),
        (PatchConfig("mxfp4", exclude=("*.k_proj",)), "k_proj is not, but engines fuse them"),
        (PatchConfig("nvfp4", share_scales=False), "different per-tensor scales"),
        (PatchConfig(None, noise="rmsnorm"), "nothing to export"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, config: PatchConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(qnoise.patch_model(stock(), config=config), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not patched"):
        export(stock(), tmp_path / "x")
    with pytest.raises(ValueError, match=r"q_proj.weight is torch.float32"):
        export(qnoise.patch_model(tiny_model("qwen2")), tmp_path / "x")
    with pytest.raises(ValueError, match="'merged'"):
        export(qnoise.patch_model(stock()), tmp_path / "x", adapters="merge")
    broken = qnoise.patch_model(stock())
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has NaN or Inf"):
        export(broken, tmp_path / "x")
    narrow = qnoise.patch_model(stock(intermediate_size=72))
    with pytest.raises(ValueError, match="down_proj: in_features=72 is no multiple of the block size 32"):
        export(narrow, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export(qnoise.patch_model(stock()), tmp_path / "full")
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load_packed(tmp_path / "full")


def test_a_fault_of_the_bytes_is_found_before_they_are_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qnoise.integrations import export as module

    right = module._stored

    def wrong(name, *arguments):
        stored = right(name, *arguments)
        if name.endswith("layers.1.mlp.up_proj"):
            stored["weight_packed"][0, 0] ^= 1
        return stored

    monkeypatch.setattr(module, "_stored", wrong)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: [12] of 6144 weights decoded"):
        export(qnoise.patch_model(stock(), fmt="mxfp4"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    export(qnoise.patch_model(stock(), fmt="mxfp4"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = dict(tensors)
    del lost["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(lost, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks codes or scales of model.layers.0.mlp.up_proj"):
        load_packed(tmp_path)
    save_file({**tensors, "other.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has 'other.weight', for which Qwen2ForCausalLM has no place"):
        load_packed(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor 'model.norm.weight'"):
        load_packed(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_packed(tmp_path)
