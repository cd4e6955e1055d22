"""Text to calibrate and to measure on, sampled from the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qnoise.rl.generation import generate_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_IGNORED = -100  # the label of a token that does not count, as torch's cross entropy and transformers have it


def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    *,
    count: int = 64,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches of text that the model writes, at temperature 1: what it will say is what a repair has to keep right.

    Call it before the model is patched, so that the text is that of the full-precision model.

    Args:
        model, tokenizer, max_new_tokens, seed: see `qnoise.rl.generate_groups`.
        prompts: a text for each, or None: `count` texts that start from the tokenizer's first token (its
            begin-of-sequence token, else its end-of-sequence token).
        count: number of texts without prompts; ignored with prompts.
        batch_size: texts in a batch.

    Returns:
        Mappings of "input_ids", "attention_mask" and "labels", each (batch, tokens) int64 on the model's device, padded
        on the right: keyword arguments of the model. Labels are -100 on the prompt and on padding.

    Raises:
        ValueError, TypeError: as `generate_groups`; no prompts and no token to start from; a count below 1.
    """
    if prompts is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("the tokenizer has no begin- and no end-of-sequence token to start from; give prompts=")
        if count < 1:
            raise ValueError(f"count is {count}; it must be at least 1")
        prompts = [[start]] * count
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rollout = generate_groups(
        model,
        tokenizer,
        prompts,
        1,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    batches = []
    for first in range(0, len(rollout.lengths), batch_size):
        some = slice(first, first + batch_size)
        rows = [
            (prompt[kept], response[sampled])
            for prompt, kept, response, sampled in zip(
                rollout.prompt_ids[some],
                rollout.prompt_mask[some],
                rollout.response_ids[some],
                rollout.response_mask[some],
                strict=True,
            )
        ]
        batches.append(_batch(rows))
    return batches


def _batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = rows[0][0].new_zeros(len(rows), width)  # what stands in padding is masked
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.cat([prompt, response])
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = response
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
