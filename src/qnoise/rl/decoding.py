"""Decoding with a plain growing cache, where a response that has ended leaves the batch.

``generate`` of transformers runs every row until the last response of the batch ends. Where lengths differ, as they do
between samples of a policy, much of that is thrown away: here the cache is cut down to the responses that go on,
whenever enough others have ended to pay for the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sampling import Sampling, draw_token

LEAVE_AT = 1 / 8
"""Share of the rows that have ended at which the others are copied together: about what one step's copy costs."""


def decode(
    model: Any,
    last: Tensor,
    mask: Tensor,
    cache: Any,
    uniform: Tensor | None,
    sampling: Sampling,
    eos: Tensor,
    pad: int,
    on_step: Callable[[], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Responses to prompts whose other tokens are in the cache.

    Args:
        model: takes ``position_ids``, ``past_key_values`` and ``logits_to_keep``.
        last: (B, 1) the last token of each prompt.
        mask: (B, P) int64, of the prompts, ``last`` included.
        cache: a ``DynamicCache`` of P - 1 tokens. It is used up.
        uniform: (B, max_new_tokens) what to draw at; None decodes greedily.
        eos: ids that end a response.
        pad: fills what is behind an end.
        on_step: called before each token.

    Returns:
        (B, T) token ids and fp32 log-probabilities, T at most ``sampling.max_new_tokens``. Behind the first end of a
        row stands nothing of meaning.
    """
    count, most = len(last), sampling.max_new_tokens
    tokens = torch.full((count, most), pad, device=last.device)
    log_probs = torch.zeros(count, most, device=last.device)
    rows = torch.arange(count, device=last.device)  # of those that are still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(most):
        if on_step:
            on_step()
        logits = model(
            input_ids=last,
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token, log_prob = draw_token(logits.float(), None if uniform is None else uniform[rows, step], sampling)
        tokens[rows, step], log_probs[rows, step] = token, log_prob
        ended = ended | torch.isin(token, eos)
        over = int(ended.sum())
        if over == len(rows) or step + 1 == most:
            break
        if over >= LEAVE_AT * len(rows):
            going = (~ended).nonzero().flatten()
            cache.batch_select_indices(going)
            rows, mask, token, ended = rows[going], mask[going], token[going], ended[going]
        last = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return tokens[:, : step + 1], log_probs[:, : step + 1]
