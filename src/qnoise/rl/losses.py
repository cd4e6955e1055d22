"""The DAPO loss, its aggregation over tokens and sequences, and KL penalties.

Names and argument order are verl's. All arithmetic is fp32 (fp64 for fp64 input), whatever the input dtype;
gradients come back in the input's dtype. Padding is replaced before any arithmetic (:mod:`.padding`), every
denominator is at least 1, and metrics are detached 0-d tensors: nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spelling import nearest
from .padding import (
    as_mask,
    check_float_matrix,
    check_same_shape,
    compute_dtype,
    keep_or_zero,
    per_token,
)

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_KINDS = ("k1", "k2", "k3", "abs")
RATIO_LEVELS = ("token", "sequence")


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
            a finite loss and no gradient. ``math.inf`` turns the clamp off (TRL has none).

    Returns:
        ``(loss, metrics)``: a 0-d loss and detached 0-d tensors, means over the kept tokens:
        ``actor/pg_clipfrac`` (clipped cost above the unclipped one), ``actor/pg_clipfrac_lower`` (dual clip
        active), ``actor/ppo_kl`` (old − new log-probability), ``clip_ratio/low_mean`` (r < 1 − low and A < 0)
        and ``clip_ratio/high_mean`` (r > 1 + high and A > 0). An all-masked batch gives loss 0, gradient 0,
        metrics 0.

    Raises:
        ValueError: shapes that do not match (both tensors and shapes are named), an unknown mode or level, a
            clip range that is negative, ``clip_ratio_c`` ≤ 1.
        TypeError: ``log_prob`` is not floating point.
    """
    check_float_matrix("log_prob", log_prob)
    if old_log_prob is not None:
        check_same_shape("old_log_prob", old_log_prob, "log_prob", log_prob)
    if not 0 <= clip_ratio_low <= 1:
        raise ValueError(f"clip_ratio_low must be between 0 and 1, got {clip_ratio_low}")
    if not clip_ratio_high >= 0:
        raise ValueError(f"clip_ratio_high must be at least 0, got {clip_ratio_high}")
    if clip_ratio_c is not None and not clip_ratio_c > 1:
        raise ValueError(f"clip_ratio_c must be greater than 1, or None for no dual clip, got {clip_ratio_c}")
    if not max_log_ratio > 0:
        raise ValueError(f"max_log_ratio must be positive (math.inf for no clamp), got {max_log_ratio}")
    check_choice("ratio_level", ratio_level, RATIO_LEVELS)
    keep = as_mask(response_mask, "log_prob", log_prob)
    dtype = compute_dtype(log_prob)

    new = keep_or_zero(log_prob, keep, dtype)
    old = new.detach() if old_log_prob is None else keep_or_zero(old_log_prob.detach(), keep, dtype)
    advantage = keep_or_zero(per_token("advantages", advantages.detach(), log_prob), keep, dtype)

    log_ratio = token_log_ratio = new - old
    if ratio_level == "sequence":
        # The value is the sequence's mean log-ratio, the gradient that of each token's own log-probability.
        mean = log_ratio.detach().sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_min(1)
        log_ratio = torch.where(keep, new - new.detach() + mean, 0.0)
    if max_log_ratio != math.inf:
        log_ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio)
    ratio = log_ratio.exp()

    # The larger of the two costs, as one clamp: for A > 0 only the upper bound can bind, for A < 0 only the lower
    # one, and above it the dual clip.
    positive, negative = advantage > 0, advantage < 0
    low, high = 1 - clip_ratio_low, 1 + clip_ratio_high
    ceiling = math.inf if clip_ratio_c is None else clip_ratio_c
    least = torch.where(negative, ratio.new_full((), low), 0.0)
    most = torch.where(negative, ratio.new_full((), ceiling), ratio.new_full((), high))
    cost = -advantage * ratio.clamp(least, most)
    if rollout_is_weights is not None:
        weights = per_token("rollout_is_weights", rollout_is_weights.detach(), log_prob)
        cost = cost * keep_or_zero(weights, keep, dtype)

    loss = agg_loss(
        cost, keep, loss_agg_mode, num_items_in_batch=num_items_in_batch, loss_scale_factor=loss_scale_factor
    )
    with torch.no_grad():
        # Padding has advantage 0, so no comparison is ever true there.
        tokens = keep.sum().clamp_min(1)
        clipped_low = (negative & (ratio < low)).sum() / tokens
        clipped_high = (positive & (ratio > high)).sum() / tokens
        limit = max_log_ratio if ratio_level == "token" else math.inf
        metrics = {
            "actor/pg_clipfrac": clipped_low + clipped_high,
            "actor/pg_clipfrac_lower": (negative & (ratio > ceiling)).sum() / tokens,
            "actor/ppo_kl": -token_log_ratio.clamp(-limit, limit).sum() / tokens,
            "clip_ratio/low_mean": clipped_low,
            "clip_ratio/high_mean": clipped_high,
        }
    return loss, metrics


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
        ValueError: shapes differ, an unknown mode, a negative number of items, a scale that is not positive.
    """
    check_float_matrix("loss_mat", loss_mat)
    check_same_shape("loss_mask", loss_mask, "loss_mat", loss_mat)
    check_choice("loss_agg_mode", loss_agg_mode, LOSS_AGG_MODES)
    keep = as_mask(loss_mask, "loss_mat", loss_mat)
    losses = keep_or_zero(loss_mat, keep, compute_dtype(loss_mat))

    if loss_agg_mode == "seq-mean-token-mean":
        total = (losses.sum(-1) / keep.sum(-1).clamp_min(1)).sum()
    else:
        total = losses.sum()
    if loss_agg_mode == "seq-mean-token-sum-norm":
        scale = loss_mat.shape[-1] if loss_scale_factor is None else loss_scale_factor
        if loss_scale_factor is not None and not loss_scale_factor > 0:
            raise ValueError(f"loss_scale_factor must be positive, got {loss_scale_factor}")
        total = total / max(scale, 1) if loss_scale_factor is None else total / scale

    if num_items_in_batch is None:
        items: float | Tensor = (keep if loss_agg_mode == "token-mean" else keep.any(-1)).sum()
    else:
        items = num_items_in_batch
    if isinstance(items, Tensor):
        # No comparison on the host: that would wait for the device.
        return total / torch.where(items > 0, items, 1)
    if not items >= 0:
        raise ValueError(f"num_items_in_batch must be at least 0, got {items}")
    return total / (items if items > 0 else 1)


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
    """
    check_float_matrix("log_prob", log_prob)
    check_same_shape("ref_log_prob", ref_log_prob, "log_prob", log_prob)
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


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` listing what is allowed, and the nearest of it, unless ``value`` is in it."""
    if value in allowed:
        return
    near = nearest(value, allowed)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"{name}={value!r} does not exist; allowed: {', '.join(map(repr, allowed))}{hint}")
