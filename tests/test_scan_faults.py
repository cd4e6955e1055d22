"""`scan(localise=True)`: the layer that carries a fault is found, and a healthy model is not accused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, snapshot
from qnoise.faults import Bias, Deadzone, GaussianError, inject
from qnoise.sensitivity import ScanReport
from qnoise.sensitivity.localise import Localisation, _Place, localise
from tiny_models import tiny_model, with_lora

CHECKPOINTS = Path(__file__).parents[1] / "benchmarks" / "recovery" / "checkpoints"
IDS = torch.randint(3, 99, (8, 40), generator=torch.Generator().manual_seed(1))


def found(model: nn.Module, inputs=IDS) -> list[tuple[str, str, str]]:
    return [(s.name, s.at, s.fault) for s in localise(model, inputs).suspicions]


@pytest.fixture(scope="module", params=[0, 1, 2])
def policy(request):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from benchmarks.recovery.data import word_examples

    path = CHECKPOINTS / f"words-{request.param}"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)

    def batch(seed: int):
        questions = [example.question for example in word_examples("dev", seed, 8)]
        return dict(tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False))

    return model, batch


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_every_layer_of_the_policies_is_found_from_three_per_mille_on(policy, dtype) -> None:
    model, batch = policy
    model.to(dtype)
    for layer in range(3):
        for at, threshold in (("output", 0.003), ("input", 0.003), ("output", 0.03)):
            with inject(model, Deadzone(threshold), layers=layer, at=at):
                suspicions = localise(model, batch(0)).suspicions
            assert [(s.name, s.at, s.fault) for s in suspicions] == [(f"model.layers.{layer}", at, "deadzone")]
            assert suspicions[0].layer == layer
            assert threshold <= suspicions[0].magnitude * (1 + 2**-8) < 1.1 * threshold
            assert suspicions[0].share > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healthy_policies_are_not_accused(policy, dtype) -> None:
    model, batch = policy
    model.to(dtype)
    result = localise(model, batch(1))
    assert result.suspicions == ()
    assert 0 < result.detectable < 0.003
    for layer in result.layers:
        assert 0.5 < layer.gain < 5
        assert layer.gain_small == pytest.approx(layer.gain, rel=0.1)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_other_architectures_and_dtypes_are_not_accused(model_type) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert found(tiny_model(model_type).to(dtype)) == []


def test_zeros_that_are_meant_are_no_fault() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 99, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("opt", **sizes, word_embed_proj_dim=64, max_position_embeddings=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    seen: list[torch.Tensor] = []
    handle = model.model.decoder.layers[0].activation_fn.register_forward_hook(lambda m, a, y: seen.append(y))
    assert found(model) == []
    handle.remove()
    assert (seen[0] == 0).double().mean() > 0.3
    with inject(model, Deadzone(0.003), "activation_fn", layers=1):
        assert found(model) == [("model.decoder.layers.1.activation_fn", "output", "deadzone")]


@pytest.mark.parametrize(
    "name",
    ["self_attn.v_proj", "self_attn.o_proj", "self_attn", "mlp.gate_proj", "mlp.act_fn", "mlp", "input_layernorm"],
)
@pytest.mark.parametrize("at", ["input", "output"])
def test_the_module_inside_the_layer_is_named(name, at) -> None:
    model = tiny_model(hidden_size=128)
    with inject(model, Deadzone(0.003), name, layers=1, at=at):
        assert found(model) == [(f"model.layers.1.{name}", at, "deadzone")]


def test_several_faults_are_all_found() -> None:
    model = tiny_model(num_hidden_layers=3)
    with inject(model, Deadzone(0.003)), inject(model, GaussianError(0.01), "self_attn", layers=1):
        names = found(model)
    assert names[0] == ("model.layers.0", "output", "deadzone")
    assert [each for each in names if each[2] == "deadzone"] == [
        (f"model.layers.{layer}", "output", "deadzone") for layer in range(3)
    ]


@pytest.mark.parametrize("at", ["input", "output"])
def test_noise_and_bias_are_told_apart(at) -> None:
    model = tiny_model(num_hidden_layers=3)
    faults = ((GaussianError(0.01), "noise"), (GaussianError(0.01, relative=False), "noise"), (Bias(0.03), "bias"))
    for layer in (0, 2):
        for fault, kind in faults:
            with inject(model, fault, layers=layer, at=at):
                result = localise(model, IDS)
            assert [(s.layer, s.at, s.fault) for s in result.suspicions] == [(layer, at, kind)]
            if fault == GaussianError(0.01):
                assert result.suspicions[0].magnitude == pytest.approx(0.01, rel=0.15)
            if kind == "bias":
                assert result.suspicions[0].magnitude == pytest.approx(0.03, rel=0.15)


def test_a_sum_that_is_zero_by_chance_makes_no_deadzone_of_a_bias(policy) -> None:
    model, batch = policy
    model.to(torch.bfloat16)
    with inject(model, Bias(0.02), layers=0):
        result = localise(model, batch(0))
    assert [(s.layer, s.at, s.fault) for s in result.suspicions] == [(0, "output", "bias")]


def test_adapters_patches_noise_and_packed_weights() -> None:
    model = with_lora(qnoise.patch_model(tiny_model(), "nvfp4", act_fmt="nvfp4", noise="rmsnorm"))
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.01), 10).step()
    hooks, before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()], snapshot(model)
    assert found(model) == []
    with inject(model, Deadzone(0.003), "up_proj", layers=1):
        assert found(model) == [("model.layers.1.mlp.up_proj", "output", "deadzone")]
    assert_same(before, snapshot(model))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    # Quantization makes steps; it is out of the way.
    patched = qnoise.patch_model(tiny_model(), "mxfp4", act_fmt="mxfp4")
    assert localise(patched, IDS[:2]) == localise(tiny_model(), IDS[:2])
    packed = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4", act_fmt="mxfp4", storage="packed")
    assert found(packed) == []
    with inject(packed, Deadzone(0.003), layers=0):
        assert found(packed) == [("model.layers.0", "output", "deadzone")]


def test_evidence_is_that_of_independent_values() -> None:
    def evidence(x: torch.Tensor) -> int:
        place = _Place("x", "output", False)
        place.look(x)
        return place.evidence(place.gap)

    x = torch.randn(300, 80, generator=torch.Generator().manual_seed(0))
    gapped = Deadzone(0.01).apply(x)
    assert evidence(gapped) > 60
    # One channel, one token or one value, however often it occurs, is one observation.
    channel = torch.full_like(x, 1.0)
    channel[:, 3] = 0.01 + 0.001 * torch.rand(300, generator=torch.Generator().manual_seed(0))
    assert evidence(channel) <= 1
    assert evidence(channel.mT.contiguous()) <= 1
    assert evidence((x * 4).round()) <= 1  # a grid
    # Without a gap n bits come once in 2^n tensors.
    bits = [evidence(torch.randn(40, 40, generator=torch.Generator().manual_seed(seed))) for seed in range(300)]
    for n in (1, 2, 3):
        assert sum(b >= n for b in bits) / 300 == pytest.approx(2.0**-n, abs=0.09)
    assert max(bits) < 16


def test_detectable_says_what_the_inputs_would_have_shown() -> None:
    model = tiny_model()
    for ids in (IDS, IDS[:2]):
        limit = localise(model, ids).layers[1].detectable
        with inject(model, Deadzone(1.5 * limit), layers=1):
            assert found(model, ids) == [("model.layers.1", "output", "deadzone")]
        with inject(model, Deadzone(limit / 1.5), layers=1):
            assert found(model, ids) == []
    assert localise(model, IDS[:1, :4]).detectable == math.inf


def test_a_zone_with_more_values_than_are_kept() -> None:
    model = tiny_model(hidden_size=256)
    ids = torch.randint(3, 99, (16, 60), generator=torch.Generator().manual_seed(1))
    with inject(model, Deadzone(0.05), layers=0):
        assert found(model, [ids[:8], ids[8:]]) == [("model.layers.0", "output", "deadzone")]


def test_the_scan_reports_it() -> None:
    model = tiny_model()
    with inject(model, Deadzone(0.01), layers=1):
        report = qnoise.scan(model, inputs=(batch for batch in (IDS[:4], IDS[4:])), localise=True)
    assert [s.layer for s in report.localisation.suspicions] == [1]
    (finding,) = (each for each in report.findings if each.serious)
    assert finding.name == "model.layers.1"
    assert finding.what.startswith("deadzone at its output: zero below 0.01")
    assert finding.what in report.to_markdown()
    assert ScanReport.from_json(report.to_json()) == report
    healthy = qnoise.scan(model, inputs=IDS[:1, :4], localise=True)
    assert ScanReport.from_json(healthy.to_json()) == healthy
    assert healthy.localisation.detectable == math.inf
    assert isinstance(healthy.localisation, Localisation)
    assert qnoise.scan(model, inputs=IDS).localisation is None


def test_mistakes_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="give inputs="):
        qnoise.scan(model, localise=True)
    with pytest.raises(ValueError, match="no repeated layers"):
        localise(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4))
    with pytest.raises(ValueError, match="holds no batch"):
        localise(model, [])
    with pytest.raises(ValueError, match="false_alarms is 2"):
        localise(model, IDS, false_alarms=2)
