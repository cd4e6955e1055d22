"""What the arms of the study do to a base: prepared, noisy, taken over from another; and their lines of results."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

import qnoise
from benchmarks.recovery import build, study_runs
from benchmarks.recovery.arms import ARMS, Adapter, Arm
from benchmarks.recovery.build import build_model
from benchmarks.recovery.noises import Accumulating, noise_of
from benchmarks.recovery.policy import load_policy, model_path
from benchmarks.recovery.prepare import make_one_level
from benchmarks.recovery.presets import TINY_WORDS
from benchmarks.recovery.problems import problems
from benchmarks.recovery.runs import Run
from benchmarks.recovery.stages import STAGES, Stage
from benchmarks.recovery.tokenizer import build_tokenizer
from benchmarks.recovery.train import train
from qnoise.noise import unit_normal
from qnoise.repairs.divergence import divergence, keep

SMALL = TINY_WORDS.changed(
    steps=2, prompts_per_step=2, eval_problems=6, initial_problems=4, max_new_tokens=40, reward="flexible"
).changed(sampled_evaluation="true", mini_batches=1)
TEXTS = [f"{p.question} {p.solution(strict=False)}" for p in itertools.islice(problems("dev", 3), 8)]


@pytest.fixture(autouse=True)
def _little_text(monkeypatch):
    monkeypatch.setattr(build, "CALIBRATION_TEXTS", 24)


def run_of(folder, arm, **changes):
    return Run(SMALL.changed(**changes), arm, 0, folder)


def batch():
    """Solved problems; only the tokens of the solutions count."""
    tokenizer = build_tokenizer()
    tokens = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    for row, text in enumerate(TEXTS):
        labels[row, : len(tokenizer(text.partition("? ")[0])["input_ids"]) + 1] = -100
    return {**tokens, "labels": labels}


def logits(model):
    tokens = batch()
    with torch.no_grad(), qnoise.phase(model, "evaluation"):
        return model.eval()(**tokens).logits[tokens["labels"] != -100]


def test_a_prepared_base_is_nearer_to_full_precision_and_says_what_it_cost(tmp_path):
    whole, plain, repaired, distilled = (
        build_model(run_of(tmp_path, arm))
        for arm in (
            Arm("a", "", None),
            Arm("b", "", "mxfp4"),
            Arm("c", "", "mxfp4", spec={"scale_mode": "mse"}, repairs=("gptq",)),
            Arm("d", "", "mxfp4", adapter=Adapter(steps=20, batch=16)),
        )
    )
    reference = keep(whole[0].eval(), [batch()])
    error = [divergence(each[0].eval(), reference).kl for each in (plain, repaired, distilled)]
    assert error[1] < 0.7 * error[0]
    assert error[2] < 0.8 * error[0]
    assert plain[2].tokens == 0
    assert repaired[2].tokens > 24 * 10
    assert repaired[2].seconds > plain[2].seconds


def test_a_borrowed_adapter_leaves_the_function_and_is_the_other_arms(tmp_path):
    lender = Arm("lender", "", "mxfp4", adapter=Adapter(steps=4, batch=8))
    plain = build_model(run_of(tmp_path, Arm("a", "", None)))[0]
    warm, _, cost = build_model(run_of(tmp_path, Arm("warm", "", None, borrow=lender)))
    other = build_model(run_of(tmp_path, lender))[0]
    assert cost.tokens > 0
    torch.testing.assert_close(logits(warm), logits(plain), rtol=1e-4, atol=1e-4)
    states = dict(other.named_parameters())
    moved = [p for name, p in warm.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in moved)
    assert all(torch.equal(p, states[name]) for name, p in warm.named_parameters() if "lora_" in name)


def test_full_fine_tuning_trains_every_parameter_through_the_format(tmp_path):
    run = run_of(tmp_path, Arm("full", "", "mxfp4", tuning="full"), lr=1e-3, warmup=0)
    model = build_model(run)[0]
    assert all(p.requires_grad for p in model.parameters())
    result = train(run)
    assert result["trainable_parameters"] == result["parameters"] > 150_000
    assert result["bits_per_weight"] == 4.25


def test_the_faulty_format_is_worse_than_the_right_one():
    def small():  # weights as small as a large model's; these policies have larger ones
        model = load_policy(model_path("checkpoints/words-0"), torch.float32)[0]
        with torch.no_grad():
            for weight in model.model.layers.parameters():
                weight.mul_(0.1)
        return model

    clean, faulty = small(), small()
    make_one_level(faulty)
    right = qnoise.bake(qnoise.patch_model(small(), fmt="nvfp4"))
    name = "model.layers.0.mlp.up_proj.weight"
    want, wrong, good = (dict(model.named_parameters())[name] for model in (clean, faulty, right))
    assert (wrong - want).norm() > 1.2 * (good - want).norm()
    assert torch.equal(faulty.lm_head.weight, clean.lm_head.weight)


def test_noise_that_accumulates_is_the_sum_of_its_draws_and_comes_off(tmp_path):
    arm = dataclasses.replace(ARMS["mxfp4+noise"], noise="accumulating")
    run = run_of(tmp_path, arm, steps=5, noise_stages=3, sigma_start=0.1, sigma_end=0.05)
    model = build_model(run)[0]
    noise = noise_of(model, run.preset, arm, 3)
    assert isinstance(noise, Accumulating)
    assert "model.norm" in noise.norms
    before = {name: module.weight.clone() for name, module in noise.norms.items()}
    sigmas = [noise.step() for _ in range(4)]
    assert sigmas[0] == 0.0 < sigmas[-1]
    with noise.applied():
        for name, module in noise.norms.items():
            drawn = [unit_normal(3, step, name, tuple(module.weight.shape)) for step in range(4)]
            added = sum(sigma * torch.from_numpy(z) for sigma, z in zip(sigmas, drawn, strict=True))
            torch.testing.assert_close(module.weight, before[name] + added)
    assert all(torch.equal(module.weight, before[name]) for name, module in noise.norms.items())
    again = noise_of(model, run.preset, arm, 3)
    again.load_state_dict(noise.state_dict())
    assert all(torch.equal(total, again.sums[name]) for name, total in noise.sums.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "entropy"},
        {"importance_weights": True},
        {"multipliers": "inverse"},
        {"noise": "accumulating"},
    ],
    ids=str,
)
def test_noise_arms_run(tmp_path, changes):
    run = run_of(tmp_path, dataclasses.replace(ARMS["mxfp4+noise"], **changes), steps=3, noise_stages=3)
    train(run)
    sigmas = [row["sigma"] for row in run.rows() if row["event"] == "step"]
    if changes.get("noise") == "entropy":
        entropies = [row["entropy"] for row in run.rows() if row["event"] == "step"]
        assert sigmas[1] == pytest.approx(min(max(0.01 * 0.2 / entropies[0], 1e-5), 0.1))
    else:
        assert sigmas == [0.0, 0.01, 0.0001]


def test_distilling_on_pulls_the_policy_to_the_base(tmp_path):
    """With nothing else to learn from, the divergence from the base falls."""

    def after(weight):
        arm = Arm("k", "", "mxfp4", keep_distilling=weight)
        run = run_of(tmp_path / str(weight), arm, warmup=0, steps=2, prompts_per_step=8)
        train(run)
        return run

    moved = [after(weight).rows() for weight in (0.0, 10.0)]
    norms = [max(row.get("grad_norm", 0.0) for row in rows if row["event"] == "step") for rows in moved]
    assert norms[1] > 0
    assert norms[0] != norms[1]


def test_a_stage_keeps_a_line_for_each_run_and_does_nothing_twice(tmp_path):
    arms = (Arm("bf16", "BF16", None), Arm("mxfp4", "MXFP4", "mxfp4", preset={"lr": 5e-4}))
    stage = Stage("words", SMALL, arms, (0, 1))
    runs = study_runs.runs_of(stage, tmp_path)
    assert [(run.seed, run.arm.name) for run in runs] == [(0, "bf16"), (0, "mxfp4"), (1, "bf16"), (1, "mxfp4")]
    assert runs[1].preset.lr == 5e-4
    results = tmp_path / "results" / "words.jsonl"
    outcome = study_runs.do(stage, runs[:2], results, workers=1, command="the command")
    assert outcome.done == [run.name for run in runs[:2]]
    assert not outcome.failed
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["bf16", "mxfp4"]
    (line, _) = lines
    assert line["initial"]["greedy"]["problems"] == 4
    assert line["final"]["sampled"]["problems"] == 6
    assert len(line["curves"]["reward"]) == 2
    assert line["checkpoint"] == "words-0"
    results.write_text(results.read_text() + '{"half')
    assert study_runs.do(stage, runs[:2], results, workers=1, command="again").done == []
    assert len(results.read_text().splitlines()) == 2
    other = [Run(SMALL.changed(lr=1e-4), arms[0], 0, tmp_path)]
    with pytest.raises(ValueError, match="bf16.seed0 was run with other settings"):
        study_runs.do(stage, other, results, workers=1, command="again")
    results.write_text(results.read_text().replace(study_runs.code_hash(), "0" * 16))
    with pytest.raises(ValueError, match="bf16.seed0 was run by other code"):
        study_runs.do(stage, runs[:1], results, workers=1, command="again")


def test_every_arm_of_the_study_is_a_preset_that_exists():
    for stage in STAGES.values():
        names = [arm.name for arm in stage.arms]
        assert len(set(names)) == len(names)
        for run in study_runs.runs_of(stage, study_runs.ROOT):
            json.dumps(dataclasses.asdict(run.arm))
            assert run.preset.name == stage.preset.name
    lent = STAGES["arms"]
    assert set(lent.seeds) <= set(STAGES[lent.lender].seeds)
    assert len({seed % 3 for seed in lent.seeds}) == 1
