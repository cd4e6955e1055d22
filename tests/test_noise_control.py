from __future__ import annotations

import json

import pytest
import torch

import qnoise
from patching import logits
from qnoise import NoiseScheduler, schedules
from qnoise.noise import unit_normal
from tiny_models import tiny_model, with_lora

STAGED = schedules.StagedExponential(1e-2, 1e-4, 10)


def noisy_model(**kwargs):
    return qnoise.patch_model(tiny_model(), noise=qnoise.NoiseConfig(**kwargs))


def test_sigma_of_the_kth_step() -> None:
    """No noise before the first call; the k-th call uses progress k / total_steps; further calls stay at the end."""
    model = noisy_model()
    scheduler = NoiseScheduler(model, STAGED, 29)
    assert scheduler.sigma == 0.0
    assert qnoise.state(model)["noise"]["active"] is False
    sigmas = [scheduler.step() for _ in range(31)]
    assert sigmas[:29] == [STAGED(k / 29) for k in range(29)]
    assert sigmas[29:] == [1e-4, 1e-4]
    assert sigmas[:3] == [0.0, 0.0, 0.0]
    assert sigmas[3] == 1e-2


def test_noise_of_a_step_is_a_function_of_seed_step_and_name(ids) -> None:
    model = noisy_model()
    norm = model.model.layers[1].input_layernorm
    scheduler = NoiseScheduler(model, schedules.Constant(0.1), 10, seed=3)
    seen = []
    for k in range(3):
        scheduler.step()
        z = torch.from_numpy(unit_normal(3, k, "model.layers.1.input_layernorm", (64,)))
        assert torch.equal(norm.effective_weight(), norm.weight + 0.1 * z)
        seen.append(logits(model, ids))
        torch.manual_seed(k)  # nobody else's random numbers matter
        assert torch.equal(logits(model, ids), seen[-1])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_noise_never_accumulates(ids) -> None:
    """After many steps the noise has the variance of one step, and the weights are untouched."""
    model = noisy_model()
    clean = {name: p.clone() for name, p in model.state_dict().items()}
    scheduler = NoiseScheduler(model, schedules.Constant(0.1), 400)
    norm = model.model.norm
    deviations = []
    for _ in range(400):
        scheduler.step()
        deviations.append((norm.effective_weight() - norm.weight).detach())
    deviations = torch.stack(deviations)
    assert deviations.std(0).mean() == pytest.approx(0.1, rel=0.02)
    assert deviations[-50:].std() == pytest.approx(0.1, rel=0.05)
    assert all(torch.equal(p, clean[name]) for name, p in model.state_dict().items())


def test_saved_and_loaded_state_continues_bit_for_bit(ids) -> None:
    def run(steps: int, resume_at: int | None = None) -> list[torch.Tensor]:
        model = noisy_model()
        scheduler = NoiseScheduler(model, STAGED, 20, seed=5)
        outputs = []
        for k in range(steps):
            if k == resume_at:
                state = json.loads(json.dumps(scheduler.state_dict()))
                model = noisy_model()
                scheduler = NoiseScheduler(model, STAGED, 20, seed=0)
                scheduler.load_state_dict(state)
                assert torch.equal(logits(model, ids), outputs[-1]), "the noise of the last step acts again"
            scheduler.step()
            outputs.append(logits(model, ids))
        return outputs

    undisturbed, resumed = run(12), run(12, resume_at=7)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, resumed, strict=True))


def test_loading_the_state_before_the_first_step_silences(ids) -> None:
    model = noisy_model()
    quantized = logits(model, ids)
    scheduler = NoiseScheduler(model, schedules.Constant(0.1), 10)
    start = scheduler.state_dict()
    scheduler.step()
    scheduler.load_state_dict(start)
    assert torch.equal(logits(model, ids), quantized)
    assert scheduler.sigma == 0.0


def test_two_ranks_agree_without_talking(ids) -> None:
    outputs = []
    for rank in range(2):
        torch.manual_seed(rank)
        model = noisy_model()
        scheduler = NoiseScheduler(model, STAGED, 10, seed=1)
        for _ in range(3):
            scheduler.step()
        outputs.append(logits(model, ids))
    assert torch.equal(*outputs)


def test_multipliers() -> None:
    """By glob, layer index or function of progress; the last match wins, 0 switches off."""
    model = noisy_model()
    multipliers = {"*": 0.5, 1: 2.0, "layers.1.input_layernorm": 0, "model.norm": lambda progress: 1 - progress}
    scheduler = NoiseScheduler(model, schedules.Constant(0.1), 4, multipliers=multipliers)
    scheduler.step()
    scheduler.step()
    assert qnoise.state(model)["noise"]["modules"] == pytest.approx(
        {
            "model.layers.0.input_layernorm": 0.05,
            "model.layers.0.post_attention_layernorm": 0.05,
            "model.layers.1.input_layernorm": 0.0,
            "model.layers.1.post_attention_layernorm": 0.2,
            "model.norm": 0.075,
        }
    )
    assert model.model.layers[1].input_layernorm.noise_state()["active"] is False


def test_adapters_added_later_are_driven_too(ids) -> None:
    model = noisy_model()
    scheduler = NoiseScheduler(model, schedules.Constant(0.1), 10)
    wrapped = with_lora(model, modules_to_save=["norm"], target_modules=["q_proj"])
    scheduler.step()
    assert wrapped.base_model.model.model.norm.modules_to_save["default"].noise_sigma() == 0.1


def test_weight_noise(ids) -> None:
    model = qnoise.patch_model(tiny_model(), noise=qnoise.NoiseConfig("linear", include="down_proj", layers=[1]))
    quantized = logits(model, ids)
    NoiseScheduler(model, schedules.Constant(0.1), 10).step()
    assert list(qnoise.state(model)["noise"]["modules"]) == ["model.layers.1.mlp.down_proj"]
    assert not torch.equal(logits(model, ids), quantized)


def test_noise_without_quantization(ids) -> None:
    model = tiny_model()
    stock = logits(model, ids)
    qnoise.patch_model(model, None, noise="rmsnorm")
    assert torch.equal(logits(model, ids), stock)
    NoiseScheduler(model, schedules.Constant(0.1), 10).step()
    assert not torch.equal(logits(model, ids), stock)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no module of the model is noisy.*noise='rmsnorm'"):
        NoiseScheduler(qnoise.patch_model(tiny_model()), STAGED, 10)
    with pytest.raises(ValueError, match="total_steps is 0"):
        NoiseScheduler(noisy_model(), STAGED, 0)
    with pytest.raises(ValueError, match=r"multiplier 9 matches no noisy module; there are: model\.layers\.0"):
        NoiseScheduler(noisy_model(), STAGED, 10, multipliers={9: 1.0})
    scheduler = NoiseScheduler(noisy_model(), STAGED, 10)
    with pytest.raises(ValueError, match="saved with total_steps=10, this scheduler has 20"):
        NoiseScheduler(noisy_model(), STAGED, 20).load_state_dict(scheduler.state_dict())


def test_an_entropy_target_moves_sigma_and_survives_a_restart(ids) -> None:
    rule = schedules.EntropyTarget(0.2, 0.01)
    model = qnoise.patch_model(tiny_model(), noise="rmsnorm")
    noise = NoiseScheduler(model, rule, 10)
    assert noise.step(entropy=5.0) == 0.01  # nothing was sampled under this sigma yet
    assert noise.step(entropy=0.1) == pytest.approx(0.02)
    assert noise.step() == pytest.approx(0.02)
    want = logits(model, ids)
    state = json.loads(json.dumps(noise.state_dict()))
    again = qnoise.patch_model(tiny_model(), noise="rmsnorm")
    other = NoiseScheduler(again, rule, 10)
    other.load_state_dict(state)
    assert torch.equal(logits(again, ids), want)
    assert other.sigma == noise.sigma
    assert other.step(entropy=0.4) == noise.step(entropy=0.4) == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"Constant\(sigma=0.1\) does not use the entropy"):
        NoiseScheduler(model, schedules.Constant(0.1), 10).step(entropy=0.1)
