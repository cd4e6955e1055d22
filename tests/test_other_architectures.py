"""What is no causal language model: encoders, encoder-decoders, vision, speech; and what hangs on a language model in
place of its head. Built tiny, in fp32; nothing is downloaded."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import qnoise
from qnoise.nn import NoisyRMSNorm
from qnoise.nn.norm import is_rms_norm
from tests.there_and_back import there_and_back
from tests.tiny_models import tiny_model, with_lora
from tests.zoo import shrunken, tiny

CLASSIFIER, TRANSLATOR = "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
IMAGE = "AutoModelForImageClassification"

# Case -> class, model type, what shrinking does not get right, the linears left alone as an output head.
KINDS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "bert": (CLASSIFIER, "bert", {}, {"classifier"}),
    "bert_mlm": ("AutoModelForMaskedLM", "bert", {}, {"cls.predictions.decoder"}),
    "roberta": ("AutoModelForTokenClassification", "roberta", {}, {"classifier"}),
    "roberta_two_layer_head": (CLASSIFIER, "roberta", {}, {"classifier.out_proj"}),
    "modernbert": (CLASSIFIER, "modernbert", {}, {"classifier"}),
    "distilbert": ("AutoModelForQuestionAnswering", "distilbert", {}, {"qa_outputs"}),
    "deberta": (
        CLASSIFIER,
        "deberta-v2",
        {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 64},
        {"classifier"},
    ),
    "electra": ("AutoModelForPreTraining", "electra", {}, {"discriminator_predictions.dense_prediction"}),
    "t5": (TRANSLATOR, "t5", {}, {"lm_head"}),
    "mt5": (TRANSLATOR, "mt5", {}, {"lm_head"}),
    "umt5": (TRANSLATOR, "umt5", {}, {"lm_head"}),
    "bart": (TRANSLATOR, "bart", {}, {"lm_head"}),
    "marian": (TRANSLATOR, "marian", {}, {"lm_head"}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq", "whisper", {"max_source_positions": 16, "num_mel_bins": 16}, {"proj_out"},
    ),
    "vit": (IMAGE, "vit", {"image_size": 32, "patch_size": 16}, {"classifier"}),
    "dinov2": (IMAGE, "dinov2", {"image_size": 32, "patch_size": 16}, {"classifier"}),
    "swin": (
        IMAGE,
        "swin",
        {"image_size": 32, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        {"classifier"},
    ),
    "siglip": ("AutoModel", "siglip", {}, set()),
    "clip": ("AutoModel", "clip", {}, set()),
    "llava": ("AutoModelForImageTextToText", "llava", {"image_token_id": 127}, {"lm_head"}),
}  # fmt: skip
SMALL_IMAGES = {"image_size": 32, "patch_size": 16}


def build(case: str) -> nn.Module:
    auto, model_type, more, _ = KINDS[case]
    kind = CONFIG_MAPPING[model_type]
    values = {**shrunken(kind()), **more}
    if "vision_config" in values:
        values["vision_config"] |= SMALL_IMAGES
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(kind(**values)).eval()


def outputs(model: nn.Module) -> Tensor:
    """Every tensor the model returns, for a short text, an image of noise, or both."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(3, 11)[None]
    inputs: dict[str, Tensor] = {}
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        inputs["pixel_values"] = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    if hasattr(config, "num_mel_bins"):
        inputs["input_features"] = torch.randn(1, config.num_mel_bins, 32, generator=generator)
    elif config.model_type == "llava":
        image = torch.full((1, (vision.image_size // vision.patch_size) ** 2), config.image_token_id)
        inputs["input_ids"] = torch.cat([ids[:, :4], image, ids[:, 4:]], 1)
    elif "pixel_values" not in inputs or hasattr(config, "text_config"):
        inputs["input_ids"] = ids
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    out = model(**inputs)
    tensors = [value for value in out.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.cat([value.flatten() for value in tensors])


FAST = ("bert", "roberta_two_layer_head", "deberta", "t5", "bart", "swin", "clip", "llava")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in KINDS]
)
def test_there_and_back(case: str) -> None:
    summary = there_and_back(build(case), outputs)
    assert {name for name, why in summary.skipped.items() if why == "output head"} == KINDS[case][3]
    assert not any(why == "router or gate" for why in summary.skipped.values())


def test_both_towers_are_reached() -> None:
    """What a vision-language model computes from an image goes through quantized weights, and so does the rest."""
    for case in ("clip", "siglip", "llava"):
        patched = qnoise.summary(qnoise.patch_model(build(case))).patched
        assert any("vision" in name for name in patched)
        assert any("text" in name or "language" in name for name in patched)


RMS_BY_ANOTHER_NAME = {
    "t5": "T5LayerNorm",
    "mt5": "MT5LayerNorm",
    "umt5": "UMT5LayerNorm",
    "longt5": "LongT5LayerNorm",
    "switch_transformers": "SwitchTransformersLayerNorm",
    "udop": "UdopLayerNorm",
    "pop2piano": "Pop2PianoLayerNorm",
    "pix2struct": "Pix2StructLayerNorm",
    "kosmos2_5": "Kosmos2_5LayerNorm",
    "cpmant": "CpmAntLayerNorm",
}


@pytest.mark.parametrize(("model_type", "kind"), RMS_BY_ANOTHER_NAME.items())
def test_a_norm_is_known_by_what_it_computes(model_type: str, kind: str) -> None:
    module = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=[kind])
    norm = getattr(module, kind)(SimpleNamespace(hidden_size=64, eps=1e-6) if model_type == "cpmant" else 64)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 3.0  # a mean that a LayerNorm would take off
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert is_rms_norm(norm)


def test_norm_noise_of_t5() -> None:
    model = build("t5")
    stock = outputs(model)
    qnoise.patch_model(model, fmt=None, noise="rmsnorm")
    norms = {name for name, m in model.named_modules() if isinstance(m, NoisyRMSNorm)}
    # Two in each of two encoder layers, three in each of two decoder layers, and each stack's last one.
    assert len(norms) == 2 * 2 + 3 * 2 + 2
    assert torch.equal(outputs(model), stock)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    assert not torch.equal(outputs(model), stock)
    qnoise.unpatch_model(model)
    assert torch.equal(outputs(model), stock)


@pytest.mark.parametrize("case", ["bert", "vit", "bart"])
def test_norm_noise_where_there_is_no_rms_norm(case: str) -> None:
    with pytest.raises(ValueError, match=r"noise on 'rmsnorm'.*its norms: LayerNorm.*noise='linear'"):
        qnoise.patch_model(build(case), noise="rmsnorm")


def test_norms_of_a_model_called_linear() -> None:
    """Kimi Linear's classes are called KimiLinear..., its norms too."""
    model = qnoise.patch_model(tiny("kimi_linear"), noise="rmsnorm")
    patched = qnoise.summary(model).patched
    assert {name.rpartition(".")[2] for name, what in patched.items() if what.startswith("noise")} == {
        "input_layernorm", "post_attention_layernorm", "kv_a_layernorm", "o_norm", "norm",
    }  # fmt: skip


def test_t5_keeps_what_it_keeps_in_fp32(tmp_path) -> None:
    """`wo` is kept in fp32 when T5 is loaded in half precision, and its input is cast to the dtype of its weight."""
    stock = build("t5")
    stock.save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).eval()
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype is torch.float32
    qnoise.patch_model(model, "nvfp4")
    assert wo.effective_weight().dtype is torch.float32
    assert torch.isfinite(outputs(model)).all()
    expected = stock.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert torch.equal(wo.effective_weight(), qnoise.fake_quantize(expected, "nvfp4"))


def reward_model(num_labels: int = 1) -> nn.Module:
    config = copy.copy(tiny_model("qwen2").config)
    config.num_labels = num_labels
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_reward_models_head_is_left_alone(num_labels: int) -> None:
    model = reward_model(num_labels)
    ids = torch.arange(3, 11)[None]
    stock = model(ids).logits
    qnoise.patch_model(model, "nvfp4", noise="rmsnorm")
    assert qnoise.summary(model).skipped["score"] == "output head"
    assert len(qnoise.summary(model).patched) == 2 * 7 + 5
    assert not torch.equal(model(ids).logits, stock)
    qnoise.unpatch_model(model)
    # Named, it is taken.
    qnoise.patch_model(model, "nvfp4", include=["model.*", "score"])
    assert "score" in qnoise.summary(model).patched


@pytest.mark.parametrize("peft_first", [True, False])
def test_a_reward_model_under_peft(peft_first: bool) -> None:
    """PEFT trains a copy of the head; copy and original are heads."""
    model = reward_model()
    if not peft_first:
        qnoise.patch_model(model)
    model = with_lora(model, task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"])
    if peft_first:
        qnoise.patch_model(model)
    summary = qnoise.summary(model)
    assert summary.skipped["score"] == "output head"
    assert len(summary.patched) == 2 * 7
    model(torch.arange(3, 11)[None]).logits.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert all(g is not None and torch.isfinite(g).all() for g in trained.values())


class ValueHead(nn.Module):
    """As TRL's: a linear with one output, in a module called `v_head` beside the language model."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(hidden).squeeze(-1)


class WithValueHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = model, ValueHead(model.config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.v_head(self.pretrained_model(ids, output_hidden_states=True).hidden_states[-1])


def test_a_value_head_is_left_alone() -> None:
    summary = there_and_back(WithValueHead(tiny_model()).eval(), lambda model: model(torch.arange(3, 11)[None]))
    assert {name for name, why in summary.skipped.items() if why == "output head"} == {
        "pretrained_model.lm_head",
        "v_head.summary",
    }


def test_bloom_reads_slices_of_its_weights() -> None:
    """With `slow_but_exact`, BLOOM multiplies by slices of `dense.weight` in place of calling `dense`."""
    model = tiny("bloom")
    for module in model.modules():
        if hasattr(module, "slow_but_exact"):
            module.slow_but_exact, module.pretraining_tp = True, 2
    summary = there_and_back(model, lambda model: model(torch.arange(3, 11)[None]).logits)
    assert "transformer.h.0.mlp.dense_4h_to_h" in summary.patched
    assert "dense_4h_to_h" in summary.patched["transformer.h.0.mlp"]


def test_the_fast_path_of_torchs_encoder() -> None:
    """In evaluation without gradient `nn.TransformerEncoderLayer` hands the weights of its linears to one kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stock = model(x)
        qnoise.patch_model(model, "mxfp4")
        fast = model(x)
    assert not torch.equal(fast, stock)
    torch.testing.assert_close(fast, model(x).detach())  # with gradient: the linears themselves are called
    with torch.no_grad():
        torch.testing.assert_close(qnoise.bake(copy.deepcopy(model))(x), fast)
        torch.testing.assert_close(qnoise.unpatch_model(model)(x), stock, rtol=0, atol=0)


@pytest.mark.parametrize("peft_first", [True, False])
def test_weights_that_are_read_under_peft(peft_first: bool) -> None:
    """Mamba multiplies by `dt_proj.weight`; PEFT puts its layer in between."""
    expected = tiny("mamba").requires_grad_(False)
    model = copy.deepcopy(expected)
    ids = torch.arange(3, 11)[None]
    if not peft_first:
        qnoise.patch_model(model)
    model = with_lora(model, target_modules=["dt_proj", "x_proj"])
    if peft_first:
        qnoise.patch_model(model)
    assert sum("dt_proj" in name for name in qnoise.summary(model).patched) == 2
    for module in expected.modules():
        if type(module) is nn.Linear and module is not expected.lm_head:
            module.weight.data = qnoise.fake_quantize(module.weight.data, "mxfp4")
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    mixer = model.get_base_model().backbone.layers[0].mixer
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert type(twin) is type(mixer)
        assert torch.equal(twin(torch.ones(1, 3, 64)), mixer(torch.ones(1, 3, 64)))
    # Outside of the mixer's forward the weight is the raw one, whoever asks.
    raw = mixer.dt_proj.get_base_layer()
    assert raw.weight is raw._parameters["weight"]
    assert not torch.equal(raw.weight, raw.effective_weight())


def test_routers_by_whatever_name_are_left_alone() -> None:
    for model_type, names in {
        "dbrx": {"transformer.blocks.0.ffn.router.layer"},
        "jetmoe": {"model.layers.0.mlp.router.layer", "model.layers.0.self_attention.experts.router.layer"},
        "longcat_flash": {"model.layers.0.mlp.router.classifier"},
        "zaya": {"model.layers.0.mlp.gate.down_proj", "model.layers.0.mlp.gate.router_mlp.fc1"},
        "gemma3n_text": {"model.layers.0.altup.modality_router"},
    }.items():
        skipped = qnoise.summary(qnoise.patch_model(tiny(model_type))).skipped
        assert {skipped.get(name) for name in names} == {"router or gate"}, model_type


@pytest.mark.parametrize(("model_type", "rows"), [("mamba", 2 * 4), ("jetmoe", 2 * 5)])
def test_the_scan_sees_what_is_patched(model_type: str, rows: int, tmp_path) -> None:
    model = tiny(model_type)
    report = qnoise.scan(model, "mxfp4")
    patched = qnoise.summary(qnoise.patch_model(copy.deepcopy(model))).patched
    linears = {name for name, what in patched.items() if what.startswith("mxfp4")}
    assert len(report.rows) == rows
    assert {row.name.removesuffix(".weight") for row in report.rows} == linears
