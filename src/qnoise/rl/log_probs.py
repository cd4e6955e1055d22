"""Log-probabilities of given tokens and the entropy of their distributions, in fp32 whatever the input dtype.

16-bit log-softmax is off by 0.01 on average and 0.04 at worst: as much as the noise one wants to measure. So
every row is taken to fp32 before the softmax, a few rows at a time: no fp32 copy of all the logits ever
exists. The backward needs only the logits and two numbers a row:
∂log p_y/∂z_j = (δ_jy − p_j)/T and ∂H/∂z_j = −p_j (log p_j + H)/T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# fp32 elements worked on at a time inside a block of logits: 4 MiB, which stays in a CPU's cache.
_ELEMENTS_PER_STEP = 1 << 20
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
        lm_head: the head *module*: logits are ``lm_head(hidden)``, computed ``chunk_rows`` rows at a time and
            recomputed in the backward, so that (rows, V) never exists as a whole. Because the module is
            called, a patched, tied or LoRA head works, and its weights get their gradients.
        chunk_rows: rows at a time; None chooses about 16 million logits.

    Returns:
        ``(log_prob, entropy)``, both (...), fp32 (fp64 for fp64 logits). Both are differentiable (once).

    Raises:
        ValueError: ``ids`` does not have the shape of ``logits`` without its last dimension (both are named),
            a temperature that is not positive, ``chunk_rows`` < 1.
        TypeError: logits that are not floating point or ids that are not integers.
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
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    rows, flat_ids = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1).long()
    if lm_head is None:
        log_prob, entropy = _LogProbEntropy.apply(rows, flat_ids, float(temperature), chunk_rows)
    else:
        log_prob, entropy = _from_hidden(rows, flat_ids, float(temperature), lm_head, chunk_rows)
    return log_prob.view(ids.shape), entropy.view(ids.shape)


def _from_hidden(
    hidden: Tensor, ids: Tensor, temperature: float, lm_head: nn.Module, chunk_rows: int | None
) -> tuple[Tensor, Tensor]:
    def block(hidden_rows: Tensor, id_rows: Tensor) -> tuple[Tensor, Tensor]:
        return _LogProbEntropy.apply(lm_head(hidden_rows), id_rows, temperature, None)

    if chunk_rows is None:
        chunk_rows = max(64, _ELEMENTS_PER_CHUNK // getattr(lm_head, "out_features", 1 << 17))
    parts = []
    # split() of no rows gives one empty block, so the head still says what dtype it works in.
    for hidden_rows, id_rows in zip(hidden.split(chunk_rows), ids.split(chunk_rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(block, hidden_rows, id_rows, use_reentrant=False))
        else:
            parts.append(block(hidden_rows, id_rows))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class _LogProbEntropy(torch.autograd.Function):
    """(N, V) logits, (N,) ids → (N,) log-probabilities and (N,) entropies."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, chunk_rows: int | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_prob = torch.empty(len(ids), dtype=dtype, device=logits.device)
        log_sum, entropy = torch.empty_like(log_prob), torch.empty_like(log_prob)
        step = chunk_rows or _rows_per_step(logits)
        for start in range(0, len(ids), step):
            rows = slice(start, start + step)
            z = _scaled(logits[rows], temperature, dtype)
            top = z.amax(-1, keepdim=True)
            shifted = z - top
            chosen = shifted.gather(-1, ids[rows, None])[:, 0]
            # A logit of −inf has weight 0; the finite floor keeps 0·(−inf) out of the entropy's sum.
            shifted = shifted.clamp_(min=torch.finfo(dtype).min)
            weight = shifted.exp()
            total = weight.sum(-1)
            log_total = total.log()
            log_prob[rows] = chosen - log_total
            log_sum[rows] = top[:, 0] + log_total
            entropy[rows] = log_total - torch.linalg.vecdot(weight, shifted) / total
        ctx.save_for_backward(logits, ids, log_sum, entropy)
        ctx.temperature, ctx.step = temperature, step
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        logits, ids, log_sum, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for start in range(0, len(ids), ctx.step):
            rows = slice(start, start + ctx.step)
            log_p = _scaled(logits[rows], ctx.temperature, log_sum.dtype) - log_sum[rows, None]
            p = log_p.exp()
            if grad_entropy is not None:
                # 0·log 0 = 0 in the limit, for values and gradients alike.
                slope = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(entropy[rows, None])
                slope.mul_(-grad_entropy[rows, None])
                if grad_log_prob is not None:
                    slope.sub_(grad_log_prob[rows, None])
                p.mul_(slope)
            elif grad_log_prob is not None:
                p.mul_(-grad_log_prob[rows, None])
            if grad_log_prob is not None:
                p.scatter_add_(-1, ids[rows, None], grad_log_prob[rows, None])
            grad[rows] = p.div_(ctx.temperature) if ctx.temperature != 1.0 else p
        return grad, None, None, None


def _scaled(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    z = logits.to(dtype)
    return z if temperature == 1.0 else z / temperature


def _rows_per_step(logits: Tensor) -> int:
    return max(1, _ELEMENTS_PER_STEP // max(1, logits.shape[-1]))
