"""The policy that was sampled against the policy that is trained: importance weights and how far apart they
are.

Rollout engine and trainer differ in kernels, precision, quantization and noise, so their log-probabilities of
the same tokens differ. The ratio is always named: **train / rollout** = exp(log_prob_train −
log_prob_rollout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spelling import check_choice
from .padding import as_mask, check_float_matrix, check_other_log_probs, compute_dtype, keep_or_zero, mean_of_kept

WEIGHT_LEVELS = ("token", "sequence")
WEIGHT_MODES = ("truncate", "mask")
_MAX_LOG_RATIO = 20.0  # exp(20) ≈ 5e8: a ratio past it is capped, so that squares stay finite in fp32


def rollout_is_weights(
    log_prob_train: Tensor,
    log_prob_rollout: Tensor,
    response_mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    upper: float | None = 2.0,
    lower: float | None = None,
) -> Tensor:
    """Importance weights train/rollout that correct a loss for tokens another policy sampled.

    Give the *behaviour* log-probabilities as recorded (``Rollout.rollout_log_probs``: temperature, top-p,
    top-k and noise included). With ``upper=None`` and ``lower=None`` the estimator is unbiased and its
    variance unbounded.

    Args:
        log_prob_train: (B, T), the policy that is trained, before the update (verl: ``old_log_prob``).
        log_prob_rollout: (B, T), the policy that was sampled.
        response_mask: (B, T), nonzero = keep.
        level: "token": one ratio a token; "sequence": the product over the sequence, the same for all its
            tokens.
        mode: "truncate": clamp to [lower, upper] (TIS); "mask": weight 0 outside [lower, upper] (token level:
            IcePop).
        upper, lower: bounds of the ratio train/rollout, None for none.

    Returns:
        (B, T) weights without gradient, fp32 (fp64 for fp64 input), 0 in padding. Log-ratios are clamped to
        ±20. A NaN at a position that counts stays NaN.

    Raises:
        ValueError: shapes differ (both are named), an unknown level or mode, bounds that are negative or
            crossed.
        TypeError: log-probabilities that are not floating point.
    """
    check_choice("mode", mode, WEIGHT_MODES)
    _check_bounds(level, upper, lower)
    log_ratio, keep = _log_ratio(log_prob_train, log_prob_rollout, response_mask)
    ratio = _ratio(log_ratio, level)
    if upper is not None or lower is not None:
        if mode == "truncate":
            ratio = ratio.clamp(min=lower, max=upper)
        else:
            inside = torch.ones_like(ratio, dtype=torch.bool)
            if upper is not None:
                inside &= ~(ratio > upper)
            if lower is not None:
                inside &= ~(ratio < lower)
            ratio = torch.where(inside, ratio, 0.0)
    return torch.where(keep, ratio, 0.0)


def mismatch_metrics(
    log_prob_train: Tensor,
    log_prob_rollout: Tensor,
    response_mask: Tensor,
    *,
    level: str = "token",
    upper: float | None = 2.0,
    lower: float | None = None,
) -> dict[str, Tensor]:
    """How far the trained policy is from the sampled one, over the kept tokens.

    With d = log_prob_train − log_prob_rollout; samples come from the rollout, so the KL estimates are of
    KL(rollout ‖ train), in nats. The ratio w is e^d of a token, or with ``level="sequence"`` e^Σd of its
    sequence, d or its sum clamped to ±20. The weights are w clamped to [lower, upper], as
    :func:`rollout_is_weights` truncates.

    Args:
        log_prob_train, log_prob_rollout: (B, T).
        response_mask: (B, T), nonzero = keep.
        level, upper, lower: as given to :func:`rollout_is_weights`.

    Returns:
        Detached 0-d tensors (fp32, fp64 for fp64 input), all 0 when nothing is kept.

        Over tokens: ``k1`` mean −d, ``k2`` mean d²/2, ``k3`` mean e^d − 1 − d (d clamped to ±20 in e^d);
        ``log_ratio_abs_mean``, ``log_ratio_abs_max`` of abs(d); ``chi2_token`` mean e^2d − 1.

        Of the ratio w over tokens (with ``level="sequence"`` each token has that of its sequence):
        ``ratio_mean``, ``ratio_min``, ``ratio_max``; ``ratio_p01``, ``ratio_p50``, ``ratio_p99`` percentiles
        (linear interpolation); ``above`` and ``below``, the shares beyond ``upper`` and ``lower``, and
        ``truncated``, their sum; ``ess`` effective sample size as a share, (Σw)²/(N Σw²).

        Of the weights over tokens: ``weight_mean``, ``weight_std`` (divided by N), ``weight_ess``.

        Over sequences with a kept token: ``chi2_seq`` mean e^2Σd − 1; ``seq_ratio_mean``, ``seq_ratio_std``
        (unbiased, 0 for one sequence), ``seq_ratio_min``, ``seq_ratio_max``, ``seq_above``, ``seq_below`` of the
        mean of w in the sequence; ``train_log_ppl``, ``rollout_log_ppl`` mean of minus the sequence's mean
        log-probability and ``train_ppl``, ``rollout_ppl`` of its exponential (inf beyond the dtype);
        ``log_ppl_diff_mean``, ``log_ppl_diff_abs_mean``, ``log_ppl_diff_min``, ``log_ppl_diff_max`` of train −
        rollout log-perplexity and ``ppl_ratio`` the mean of its exponential.

    Raises:
        ValueError: shapes differ (both are named), an unknown level, bounds that are negative or crossed.
        TypeError: log-probabilities that are not floating point.
    """
    _check_bounds(level, upper, lower)
    with torch.no_grad():
        d, keep = _log_ratio(log_prob_train, log_prob_rollout, response_mask)
        dtype = d.dtype
        lengths = keep.sum(-1)
        some_of_length, full = lengths.clamp_min(1), lengths > 0

        token_ratio = _ratio(d, "token")
        ratio = token_ratio if level == "token" else _ratio(d, level).expand_as(d)
        above, below = _beyond(ratio, upper, lower)
        weight = ratio if upper is None and lower is None else ratio.clamp(min=lower, max=upper)
        weight_mean = mean_of_kept(weight, keep)
        ratio_min, ratio_max = _extremes(ratio, keep)
        p01, p50, p99 = _percentiles(ratio, keep, (1, 50, 99))

        seq_ratio = torch.where(keep, ratio, 0.0).sum(-1) / some_of_length
        seq_ratio_mean = mean_of_kept(seq_ratio, full)
        seq_ratio_min, seq_ratio_max = _extremes(seq_ratio, full)
        seq_squares = torch.where(full, seq_ratio - seq_ratio_mean, 0.0).square().sum()
        seq_above, seq_below = _beyond(seq_ratio, upper, lower)

        train_log_ppl = -keep_or_zero(log_prob_train, keep, dtype).sum(-1) / some_of_length
        rollout_log_ppl = -keep_or_zero(log_prob_rollout, keep, dtype).sum(-1) / some_of_length
        log_ppl_diff = train_log_ppl - rollout_log_ppl
        log_ppl_diff_min, log_ppl_diff_max = _extremes(log_ppl_diff, full)
        clamped = d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        return {
            "k1": mean_of_kept(-d, keep),
            "k2": mean_of_kept(d.square() / 2, keep),
            "k3": mean_of_kept(torch.expm1(clamped) - d, keep),
            "log_ratio_abs_mean": mean_of_kept(d.abs(), keep),
            "log_ratio_abs_max": _extremes(d.abs(), keep)[1],
            "chi2_token": mean_of_kept(token_ratio.square() - 1, keep),
            "ratio_mean": mean_of_kept(ratio, keep),
            "ratio_min": ratio_min,
            "ratio_max": ratio_max,
            "ratio_p01": p01,
            "ratio_p50": p50,
            "ratio_p99": p99,
            "above": mean_of_kept(above.to(dtype), keep),
            "below": mean_of_kept(below.to(dtype), keep),
            "truncated": mean_of_kept((above | below).to(dtype), keep),
            "ess": _effective_share(ratio, keep),
            "weight_mean": weight_mean,
            "weight_std": mean_of_kept((weight - weight_mean).square(), keep).sqrt(),
            "weight_ess": _effective_share(weight, keep),
            "chi2_seq": mean_of_kept(_ratio(d, "sequence")[:, 0].square() - 1, full),
            "seq_ratio_mean": seq_ratio_mean,
            "seq_ratio_std": (seq_squares / (full.sum() - 1).clamp_min(1)).sqrt(),
            "seq_ratio_min": seq_ratio_min,
            "seq_ratio_max": seq_ratio_max,
            "seq_above": mean_of_kept(seq_above.to(dtype), full),
            "seq_below": mean_of_kept(seq_below.to(dtype), full),
            "train_log_ppl": mean_of_kept(train_log_ppl, full),
            "rollout_log_ppl": mean_of_kept(rollout_log_ppl, full),
            "train_ppl": mean_of_kept(train_log_ppl.exp(), full),
            "rollout_ppl": mean_of_kept(rollout_log_ppl.exp(), full),
            "log_ppl_diff_mean": mean_of_kept(log_ppl_diff, full),
            "log_ppl_diff_abs_mean": mean_of_kept(log_ppl_diff.abs(), full),
            "log_ppl_diff_min": log_ppl_diff_min,
            "log_ppl_diff_max": log_ppl_diff_max,
            "ppl_ratio": mean_of_kept(log_ppl_diff.exp(), full),
        }


def _check_bounds(level: str, upper: float | None, lower: float | None) -> None:
    check_choice("level", level, WEIGHT_LEVELS)
    if upper is not None and not upper > 0:
        raise ValueError(f"upper must be positive or None, got {upper}")
    if lower is not None and not 0 <= lower <= (upper if upper is not None else float("inf")):
        raise ValueError(f"lower must be between 0 and upper={upper}, or None, got {lower}")


def _log_ratio(train: Tensor, rollout: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log(train/rollout), 0 in padding and without gradient, and the mask as booleans."""
    check_float_matrix("log_prob_train", train)
    check_other_log_probs("log_prob_rollout", rollout, "log_prob_train", train)
    keep = as_mask(response_mask, "log_prob_train", train)
    dtype = compute_dtype(train, rollout)
    return keep_or_zero(train.detach(), keep, dtype) - keep_or_zero(rollout.detach(), keep, dtype), keep


def _ratio(log_ratio: Tensor, level: str) -> Tensor:
    """train/rollout of each token (B, T), or of each sequence (B, 1)."""
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _beyond(x: Tensor, upper: float | None, lower: float | None) -> tuple[Tensor, Tensor]:
    """Where ``x`` is above ``upper`` and where it is below ``lower``."""
    nowhere = torch.zeros_like(x, dtype=torch.bool)
    return (nowhere if upper is None else x > upper), (nowhere if lower is None else x < lower)


def _extremes(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest of the kept positions, 0 when there are none."""
    if x.numel() == 0:
        return x.sum(), x.sum()
    some = keep.any()
    low, high = torch.where(keep, x, torch.inf).amin(), torch.where(keep, x, -torch.inf).amax()
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def _effective_share(weight: Tensor, keep: Tensor) -> Tensor:
    """(Σw)²/(N Σw²) over the kept positions: 1 when all weights are equal, 1/N when one of them is everything."""
    weight = torch.where(keep, weight, 0.0)
    return weight.sum().square() / (keep.sum() * weight.square().sum()).clamp_min(torch.finfo(weight.dtype).tiny)


def _percentiles(x: Tensor, keep: Tensor, percents: tuple[int, ...]) -> list[Tensor]:
    """Percentiles over the kept positions, without asking the device how many there are."""
    if x.numel() == 0:
        return [x.sum() for _ in percents]
    last = keep.sum() - 1  # place of the largest kept value
    ordered = torch.where(keep, x, torch.inf).flatten().sort().values
    result = []
    for percent in percents:
        # The place is last·percent/100, in integers: not every device has fp64, and fp32 ends at 16 million tokens.
        hundredths = last.clamp_min(0) * percent
        below = hundredths // 100
        # gather, because indexing with a 0-d tensor would read it on the host.
        low, high = ordered.gather(0, torch.stack([below, (below + 1).clamp_max(last.clamp_min(0))]))
        value = low + (high - low) * ((hundredths % 100).to(x.dtype) / 100)
        result.append(torch.where(last >= 0, value, 0.0))
    return result
