import copy
import logging

import numpy as np
import pytest
import torch

from qnoise.rl import Rollout, decoding, generate_groups, generation, token_log_probs
from qnoise.rl.sampling import behaviour_log_probs
from tiny_models import ARCHITECTURES, tiny_model, with_lora

PROMPTS = ["w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14 w15 w16 w17 w18 w19"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 99)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def model():
    return lively(tiny_model())


def lively(model, scale=8.0):
    """Logits far from uniform, so that sampling settings matter and greedy decoding has no near ties."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


def logits_of(model, rollout):
    with torch.no_grad():
        return model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            logits_to_keep=rollout.response_ids.shape[1] + 1,
        ).logits[:, :-1]


def same_samples(a, b):
    width = min(a.response_ids.shape[1], b.response_ids.shape[1])
    return torch.equal(a.response_ids[:, :width], b.response_ids[:, :width]) and torch.equal(a.lengths, b.lengths)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_log_probs_are_those_of_the_policy(architecture, tokenizer):
    """A teacher-forced forward over prompt and response gives them again, padding and shared prompts or not."""
    model = lively(tiny_model(architecture), 3.0)
    rollout = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=12, temperature=0.7, seed=1)
    log_prob, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids, 0.7)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_log_probs[mask], log_prob[mask], rtol=1e-4, atol=1e-4)
    assert (rollout.rollout_log_probs[~mask] == 0).all()
    assert rollout.rollout_log_probs[mask].std() > 0.1


def test_recorded_log_probs_account_for_truncation(model, tokenizer):
    settings = {"temperature": 0.8, "top_p": 0.7, "top_k": 5}
    rollout = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=10, seed=2, **settings)
    logits = logits_of(model, rollout)
    flat = behaviour_log_probs(logits.flatten(0, 1), **settings).view_as(logits)
    want = flat.gather(-1, rollout.response_ids[..., None])[..., 0]
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_log_probs[mask], want[mask], rtol=1e-4, atol=1e-4)
    full, _ = token_log_probs(logits, rollout.response_ids, 0.8)
    assert (rollout.rollout_log_probs - full)[mask].max() > 0.1


def test_greedy_is_what_the_model_says_alone(model, tokenizer):
    """Equal to generate() on each prompt by itself, without padding, whatever the batch."""
    from transformers import GenerationConfig

    plain = GenerationConfig(max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=2)
    for batch_size in (None, 1, 4, 5):
        rollout = generate_groups(
            model, tokenizer, PROMPTS, 2, max_new_tokens=15, temperature=0.0, batch_size=batch_size
        )
        for i, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)[0, ids.shape[1] :]
            for sample in (2 * i, 2 * i + 1):
                assert rollout.response_ids[sample][rollout.response_mask[sample]].tolist() == alone.tolist()
        assert (rollout.rollout_log_probs == 0).all()


def test_samples_depend_on_seed_and_index_only(model, tokenizer):
    arguments = {"num_generations": 4, "max_new_tokens": 12, "temperature": 1.0}
    whole = generate_groups(model, tokenizer, PROMPTS, seed=5, **arguments)
    torch.manual_seed(123)
    for batch_size in (1, 3, 5, 100):
        part = generate_groups(model, tokenizer, PROMPTS, seed=5, batch_size=batch_size, **arguments)
        assert same_samples(whole, part)
        torch.testing.assert_close(part.rollout_log_probs, whole.rollout_log_probs, rtol=1e-4, atol=1e-4)
        assert torch.equal(part.prompt_ids, whole.prompt_ids)
        assert part.texts == whole.texts
    other = generate_groups(model, tokenizer, PROMPTS, seed=6, **arguments)
    assert not torch.equal(other.lengths, whole.lengths) or not same_samples(other, whole)
    first = whole.response_ids[:4]
    assert len({tuple(row) for row in first.tolist()}) == 4, "samples of a group are different draws"


def test_the_global_random_state_is_left_alone(model, tokenizer):
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_samples_follow_the_policy(tokenizer):
    """χ² of the first token of 4,000 samples against the model's own distribution."""
    model = lively(tiny_model(), 8.0)
    rollout = generate_groups(model, tokenizer, PROMPTS[:1], 4000, max_new_tokens=1, seed=3, batch_size=1000)
    p = logits_of(model, rollout.select(torch.tensor([0])))[0, 0].double().softmax(-1)
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=99).double()
    common = 4000 * p > 5
    expected = torch.cat([4000 * p[common], 4000 * p[~common].sum()[None]])
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    degrees = len(expected) - 1
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert degrees > 5
    assert not common.all()
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_fields(model, tokenizer):
    rollout = generate_groups(model, tokenizer, PROMPTS, 16, max_new_tokens=20, seed=0)
    assert rollout.group_ids.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert rollout.prompt_ids.shape == (48, 8)
    assert rollout.prompt_mask.sum(-1).tolist() == [5] * 16 + [2] * 16 + [8] * 16
    assert rollout.prompt_ids[0].tolist() == [0, 0, 0, 5, 6, 7, 8, 9]
    assert 0 < rollout.finished.sum() < 48, "this test needs both kinds"
    for i in range(48):
        ids = rollout.response_ids[i].tolist()
        length = rollout.lengths[i].item()
        assert rollout.response_mask[i].tolist() == [t < length for t in range(len(ids))]
        assert (ids[length - 1] == 2) == rollout.finished[i].item()
        assert 2 not in ids[: length - 1]
        assert set(ids[length:]) <= {0}
        words = ids[: length - 1] if rollout.finished[i] else ids
        assert rollout.texts[i] == " ".join(f"w{w}" for w in words if w > 2)
        assert length == 20 or rollout.finished[i]
    assert rollout.sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "max_new_tokens": 20}
    assert rollout.noise["num_modules"] == 0
    assert rollout.rollout_log_probs.dtype == torch.float32


def test_token_lists_and_several_ends(model, tokenizer):
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    strings = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=10)
    assert same_samples(strings, generate_groups(model, tokenizer, ids, 4, max_new_tokens=10))
    token = strings.response_ids[strings.response_mask][5].item()
    ends = generate_groups(model, tokenizer, ids, 4, max_new_tokens=10, eos_token_id=[2, token])
    at = (ends.response_ids == token) & ends.response_mask
    assert at.any()
    assert ends.finished[at.any(-1)].all()
    assert (at.float().argmax(-1) + 1)[at.any(-1)].tolist() == ends.lengths[at.any(-1)].tolist()


def test_an_end_at_the_very_last_token_counts(model, tokenizer):
    plain = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=6)
    sample = plain.truncated.nonzero()[0].item()
    *earlier, last = plain.response_ids[sample].tolist()
    assert last not in earlier
    ends = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=6, eos_token_id=last)
    assert ends.response_ids[sample].tolist() == [*earlier, last]
    assert ends.finished[sample]
    assert ends.lengths[sample] == 6


def test_pad_token_may_be_the_end_token(model, tokenizer):
    want = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=10)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    got = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=10)
    assert torch.equal(got.response_mask, want.response_mask)
    assert torch.equal(got.finished, want.finished)
    assert torch.equal(got.response_ids[got.response_mask], want.response_ids[want.response_mask])


STORED = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "top_k": 1,
    "temperature": 0.1,
    "do_sample": True,
    "min_new_tokens": 10,
    "num_return_sequences": 2,
    "use_cache": False,
    "max_length": 9,
    "suppress_tokens": list(range(3, 50)),
    "bad_words_ids": [[50], [51]],
    "forced_eos_token_id": 2,
    "stop_strings": ["w5"],
}


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["plain", "peft"])
def test_stored_settings_do_not_change_what_is_drawn(wrap, model, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = wrap(model)
    want = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=10)
    before = model.generation_config
    for name, value in STORED.items():
        setattr(before, name, value)
    with caplog.at_level("WARNING"):
        got = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=10)
    assert same_samples(got, want)
    assert model.generation_config is before
    if wrap is with_lora:
        assert model.get_base_model().generation_config is before
    assert {name: getattr(before, name) for name in STORED} == STORED
    assert not caplog.records


def test_the_chosen_cache_is_used(model, tokenizer):
    kinds = set()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: kinds.add(type(kwargs["past_key_values"]).__name__), with_kwargs=True
    )
    want = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=6)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True
    kinds.clear()
    assert same_samples(generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=6), want)
    assert kinds == {"StaticCache"}


def test_prompts_are_run_once_a_group(model, tokenizer, monkeypatch):
    """The shared cache gives the samples of the long way round; only the last prompt token runs for every sample."""
    rows = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: rows.append(args[0].shape))
    shared = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=6)
    assert rows[:2] == [(3, 7), (24, 1)]
    rows.clear()
    generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=1, batch_size=8)
    assert rows == [(1, 1), (8, 1), (1, 4), (8, 1), (1, 7), (8, 1)], "a batch is as wide as its own prompts"
    rows.clear()
    monkeypatch.setattr(generation, "_shared_prefix", lambda *args: None)
    alone = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=6)
    assert rows[0] == (24, 8)
    hook.remove()
    assert same_samples(shared, alone)
    torch.testing.assert_close(shared.rollout_log_probs, alone.rollout_log_probs, rtol=1e-4, atol=1e-5)


def test_what_has_ended_leaves_the_batch(model, tokenizer):
    """The rows of a forward become fewer, and every sample is the one it is alone."""
    sizes = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[0]))
    ends = list(range(0, 60, 3))
    rollout = generate_groups(model, tokenizer, PROMPTS, 16, max_new_tokens=12, eos_token_id=ends)
    hook.remove()
    steps = sizes[1:]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 48
    assert steps[-1] < 12
    ended_at = rollout.lengths.masked_fill(~rollout.finished, 99)
    for step, rows in enumerate(steps):
        going = int((ended_at > step).sum())
        assert going <= rows <= max(1, going / (1 - decoding.LEAVE_AT)), "no more than the share that may wait"
    alone = generate_groups(model, tokenizer, PROMPTS, 16, max_new_tokens=12, eos_token_id=ends, batch_size=1)
    assert same_samples(alone, rollout)
    torch.testing.assert_close(alone.rollout_log_probs, rollout.rollout_log_probs, rtol=1e-4, atol=1e-5)


def test_the_loop_of_transformers_draws_the_same(model, tokenizer, monkeypatch):
    ends = list(range(0, 60, 3))
    for settings in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}):
        own = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=12, eos_token_id=ends, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(generation, "_shared_prefix", lambda *args: None)
            theirs = generate_groups(model, tokenizer, PROMPTS, 8, max_new_tokens=12, eos_token_id=ends, **settings)
        assert same_samples(own, theirs)
        torch.testing.assert_close(own.rollout_log_probs, theirs.rollout_log_probs, rtol=1e-4, atol=1e-5)


def test_prompts_of_one_token(model, tokenizer):
    rollout = generate_groups(model, tokenizer, ["w5", "w6 w7"], 3, max_new_tokens=4)
    log_prob, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_log_probs[mask], log_prob[mask], rtol=1e-4, atol=1e-4)


def test_modes_and_gradients_are_restored(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    model.config.use_cache = False
    rollout = generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not rollout.rollout_log_probs.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())

    broken = model.lm_head.register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3)
    broken.remove()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_gradient_checkpointing_in_training_mode(model, tokenizer):
    want = generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=6)
    model.gradient_checkpointing_enable()
    model.train()
    assert same_samples(generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=6), want)


@pytest.mark.parametrize("tuning", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learned_prompt(tuning, tokenizer):
    """Its virtual tokens stand before every prompt: no cache is shared that lacks them."""
    import peft

    config = getattr(peft, tuning)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(lively(tiny_model()), config)
    rollout = generate_groups(model.eval(), tokenizer, PROMPTS, 2, max_new_tokens=6, temperature=0.0)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :]
        mask = rollout.response_mask[2 * i]
        assert rollout.response_ids[2 * i][mask].tolist() == alone.tolist()


def test_peft_model(tokenizer):
    model = with_lora(lively(tiny_model()))
    rollout = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=8)
    log_prob, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_log_probs[mask], log_prob[mask], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        base, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids)
    assert (base - log_prob)[mask].abs().max() > 1e-2, "the adapter does something"


def test_quantized_noisy_policy(tokenizer):
    """The noise of the rollout is recorded, and under it the log-probabilities are found again."""
    import qnoise

    model = qnoise.patch_model(lively(tiny_model()), "mxfp4", noise="rmsnorm")
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.05), total_steps=10, seed=4)
    scheduler.step()
    with qnoise.phase(model, "rollout"):
        rollout = generate_groups(model, tokenizer, PROMPTS, 4, max_new_tokens=8)
        shared, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids)
    assert rollout.noise["sigma"] == pytest.approx(0.05)
    assert rollout.noise["seed"] == 4
    assert rollout.noise["num_modules"] == len(rollout.noise["modules"]) == 5
    assert "model.layers.0.input_layernorm" in rollout.noise["modules"]
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_log_probs[mask], shared[mask], rtol=1e-4, atol=1e-4)
    with qnoise.phase(model, "evaluation"):
        clean, _ = token_log_probs(logits_of(model, rollout), rollout.response_ids)
        assert generate_groups(model, tokenizer, PROMPTS, 1, max_new_tokens=1).noise["num_modules"] == 0
    assert (clean - shared)[mask].abs().max() > 1e-2


def test_progress_bar(model, tokenizer, capsys):
    generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=5, batch_size=2, progress=True)
    assert "15/15" in capsys.readouterr().err


def test_logits_that_are_not_finite(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[9] = float("nan")
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match="logits that are not finite: sample 0, token 0"):
            generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, temperature=temperature)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, ValueError, "prompts is empty; give at least one prompt"),
        ({"prompts": "w5 w6"}, TypeError, "prompts must be a list of strings or of lists of token ids"),
        ({"prompts": ["w5", [6]]}, TypeError, "prompts mixes strings and lists of token ids"),
        ({"prompts": ["w5", ""]}, ValueError, r"prompts\[1\] = '' has no tokens"),
        ({"prompts": [[5], []]}, ValueError, r"prompts\[1\] = \[\] has no tokens"),
        (
            {"prompts": ["w5", "w5 " * 250]},
            ValueError,
            r"prompts\[1\] has 250 tokens; with max_new_tokens=8 that exceeds the model's context of 256 tokens",
        ),
        ({"prompts": [[5], [6, 99]]}, ValueError, r"prompts\[1\] holds token 99, but the model knows 0 … 98 only"),
        ({"prompts": [[-1]]}, ValueError, r"prompts\[0\] holds token -1"),
        ({"num_generations": 0}, ValueError, "num_generations must be at least 1, got 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature must be 0 \(greedy\) or positive, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_k": -1}, ValueError, r"top_k must be 0 \(all tokens\) or positive, got -1"),
        ({"seed": -1}, ValueError, "seed must be between 0 and"),
        ({"prompts": [[5], [6.0]]}, TypeError, r"prompts\[1\] holds 6\.0, which is no token id"),
        ({"prompts": [[{"role": "user", "content": "w5"}]]}, TypeError, r"prompts\[0\] holds {.*apply_chat_template"),
        # Iterated, it is the names of its entries.
        ({"prompts": {"input_ids": [[5], [6]]}}, TypeError, r"prompts must be a list .*got a dict; .*\['input_ids'\]"),
        ({"prompts": [5, 6]}, TypeError, r"prompts\[0\] is 5; give strings or lists of token ids"),
        ({"num_generations": 2.0}, TypeError, r"num_generations must be an integer, got 2\.0"),
        ({"max_new_tokens": 8.0}, TypeError, r"max_new_tokens must be an integer, got 8\.0"),
        ({"top_k": 2.5}, TypeError, r"top_k must be an integer, got 2\.5"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"top_p": None}, TypeError, "top_p must be a number, got None"),
        ({"batch_size": 1.5}, TypeError, r"batch_size must be an integer, got 1\.5"),
        ({"eos_token_id": []}, ValueError, "eos_token_id is empty, so no response could end"),
        ({"eos_token_id": 99}, ValueError, "eos_token_id 99 is no token of the model, which knows 0 … 98 only"),
        ({"eos_token_id": [2, -1]}, ValueError, "eos_token_id -1 is no token of the model"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be an integer or several, got '</s>'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, or None for all at once, got 0"),
    ],
)
def test_bad_input(change, error, message, model, tokenizer):
    good = {"prompts": PROMPTS, "num_generations": 2, "max_new_tokens": 8}
    with pytest.raises(error, match=message):
        generate_groups(model, tokenizer, **{**good, **change})


def test_numbers_of_numpy_can_be_saved(model, tokenizer, tmp_path):
    seed, temperature = np.int64(3), np.float32(0.5)
    rollout = generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=2, seed=seed, temperature=temperature)
    rollout.save(tmp_path / "rollout")
    assert Rollout.load(tmp_path / "rollout").sampling == rollout.sampling
    assert rollout.sampling["seed"] == 3


def test_no_end_token(tokenizer):
    model = tiny_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither tokenizer\.eos_token_id nor model\.generation_config\.eos_token_id"):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=2)
    assert generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=2, eos_token_id=2).response_ids.shape == (6, 2)


def test_not_a_language_model(tokenizer):
    with pytest.raises(TypeError, match=r"Linear has no generate\(\)"):
        generate_groups(torch.nn.Linear(2, 2), tokenizer, PROMPTS, 2, max_new_tokens=2)
    wrapper = torch.nn.DataParallel(tiny_model())
    with pytest.raises(TypeError, match=r"DataParallel has no generate\(\); .*give the model inside it \(\.module\)"):
        generate_groups(wrapper, tokenizer, PROMPTS, 2, max_new_tokens=2)
