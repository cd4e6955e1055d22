"""The DAPO loss, its aggregation over tokens and sequences, and KL penalties.

Names and argument order are verl's. All arithmetic is fp32 (fp64 for fp64 input), whatever the input dtype;
gradients come back in the input's dtype. Padding is replaced before any arithmetic (:mod:`.padding`), every
denominator is at least 1, and metrics are detached 0-d tensors: nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spelling import check_choice
from .padding import (
    as_mask,
    check_float_matrix,
    check_other_log_probs,
    check_same_shape,
    compute_dtype,
    keep_or_zero,
    per_token,
)

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_KINDS = ("k1", "k2", "k3", "abs")
RATIO_LEVELS = ("token", "sequence")
# The end of fp32 is at 88; a ratio is also multiplied by an advantage.
_LARGEST_LOG_RATIO = 80.0


def dapo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    clip_ratio_c: float | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    ratio_level: str = "token",
    max_log_ratio: float = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with a higher upper clip (DAPO, arXiv 2503.14476, eq. 8).

    With r = exp(log_prob − old_log_prob) and advantage A, a token costs
    ``max(−r·A, −clip(r, 1 − clip_ratio_low, 1 + clip_ratio_high)·A)``; with ``clip_ratio_c`` (dual clip,
    arXiv 1912.09729) a token of negative advantage costs at most ``−clip_ratio_c·A``. Token costs are
    multiplied by ``rollout_is_weights`` and aggregated by :func:`agg_loss`. No KL term: add
    :func:`kl_penalty` if you want one.

    Args:
        log_prob: (B, T) log-probabilities of the response tokens under the policy that is trained, any float
            dtype; the gradient goes here and nowhere else.
        old_log_prob: (B, T), the same under the policy of the previous update (no gradient), or None: the
            policy itself, so the ratio is 1 and the gradient that of −A·log_prob.
        advantages: (B,) or (B, T).
        response_mask: (B, T) bool, int or float; nonzero = response token that counts. What masked positions
            of the other tensors hold (NaN, −inf) changes neither loss nor gradient. Overlong filtering is the
            caller zeroing the rows of truncated responses.
        clip_ratio_low, clip_ratio_high: the clip range is [1 − low, 1 + high].
        clip_ratio_c: bound (> 1) of the ratio for negative advantages, or None for none. verl's default is
            3.0 (its DAPO recipes use 10.0); the paper and TRL have none (TRL calls it ``delta``).
        loss_agg_mode: "token-mean" (DAPO), "seq-mean-token-mean" (GRPO), "seq-mean-token-sum" or
            "seq-mean-token-sum-norm" (Dr. GRPO); see :func:`agg_loss`.
        rollout_is_weights: (B, T) or (B,) weights, taken without gradient; see :func:`rollout_is_weights`.
        num_items_in_batch: what the mean runs over in the *whole* batch when this call sees only a part of it
            (gradient accumulation, data parallelism); see :func:`agg_loss`.
        loss_scale_factor: the constant length of "seq-mean-token-sum-norm"; None = T.
        ratio_level: "token", or "sequence" for the length-normalized sequence ratio of GSPO (arXiv
            2507.18071), whose gradient reaches every token of the sequence alike.
        max_log_ratio: the log-ratio is clamped to ± this before ``exp``, so a token that far off-policy gives
            a finite loss and no gradient. ``math.inf`` is 80, short of where fp32 overflows (TRL has no clamp).

    Returns:
        ``(loss, metrics)``: a 0-d loss, differentiable once, and detached 0-d tensors of the kept tokens of this
        call. An all-masked or empty batch gives loss 0, gradient 0, metrics 0.

        ============================ =====================================================================
        ``actor/pg_clipfrac``        share of tokens whose cost the clip range raised
        ``actor/pg_clipfrac_lower``  share of tokens whose cost the dual clip lowered
        ``actor/ppo_kl``             mean of old − new log-probability
        ``clip_ratio/low_mean``      share clipped below: r < 1 − low and A < 0
        ``clip_ratio/high_mean``     share clipped above: r > 1 + high and A > 0
        ``clip_ratio/region_mean``   the two together
        ``clip_ratio/low_min``       the least share clipped below that a sequence has
        ``clip_ratio/high_max``      the largest share clipped above that a sequence has
        ============================ =====================================================================

        The first three are verl's, the others TRL's: of tokens, or at ``ratio_level="sequence"`` means over the
        sequences that have a kept token.

    Raises:
        ValueError: shapes that do not match (both tensors and shapes are named), an unknown mode or level, a
            clip range that is negative, ``clip_ratio_c`` ≤ 1, and what :func:`agg_loss` refuses.
        TypeError: ``log_prob`` or ``old_log_prob`` is not floating point.
    """
    check_float_matrix("log_prob", log_prob)
    if old_log_prob is not None:
        check_other_log_probs("old_log_prob", old_log_prob, "log_prob", log_prob)
    if not 0 <= clip_ratio_low <= 1:
        raise ValueError(f"clip_ratio_low must be between 0 and 1, got {clip_ratio_low}")
    if not clip_ratio_high >= 0:
        raise ValueError(f"clip_ratio_high must be at least 0, got {clip_ratio_high}")
    if clip_ratio_c is not None and not clip_ratio_c > 1:
        raise ValueError(f"clip_ratio_c must be greater than 1, or None for no dual clip, got {clip_ratio_c}")
    if not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio must be positive (math.inf for no clamp), got {max_log_ratio}")
    check_choice("ratio_level", ratio_level, RATIO_LEVELS)
    check_choice("loss_agg_mode", loss_agg_mode, LOSS_AGG_MODES)
    keep = as_mask(response_mask, "log_prob", log_prob)
    dtype = compute_dtype(log_prob)

    with torch.no_grad():
        new = log_prob.to(dtype)
        old = new if old_log_prob is None else old_log_prob.to(dtype)
        log_ratio = token_log_ratio = torch.where(keep, new - old, 0.0)
        advantage = keep_or_zero(per_token("advantages", advantages, log_prob), keep, dtype)
        counts = keep.sum(-1, keepdim=True)
        if ratio_level == "sequence":
            # One ratio for the sequence; each of its tokens has the slope of a ratio of its own.
            log_ratio = torch.where(keep, log_ratio.sum(-1, keepdim=True) / counts.clamp_min(1), 0.0)
        cost, slope, clipped = _clip(
            log_ratio,
            advantage,
            1 - clip_ratio_low,
            1 + clip_ratio_high,
            clip_ratio_c,
            min(max_log_ratio, _LARGEST_LOG_RATIO),
        )
        if rollout_is_weights is not None:
            weights = per_token("rollout_is_weights", rollout_is_weights, log_prob)
            weights = keep_or_zero(weights, keep, dtype)
            cost, slope = cost.mul_(weights), slope.mul_(weights)
        divisor = _divisor(counts, keep.shape[1], loss_agg_mode, num_items_in_batch, loss_scale_factor, dtype)
        loss = (cost.sum(-1, keepdim=True) / divisor).sum()
        if ratio_level == "token":
            token_log_ratio = token_log_ratio.clamp(-max_log_ratio, max_log_ratio)
        metrics = _clip_metrics(clipped.sum(-1), counts[:, 0], ratio_level)
        metrics["actor/ppo_kl"] = -token_log_ratio.sum() / counts.sum().clamp_min(1)
    return _WithSlope.apply(log_prob, loss, slope.div_(divisor)), metrics


class _WithSlope(torch.autograd.Function):
    """The given 0-d loss, as a function of ``x`` with the given slope (the shape of ``x``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * grad).to(ctx.dtype), None, None


def _clip(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, ceiling: float | None, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cost of each token, its derivative by the log-ratio, and (3, B, T) what was clipped: low, high, ceiling.

    What was clipped, like every condition here, is 0 or 1 in the dtype of the arithmetic: on a CPU that takes a
    quarter of the time of a boolean mask.
    """
    clipped = log_ratio.new_empty(3, *log_ratio.shape)
    bounded = log_ratio.clamp(-limit, limit)
    ratio = bounded.exp()
    unclipped = ratio * -advantage
    cost = torch.maximum(unclipped, ratio.clamp(low, high).mul_(-advantage))
    raised = torch.gt(cost, unclipped, out=clipped[1])
    torch.lt(ratio, low, out=clipped[0]).mul_(raised)
    raised.sub_(clipped[0])
    if ceiling is None:
        clipped[2] = 0
    else:
        # An advantage that is not negative has no positive cost, which no such bound would lower.
        most = advantage.abs().mul_(ceiling)
        torch.gt(cost, most, out=clipped[2])
        cost = torch.minimum(cost, most)
    # At a bound the slope is that of inside, as torch.clamp has it.
    inside = torch.eq(cost, unclipped, out=torch.empty_like(cost))
    inside.mul_(torch.eq(bounded, log_ratio, out=torch.empty_like(cost)))
    return cost, unclipped.mul_(inside), clipped


def _clip_metrics(clipped: Tensor, counts: Tensor, ratio_level: str) -> dict[str, Tensor]:
    """Metrics of (3, B) numbers of clipped tokens and the (B,) numbers of kept ones."""
    low, high, ceiling = clipped.sum(-1) / counts.sum().clamp_min(1)
    shares, full = clipped[:2] / counts.clamp_min(1), counts > 0
    sequences = full.sum()
    metrics = {"actor/pg_clipfrac": low + high, "actor/pg_clipfrac_lower": ceiling}
    if ratio_level == "sequence":
        low, high = shares.sum(-1) / sequences.clamp_min(1)
    metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"] = low, high
    metrics["clip_ratio/region_mean"] = low + high
    # The smallest and the largest of no sequences have no value of their own: the rows are known to be there.
    shares, full = (shares, full) if len(counts) else (shares.new_zeros(2, 1), full.new_zeros(1))
    metrics["clip_ratio/low_min"] = torch.where(full, shares[0], 1.0).amin() * (sequences > 0)
    metrics["clip_ratio/high_max"] = shares[1].amax()
    return metrics


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    *,
    num_items_in_batch: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """A (B, T) matrix of token losses as one number.

    ========================== =============================================== =======================
    mode                       value                                           item
    ========================== =============================================== =======================
    "token-mean"               Σ tokens / items                                a kept token
    "seq-mean-token-mean"      Σ sequences (mean of its tokens) / items        a sequence with ≥ 1 kept token
    "seq-mean-token-sum"       Σ sequences (sum of its tokens) / items         a sequence with ≥ 1 kept token
    "seq-mean-token-sum-norm"  Σ tokens / (items · loss_scale_factor)          a sequence with ≥ 1 kept token
    ========================== =============================================== =======================

    Args:
        loss_mat: (B, T), any float dtype; summed in fp32 (fp64 for fp64).
        loss_mask: (B, T); masked positions count for nothing, also when they hold NaN. (If the NaN was
            *computed* from inputs that need gradients, clean those inputs instead, as :func:`dapo_loss`
            does.)
        num_items_in_batch: number of items of the whole batch, a number or a 0-d tensor. None = the items of
            this call. With it the sum of the losses of the micro-batches is the loss of the batch, and so are
            the gradients. Under data parallelism that averages gradients over ranks pass items / world_size.
            Other conventions: all B rows as items is TRL's "grpo" and "dr_grpo"; items = 1 with
            "seq-mean-token-sum-norm" is verl's.
        loss_scale_factor: the constant length of "seq-mean-token-sum-norm"; None = T, which changes with the
            padding: pass the maximal response length to accumulate over micro-batches.

    Returns:
        0-d tensor; 0 (with gradient 0) when everything is masked.

    Raises:
        ValueError: shapes differ, an unknown mode, a number of items that is negative or not one number, a scale
            that is not positive or given to a mode without one.
    """
    check_float_matrix("loss_mat", loss_mat)
    check_same_shape("loss_mask", loss_mask, "loss_mat", loss_mat)
    check_choice("loss_agg_mode", loss_agg_mode, LOSS_AGG_MODES)
    keep = as_mask(loss_mask, "loss_mat", loss_mat)
    losses = keep_or_zero(loss_mat, keep, compute_dtype(loss_mat))
    counts, dtype = keep.sum(-1, keepdim=True), losses.dtype
    divisor = _divisor(counts, keep.shape[1], loss_agg_mode, num_items_in_batch, loss_scale_factor, dtype)
    return (losses.sum(-1, keepdim=True) / divisor).sum()


def _divisor(
    counts: Tensor,
    length: int,
    mode: str,
    num_items_in_batch: float | Tensor | None,
    scale: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """What every token of a sequence is divided by, 0-d or (B, 1) in ``dtype``, never 0.

    ``counts`` is (B, 1), the kept tokens of each sequence out of ``length``.
    """
    if scale is not None and mode != "seq-mean-token-sum-norm":
        raise ValueError(
            f"loss_scale_factor={scale} has no place in loss_agg_mode={mode!r}; only 'seq-mean-token-sum-norm' takes it"
        )
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1:
        raise ValueError(
            f"num_items_in_batch must be one number, got shape {tuple(num_items_in_batch.shape)}; for 'token-mean' "
            "it is response_mask.sum() of the whole batch"
        )
    if num_items_in_batch is None:
        items = (counts if mode == "token-mean" else counts > 0).sum()
    elif isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch.reshape(())
    elif num_items_in_batch >= 0:
        items = torch.full((), num_items_in_batch, dtype=dtype, device=counts.device)
    else:
        raise ValueError(f"num_items_in_batch must be at least 0, got {num_items_in_batch}")
    # No comparison on the host: that would wait for the device.
    items = torch.where(items > 0, items, 1).to(dtype)
    if mode == "seq-mean-token-mean":
        return items * counts.clamp_min(1)
    if mode == "seq-mean-token-sum-norm":
        if scale is not None and not scale > 0:
            raise ValueError(f"loss_scale_factor must be positive, got {scale}")
        return items * (max(length, 1) if scale is None else scale)
    return items


def kl_penalty(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    response_mask: Tensor | None = None,
    *,
    kind: str = "k3",
    clamped: bool = True,
) -> Tensor:
    """Per-token estimates of KL(policy ‖ reference) from tokens the policy sampled.

    With d = log_prob − ref_log_prob (joschu.net/blog/kl-approx.html): "k1" is d, "abs" is |d|, "k2" is d²/2,
    "k3" is e^{−d} − 1 + d, never negative. Aggregate with :func:`agg_loss` and add with a weight of your own.
    As a *loss*, k2 has the gradient of the KL of on-policy samples; the gradient of k1 is zero in
    expectation.

    Args:
        log_prob: (B, T), the gradient goes here.
        ref_log_prob: (B, T), no gradient.
        response_mask: (B, T) or None; given, masked positions are 0 in value and gradient whatever they hold.
        clamped: for "k3", clamp d to ±20 and the result to at most 10, as verl does; False is TRL's
            estimator.

    Returns:
        (B, T) in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes differ or ``kind`` is unknown.
        TypeError: log-probabilities that are not floating point.
    """
    check_float_matrix("log_prob", log_prob)
    check_other_log_probs("ref_log_prob", ref_log_prob, "log_prob", log_prob)
    check_choice("kind", kind, KL_KINDS)
    dtype = compute_dtype(log_prob)
    new, ref = log_prob.to(dtype), ref_log_prob.detach().to(dtype)
    if response_mask is not None:
        keep = as_mask(response_mask, "log_prob", log_prob)
        new, ref = torch.where(keep, new, 0.0), torch.where(keep, ref, 0.0)
    difference = new - ref
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return difference.square() / 2
    if not clamped:
        return torch.expm1(-difference) + difference
    difference = difference.clamp(-20.0, 20.0)
    return (torch.expm1(-difference) + difference).clamp_max(10.0)
