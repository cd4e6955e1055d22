"""Comparison with verl's and TRL's own functions: values, gradients and metrics. See golden_rl/README.md."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import golden_rl_adapter as adapter

GOLDEN = Path(__file__).parent / "golden_rl"
CASES = json.loads((GOLDEN / "cases.json").read_text())
KINDS = sorted({case["kind"] for case in CASES})


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
    """Names of the outputs that differ, and how many were compared."""
    got = outputs(case, vectors)
    want = {**{name: vectors[key] for name, key in case["tensors"].items()}, **case["scalars"]}
    required = {name for name in want if name == "loss" or name.startswith("grad_")} | set(case["tensors"])
    bad = sorted(f"{name} is missing" for name in required - got.keys())
    compared = want.keys() & got.keys()
    for name in compared:
        value = torch.as_tensor(got[name]).detach().double()
        reference = torch.as_tensor(want[name]).double()
        if "all_masked_batch" in case["tags"]:
            assert (value == 0).all(), f"{case['id']}: {name} of an all-masked batch is {value}"
            continue
        rtol = 2e-2 if "bf16" in case["tags"] else 1e-5
        largest = reference[reference.isfinite()].abs().max() if reference.isfinite().any() else 0.0
        close = (value - reference).abs() <= rtol * reference.abs() + 0.1 * rtol * largest + 1e-7
        if value.shape != reference.shape or not (close | (value == reference)).all():
            bad.append(name)
    return bad, len(compared)


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind, vectors):
    bad, cases, compared = {}, 0, Counter()
    for case in CASES:
        if case["kind"] != kind:
            continue
        if "onegroup_identical" in case["tags"]:
            continue  # test_equal_rewards
        names, count = differences(case, vectors)
        cases += 1
        compared[kind] += count
        if names:
            bad[case["id"]] = names
    assert not bad
    assert cases >= 2
    assert compared[kind] >= cases


@pytest.mark.parametrize("kind", ["verl_grpo_advantage", "trl_advantages"])
def test_equal_rewards(kind, vectors):
    """Where the peers' rounding gives equal rewards an advantage, ours is exactly 0; the other groups agree."""
    cases = [case for case in CASES if case["kind"] == kind and "onegroup_identical" in case["tags"]]
    assert cases
    for case in cases:
        got = outputs(case, vectors)["advantages"]
        want = vectors[case["tensors"]["advantages"]]
        rewards = vectors[case["inputs"]["token_level_rewards" if kind.startswith("verl") else "rewards_per_func"]]
        constant = (rewards.sum(-1) - 0.7).abs() < 1e-6
        assert constant.any()
        assert (got[constant] == 0).all()
        if case["params"].get("scale_rewards") != "batch":
            torch.testing.assert_close(got[~constant], want[~constant], rtol=1e-5, atol=1e-6)


def test_the_comparison_can_fail(vectors, monkeypatch):
    """A loss off by 1 part in 1,000 and a lost clip are both noticed."""
    clipped = [c for c in CASES if c["kind"] == "verl_policy_loss" and c["scalars"].get("actor/pg_clipfrac", 0) > 0.1]
    case = clipped[0]
    assert differences(case, vectors)[0] == []
    right = adapter.verl_policy_loss
    monkeypatch.setattr(adapter, "verl_policy_loss", lambda *a, **k: (right(*a, **k)[0] * 1.001, {}))
    assert "loss" in differences(case, vectors)[0]
    monkeypatch.setattr(adapter, "verl_policy_loss", lambda *a, **k: right(*a, **{**k, "clip_ratio_high": 9.0}))
    assert differences(case, vectors)[0]
