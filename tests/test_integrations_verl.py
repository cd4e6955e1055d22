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
    assert sum(qnoise.state(model)["formats"].values()) == (7 if name == "E13h" else 14)
    if "noise_injection" not in blocks:
        return
    start, end = (blocks["noise_injection"][key] for key in ("sigma_start", "sigma_end"))
    assert settings.schedule == StagedExponential(start, end, 10)
    scheduler = settings.scheduler(model, total_steps=10)
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
        ({"hw_error_injection": formats("mxfp4", place="output")}, "'output' quantizes what a linear gives out"),
        ({"hw_error_injection": formats("mxfp4", mxfp4_block_2d=True)}, "mxfp4_block_2d=True has no counterpart"),
        ({"hw_error_injection": formats("mxfp4", use_ste=False)}, "use_ste=False has no counterpart"),
        ({"hw_error_injection": {**formats("mxfp4"), "apply_during": "rollout"}}, "acts in every phase"),
        ({"hw_error_injection": {**formats("mxfp4"), "target_modules": ["rmsnorm"]}}, "is a format of matrices"),
        ({"hw_error_injection": [1]}, "must be a mapping"),
    ],
    ids=str,
)
def test_what_is_not_known_or_not_done_is_named(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(config)
