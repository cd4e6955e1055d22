"""Log-probabilities of given tokens and the entropy of their distributions, in fp32 whatever the input dtype.

16-bit log-softmax is off by 0.01 on average and 0.04 at worst: as much as the noise one wants to measure. So
every row is taken to fp32 before the softmax, a few rows at a time: no fp32 copy of all the logits ever
exists (:mod:`.token_softmax`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .token_softmax import check_ids, statistics, write_logit_gradient

# Logits that exist at a time between a head and its log-probabilities.
_ELEMENTS_PER_CHUNK = 1 << 24


def token_log_probs(
    logits: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    lm_head: nn.Module | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of ``ids`` and the entropy of the distribution it was drawn from.

    Both are of softmax(logits / temperature), in nats. Position t of ``logits`` must predict position t of
    ``ids``: for a causal model, logits ``[:, :-1]`` go with ids ``[:, 1:]`` (see :class:`Rollout` for the
    response part).

    Args:
        logits: (..., V) logits of any float dtype; with ``lm_head``, hidden states (..., H).
        ids: (...) integer token ids, 0 … V−1, also in padding.
        temperature: > 0; use the one the tokens were sampled with.
        lm_head: the head *module*: logits are ``lm_head(hidden)``, computed ``chunk_rows`` rows at a time, so
            that (rows, V) never exists as a whole. Because the module is called, a patched, tied or LoRA head
            works, and its weights get their gradients. A head that is trained is called again in the backward.
            Of a frozen one the gradient with respect to ``hidden`` is formed at once and kept in the place of
            the logits; only a gradient through the entropy calls it again. Use ``torch.no_grad`` where no
            gradient is wanted. What a model does to its logits behind the head (``final_logit_softcapping`` of
            Gemma 2, ``logit_scale`` of Cohere, ``logits_scaling`` of Granite) is not in the head: give a module
            that does both.
        chunk_rows: rows at a time; None chooses about 16 million logits.

    Returns:
        ``(log_prob, entropy)``, both (...), fp32 (fp64 for fp64 logits). Both are differentiable (once). An fp32
        log-probability is within 5e-7 and half an ulp of the exact one of the logits as given: 1e-6 down to −16,
        where half an ulp is 4.8e-7. The entropy is within 1e-6 and half an ulp.

    Raises:
        ValueError: ``ids`` does not have the shape of ``logits`` without its last dimension (both are named),
            an id outside 0 … V−1 (on a CPU; elsewhere the device reports it), a temperature that is not
            positive and finite, ``chunk_rows`` < 1.
        TypeError: logits that are not floating point, ids that are not integers, a head that is no module.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if logits.dim() < 1 or logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} but {'logits' if lm_head is None else 'hidden'} has shape "
            f"{tuple(logits.shape)}; ids must have that shape without the last dimension"
        )
    if lm_head is not None and not isinstance(lm_head, nn.Module):
        raise TypeError(
            f"lm_head must be the head as a module (model.get_output_embeddings()), got {type(lm_head).__name__}: a "
            "weight alone knows nothing of a bias, an adapter or quantization"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    rows, flat_ids = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1).long()
    if lm_head is None:
        check_ids(flat_ids, logits.shape[-1])
        log_prob, entropy = _LogProbEntropy.apply(rows, flat_ids, float(temperature), chunk_rows, None)
    else:
        log_prob, entropy = _from_hidden(rows, flat_ids, float(temperature), lm_head, chunk_rows)
    return log_prob.view(ids.shape), entropy.view(ids.shape)


def _from_hidden(
    hidden: Tensor, ids: Tensor, temperature: float, lm_head: nn.Module, chunk_rows: int | None
) -> tuple[Tensor, Tensor]:
    if chunk_rows is None:
        chunk_rows = max(64, _ELEMENTS_PER_CHUNK // getattr(lm_head, "out_features", 1 << 17))
    if torch.is_grad_enabled() and hidden.requires_grad and _looks_frozen(lm_head):
        formed = _form_slopes(hidden, ids, temperature, lm_head, chunk_rows)
        if formed is not None:
            return _FrozenHead.apply(hidden, ids, *formed, temperature, lm_head, chunk_rows)
    parts = []
    # split() of no rows gives one empty block, so the head still says what dtype it works in.
    for hidden_rows, id_rows in zip(hidden.split(chunk_rows), ids.split(chunk_rows), strict=True):
        block = _Recomputed(lm_head, temperature)
        if torch.is_grad_enabled():
            parts.append(checkpoint(block, hidden_rows, id_rows, use_reentrant=False))
        else:
            parts.append(block(hidden_rows, id_rows))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class _Recomputed:
    """Head and log-probabilities of one chunk; the second call, in the backward, keeps what the first found."""

    def __init__(self, lm_head: nn.Module, temperature: float) -> None:
        self.lm_head, self.temperature = lm_head, temperature
        self.known: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        if self.known is None:
            check_ids(ids, logits.shape[-1])
            self.known = statistics(logits.detach(), ids, self.temperature)
        return _LogProbEntropy.apply(logits, ids, self.temperature, None, self.known)


class _LogProbEntropy(torch.autograd.Function):
    """(N, V) logits, (N,) ids → (N,) log-probabilities and entropies; ``known`` are their :func:`statistics`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: float,
        chunk_rows: int | None,
        known: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        log_prob, entropy, top, log_sum = known or statistics(logits, ids, temperature, chunk_rows)
        ctx.save_for_backward(logits, ids, entropy, top, log_sum)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.set_materialize_grads(False)
        return log_prob.clone(), entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        logits, ids, *stats = ctx.saved_tensors
        grad = torch.empty_like(logits)
        write_logit_gradient(grad, logits, ids, ctx.temperature, stats, grads, ctx.chunk_rows)
        return grad, None, None, None, None


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies of (N, H) hidden states, from what :func:`_form_slopes` found.

    A row's gradient is linear in the gradients that arrive: that of a log-probability is g · ∂log p_y/∂hidden.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        ids: Tensor,
        slope: Tensor,
        log_prob: Tensor,
        entropy: Tensor,
        top: Tensor,
        log_sum: Tensor,
        temperature: float,
        lm_head: nn.Module,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, ids, slope, entropy, top, log_sum)
        ctx.temperature, ctx.lm_head, ctx.chunk_rows = temperature, lm_head, chunk_rows
        kind = hidden.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        ctx.set_materialize_grads(False)
        return log_prob.clone(), entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, ids, slope, *stats = ctx.saved_tensors
        if grad_entropy is None:
            grad = None if grad_log_prob is None else (slope * grad_log_prob[:, None]).to(hidden.dtype)
            return grad, *[None] * 9
        grad = torch.empty_like(hidden)
        for start in range(0, len(ids), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            with torch.autocast(**ctx.autocast):
                leaf, logits = _call(ctx.lm_head, hidden[rows])
            slopes = torch.empty_like(logits)
            grads = [None if g is None else g[rows] for g in (grad_log_prob, grad_entropy)]
            write_logit_gradient(slopes, logits.detach(), ids[rows], ctx.temperature, [x[rows] for x in stats], grads)
            (grad[rows],) = torch.autograd.grad(logits, leaf, slopes)
            del logits, slopes  # before the next chunk is there
        return grad, *[None] * 9


def _form_slopes(
    hidden: Tensor, ids: Tensor, temperature: float, lm_head: nn.Module, chunk_rows: int
) -> tuple[Tensor, ...] | None:
    """(∂log p_y/∂hidden (N, H), log_prob, entropy, top, log_sum), a chunk of logits at a time.

    Two products with the head's weight instead of the three that recomputation needs. None where the head's
    output depends on something else that needs a gradient, or on nothing.
    """
    slope = torch.empty_like(hidden)
    found: list[tuple[Tensor, ...]] = []
    for hidden_rows, id_rows, slope_rows in zip(*(x.split(chunk_rows) for x in (hidden, ids, slope)), strict=True):
        leaf, logits = _call(lm_head, hidden_rows)
        if not found and not _depends_only_on(leaf, logits):
            return None
        check_ids(id_rows, logits.shape[-1])
        slopes = torch.empty_like(logits)
        found.append(statistics(logits.detach(), id_rows, temperature, slopes=slopes))
        slope_rows.copy_(torch.autograd.grad(logits, leaf, slopes)[0])
        del logits, slopes  # before the next chunk is there
    return slope, *(torch.cat(parts) for parts in zip(*found, strict=True))


def _looks_frozen(lm_head: nn.Module) -> bool:
    """No parameter needs a gradient, none is sharded (its hooks tell forward from backward), nothing is dropped
    at random (a second call would drop something else)."""
    return not any(p.requires_grad or hasattr(p, "device_mesh") for p in lm_head.parameters()) and not any(
        isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in lm_head.modules()
    )


def _call(lm_head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The head on a leaf of its own, and that leaf."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, lm_head(leaf)


def _depends_only_on(leaf: Tensor, output: Tensor) -> bool:
    """Whether ``leaf`` is the one tensor that a backward from ``output`` reaches."""
    pending, seen, reached = [output.grad_fn], set(), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.append(node.variable is leaf)
        pending += [following for following, _ in node.next_functions]
    return reached == [True]
