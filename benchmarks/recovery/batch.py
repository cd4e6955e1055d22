"""Sampled sequences as a trainer wants them: selected, without needless padding, in pieces of like length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qnoise.rl import Rollout


@dataclass(frozen=True)
class Batch:
    """N sequences: a prompt padded on the left to P tokens, a response padded on the right to T."""

    ids: Tensor  #: (N, P + T) int64
    mask: Tensor  #: (N, P + T) bool, True = a real token
    response_mask: Tensor  #: (N, T) bool
    rollout_log_prob: Tensor  #: (N, T) fp32, of the policy that sampled
    old_log_prob: Tensor  #: (N, T) fp32, of the policy that is trained, before the update
    advantages: Tensor  #: (N,) fp32

    @classmethod
    def of(cls, rollout: Rollout, advantages: Tensor) -> Batch:
        """The whole rollout; `old_log_prob` is NaN until somebody fills it."""
        return cls(
            ids=rollout.input_ids,
            mask=rollout.attention_mask.bool(),
            response_mask=rollout.response_mask,
            rollout_log_prob=rollout.rollout_log_probs,
            old_log_prob=torch.full_like(rollout.rollout_log_probs, torch.nan),
            advantages=advantages.to(rollout.input_ids.device),
        )

    @classmethod
    def join(cls, parts: Sequence[Batch], pad: int) -> Batch:
        """The rows of several batches under one another."""
        prompts = max(part.ids.shape[1] - part.response_mask.shape[1] for part in parts)
        responses = max(part.response_mask.shape[1] for part in parts)
        padded = []
        for part in parts:
            right = responses - part.response_mask.shape[1]
            left = prompts + responses - right - part.ids.shape[1]
            padded.append(
                (
                    F.pad(part.ids, (left, right), value=pad),
                    F.pad(part.mask, (left, right)),
                    F.pad(part.response_mask, (0, right)),
                    F.pad(part.rollout_log_prob, (0, right)),
                    F.pad(part.old_log_prob, (0, right)),
                    part.advantages,
                )
            )
        return cls(*(torch.cat(columns) for columns in zip(*padded, strict=True)))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def position_ids(self) -> Tensor:
        """(N, P + T): 0 at the first real token, whatever the padding."""
        return (self.mask.long().cumsum(1) - 1).clamp_min(0)

    def rows(self, index: Tensor) -> Batch:
        """The rows `index` names, without the columns that are padding in all of them."""
        prompt = self.ids.shape[1] - self.response_mask.shape[1]
        mask, response_mask = self.mask[index], self.response_mask[index]
        first = int(mask.any(0).long().argmax())
        width = int(response_mask.any(0).sum())
        whole, response = slice(first, prompt + width), slice(0, width)
        return Batch(
            self.ids[index][:, whole],
            mask[:, whole],
            response_mask[:, response],
            self.rollout_log_prob[index][:, response],
            self.old_log_prob[index][:, response],
            self.advantages[index],
        )

    def pieces(self, rows: Tensor, size: int) -> tuple[Tensor, ...]:
        """`rows` in pieces of at most `size`, sequences of like length together: less padding in each."""
        lengths = self.mask[rows].sum(1)
        return rows[lengths.argsort(stable=True)].split(size)
