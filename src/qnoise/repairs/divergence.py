"""How far a model's predictions have moved: KL divergence and output error against log-probabilities that were kept.

KL(p || q) = sum over the vocabulary of p (log p - log q) with p of the model before and q after, in nats, mean over the
tokens that count. The output error is the relative RMS of the logits, centred per token: the part of them that the
softmax sees,  sqrt(sum ||z' - z||^2 / sum ||z||^2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.repairs.self_teacher import as_mapping, counted, kl_rows
from qnoise.sensitivity.batches import evaluating

_CHUNK = 1 << 24  # logits that are worked on at a time, 64 MB in fp32


@dataclass(frozen=True)
class Divergence:
    """kl: nats per token. output_error: relative. agreement: share of tokens whose likeliest next token is the same."""

    kl: float
    output_error: float
    agreement: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Reference:
    """What a model said: its batches, and for each the log-probabilities (tokens, vocabulary) fp32 on the CPU."""

    batches: Sequence[Mapping[str, Any]]
    log_probs: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.log_probs)


@torch.no_grad()
def keep(model: nn.Module, batches: Iterable[Any]) -> Reference:
    """Run the model as it is and keep its log-probabilities: tokens x vocabulary x 4 bytes.

    Args:
        model: gives logits (batch, tokens, vocabulary), as an attribute `logits` or as its output.
        batches: tensors (batch, tokens) of ids, or mappings of keyword arguments with "input_ids"; with "labels" the
            positions whose next label is -100 do not count, with "attention_mask" padding does not.

    Raises:
        TypeError: the model gives no logits; a batch of another kind.
        ValueError: no token counts; logits that are not finite.
    """
    kept = [as_mapping(batch) for batch in batches]
    log_probs = []
    with evaluating(model):
        for batch in kept:
            rows = _logits(model, batch)
            if not torch.isfinite(rows).all():
                raise ValueError(f"{type(model).__name__}: logits that are not finite, before anything was quantized")
            log_probs.append(rows.float().log_softmax(-1).cpu())
    if not sum(map(len, log_probs)):
        raise ValueError("no token counts: the batches are empty, or all masked; give sequences of at least two tokens")
    return Reference(kept, log_probs)


@torch.no_grad()
def divergence(model: nn.Module, reference: Reference) -> Divergence:
    """How far the model, as it is now, is from what `keep` kept. KL is infinite or NaN where logits are."""
    kl = error = size = same = 0.0
    tokens = 0
    with evaluating(model):
        for batch, log_probs in zip(reference.batches, reference.log_probs, strict=True):
            rows = _logits(model, batch)
            step = max(1, _CHUNK // rows.shape[-1])
            for now, before in zip(rows.split(step), log_probs.split(step), strict=True):
                now, before = now.float(), before.to(now.device)
                kl += kl_rows(now, before, 1.0)[0].sum(dtype=torch.float64).item()
                centred = before - before.mean(-1, keepdim=True)
                error += (now - now.mean(-1, keepdim=True) - centred).square().sum(dtype=torch.float64).item()
                size += centred.square().sum(dtype=torch.float64).item()
                same += (now.argmax(-1) == before.argmax(-1)).sum().item()
                tokens += len(now)
    return Divergence(kl / tokens, (error / size) ** 0.5 if size else 0.0, same / tokens, tokens)


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """(tokens that count, vocabulary): the logits of the positions whose next token counts."""
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    ids = batch["input_ids"]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise TypeError(
            f"{type(model).__name__} gives no logits of shape (batch, tokens, vocabulary) for ids of shape "
            f"{tuple(ids.shape)}; a KL divergence needs a language model"
        )
    counts = counted(batch)
    return logits[:, :-1][counts.to(logits.device)]
