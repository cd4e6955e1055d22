"""Checkpoints for compressed-tensors: loaded by transformers they are the patched model, bit for bit."""

from __future__ import annotations

import copy
import json
from importlib import metadata

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qnoise
import qnoise.nn.linear
from qnoise import FORMATS, QuantSpec
from qnoise.config import PatchConfig
from qnoise.formats import E2M1
from qnoise.integrations.export import export
from qnoise.integrations.layout import stored
from qnoise.integrations.load_packed import load_packed
from qnoise.integrations.schemes import SCHEMES
from qnoise.rounding import round_magnitude
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


ALL_MODES = [QuantSpec(fmt, mode) for fmt in ("mxfp4", "nvfp4", "mxfp8_e4m3") for mode in FORMATS[fmt].scale_modes]


@pytest.mark.parametrize("spec", ALL_MODES, ids=str)
def test_every_scale_mode_decodes_to_what_the_forward_uses(spec: QuantSpec) -> None:
    """By the library's own decoder. Each weight has its largest magnitude at one of the 128 mantissas of bfloat16; at
    147 and 217 a scale that is a product instead of a quotient is another one."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = next(s for s in SCHEMES if s.weight == spec.fmt and s.inputs is None)
    decoder = BaseCompressor.get_value_from_registry(scheme.layout)
    generator = torch.Generator().manual_seed(1)
    for mantissa in range(128, 256) if spec.per_tensor_scale else (128, 147, 217):
        weight = torch.randn(24, 64, generator=generator) * torch.exp(torch.linspace(-4, 0, 24))[:, None]
        weight = (weight / weight.abs().max() * 0.99 * mantissa / 128).bfloat16()
        weight[3, 5], weight[7] = mantissa / 128, 0
        quantized = qnoise.quantize(weight, spec)
        decoded = decoder.decompress(stored("x", quantized, None), preset_name_to_scheme(scheme.preset, ["Linear"]))[
            "weight"
        ]
        assert torch.equal(decoded.to(torch.bfloat16), qnoise.fake_quantize(weight, spec)), mantissa


@pytest.mark.parametrize("spec", [QuantSpec("mxfp4", "even"), QuantSpec("mxfp8_e4m3", "rceil")], ids=str)
def test_quantized_inputs(tmp_path, spec: QuantSpec) -> None:
    model = qnoise.patch_model(stock(), config=PatchConfig(spec.fmt, act_fmt=spec))
    assert export(model, tmp_path / "mx").preset == {"mxfp4": "MXFP4", "mxfp8_e4m3": "MXFP8"}[spec.fmt]
    assert torch.equal(logits(loaded(tmp_path / "mx")), logits(model))
    packed = load_packed(tmp_path / "mx")
    assert torch.equal(logits(packed), logits(model))
    assert qnoise.state(packed)["act_formats"] == {str(spec): 14}


def quantized_by_the_library(x: Tensor, preset: str) -> Tensor:
    """Inputs as compressed-tensors quantizes them while a model runs."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = preset_name_to_scheme(preset, ["Linear"]).input_activations
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    return fake_quantize(x, scale, zero_point, args)


def test_rules_for_inputs_at_every_mantissa() -> None:
    """MXFP4: the same. MXFP8: but for one mantissa of 128, and there only for elements far below the largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 200, 32, generator=generator) * 2.0 ** -torch.randint(
        0, 20, (128, 200, 32), generator=generator
    )
    peak = torch.arange(128, 256)[:, None, None] / 128
    x = (x / x.abs().amax(-1, keepdim=True) * 0.99 * peak).bfloat16()
    x[..., 0] = peak[..., 0]
    rows = x.flatten(1)[None]
    assert torch.equal(quantized_by_the_library(rows, "MXFP4"), qnoise.fake_quantize(rows, QuantSpec("mxfp4", "even")))
    own = qnoise.fake_quantize(x, QuantSpec("mxfp8_e4m3", "rceil"))
    theirs = quantized_by_the_library(rows, "MXFP8").view_as(x)
    differ = own != theirs
    assert differ.any(-1).any(-1).nonzero().tolist() == [[224 - 128]]
    assert x[differ].abs().max() < 1.75 / 14336
    assert (own - theirs).abs().max() < 1.75 / 2e5
    for mode in ("floor", "even", "ceil"):
        other = qnoise.fake_quantize(x, QuantSpec("mxfp8_e4m3", mode)) != theirs
        assert other.any(-1).any(-1).sum() > 20, mode


def test_calibrated_inputs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVFP4 with quantized inputs. What is loaded divides by 6 in bfloat16, and that is all that differs."""
    amaxes = qnoise.calibrate_activations(stock(), IDS)
    amaxes |= {name: 0.7 * amax for name, amax in amaxes.items() if "layers.1.mlp" in name}  # and inputs beyond it
    model = qnoise.patch_model(stock(), config=PatchConfig("nvfp4", act_fmt="nvfp4", act_amax=amaxes))
    assert export(model, tmp_path / "nv").preset == "NVFP4"
    with safe_open(tmp_path / "nv" / "model.safetensors", framework="pt") as file:
        names = [key for key in file.keys() if key.endswith("input_global_scale")]  # noqa: SIM118
        assert len(names) == 14
        for name in names:
            amax = torch.tensor(amaxes[name.removesuffix(".input_global_scale")]).double()
            assert torch.equal(file.get_tensor(name), (2688 / amax).float().reshape(1)), name
    want = logits(model)
    assert torch.equal(logits(load_packed(tmp_path / "nv")), want)
    dense = loaded(tmp_path / "nv", quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(dense.get_submodule(name).weight, module.effective_weight()), name

    scales = []

    def divided_in_bfloat16(x: Tensor, spec: QuantSpec, amax: float) -> Tensor:
        divisor = torch.tensor([2688.0]) / torch.tensor([amax])
        blocks = x.unflatten(-1, (-1, 16))
        peak, six = blocks.abs().amax(-1), torch.full_like(blocks[..., 0], 6)
        fp32, bf16 = (
            (part * divisor).clamp(max=448).to(torch.float8_e4m3fn).float()
            for part in (peak.float() / six.float(), (peak / six).float())
        )
        scales.append((fp32 != bf16).float().mean())
        scale = (bf16 / divisor)[..., None]
        shares = torch.where(scale == 0, 0.0, blocks.float() / scale).clamp(-6, 6)
        return (round_magnitude(shares.abs(), E2M1).copysign(shares) * scale).flatten(-2).to(x.dtype)

    served = logits(loaded(tmp_path / "nv"))
    assert not torch.equal(served, want)
    monkeypatch.setattr(qnoise.nn.linear, "quantize_tokens", divided_in_bfloat16)
    assert torch.equal(served, logits(model))
    assert 0 < torch.stack(scales).mean() < 0.06


PLAN = {"*self_attn*": "nvfp4", "*mlp*": "mxfp8_e4m3", "*1.mlp*": "mxfp4", "*1.mlp.down_proj": None}


def test_a_plan_of_several_formats(tmp_path) -> None:
    model = qnoise.patch_model(stock(), fmt=PLAN)
    report = export(model, tmp_path / "x")
    assert report.preset == "NVFP4A16 + MXFP8A16 + MXFP4A16"
    assert report.ignored == ("model.layers.1.mlp.down_proj", "lm_head")
    want = logits(model)
    assert torch.equal(logits(loaded(tmp_path / "x")), want)
    packed = load_packed(tmp_path / "x")
    assert torch.equal(logits(packed), want)
    assert qnoise.state(packed)["formats"] == qnoise.state(model)["formats"]
    export(packed, tmp_path / "again")
    config = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("x", "again")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]


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


def test_folded_scales_are_in_the_weights_and_norms(tmp_path) -> None:
    model = qnoise.patch_model(stock(), fmt="mxfp4")
    qnoise.repairs.fold_scales(model, IDS)
    export(model, tmp_path / "x")
    assert torch.equal(logits(loaded(tmp_path / "x")), logits(model))
    assert not torch.equal(logits(model), logits(qnoise.patch_model(stock(), fmt="mxfp4")))


@pytest.mark.parametrize(
    ("found", "message"), [("0.19.1", r"needs compressed-tensors >= 0.20; found 0.19.1"), (None, "is not installed")]
)
def test_a_library_that_is_too_old_or_missing(tmp_path, monkeypatch: pytest.MonkeyPatch, found, message: str) -> None:
    right = metadata.version

    def version(package: str) -> str:
        if package != "compressed-tensors":
            return right(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=message + r".*pip install 'compressed-tensors>=0.20'"):
        export(qnoise.patch_model(stock()), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PatchConfig("mxfp6_e2m3"), "q_proj: mxfp6_e2m3 with 16-bit inputs has no preset"),
        (
            PatchConfig({"*": "mxfp4", "*v_proj": "nvfp4"}),
            "is MXFP4A16 and .*v_proj is NVFP4A16, but engines fuse them",
        ),
        (PatchConfig({"*": "mxfp4", "*mlp*": "mxint8"}), "gate_proj: mxint8 with 16-bit inputs has no preset"),
        (PatchConfig(QuantSpec("mxfp4", rotation="hadamard")), "has no place for rotation"),
        (PatchConfig("mxfp4", act_fmt="mxfp4"), r"QuantSpec\('mxfp4', 'even'\)"),
        (PatchConfig("nvfp4", act_fmt="nvfp4"), "static input scale, and this linear has none"),
        (PatchConfig("nvfp4", act_fmt="nvfp4"), r"act_amax=qnoise.calibrate_activations\(model, inputs\)"),
        (PatchConfig("nvfp4", act_fmt=QuantSpec("nvfp4", "mse"), act_amax=4.0), r"QuantSpec\('nvfp4', 'two_level'\)"),
        (PatchConfig("nvfp4", act_fmt="nvfp4", act_amax={"*": 4.0, "*.k_proj": 3.0}), "have different act_amax"),
        (PatchConfig("mxfp8_e4m3", act_fmt="mxfp8_e4m3"), r"QuantSpec\('mxfp8_e4m3', 'rceil'\)"),
        (
            PatchConfig("mxfp4", act_fmt=QuantSpec("mxfp4", "even", "stochastic")),
            "even, stochastic.*rounded to nearest",
        ),
        (PatchConfig("nvfp4", act_fmt=QuantSpec("mxfp4", "even")), "nvfp4 with mxfp4 .even. inputs has no preset"),
        (PatchConfig(QuantSpec("mxfp4", rounding="stochastic")), "q_proj: its weight is rounded stochastically"),
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
    with pytest.raises(ValueError, match="Sequential has no save_pretrained"):
        export(qnoise.patch_model(torch.nn.Sequential(torch.nn.Linear(64, 64))), tmp_path / "x")
    offloaded = qnoise.patch_model(stock(), "nvfp4")
    offloaded.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(96, 64, device="meta").bfloat16())
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is not in memory"):
        export(offloaded, tmp_path / "x")
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


def test_a_model_that_is_stored_under_other_names_is_refused(tmp_path) -> None:
    """transformers splits fused experts when it saves them, and takes them for quantized when it loads the result."""
    sizes = {"num_local_experts": 4, "head_dim": 16}
    mixture = qnoise.patch_model(tiny_model("mixtral", **sizes).bfloat16(), "nvfp4", exclude=["*experts"])
    with pytest.raises(ValueError, match=r"MixtralForCausalLM: .* such as model.layers.0.*experts.0.w1.weight"):
        export(mixture, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    qnoise.unpatch_model(mixture)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: .*no names. qnoise.bake"):
        export(qnoise.patch_model(mixture, "nvfp4"), tmp_path / "x")
    # GPT-OSS keeps them in one piece.
    sizes |= {"layer_types": ["full_attention", "sliding_attention"], "num_experts_per_tok": 2}
    config = tiny_model("gpt_oss", **sizes).config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    qnoise.patch_model(model, "mxfp4", exclude=["*experts"])
    report = export(model, tmp_path / "y")
    assert torch.equal(logits(loaded(tmp_path / "y")), logits(model))
    assert torch.equal(logits(load_packed(tmp_path / "y")), logits(model))
    assert len(report.quantized) == 8
    # An engine has its own module for experts, which it quantizes unless it is told not to.
    layers = [f"model.layers.{i}.mlp.{leaf}" for i in range(2) for leaf in ("router", "experts")]
    assert sorted(report.ignored) == sorted(["lm_head", *layers])


def test_a_fault_of_the_bytes_is_found_before_they_are_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qnoise.integrations import export as module

    right = module.stored

    def wrong(name, *arguments):
        stored = right(name, *arguments)
        if name.endswith("layers.1.mlp.up_proj"):
            stored["weight_packed"][0, 0] ^= 1
        return stored

    monkeypatch.setattr(module, "stored", wrong)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: [12] of 6144 weights decoded"):
        export(qnoise.patch_model(stock(), fmt="mxfp4"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
