"""The trainer: deterministic, resumable bit for bit, quantized and noisy where the arm says so and nowhere else."""

import dataclasses
import json
import math

import pytest
import torch

import qnoise
from benchmarks.recovery.arms import arm
from benchmarks.recovery.batch import Batch
from benchmarks.recovery.build import build_model
from benchmarks.recovery.data import word_examples
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.policy import load_policy
from benchmarks.recovery.presets import TINY_WORDS
from benchmarks.recovery.runs import Run
from benchmarks.recovery.train import train, update

SHORT = TINY_WORDS.changed(
    split="dev", steps=4, prompts_per_step=8, num_generations=4, micro_batch=7, eval_problems=12, noise_stages=4
)


def run_of(folder, name="mxfp4+noise", seed=0, **fields):
    return Run(SHORT.changed(**fields), arm(name), seed, folder)


def numbers(run, events=("step", "evaluation", "result")):
    """The log without what a clock, a memory meter or a resumption adds."""
    measured = ("seconds", "cpu_seconds", "prepare_seconds", "peak_memory_mb")
    rows = [row for row in run.rows() if row["event"] in events]
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def steps(run):
    return [row for row in run.rows() if row["event"] == "step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("undisturbed"))
    train(run)
    return run


def test_the_same_seed_gives_the_same_numbers_twice(undisturbed, tmp_path):
    torch.rand(3)  # the global random state plays no part
    again = run_of(tmp_path)
    train(again)
    assert numbers(again) == numbers(undisturbed)
    assert any(row["trained_samples"] > 0 and row["grad_norm"] > 0 for row in steps(again))


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_resumes_bit_for_bit(undisturbed, tmp_path, stop):
    run = run_of(tmp_path, save_every=2)
    undisturbed_run = run_of(undisturbed.folder, save_every=2)

    def interrupt(step):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, on_step=interrupt)
    assert run.finished() is None
    with run.log_path.open("a") as log:
        log.write('{"event": "step", "st')  # killed in the middle of a line
    assert run.finished() is None
    train(run, resume=True)
    assert run.finished() is not None
    # save_every is part of the settings, so only the hash of the settings may differ.
    assert [{**row, "config_hash": 0} for row in numbers(run)] == [
        {**row, "config_hash": 0} for row in numbers(undisturbed)
    ]
    assert undisturbed_run.config_hash == run.config_hash != undisturbed.config_hash
    resumed = [row["step"] for row in run.rows() if row["event"] == "resumed"]
    assert resumed == ([2] if stop == 3 else [])


def test_a_run_with_other_settings_is_not_resumed(undisturbed):
    other = run_of(undisturbed.folder, lr=0.5)
    with pytest.raises(ValueError, match=r"made with other settings: preset\.lr was 0\.\d+, is 0\.5\. Use the same"):
        train(other, resume=True)
    with pytest.raises(ValueError, match="made with other settings"):
        other.finished()


def test_a_damaged_checkpoint_or_log_is_named(tmp_path):
    run = run_of(tmp_path, steps=1)
    train(run)
    whole = run.checkpoint_path.read_bytes()
    run.checkpoint_path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"seed0\.safetensors: this checkpoint cannot be read"):
        train(run, resume=True)
    run.checkpoint_path.write_bytes(whole)
    text = run.log_path.read_text()
    run.log_path.write_text("\n".join([text.split("\n")[0], '{"event": "ste']))
    with pytest.raises(ValueError, match="is shorter than when its checkpoint was written"):
        train(run, resume=True)
    run.log_path.write_text("\n".join([*text.split("\n")[:2], '{"event": "ste', ""]))
    with pytest.raises(ValueError, match=r"seed0\.jsonl, line 3: not JSON"):
        run.finished()
    run.log_path.write_text("broken\n")
    with pytest.raises(ValueError, match=r"seed0\.jsonl, line 1: not the head of a run"):
        run.finished()


def test_arms_of_a_seed_start_alike_and_differ_in_what_they_say(tmp_path):
    models = {name: build_model(run_of(tmp_path, name))[0] for name in ("bf16", "mxfp4", "mxfp4-aa", "nvfp4")}
    adapters = {
        name: torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]) for name, model in models.items()
    }
    for other in adapters.values():
        assert torch.equal(other, adapters["bf16"])
    assert qnoise.state(models["mxfp4"])["formats"] != qnoise.state(models["nvfp4"])["formats"]
    assert not any(isinstance(module, qnoise.FakeQuantLinear) for module in models["bf16"].modules())
    assert "lm_head" not in str([name for name, p in models["mxfp4"].named_parameters() if p.requires_grad])


def test_the_aa_arm_sees_the_same_problems_and_draws_other_samples(tmp_path):
    runs = [run_of(tmp_path, name, steps=1) for name in ("mxfp4", "mxfp4-aa")]
    for run in runs:
        train(run)
    ours, theirs = (numbers(run) for run in runs)
    assert ours[0] == theirs[0]  # step 0: the same policy on the same problems
    assert ours[1]["response_length"] != theirs[1]["response_length"]
    assert {key for key in runs[0].config["arm"] if runs[0].config["arm"][key] != runs[1].config["arm"][key]} == {
        "name",
        "label",
        "sampling_stream",
        "note",
    }


def test_mismatch_is_rounding_unless_noise_is_in_the_rollout_alone(tmp_path):
    mismatch = {}
    for name in ("mxfp4", "mxfp4+shared-noise", "mxfp4+noise"):
        run = run_of(tmp_path, name, steps=2, noise_stages=3, sigma_start=0.1, sigma_end=0.05)
        train(run)
        noisy = [row for row in steps(run) if row["sigma"] > 0]
        assert len(noisy) == (0 if name == "mxfp4" else 1)
        mismatch[name] = [row["mismatch_abs"] for row in (noisy or steps(run)) if "mismatch_abs" in row]
    assert max(mismatch["mxfp4"]) < 1e-4
    assert max(mismatch["mxfp4+shared-noise"]) < 1e-4
    assert min(mismatch["mxfp4+noise"]) > 1e-3


def test_sigma_follows_the_staged_schedule(undisturbed):
    sigma = [row["sigma"] for row in steps(undisturbed)]
    assert sigma[0] == 0.0
    assert sigma[1:] == pytest.approx([0.01, 0.001, 0.0001])


def test_accuracy_is_that_of_the_quantized_policy_without_noise(tmp_path):
    run = run_of(tmp_path, "mxfp4+noise", steps=1, eval_problems=60, sigma_start=10.0, sigma_end=9.0)
    train(run)
    examples = word_examples("dev", 0, 60)
    outcomes = {}
    for fmt in (None, "mxfp4"):
        model, tokenizer = load_policy(run.model_path, torch.float32)
        if fmt:
            qnoise.patch_model(model, fmt)
        result = evaluate(model, tokenizer, examples, max_new_tokens=SHORT.max_new_tokens)
        outcomes[fmt] = "".join(str(int(right)) for right in result.flexible)
    first = next(row for row in run.rows() if row["event"] == "evaluation")
    assert first["flexible_outcomes"] == outcomes["mxfp4"] != outcomes[None]


def test_clipping_acts_when_one_rollout_serves_several_updates(tmp_path):
    clipped = {}
    for mini_batches in (1, 4):
        run = run_of(tmp_path, "bf16", mini_batches=mini_batches, lr=3e-2, warmup=1, steps=1)
        train(run)
        (row,) = steps(run)
        clipped[mini_batches] = row["clip_fraction"]
    assert clipped[1] == 0.0 < clipped[4]


def test_further_rounds_refill_until_enough_groups_are_informative(tmp_path):
    one, three = (run_of(tmp_path / str(n), "bf16", steps=1, generation_rounds=n) for n in (1, 3))
    for run in (one, three):
        train(run)
    few, more = steps(one)[0], steps(three)[0]
    assert few["samples"] == 32
    assert few["trained_samples"] < more["trained_samples"] <= 32
    assert more["samples"] in (64, 96)


def test_a_step_without_informative_groups_trains_nothing_and_logs_no_false_zeros(tmp_path):
    run = run_of(tmp_path, "bf16", num_generations=1, steps=1)
    train(run)
    (row,) = steps(run)
    assert row["trained_samples"] == 0
    assert "mismatch_kl" not in row
    assert row["entropy"] > 0


def test_a_mini_batch_in_pieces_gives_the_gradient_of_the_whole(tmp_path):
    """The denominator is the mini-batch's, whatever the size of the pieces and their padding."""
    updated = []
    for micro_batch in (3, 64):
        run = run_of(tmp_path, "bf16", micro_batch=micro_batch, mini_batches=1, warmup=1)
        model = build_model(run)[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, 100, (7, 20), generator=generator)
        mask = torch.ones(7, 20, dtype=torch.bool)
        response_mask = torch.arange(8) < torch.tensor([3, 8, 5, 1, 8, 2, 7])[:, None]
        mask[:, 12:] = response_mask
        mask[2, :6] = False
        log_prob = torch.zeros(7, 8)
        batch = Batch(ids, mask, response_mask, log_prob, log_prob.clone(), torch.randn(7, generator=generator))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        update(model, optimizer, batch, run.preset.changed(max_grad_norm=1e9), 0, 0, run.arm)
        updated.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    start = torch.cat([p.detach().flatten() for p in build_model(run)[0].parameters() if p.requires_grad])
    assert (updated[0] - start).abs().max() > 1e-6
    torch.testing.assert_close(updated[0], updated[1], rtol=1e-4, atol=1e-9)


def test_a_run_begun_anew_keeps_the_log_of_the_one_before(tmp_path):
    run = run_of(tmp_path, "bf16")
    model = build_model(run)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        run.begin(model, optimizer, None, resume=False)
        run.log_step(1, {"reward": 0.5})
    (previous,) = run.log_path.parent.glob("*.previous.jsonl")
    assert previous.read_bytes() == run.log_path.read_bytes()


def test_the_log_tells_what_made_it(undisturbed):
    header, *_, result = undisturbed.rows()
    assert header["config"] == json.loads(json.dumps(undisturbed.config))
    assert header["config"]["preset"] == json.loads(json.dumps(dataclasses.asdict(undisturbed.preset)))
    assert {"torch", "transformers", "peft", "python", "qnoise"} <= set(header["versions"])
    assert header["commit"]
    assert result["trainable_parameters"] == 29184
    assert result["peak_memory_mb"] > 100
    for row in steps(undisturbed):
        assert {"strict", "flexible", "reward", "response_length", "entropy", "sigma", "seconds"} <= set(row)
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
