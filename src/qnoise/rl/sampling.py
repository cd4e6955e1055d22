"""Drawing a token from logits so that its log-probability is known and its randomness is its own.

Every sample has its own counter-based stream (Philox keyed by seed and sample index), one uniform number a
token, and a token is the inverse of the cumulative distribution at that number. So what sample i draws
depends on the seed, on i and on its logits, and on nothing else: not on the batch it runs in, not on the
global random state, which stays untouched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


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


def uniforms(seed: int, samples: range, count: int) -> Tensor:
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


class RecordingSampler:
    """A logits processor that samples: it leaves only the drawn token possible and keeps its log-probability.

    ``generate`` runs in its greedy mode and takes the one token left. In this way the log-probability
    recorded is that of the distribution drawn from, one number a token, and no list of scores is ever kept.
    """

    def __init__(
        self,
        uniform: Tensor | None,
        temperature: float,
        top_p: float,
        top_k: int,
        on_step: Callable[[], object] | None = None,
    ) -> None:
        self.uniform = uniform  # (B, max_new_tokens), or None for greedy decoding
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.on_step = on_step
        self.recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.on_step:
            self.on_step()
        if self.uniform is None:
            # A deterministic policy gives its token probability 1; NaN logits must still be noticed.
            self.recorded.append(scores.amax(-1) * 0.0)
            return scores
        log_p = behaviour_log_probs(scores, self.temperature, self.top_p, self.top_k)
        # On a GPU generate may run a few steps past the last one before it notices that it is done.
        step = min(len(self.recorded), self.uniform.shape[1] - 1)
        # NaN logits find no token; the clamp lets them reach the record, where they are reported.
        token = draw(log_p, self.uniform[:, step]).clamp_max(log_p.shape[-1] - 1)[:, None]
        self.recorded.append(log_p.gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
