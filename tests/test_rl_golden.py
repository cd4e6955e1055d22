"""Comparison with verl's and TRL's own functions: values, gradients and metrics. See golden_rl/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import golden_rl_adapter as adapter
from qnoise import rl

GOLDEN = Path(__file__).parent / "golden_rl"
CASES = json.loads((GOLDEN / "cases.json").read_text())
KINDS = sorted({case["kind"] for case in CASES})
# verl subtracts two near numbers to get these, so its own digits end earlier.
CANCELLING = {"rollout_is_std": 1e-3, "rollout_is_eff_sample_size": 1e-4}


@pytest.fixture(scope="module")
def vectors():
    return load_file(GOLDEN / "golden.safetensors")


def outputs(case, vectors):
    inputs = {name: vectors[key].clone() for name, key in case["inputs"].items()}
    for name in case["grad"]:
        inputs[name].requires_grad_()
    result = getattr(adapter, case["kind"])(**inputs, **case["params"])
    if isinstance(result, dict):
        return result
    loss, metrics = result
    gradients = torch.autograd.grad(loss, [inputs[name] for name in case["grad"]])
    return {"loss": loss, **metrics, **{f"grad_{n}": g for n, g in zip(case["grad"], gradients, strict=True)}}


def differences(case, vectors):
    """Names of the outputs that are missing or differ: everything the peer returned is asked for."""
    got = outputs(case, vectors)
    want = {**{name: vectors[key] for name, key in case["tensors"].items()}, **case["scalars"]}
    bad = sorted(f"{name} is missing" for name in want.keys() - got.keys())
    for name in want.keys() & got.keys():
        value = torch.as_tensor(got[name]).detach().double()
        reference = torch.as_tensor(want[name]).double()
        if "all_masked_batch" in case["tags"]:
            assert (value == 0).all(), f"{case['id']}: {name} of an all-masked batch is {value}"
            continue
        rtol = 2e-2 if "bf16" in case["tags"] else CANCELLING.get(name, 1e-5)
        largest = reference[reference.isfinite()].abs().max() if reference.isfinite().any() else 0.0
        close = (value - reference).abs() <= rtol * reference.abs() + 0.1 * rtol * largest + 1e-7
        if value.shape != reference.shape or not (close | (value == reference)).all():
            bad.append(name)
    return bad


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind, vectors):
    cases = [case for case in CASES if case["kind"] == kind]
    bad = {case["id"]: names for case in cases if (names := differences(case, vectors))}
    assert not bad
    assert len(cases) >= 2


@pytest.mark.parametrize("kind", ["verl_grpo_advantage", "trl_advantages"])
def test_equal_rewards(kind, vectors):
    """What the peers' rounding leaves of eight equal rewards is reached on request; by default it is exactly 0."""
    cases = [case for case in CASES if case["kind"] == kind and "onegroup_identical" in case["tags"]]
    left = []
    for case in cases:
        rewards = vectors[case["inputs"]["token_level_rewards" if kind.startswith("verl") else "rewards_per_func"]]
        rewards = rewards.sum(-1)
        constant = (rewards - 0.7).abs() < 1e-6
        left.append(vectors[case["tensors"]["advantages"]][constant].flatten()[0].item())
        assert outputs(case, vectors)["advantages"][constant].flatten()[0].item() == pytest.approx(left[-1], rel=1e-4)
        for norm in (True, False, "batch"):
            ours = rl.group_advantages(rewards, int(constant.sum()), norm)
            assert (ours[constant] == 0).all()
            assert (ours[~constant] != 0).all()
    assert max(left) > 5e-4


def test_the_comparison_can_fail(vectors, monkeypatch):
    """A loss off by 1 part in 1,000, a lost clip and a lost metric are all noticed."""
    clipped = [c for c in CASES if c["kind"] == "verl_policy_loss" and c["scalars"].get("actor/pg_clipfrac", 0) > 0.1]
    case = clipped[0]
    assert differences(case, vectors) == []
    right = adapter.verl_policy_loss
    monkeypatch.setattr(adapter, "verl_policy_loss", lambda *a, **k: (right(*a, **k)[0] * 1.001, {}))
    assert "loss" in differences(case, vectors)
    monkeypatch.setattr(adapter, "verl_policy_loss", lambda *a, **k: right(*a, **{**k, "clip_ratio_high": 9.0}))
    assert differences(case, vectors)
    monkeypatch.setattr(adapter, "verl_policy_loss", lambda *a, **k: (right(*a, **k)[0], {}))
    assert "actor/ppo_kl is missing" in differences(case, vectors)
