"""Drawing a token from logits so that its log-probability is known and its randomness is its own.

Every sample has its own counter-based stream (Philox keyed by seed and sample index), one uniform number a
token, and a token is the inverse of the cumulative distribution at that number. So what sample i draws
depends on the seed, on i and on its logits, and on nothing else: not on the batch it runs in, not on the
global random state, which stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor


def check_integer(name: str, value: object) -> None:
    """Raise ``TypeError`` naming the argument unless it is an integer."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; ValueError for what is out of range, TypeError for what is no number."""

    temperature: float  #: 0 decodes greedily
    top_p: float  #: 1.0 keeps everything
    top_k: int  #: 0 keeps everything
    seed: int  #: 0 … 2⁶⁴−1
    max_new_tokens: int  #: of a response, its end included

    def __post_init__(self) -> None:
        # Plain numbers, because they are saved as JSON with a rollout.
        for name in ("top_k", "seed", "max_new_tokens"):
            check_integer(name, getattr(self, name))
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name} must be a number, got {getattr(self, name)!r}")
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or positive, got {self.top_k}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {self.seed}")

    def uniforms(self, samples: Sequence[int], device: torch.device) -> Tensor | None:
        """(len(samples), max_new_tokens) what the samples draw at; None for greedy decoding."""
        return uniforms(self.seed, samples, self.max_new_tokens).to(device) if self.temperature > 0 else None


def behaviour_log_probs(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """(B, V) log-probabilities a sampler draws from: temperature, then top-k, then top-p, renormalized.

    ``top_k=0`` and ``top_p=1.0`` keep everything. Top-k keeps ties with the k-th token; top-p keeps the
    smallest set of most likely tokens whose mass reaches ``top_p`` (always at least one). fp32; −inf for what
    is never drawn.
    """
    log_p = torch.log_softmax(logits.float() / temperature, -1)
    if top_k and top_k < log_p.shape[-1]:
        least = log_p.topk(top_k, -1).values[:, -1:]
        log_p = torch.log_softmax(log_p.masked_fill(log_p < least, -torch.inf), -1)
    if top_p < 1.0:
        ordered, order = log_p.sort(-1, descending=True)
        mass = ordered.exp()
        before = mass.cumsum(-1) - mass
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        log_p = torch.log_softmax(torch.empty_like(log_p).scatter_(-1, order, ordered), -1)
    return log_p


def uniforms(seed: int, samples: Sequence[int], count: int) -> Tensor:
    """(len(samples), count) fp64 numbers in [0, 1): row i begins the stream of sample ``samples[i]``."""
    table = np.empty((len(samples), count))
    for row, sample in enumerate(samples):
        key = np.array([seed, sample], dtype=np.uint64)
        table[row] = np.random.Generator(np.random.Philox(key=key)).random(count)
    return torch.from_numpy(table)


def draw(log_p: Tensor, uniform: Tensor) -> Tensor:
    """(B,) token ids: the first whose cumulative probability exceeds ``uniform`` (B,) of the total mass."""
    cumulative = log_p.double().exp().cumsum(-1)
    # uniform ≤ 1 − 2⁻⁵³ keeps the target below the total in fp64: the last possible token is found for certain.
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def draw_token(scores: Tensor, uniform: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token a row.

    Args:
        scores: (B, V) fp32 logits.
        uniform: (B,) what to draw at; None decodes greedily.
        sampling: the distribution.

    Returns:
        (B,) token ids, and their (B,) log-probabilities.
    """
    if uniform is None:
        # A deterministic policy gives its token probability 1; NaN logits must still be noticed.
        best, token = scores.max(-1)
        return token, best * 0.0
    log_p = behaviour_log_probs(scores, sampling.temperature, sampling.top_p, sampling.top_k)
    # NaN logits find no token; the clamp lets them reach the record, where they are reported.
    token = draw(log_p, uniform).clamp_max(log_p.shape[-1] - 1)
    return token, log_p.gather(-1, token[:, None])[:, 0]


def force_draw(scores: Tensor, uniform: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """`draw_token` for ``generate``: (B, V) scores whose argmax is the token drawn, and its (B,) log-probability."""
    token, log_prob = draw_token(scores, uniform, sampling)
    if uniform is None:
        return scores, log_prob
    return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0), log_prob


class RecordingSampler:
    """A logits processor that samples: it leaves only the drawn token possible and keeps its log-probability.

    ``generate`` runs in its greedy mode and takes the one token left. In this way the log-probability
    recorded is that of the distribution drawn from, one number a token, and no list of scores is ever kept.
    """

    def __init__(
        self,
        uniform: Tensor | None,
        sampling: Sampling,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        self.uniform = uniform  # (B, max_new_tokens), or None for greedy decoding
        self.sampling = sampling
        self.on_step = on_step
        self.recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.on_step:
            self.on_step()
        uniform = None
        if self.uniform is not None:
            # On a GPU generate may run a few steps past the last one before it notices that it is done.
            uniform = self.uniform[:, min(len(self.recorded), self.uniform.shape[1] - 1)]
        scores, log_prob = force_draw(scores, uniform, self.sampling)
        self.recorded.append(log_prob)
        return scores
