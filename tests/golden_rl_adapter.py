"""Maps the kinds of the RL golden vectors (outputs of verl's and TRL's own functions) to this library.

One function a kind. What a function does beyond a call is the translation of the peer's conventions.
"""

from __future__ import annotations

import math

import torch

from qnoise import rl


def _sequences(mask):
    return mask.bool().any(-1).sum()


class _AllRows:
    """verl's statistics of sequences count fully masked rows as well, each with the value ``empty``."""

    def __init__(self, mask):
        self.rows, self.full = mask.shape[0], _sequences(mask)

    def mean(self, metric, empty):
        return (metric * self.full + empty * (self.rows - self.full)) / self.rows

    def std(self, mean, std, empty):
        mean, std, masked = mean.double(), std.double(), self.rows - self.full
        total = self.mean(mean, empty)
        squares = (
            (self.full - 1).clamp_min(0) * std**2 + self.full * (mean - total) ** 2 + masked * (empty - total) ** 2
        )
        return (squares / max(self.rows - 1, 1)).sqrt()

    def max(self, metric, empty):
        return metric if self.full == self.rows else metric.clamp_min(empty)

    def min(self, metric, empty):
        return metric if self.full == self.rows else metric.clamp_max(empty)


# ---- verl ----


def verl_policy_loss(
    log_prob,
    old_log_prob,
    advantages,
    response_mask,
    rollout_is_weights=None,
    *,
    loss_mode="vanilla",
    clip_ratio_low=0.2,
    clip_ratio_high=0.2,
    clip_ratio_c=3.0,
    loss_agg_mode="token-mean",
    dp_size=1,
    batch_num_tokens=None,
):
    items = None
    if loss_mode == "gspo":
        loss_agg_mode, clip_ratio_c, level = "seq-mean-token-mean", None, "sequence"
    elif loss_mode == "vanilla":
        level = "token"
        if loss_agg_mode == "seq-mean-token-sum-norm":
            items = 1  # verl divides by the length only
        elif batch_num_tokens is not None:
            items = batch_num_tokens / dp_size
    else:
        raise NotImplementedError(loss_mode)
    return rl.dapo_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        clip_ratio_c=clip_ratio_c,
        loss_agg_mode=loss_agg_mode,
        rollout_is_weights=rollout_is_weights,
        num_items_in_batch=items,
        ratio_level=level,
        max_log_ratio=20.0 if level == "token" else 10.0,
    )


def verl_agg_loss(loss_mat, loss_mask, *, loss_agg_mode, loss_scale_factor=None, global_batch_size=None, dp_size=1):
    items = None
    if loss_agg_mode == "seq-mean-token-sum-norm":
        items = 1
    elif global_batch_size is not None:
        items = global_batch_size / dp_size
    loss = rl.agg_loss(
        loss_mat, loss_mask, loss_agg_mode, num_items_in_batch=items, loss_scale_factor=loss_scale_factor
    )
    return loss, {}


def verl_grpo_advantage(token_level_rewards, response_mask, index, *, norm_adv_by_std_in_grpo=True):
    rewards = token_level_rewards.sum(-1)
    advantages = rl.group_advantages(
        rewards, index, norm_by_std=norm_adv_by_std_in_grpo, singleton="reward", constant="rounding"
    )
    return {"advantages": advantages[:, None] * response_mask}


def verl_kl_penalty(logprob, ref_logprob, *, kl_penalty):
    return {"kl": rl.kl_penalty(logprob, ref_logprob, kind=kl_penalty)}


def verl_offpolicy_metrics(old_log_prob, rollout_log_prob, response_mask):
    got = rl.mismatch_metrics(old_log_prob, rollout_log_prob, response_mask)
    rows = _AllRows(response_mask)
    return {
        "kl": got["k1"],
        "k3_kl": got["k3"],
        "chi2_token": got["chi2_token"],
        "chi2_seq": rows.mean(got["chi2_seq"], 0.0),
        "training_ppl": rows.mean(got["train_ppl"], 1.0),
        "training_log_ppl": rows.mean(got["train_log_ppl"], 0.0),
        "rollout_ppl": rows.mean(got["rollout_ppl"], 1.0),
        "rollout_log_ppl": rows.mean(got["rollout_log_ppl"], 0.0),
        "log_ppl_diff": rows.mean(got["log_ppl_diff_mean"], 0.0),
        "log_ppl_abs_diff": rows.mean(got["log_ppl_diff_abs_mean"], 0.0),
        "log_ppl_diff_max": rows.max(got["log_ppl_diff_max"], 0.0),
        "log_ppl_diff_min": rows.min(got["log_ppl_diff_min"], 0.0),
        "ppl_ratio": rows.mean(got["ppl_ratio"], 1.0),
    }


def verl_rollout_is(
    old_log_prob,
    rollout_log_prob,
    response_mask,
    *,
    rollout_is="token",
    rollout_is_threshold=2.0,
    rollout_is_batch_normalize=False,
):
    arguments = (old_log_prob, rollout_log_prob, response_mask)
    bounds = {"level": rollout_is, "upper": rollout_is_threshold}
    weights = rl.rollout_is_weights(*arguments, **bounds)
    got = rl.mismatch_metrics(*arguments, **bounds, lower=1 / rollout_is_threshold)
    rows = _AllRows(response_mask)
    # The mean ratio of a masked row is 0 to verl, its product of ratios 1.
    seq_max, seq_min = rows.max(got["seq_ratio_max"], 0.0), rows.min(got["seq_ratio_min"], 0.0)
    result = {
        "rollout_is_mean": got["ratio_mean"],
        "rollout_is_std": got["weight_std"],
        "rollout_is_eff_sample_size": got["weight_ess"],
        "rollout_is_seq_mean": rows.mean(got["seq_ratio_mean"], 0.0),
        "rollout_is_seq_std": rows.std(got["seq_ratio_mean"], got["seq_ratio_std"], 0.0),
        "rollout_is_seq_max": seq_max,
        "rollout_is_seq_min": seq_min,
        "rollout_is_seq_max_deviation": torch.maximum((seq_max - 1).abs(), (seq_min - 1).abs()),
        "rollout_is_seq_fraction_high": rows.mean(got["seq_above"], 0.0),
        "rollout_is_seq_fraction_low": rows.mean(got["seq_below"], 1.0),
    }
    if rollout_is == "token":
        result["rollout_is_max"], result["rollout_is_min"] = got["ratio_max"], got["ratio_min"]
        result["rollout_is_ratio_fraction_high"] = got["above"]
        result["rollout_is_ratio_fraction_low"] = got["below"]
    else:
        result["rollout_is_max"] = rows.max(got["ratio_max"], 1.0)
        result["rollout_is_min"] = rows.min(got["ratio_min"], 1.0)
        result["rollout_is_ratio_fraction_high"] = rows.mean(got["seq_above"], 0.0)
        result["rollout_is_ratio_fraction_low"] = rows.mean(got["seq_below"], 0.0)
    if rollout_is_batch_normalize:
        # Of the applied weights: all tokens alike, or all sequences alike.
        if rollout_is == "token":
            mean = weights.sum() / response_mask.bool().sum().clamp_min(1)
        else:
            mean = weights.amax(-1).sum() / rows.full.clamp_min(1)
        factor = mean if mean > 1e-8 else torch.ones(())
        weights = weights / factor
        result["rollout_is_batch_norm_factor"] = factor
    return {"weights": weights, **result}


def verl_overlong(lengths, *, max_resp_len, overlong_buffer_len, penalty_factor):
    return {
        "reward": rl.soft_overlong_punishment(lengths, max_resp_len, overlong_buffer_len, penalty_factor, floored=False)
    }


def verl_logprobs(logits, labels):
    return {"logprobs": rl.token_log_probs(logits, labels)[0]}


def verl_entropy(logits):
    return {"entropy": rl.token_log_probs(logits, torch.zeros(logits.shape[:-1], dtype=torch.long))[1]}


# ---- TRL ----

TRL_MODES = {
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}


def trl_grpo_loss(
    per_token_logps,
    completion_mask,
    advantages,
    old_per_token_logps=None,
    ref_per_token_logps=None,
    importance_sampling_ratio=None,
    sampling_per_token_logps=None,
    entropies=None,
    *,
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=None,
    beta=0.0,
    delta=None,
    importance_sampling_level="token",
    max_completion_length=None,
    off_policy_mask_threshold=None,
    top_entropy_quantile=1.0,
    num_items_in_batch=None,
):
    if loss_type not in TRL_MODES:
        raise NotImplementedError(loss_type)
    mask = completion_mask.bool()
    mode = TRL_MODES[loss_type]
    items = num_items_in_batch if loss_type == "dapo" else None
    if loss_type in ("grpo", "dr_grpo"):
        items = mask.shape[0]
    aggregation = {"num_items_in_batch": items}
    if loss_type == "dr_grpo":
        aggregation["loss_scale_factor"] = max_completion_length

    weights = None
    if importance_sampling_ratio is not None:
        weights = importance_sampling_ratio.expand(mask.shape)
    if off_policy_mask_threshold is not None:
        # TRL drops sequences of negative advantage whose mean log-ratio sampling/current passes the
        # threshold.
        clean = torch.where(mask, sampling_per_token_logps - per_token_logps.detach(), 0.0)
        far = clean.sum(-1) / mask.sum(-1).clamp_min(1) > off_policy_mask_threshold
        weights = (~(far & (advantages < 0))).float()
    if top_entropy_quantile < 1.0:
        threshold = torch.quantile(entropies[mask].float(), 1 - top_entropy_quantile)
        weights = ((entropies >= threshold) & mask).float()

    loss, metrics = rl.dapo_loss(
        per_token_logps,
        old_per_token_logps,
        advantages,
        completion_mask,
        clip_ratio_low=epsilon,
        clip_ratio_high=epsilon if epsilon_high is None else epsilon_high,
        clip_ratio_c=delta,
        loss_agg_mode=mode,
        rollout_is_weights=weights,
        ratio_level=importance_sampling_level,
        max_log_ratio=math.inf,
        **aggregation,
    )
    if beta:
        kl = rl.kl_penalty(per_token_logps, ref_per_token_logps, completion_mask, kind="k3", clamped=False)
        loss = loss + beta * rl.agg_loss(kl, completion_mask, mode, **aggregation)
        metrics["kl"] = rl.agg_loss(kl.detach(), completion_mask, "token-mean")
    if importance_sampling_level == "sequence":  # TRL counts a fully masked row as a sequence that is not clipped
        full = mask.any(-1).float()
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            metrics[name] = metrics[name] * full.mean()
        metrics["clip_ratio/low_min"] = metrics["clip_ratio/low_min"] * full.amin()
    entropies = torch.zeros_like(per_token_logps) if entropies is None else entropies
    metrics["entropy"] = rl.agg_loss(entropies, completion_mask, "token-mean")
    return loss, metrics


def trl_advantages(
    rewards_per_func,
    reward_weights=None,
    *,
    num_generations,
    scale_rewards="group",
    multi_objective_aggregation="sum_then_normalize",
):
    weights = torch.ones(rewards_per_func.shape[1]) if reward_weights is None else reward_weights
    count = len(rewards_per_func)
    groups = torch.arange(count) // num_generations
    options = {"epsilon": 1e-4, "constant": "rounding"}
    if multi_objective_aggregation == "normalize_then_sum":
        # Each reward is normalized in its groups, and their weighted sum over the whole batch.
        parts = [rl.group_advantages(column, groups, **options) for column in rewards_per_func.T]
        total = (torch.stack(parts, -1) * weights).sum(-1)
        everything = torch.zeros(count, dtype=torch.long)
        return {
            "advantages": rl.group_advantages(total, everything, **options),
            "is_std_zero": _is_std_zero(total, everything),
        }
    # A sample no reward function scored takes no part in its group and gets advantage 0.
    scored = ~rewards_per_func.isnan().all(-1)
    rewards = (rewards_per_func * weights).nansum(-1)
    norm = {"group": True, "batch": "batch", "none": False}[scale_rewards]
    advantages = torch.zeros(count)
    advantages[scored] = rl.group_advantages(rewards[scored], groups[scored], norm, **options)
    constant = torch.zeros(count, dtype=torch.bool)
    constant[scored] = _is_std_zero(rewards[scored], groups[scored] * (scale_rewards != "batch"))
    return {"advantages": advantages, "is_std_zero": constant}


def _is_std_zero(rewards, groups):
    """TRL logs the groups whose deviation, with the rounding of the mean in it, is at most 1e-8."""
    centred = rl.group_advantages(rewards, groups, norm_by_std=False, constant="rounding").double()
    mates = groups[:, None] == groups
    return ((mates * centred.square()).sum(-1) / (mates.sum(-1) - 1).clamp_min(1)).sqrt() <= 1e-8


def trl_is_ratio(old_per_token_logps, sampling_per_token_logps, completion_mask, *, mode, clip_max=3.0, clip_min=None):
    level, action = mode.split("_")
    weights = rl.rollout_is_weights(
        old_per_token_logps,
        sampling_per_token_logps,
        completion_mask,
        level=level,
        mode=action,
        upper=clip_max,
        lower=clip_min,
    )
    # TRL keeps the ratio 1 (bounded like the others) where nothing was sampled, and one column for a
    # sequence.
    mask = completion_mask.bool()
    padding = 0.0 if action == "mask" and (clip_min or 0.0) > 1.0 else max(1.0, clip_min or 0.0)
    if level == "sequence":
        return {"ratio": torch.where(mask.any(-1), weights.amax(-1), padding)[:, None]}
    return {"ratio": torch.where(mask, weights, padding)}


def trl_soft_overlong(lengths, *, max_completion_len, soft_punish_cache):
    return {"reward": rl.soft_overlong_punishment(lengths, max_completion_len, soft_punish_cache)}


def trl_selective_log_softmax(logits, index, *, temperature=1.0):
    return {"logprobs": rl.token_log_probs(logits, index, temperature)[0]}
