"""Configurations of the verl family, those of the published experiments among them."""

from __future__ import annotations

import pytest
import torch

import qnoise
from qnoise import QuantSpec
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.faults import Bias, Deadzone, GaussianError
from qnoise.integrations.verl import from_config, to_config
from qnoise.schedules import PerEpoch, StagedExponential
from tests.patching import logits, manually_quantized
from tests.tiny_models import tiny_model, with_lora

IDS = torch.arange(3, 20)[None]
LORA = ["lm_head", "embed_tokens", "lora_A", "lora_B", "base_layer"]


def formats(fmt: str, exclude=("lm_head", "embed_tokens"), place: str = "weight", **more):
    return {
        "enabled": True, "error_type": fmt, "injection_point": place, "target_modules": ["linear"],
        "apply_during": "both", "exclude_modules": list(exclude), **more,
    }  # fmt: skip


def noise(start: float = 0.01, end: float = 0.0001, **more):
    return {
        "enabled": True,
        "sigma_start": start,
        "sigma_end": end,
        "num_stages": 10,
        "layer_types": ["rmsnorm"],
        **more,
    }


AQN = NoiseConfig("rmsnorm")
WITH_NOISE = {"noise_injection": noise()}
MIDDLE = {"enabled": True, "default_multiplier": 1.0, "layer_multipliers": {"1": 1.5}}
EXPERIMENTS = {
    # full fine-tuning through a format, without and with noise
    "E3a": ({"hw_error_injection": formats("mxfp4")}, PatchConfig("mxfp4")),
    "E3b": ({"hw_error_injection": formats("mxfp4"), **WITH_NOISE}, PatchConfig("mxfp4", noise=AQN)),
    "E4a": ({"hw_error_injection": formats("nvfp4")}, PatchConfig("nvfp4")),
    "E4b": ({"hw_error_injection": formats("nvfp4"), **WITH_NOISE}, PatchConfig("nvfp4", noise=AQN)),
    # LoRA: `base_layer` was excluded to keep a second hook off, not to leave the base unquantized
    "E5a-LoRA": ({"hw_error_injection": formats("nvfp4", LORA)}, PatchConfig("nvfp4")),
    "E5b-LoRA": ({"hw_error_injection": formats("nvfp4", LORA), **WITH_NOISE}, PatchConfig("nvfp4", noise=AQN)),
    "E6a": ({"hw_error_injection": formats("mxfp4", LORA)}, PatchConfig("mxfp4")),
    "E6b": ({"hw_error_injection": formats("mxfp4", LORA), **WITH_NOISE}, PatchConfig("mxfp4", noise=AQN)),
    # AQN's three decays on bf16 weights: one for the whole run, one in each epoch, a lower one
    "E5a": ({"noise_injection": noise(0.05, 0.0005)}, PatchConfig(None, noise=AQN)),
    "E5b": (
        {"noise_injection": noise(0.05, 0.0005, epoch_aware=True, stages_per_epoch=5, steps_per_epoch=6)},
        PatchConfig(None, noise=AQN),
    ),
    "E5c": ({"noise_injection": noise(0.01, 0.0001)}, PatchConfig(None, noise=AQN)),
    # bf16: both blocks switched off
    "E7a": ({"hw_error_injection": {"enabled": False}, "noise_injection": {"enabled": False}}, None),
    # lower sigma; noise on chosen layers; more noise in the middle
    "E8a planned": (
        {"hw_error_injection": formats("mxfp4", LORA), "noise_injection": noise(0.005, 0.00005)},
        PatchConfig("mxfp4", noise=AQN),
    ),
    "E8b planned": (
        {"hw_error_injection": formats("mxfp4", LORA), "noise_injection": noise(target_layers=[0])},
        PatchConfig("mxfp4", noise=NoiseConfig("rmsnorm", layers=(0,))),
    ),
    "E8c planned": (
        {"hw_error_injection": formats("mxfp4", LORA), "noise_injection": noise(layer_sigma_config=MIDDLE)},
        PatchConfig("mxfp4", noise=AQN),
    ),
    # weights and inputs, a layer at the edge left alone
    "E13h": (
        {"hw_error_injection": formats("mxfp4", [*LORA, "layers.0"], "both")},
        PatchConfig("mxfp4", act_fmt="mxfp4", exclude=("*layers.0.*",)),
    ),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name: str) -> None:
    blocks, expected = EXPERIMENTS[name]
    settings = from_config({"actor_rollout_ref": {"model": blocks}})
    assert settings.patch == expected
    again = from_config(to_config(settings))
    assert (again.patch, again.schedule, again.multipliers) == (settings.patch, settings.schedule, settings.multipliers)
    assert any("base_layer" in note for note in settings.notes) == ("base_layer" in str(blocks))
    if expected is None:
        return
    model = with_lora(qnoise.patch_model(tiny_model(), config=settings.patch))
    count = {"E13h": 7, "E5a": 0, "E5b": 0, "E5c": 0}.get(name, 14)
    assert sum(qnoise.state(model)["formats"].values()) == count
    if "noise_injection" not in blocks:
        return
    start, end = (blocks["noise_injection"][key] for key in ("sigma_start", "sigma_end"))
    assert settings.schedule == (None if name == "E5b" else StagedExponential(start, end, 10))
    scheduler = settings.scheduler(model, total_steps=6 if name == "E5b" else 10)
    assert (scheduler.step(), scheduler.step()) == (0.0, start)
    loud = {name: sigma for name, sigma in qnoise.state(model)["noise"]["modules"].items() if sigma}
    assert len(loud) == (2 if name == "E8b planned" else 5)
    assert loud["model.layers.0.input_layernorm"] == start
    second = {"E8b planned": None, "E8c planned": 1.5 * start}.get(name, start)
    assert loud.get("model.layers.1.input_layernorm") == second


def test_a_yaml_file(tmp_path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "grpo.yaml"
    path.write_text(
        "trainer:\n  hw_error_injection:\n    enabled: true\n    error_type: nvfp4\n    injection_point: weight\n"
        "    target_modules: [q_proj, down_proj]\n    nvfp4_stochastic_rounding: true\n    target_layers: [1]\n"
    )
    settings = from_config(path)
    model = qnoise.patch_model(tiny_model(), config=settings.patch)
    assert qnoise.state(model)["formats"] == {str(QuantSpec("nvfp4", rounding="stochastic")): 2}
    assert any("per-tensor scale" in note for note in settings.notes)


def test_epochs_and_zones() -> None:
    zone = {"enabled": True, "edge_layers": [0], "middle_layers": [1], "phase_boundary_ratio": 0.5}
    block = noise(
        0.05, 0.0005, epoch_aware=True, stages_per_epoch=4, steps_per_epoch=5,
        layer_sigma_config={"enabled": True, "default_multiplier": 0.0, "zone_schedule": zone},
    )  # fmt: skip
    settings = from_config({"noise_injection": block})
    written = to_config(settings)["noise_injection"]
    assert written["layer_sigma_config"]["zone_schedule"]["late_middle_mult"] == 0.5
    assert from_config({"noise_injection": written}).multipliers == settings.multipliers
    model = qnoise.patch_model(tiny_model(), config=settings.patch)
    scheduler = settings.scheduler(model, total_steps=10)
    assert scheduler.schedule == PerEpoch(0.05, 0.0005, 2, 4)
    for step in range(10):
        sigma = scheduler.step()
        now = qnoise.state(model)["noise"]["modules"]
        assert now["model.layers.0.input_layernorm"] == sigma
        assert now["model.layers.1.input_layernorm"] == (sigma if step < 5 else 0.5 * sigma)
        assert now["model.norm"] == 0
    with pytest.raises(ValueError, match="steps_per_epoch is 5.*divide the number of steps, 12"):
        settings.scheduler(model, total_steps=12)


def test_numbers_as_yaml_and_hydra_write_them(tmp_path) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "grpo.yaml"
    # YAML 1.1 takes 1e-2 for a string; Hydra, which reads these files in the family, does not.
    path.write_text("noise_injection: {enabled: true, sigma_start: 1e-2, sigma_end: 1e-4, num_stages: '10'}\n")
    settings = from_config(path)
    assert settings.schedule == StagedExponential(0.01, 0.0001, 10)
    assert to_config(settings)["noise_injection"]["sigma_end"] == 0.0001


RELATIVE = {"error_type": "relative_gaussian", "error_scale": 0.05}
ABSOLUTE = {"error_type": "absolute_gaussian", "error_scale": 0.1, "injection_point": "output"}
BIAS = {"error_type": "systematic_bias", "error_scale": 0.1, "injection_point": "both"}
DEADZONE = {"error_type": "deadzone", "deadzone_threshold": 0.2}


@pytest.mark.parametrize(
    ("block", "fault", "places"),
    [
        (RELATIVE, GaussianError(0.05), ["input"]),
        (ABSOLUTE, GaussianError(0.1, relative=False), ["output"]),
        (BIAS, Bias(0.1), ["weight", "input"]),
        (DEADZONE, Deadzone(0.2), ["input"]),
    ],
    ids=["relative", "absolute", "bias", "deadzone"],
)
@pytest.mark.parametrize(("targets", "count"), [(["rmsnorm"], 5), (["linear"], 14), (["up_proj"], 2)])
def test_faults(block, fault, places, targets, count: int) -> None:
    settings = from_config({"hw_error_injection": {"enabled": True, "target_modules": targets, **block}})
    assert settings.patch is None
    assert [place for _, place in settings.faults] == places
    assert all(each == fault for each, _ in settings.faults)
    model = with_lora(tiny_model())
    clean = model(IDS).logits
    with settings.inject(model):
        assert not torch.equal(model(IDS).logits, clean)
        assert len([m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]) == count
    assert torch.equal(model(IDS).logits, clean)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("during", ["rollout", "training"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_format_in_one_phase_goes_in_as_a_fault(fmt: str, during: str) -> None:
    settings = from_config({"hw_error_injection": {**formats(fmt), "apply_during": during}})
    model = tiny_model()
    stock, quantized = logits(model, IDS), logits(manually_quantized(model, fmt), IDS)
    qnoise.patch_model(model, config=settings.patch)
    assert not qnoise.state(model)["formats"]
    with settings.inject(model):
        for phase in ("rollout", "training", "evaluation"):
            with qnoise.phase(model, phase):
                assert torch.equal(logits(model, IDS), quantized if phase == during else stock), phase
    assert from_config(to_config(settings)).faults == settings.faults


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_format_at_the_output(fmt: str) -> None:
    stochastic = {f"{fmt}_stochastic_rounding": True, "target_modules": ["up_proj"], "target_layers": [1]}
    for more in ({"target_modules": ["up_proj"], "target_layers": [1]}, stochastic):
        settings = from_config({"hw_error_injection": formats(fmt, place="output") | more})
        assert settings.patch is None
        model, seen = tiny_model(), []
        up = model.model.layers[1].mlp.up_proj
        with settings.inject(model):
            up.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
            first, again, alone = (logits(model, ids) for ids in (IDS, IDS, IDS[:, :5]))
        assert torch.equal(first, again)
        x, y = seen[0]
        exact = torch.nn.functional.linear(x, up.weight)
        if more is not stochastic:
            # a token's scale is its own: the others do not matter
            rows = [qnoise.fake_quantize(row, fmt) for row in exact[0].detach()]
            assert torch.equal(y[0], torch.stack(rows))
            assert torch.allclose(alone, first[:, :5], atol=1e-5)
        else:
            error = (y - exact).abs().mean()
            nearest = (qnoise.fake_quantize(exact.detach(), fmt) - exact).abs().mean()
            assert nearest < error < 3 * nearest


def test_phases_of_a_fault_are_known_without_noise() -> None:
    settings = from_config({"hw_error_injection": {"enabled": True, "apply_during": "rollout", **RELATIVE}})
    model = qnoise.patch_model(tiny_model(), config=settings.patch)
    clean = logits(tiny_model(), IDS)
    with settings.inject(model):
        assert torch.equal(logits(model, IDS), clean)
        with qnoise.phase(model, "rollout"):
            assert not torch.equal(logits(model, IDS), clean)
    with pytest.raises(ValueError, match="noise_injection is not enabled"):
        settings.scheduler(model, total_steps=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "neither a hw_error_injection nor a noise_injection"),
        ({"hw_error_injection": {"enabled": True, "eror_type": "mxfp4"}}, "Did you mean 'error_type'"),
        ({"noise_injection": {"sigma_begin": 1}}, "unknown key of noise_injection 'sigma_begin'"),
        ({"noise_injection": noise(layer_sigma_config={"enable": True})}, "layer_sigma_config"),
        ({"noise_injection": noise(layer_types=["rmsnorm", "linear"])}, "one kind at a time"),
        ({"hw_error_injection": formats("mxfp5")}, "error_type"),
        ({"hw_error_injection": formats("fp8")}, "mxfp8_e4m3"),
        ({"hw_error_injection": formats("mxfp4", mxfp4_block_2d=True)}, "mxfp4_block_2d=True has no counterpart"),
        ({"hw_error_injection": formats("mxfp4", use_ste=False)}, "use_ste=False has no counterpart"),
        ({"hw_error_injection": {**formats("mxfp4"), "apply_during": "roll"}}, "Did you mean 'rollout'"),
        ({"hw_error_injection": {**formats("mxfp4"), "target_modules": ["rmsnorm"]}}, "is a format of matrices"),
        ({"hw_error_injection": [1]}, "must be a mapping"),
        ({"noise_injection": noise(start="much")}, "sigma_start is 'much'; it must be a number"),
        ({"noise_injection": noise(num_stages=9.5)}, "num_stages is 9.5; it must be a whole number"),
        ({"noise_injection": noise(steps_per_epoch="${trainer.steps}")}, "a reference to another value"),
        ({"noise_injection": noise(target_layers=14)}, "target_layers is 14; it must be a list of layer indices"),
        ({"noise_injection": noise(layer_sigma_config={"enabled": True, "layer_multipliers": {"mid": 2}})}, "'mid'"),
        ({"hw_error_injection": {"enabled": "yes"}}, "enabled is 'yes'; it must be true or false"),
    ],
    ids=str,
)
def test_what_is_not_known_or_not_done_is_named(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(config)
