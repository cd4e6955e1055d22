import sys

import pytest
import torch

import qnoise
from qnoise.rl import continuous, generate_groups, generation, token_log_probs
from test_rl_generation import PROMPTS, lively, logits_of, same_samples
from test_rl_generation import tokenizer as tokenizer
from tiny_models import tiny_model, with_lora

# One sdpa model, one with sliding windows, soft-capping and eager attention, one with a fused projection.
ARCHITECTURES = ("qwen2", "gemma2", "gpt_neox")


@pytest.fixture
def model():
    return lively(tiny_model())


def both(model, tokenizer, prompts=PROMPTS, num_generations=4, **settings):
    """The same rollout by both engines."""
    return [
        generate_groups(model, tokenizer, prompts, num_generations, engine=engine, **settings)
        for engine in generation.ENGINES
    ]


def assert_same(a, b):
    assert same_samples(a, b)
    width = min(a.response_ids.shape[1], b.response_ids.shape[1])
    torch.testing.assert_close(a.rollout_log_probs[:, :width], b.rollout_log_probs[:, :width], rtol=1e-4, atol=1e-4)
    for name in ("prompt_ids", "prompt_mask", "finished", "group_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.texts == b.texts
    assert a.noise == b.noise
    assert a.sampling == b.sampling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.8, "top_k": 20}], ids=["greedy", "sampled"]
)
def test_the_same_rollout_as_generate(architecture, settings, tokenizer):
    window = {"sliding_window": 4} if architecture == "gemma2" else {}
    model = lively(tiny_model(architecture, **window), 3.0)
    plain, paged = both(model, tokenizer, max_new_tokens=20, seed=1, **settings)
    assert_same(plain, paged)
    if settings["temperature"]:
        assert 0 < plain.finished.sum() < 12, "this test needs responses of different lengths"
        mask = paged.response_mask
        full, _ = token_log_probs(logits_of(model, paged), paged.response_ids, 0.8)
        assert (paged.rollout_log_probs - full)[mask].max() > 0.05, "the record is of the truncated distribution"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_whatever_is_in_flight(batch_size, model, tokenizer):
    """Places that become free while others go on."""
    plain, paged = both(model, tokenizer, max_new_tokens=12, seed=5, batch_size=batch_size)
    assert_same(plain, paged)


def test_prompts_in_pieces(model, tokenizer, monkeypatch):
    monkeypatch.setattr(continuous, "_PREFILL_TOKENS", 3)
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: widths.append(args[0].numel()))
    paged = generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=6, seed=5, batch_size=2, engine="continuous")
    assert max(widths) == 3
    assert_same(generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=6, seed=5), paged)


def test_prompts_of_a_group_are_read_once(model, tokenizer):
    """Whole pages of 16 tokens of a prompt are found in the cache by all samples but the first."""
    prompts = [" ".join(f"w{start + i}" for i in range(40)) for start in (3, 50)]
    tokens = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    settings = {"max_new_tokens": 4, "temperature": 0.0, "batch_size": 2}
    paged = generate_groups(model, tokenizer, prompts, 4, engine="continuous", **settings)
    hook.remove()
    assert sum(tokens) == 2 * 40 + 6 * 8 + (paged.lengths - 1).sum()
    assert_same(generate_groups(model, tokenizer, prompts, 4, **settings), paged)


def test_responses_that_lose_their_cache_go_on(model, tokenizer, monkeypatch):
    """A cache too small for all: transformers takes it from some, which start again with what they have."""
    from transformers import generation as of_transformers

    settings = of_transformers.configuration_utils.ContinuousBatchingConfig
    monkeypatch.setattr(settings, "__post_init__", lambda self: setattr(self, "num_blocks", 4))
    lost = []
    state = sys.modules["transformers.generation.continuous_batching.requests"].RequestState
    restart = state.create_equivalent_initial_request
    monkeypatch.setattr(
        state,
        "create_equivalent_initial_request",
        lambda self: lost.append(len(self.generated_tokens)) or restart(self),
    )
    plain, paged = both(model, tokenizer, max_new_tokens=30, seed=1)
    assert max(lost) > 0
    assert_same(plain, paged)


def test_quantized_noisy_policy_with_adapter(tokenizer):
    model = with_lora(qnoise.patch_model(lively(tiny_model()), "mxfp4", noise="rmsnorm"))
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.05), total_steps=10, seed=4).step()
    with qnoise.phase(model, "rollout"):
        plain, paged = both(model, tokenizer, max_new_tokens=8)
        shared, _ = token_log_probs(logits_of(model, paged), paged.response_ids)
    assert_same(plain, paged)
    assert paged.noise["num_modules"] == 5
    mask = paged.response_mask
    torch.testing.assert_close(paged.rollout_log_probs[mask], shared[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_everything_is_put_back(attention, model, tokenizer, capsys):
    model.set_attn_implementation(attention)
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    stored = model.generation_config
    with torch.inference_mode():
        paged = generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, progress=True, engine="continuous")
    assert "6/6" in capsys.readouterr().err
    assert not paged.rollout_log_probs.requires_grad

    broken = model.lm_head.register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(RuntimeError, match=r"continuous batching failed on sample \d+: division by zero"):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, engine="continuous")
    broken.remove()
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == attention
    assert model.generation_config is stored
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_logits_that_are_not_finite(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[9] = float("nan")
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match="logits that are not finite: sample 0, token 0"):
            generate_groups(
                model, tokenizer, PROMPTS, 2, max_new_tokens=3, temperature=temperature, engine="continuous"
            )


def test_a_sampler_that_is_not_asked_is_noticed(model, tokenizer, monkeypatch):
    monkeypatch.setattr(continuous.PagedSampler, "__call__", lambda self, scores, slots: scores)
    with pytest.raises(RuntimeError, match="continuous batching returned other tokens than were sampled"):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, engine="continuous")


def unfit(kind):
    if kind == "other attention":
        return tiny_model("bloom", n_layer=1, n_head=2)
    if kind == "state space":
        return tiny_model("mamba", state_size=4)
    if kind == "soft prompt":
        from peft import PromptTuningConfig, get_peft_model

        return get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model = tiny_model()
    if kind == "flex":
        model.set_attn_implementation("flex_attention")
    elif kind == "persistent":
        model._cached_continuous_batching_manager = object()
    elif kind == "old":
        type_without = type("Old", (torch.nn.Module,), {"generate": model.generate, "config": model.config})
        old = type_without()
        old.get_input_embeddings = model.get_input_embeddings
        return old
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other attention", "BloomForCausalLM does not take its attention from transformers' attention interface"),
        ("state space", "MambaForCausalLM does not take its attention from"),
        ("soft prompt", "PeftModelForCausalLM puts a learned prompt before its input"),
        ("flex", r"cannot run Qwen2ForCausalLM with attn_implementation='flex_attention': .* Use engine='generate'"),
        ("persistent", "Qwen2ForCausalLM keeps a continuous batching manager of its own"),
        ("old", r"Old has no init_continuous_batching\(\)"),
    ],
)
def test_models_it_cannot_run(kind, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        generate_groups(unfit(kind), tokenizer, PROMPTS, 2, max_new_tokens=3, engine="continuous")


def test_other_bad_input(model, tokenizer):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"torch.autocast is on for cpu"):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, engine="continuous")
    with pytest.raises(ValueError, match=r"engine is 'continous'; it must be .* Did you mean 'continuous'\?"):
        generate_groups(model, tokenizer, PROMPTS, 2, max_new_tokens=3, engine="continous")
