"""A quantized, noisy policy that is small enough to enumerate: expectations are sums over every response it can give.

Which noise acts where decides whether the policy that is trained is the policy that was sampled; the importance
weights make up for the difference exactly, as long as they are not bounded.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import qnoise
from qnoise import rl
from qnoise.rl.rollouts import collect_noise_state
from tiny_models import tiny_model

EOS, VOCABULARY, TOKENS = 2, 5, 3
PROMPT = (3, 4, 1)
SIGMA = 0.3


def noisy_policy(during, sigma=SIGMA, **sizes):
    """A tiny Qwen2 behind 4 bits whose norms are noisy in the given phases; the noise of one generation is on."""
    model = tiny_model(**sizes)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    noise = qnoise.NoiseConfig("rmsnorm", during=during)
    model = qnoise.patch_model(model, "mxfp4", noise=noise)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(sigma), total_steps=4, seed=11).step()
    return model


def every_response():
    """(ids, mask): all responses of at most three tokens, each ended by the end token or by the limit."""
    responses = []
    for length in range(1, TOKENS + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in tokens[:-1] and (length == TOKENS or tokens[-1] == EOS):
                responses.append(tokens)
    ids = torch.tensor([[*tokens, *[0] * (TOKENS - len(tokens))] for tokens in responses])
    mask = torch.tensor([[True] * len(tokens) + [False] * (TOKENS - len(tokens)) for tokens in responses])
    return ids, mask


def log_probs(model, ids):
    prompts = torch.tensor(PROMPT).expand(len(ids), -1)
    logits = model(input_ids=torch.cat([prompts, ids], 1), logits_to_keep=TOKENS + 1).logits[:, :-1]
    return rl.token_log_probs(logits, ids)[0]


class Enumerated:
    """Rollout and training policy on every response, with the true value of what a trainer estimates."""

    def __init__(self):
        self.model = noisy_policy(("rollout",), vocab_size=VOCABULARY)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ids, self.mask = every_response()
        self.rewards = torch.randn(len(self.ids), generator=torch.Generator().manual_seed(5))
        with qnoise.phase(self.model, "rollout"), torch.no_grad():
            self.rollout = log_probs(self.model, self.ids)
            assert collect_noise_state(self.model)["num_modules"] == 5
        self.behaviour = self.probability(self.rollout)
        with qnoise.phase(self.model, "training"):
            train = log_probs(self.model, self.ids)
        self.train = train.detach()
        self.expected_reward = (self.probability(train) * self.rewards).sum()
        self.gradient = self.flat_gradient(self.expected_reward)

    def probability(self, log_prob):
        return torch.where(self.mask, log_prob, 0.0).sum(-1).exp()

    def flat_gradient(self, value):
        gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    def weights(self, **options):
        return rl.rollout_is_weights(self.train, self.rollout, self.mask, **options)

    def estimate(self, weights, baseline=0.0):
        """Expected gradient of the loss of one sample, over samples of the rollout policy."""
        with qnoise.phase(self.model, "training"):
            log_prob = log_probs(self.model, self.ids)
        total = torch.zeros(())
        for row in range(len(self.ids)):
            one = slice(row, row + 1)
            loss, _ = rl.dapo_loss(
                log_prob[one],
                None,
                self.rewards[one] - baseline,
                self.mask[one],
                rollout_is_weights=None if weights is None else weights[one],
                loss_agg_mode="seq-mean-token-sum",
            )
            total = total + self.behaviour[row] * loss
        return -self.flat_gradient(total)

    def error(self, estimate):
        """Relative distance of an expected gradient from the true one."""
        return ((estimate - self.gradient).norm() / self.gradient.norm()).item()


@pytest.fixture(scope="module")
def everything():
    return Enumerated()


def test_the_enumeration_is_complete_and_the_policies_differ(everything):
    assert len(everything.ids) == 1 + 4 + 16 * VOCABULARY
    assert everything.behaviour.sum().item() == pytest.approx(1, abs=1e-5)
    assert everything.probability(everything.train).sum().item() == pytest.approx(1, abs=1e-5)
    metrics = rl.mismatch_metrics(everything.train, everything.rollout, everything.mask)
    assert metrics["log_ratio_abs_mean"] > 0.1
    # The estimate from samples of the rollout is one of KL(rollout ‖ train) of responses: exactly their expectation.
    kl = (everything.behaviour * (everything.rollout - everything.train).where(everything.mask, 0.0).sum(-1)).sum()
    assert kl > 0.01


def test_unbounded_sequence_weights_are_unbiased(everything):
    """Σ over responses of behaviour · weight · f = Σ over responses of policy · f, for the reward and the gradient."""
    weights = everything.weights(level="sequence", upper=None)
    rewards = (everything.behaviour * weights.amax(-1) * everything.rewards).sum()
    assert rewards.item() == pytest.approx(everything.expected_reward.item(), rel=1e-5)
    assert everything.error(everything.estimate(weights)) < 1e-5
    # A baseline changes nothing in expectation.
    assert everything.error(everything.estimate(weights, baseline=0.7)) < 1e-5


@pytest.mark.parametrize(
    "bounds",
    [
        {"level": "sequence", "upper": 1.2},
        {"level": "sequence", "upper": 1.2, "mode": "mask"},
        {"level": "sequence", "upper": None, "lower": 0.9},
        {"level": "token", "upper": None},
        None,
    ],
    ids=str,
)
def test_everything_else_is_biased(everything, bounds):
    """Bounds trade bias for variance; token weights leave out that the tokens before were another policy's."""
    weights = None if bounds is None else everything.weights(**bounds)
    assert everything.error(everything.estimate(weights)) > 0.1


def test_bounds_that_no_ratio_reaches_change_nothing(everything):
    unbounded = everything.weights(level="sequence", upper=None)
    assert torch.equal(everything.weights(level="sequence", upper=math.ceil(unbounded.max().item())), unbounded)


def test_sampling_draws_from_the_noisy_policy(everything, tokenizer):
    """What generate_groups records in the rollout phase is the behaviour the weights are about."""
    with qnoise.phase(everything.model, "rollout"):
        rollout = rl.generate_groups(everything.model, tokenizer, [PROMPT], 64, max_new_tokens=TOKENS, seed=3)
    place = {tuple(ids[keep].tolist()): row for row, (ids, keep) in enumerate(zip(*every_response(), strict=True))}
    rows = [
        place[tuple(ids[keep].tolist())] for ids, keep in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    width = rollout.response_ids.shape[1]
    want = torch.where(everything.mask, everything.rollout, 0.0)[rows, :width]
    torch.testing.assert_close(rollout.rollout_log_probs, want, rtol=1e-4, atol=1e-4)
    assert len(set(rows)) > 5


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def first_update(during, tokenizer):
    """Rollout and the log-probabilities the trainer finds before its first update, with the metrics of that update."""
    model = noisy_policy(during, sigma=0.05)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    with qnoise.phase(model, "rollout"):
        rollout = rl.generate_groups(model, tokenizer, prompts, 4, max_new_tokens=8, temperature=0.8, seed=6)
    with qnoise.phase(model, "training"):
        logits = model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            logits_to_keep=rollout.response_ids.shape[1] + 1,
        ).logits[:, :-1]
        log_prob, _ = rl.token_log_probs(logits, rollout.response_ids, 0.8)
    advantages = torch.arange(12) % 2 * 2.0 - 1.0
    _, metrics = rl.dapo_loss(log_prob, rollout.rollout_log_probs, advantages, rollout.response_mask)
    return rollout, log_prob.detach(), metrics


def test_shared_noise_makes_the_first_ratio_one(tokenizer):
    rollout, log_prob, metrics = first_update(("rollout", "training"), tokenizer)
    mask = rollout.response_mask
    assert rollout.noise["sigma"] == pytest.approx(0.05)
    torch.testing.assert_close(log_prob[mask], rollout.rollout_log_probs[mask], rtol=1e-5, atol=1e-5)
    weights = rl.rollout_is_weights(log_prob, rollout.rollout_log_probs, mask)
    torch.testing.assert_close(weights[mask], torch.ones_like(weights[mask]), rtol=0, atol=1e-5)
    assert abs(metrics["actor/ppo_kl"].item()) < 1e-5
    assert metrics["actor/pg_clipfrac"] == 0


def test_noise_in_the_rollout_alone_is_seen_by_the_weights(tokenizer):
    rollout, log_prob, _ = first_update(("rollout",), tokenizer)
    got = rl.mismatch_metrics(log_prob, rollout.rollout_log_probs, rollout.response_mask, level="sequence")
    assert got["log_ratio_abs_mean"] > 5e-3
    assert got["ratio_max"] - got["ratio_min"] > 0.05
