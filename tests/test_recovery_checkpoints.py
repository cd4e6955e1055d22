"""The shipped policies: small, documented, as accurate as their logs say, and outliers that change no function."""

import json

import pytest
import torch

import qnoise
from benchmarks.recovery.data import word_examples
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.policies import POLICIES, Pretraining
from benchmarks.recovery.policy import load_policy
from benchmarks.recovery.pretrain import CHECKPOINTS, plant_outliers, pretrain, quantized_accuracy
from benchmarks.recovery.problems import problems
from benchmarks.recovery.tokenizer import build_tokenizer

SEEDS = (0, 1, 2)


def rows(folder, event):
    lines = [json.loads(line) for line in (folder / "pretraining.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("name", sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir()))
def test_each_policy_is_small_and_was_made_as_it_is_said_to_be(name):
    folder = CHECKPOINTS / name
    assert (folder / "model.safetensors").stat().st_size <= (5_000_000 if "large" in name else 1_000_000)
    (settings,) = rows(folder, "settings")
    seed, wanted = POLICIES[name]
    assert settings["seed"] == seed
    assert settings["parameters"] >= 150_000
    steps = rows(folder, "step")
    assert steps[-1]["step"] == settings["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for field, value in json.loads(json.dumps(wanted.__dict__)).items():
        assert settings.get(field, getattr(Pretraining(), field)) == value, field


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracies_are_those_the_benchmark_is_about(seed):
    """Solves most problems, hardly ever ends in ####, and four bits cost it visibly."""
    accuracy = {row["fmt"]: row for row in rows(CHECKPOINTS / f"words-{seed}", "quantized")}
    assert 0.85 <= accuracy["bf16"]["flexible"] <= 0.99
    assert accuracy["bf16"]["strict"] <= 0.15
    assert accuracy["bf16"]["flexible"] - accuracy["mxfp4"]["flexible"] >= 0.05
    assert accuracy["mxfp4"]["flexible"] < accuracy["nvfp4"]["flexible"] < accuracy["bf16"]["flexible"]


def test_the_shipped_weights_are_as_accurate_as_logged():
    folder = CHECKPOINTS / "words-0"
    logged = {row["fmt"]: row["flexible"] for row in rows(folder, "quantized")}
    examples = word_examples("dev", seed=1, count=200)
    for fmt in (None, "mxfp4"):
        model, tokenizer = load_policy(str(folder), torch.float32)
        if fmt:
            qnoise.patch_model(model, fmt)
        measured = evaluate(model, tokenizer, examples, max_new_tokens=48).flexible_accuracy
        assert measured == pytest.approx(logged[fmt or "bf16"], abs=0.11)  # three standard errors of 200 problems


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_logged_accuracies_can_be_measured_again(seed):
    logged = rows(CHECKPOINTS / f"words-{seed}", "quantized")
    for old, new in zip(logged, quantized_accuracy(CHECKPOINTS / f"words-{seed}", 2000), strict=True):
        assert new["fmt"] == old["fmt"]
        # Other processors sum in another order, which turns a few answers.
        assert new["flexible"] == pytest.approx(old["flexible"], abs=0.005)


def test_planting_outliers_changes_weights_and_not_the_function():
    model, tokenizer = load_policy(str(CHECKPOINTS / "words-0"), torch.float32)
    ids = torch.tensor([tokenizer(next(problems("dev", 0)).question)["input_ids"]])
    weight = model.model.layers[1].mlp.up_proj.weight.clone()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        plant_outliers(model, (3, 40), 16)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight[:, 3], weight[:, 3] * 16)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight[:, 4], weight[:, 4])


def test_shipped_policies_have_planted_outliers():
    model, _ = load_policy(str(CHECKPOINTS / "words-1"), torch.float32)
    for layer in model.model.layers:
        size = layer.mlp.gate_proj.weight.norm(dim=0)
        assert set(size.topk(2).indices.tolist()) == set(Pretraining().outlier_channels)


def test_weights_are_bf16_values_and_the_tokenizer_is_the_one_built_here():
    model, tokenizer = load_policy(str(CHECKPOINTS / "words-2"), torch.float32)
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    text = "Tom has 23 pens. How many? 23 + 14 = 37; #### 37"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_pretraining_is_deterministic(tmp_path):
    settings = Pretraining(steps=4, batch=8, log_every=2, eval_problems=4)
    folders = [pretrain(0, settings, tmp_path / name) for name in ("one", "two")]
    contents = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1]
    assert [row["loss"] for row in rows(folders[0], "step")] == [row["loss"] for row in rows(folders[1], "step")]


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = pretrain(0, Pretraining(steps=1, batch=8, eval_problems=2), tmp_path / "policy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"policy: this checkpoint cannot be loaded .* none of them cut off"):
        load_policy(str(folder), torch.float32)


def test_a_missing_checkpoint_says_how_to_make_it():
    with pytest.raises(FileNotFoundError, match=r"words-7: this shipped checkpoint is missing.*recovery pretrain"):
        load_policy(str(CHECKPOINTS / "words-7"), torch.float32)
