"""The policy that was sampled against the policy that is trained: importance weights and how far apart they
are.

Rollout engine and trainer differ in kernels, precision, quantization and noise, so their log-probabilities of
the same tokens differ. The ratio is always named: **train / rollout** = exp(log_prob_train −
log_prob_rollout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import check_choice
from .padding import as_mask, check_float_matrix, check_same_shape, compute_dtype, keep_or_zero, mean_of_kept

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
    """
    check_choice("level", level, WEIGHT_LEVELS)
    check_choice("mode", mode, WEIGHT_MODES)
    if upper is not None and not upper > 0:
        raise ValueError(f"upper must be positive or None, got {upper}")
    if lower is not None and not 0 <= lower <= (upper if upper is not None else float("inf")):
        raise ValueError(f"lower must be between 0 and upper={upper}, or None, got {lower}")
    log_ratio, keep = _log_ratio(log_prob_train, log_prob_rollout, response_mask)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
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
    upper: float = 2.0,
) -> dict[str, Tensor]:
    """How far the trained policy is from the sampled one, over the kept tokens.

    With d = log_prob_train − log_prob_rollout and w = e^d (d clamped to ±20 in w); samples come from the
    rollout, so the KL estimates are of KL(rollout ‖ train), in nats.

    Args:
        log_prob_train, log_prob_rollout: (B, T).
        response_mask: (B, T), nonzero = keep.
        upper: the truncation whose share is reported.

    Returns:
        Detached 0-d tensors (fp32, fp64 for fp64 input), all 0 when nothing is kept:
        ``k1`` mean −d; ``k3`` mean e^d − 1 − d; ``log_ratio_abs_mean``, ``log_ratio_abs_max`` of abs(d);
        ``ratio_p01``, ``ratio_p50``, ``ratio_p99`` percentiles of w (linear interpolation); ``ess`` effective
        sample size as a share, (Σw)²/(N Σw²); ``truncated`` share of tokens with w > upper; ``chi2_token`` mean
        w² − 1; ``chi2_seq`` the same for whole sequences; ``train_ppl``, ``rollout_ppl`` mean over sequences of
        exp(−mean log-probability), inf beyond the dtype; ``ppl_ratio`` mean over sequences of train/rollout
        perplexity.

    Raises:
        ValueError: shapes differ (both are named).
    """
    with torch.no_grad():
        d, keep = _log_ratio(log_prob_train, log_prob_rollout, response_mask)
        dtype = d.dtype
        ratio = d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        weight = torch.where(keep, ratio, 0.0)
        count = keep.sum()
        some = count.clamp_min(1)

        lengths = keep.sum(-1)
        full = lengths > 0
        sequence_d = d.sum(-1)
        train_log_ppl = -keep_or_zero(log_prob_train, keep, dtype).sum(-1) / lengths.clamp_min(1)
        rollout_log_ppl = -keep_or_zero(log_prob_rollout, keep, dtype).sum(-1) / lengths.clamp_min(1)
        sequence_w2 = (2 * sequence_d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)).exp()

        p01, p50, p99 = _percentiles(ratio, keep, (0.01, 0.5, 0.99))
        return {
            "k1": -d.sum() / some,
            "k3": mean_of_kept(torch.expm1(d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)) - d, keep),
            "log_ratio_abs_mean": d.abs().sum() / some,
            "log_ratio_abs_max": d.abs().amax() if d.numel() else d.sum(),
            "ratio_p01": p01,
            "ratio_p50": p50,
            "ratio_p99": p99,
            "ess": weight.sum().square() / (some * weight.square().sum()).clamp_min(torch.finfo(dtype).tiny),
            "truncated": (weight > upper).sum() / some,
            "chi2_token": mean_of_kept(ratio.square() - 1, keep),
            "chi2_seq": mean_of_kept(sequence_w2 - 1, full),
            "train_ppl": mean_of_kept(train_log_ppl.exp(), full),
            "rollout_ppl": mean_of_kept(rollout_log_ppl.exp(), full),
            "ppl_ratio": mean_of_kept((train_log_ppl - rollout_log_ppl).exp(), full),
        }


def _log_ratio(train: Tensor, rollout: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log(train/rollout), 0 in padding and without gradient, and the mask as booleans."""
    check_float_matrix("log_prob_train", train)
    check_same_shape("log_prob_rollout", rollout, "log_prob_train", train)
    keep = as_mask(response_mask, "log_prob_train", train)
    dtype = compute_dtype(train, rollout)
    return keep_or_zero(train.detach(), keep, dtype) - keep_or_zero(rollout.detach(), keep, dtype), keep


def _percentiles(x: Tensor, keep: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Percentiles over the kept positions, without asking the device how many there are."""
    count = keep.sum()
    if x.numel() == 0:
        return [x.sum() for _ in shares]
    ordered = torch.where(keep, x, torch.inf).flatten().sort().values
    result = []
    for share in shares:
        place = (count - 1).clamp_min(0) * torch.tensor(share, dtype=torch.float64, device=x.device)
        below = place.floor().long()
        low = ordered[below]
        high = ordered[torch.minimum(below + 1, (count - 1).clamp_min(0))]
        value = low + (high - low) * (place - below).to(x.dtype)
        result.append(torch.where(count > 0, value, 0.0))
    return result
