"""Rewards of groups of samples turned into advantages, and the groups worth training on.

Rewards are few and have to be looked at before they are used (one that is not finite is an error), so they are
read to the host once and all arithmetic is done there: the same numbers on every device, sums of squares in fp64
also where the device has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spelling import check_choice

CONSTANT_GROUPS = ("zero", "rounding")
SINGLETON_GROUPS = ("zero", "reward")


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    norm_by_std: bool | str = True,
    epsilon: float = 1e-6,
    *,
    singleton: str = "zero",
    constant: str = "zero",
) -> Tensor:
    """Advantage of each sample inside its group: (reward − mean) / (std + epsilon) (GRPO, arXiv 2402.03300).

    The mean is an fp32 one (fp64 for fp64 rewards) and the deviation, the unbiased one, is taken from it, as verl
    and TRL do. A group whose rewards are all equal has advantage exactly 0; without that rule the mean's rounding
    would be divided by a deviation that is the same rounding: eight rewards of 0.7 get 0.056 in verl.

    Args:
        rewards: (N,) finite rewards, any dtype, any device (read to the host).
        groups: (N,) integer group ids in any order, groups of any size; or an int G: consecutive groups of G.
        norm_by_std: True divides by the group's deviation; False does not divide (Dr. GRPO); "batch" divides
            by the deviation of all N rewards.
        epsilon: added to the deviation; verl 1e-6, TRL 1e-4.
        singleton: the advantage of a group of one: "zero" or "reward" (verl: the reward itself).
        constant: the advantage of a larger group of equal rewards: "zero", or "rounding" (verl, TRL: what their
            arithmetic leaves), to reproduce a run of theirs number by number.

    Returns:
        (N,) fp32 (fp64 for fp64 rewards), no gradient, on the device of ``rewards``. Without rewards (0,).

    Raises:
        ValueError: shapes differ (both are named), N is no multiple of G, a reward is not finite (its index
            is named), an unknown option, an epsilon below 0, or of 0 together with ``constant="rounding"``.
        TypeError: rewards that are no tensor, group ids that are not integers.
    """
    if norm_by_std not in (True, False, "batch"):
        raise ValueError(f"norm_by_std must be True, False or 'batch', got {norm_by_std!r}")
    check_choice("singleton", singleton, SINGLETON_GROUPS)
    check_choice("constant", constant, CONSTANT_GROUPS)
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be at least 0 and finite, got {epsilon}")
    if epsilon == 0 and constant == "rounding":
        raise ValueError(
            "constant='rounding' divides what is left by a deviation that may be 0; give an epsilon above 0"
        )
    values = _read_rewards(rewards)
    advantages = torch.zeros_like(values)
    for rows in _rows_of_groups(groups, rewards):
        group = values[rows]
        if rows.shape[1] == 1:
            # verl divides by a deviation of 1.
            own = group / (1 + epsilon) if norm_by_std is True else group
            advantages[rows] = own if singleton == "reward" else 0.0
            continue
        centred = group - group.mean(1, keepdim=True)
        if norm_by_std is False:
            scaled = centred
        else:
            spread = centred if norm_by_std is True else (values - values.mean())[None]
            scaled = centred / (_deviation(spread) + epsilon)
        advantages[rows] = scaled if constant == "rounding" else torch.where(_varies(group), scaled, 0.0)
    return advantages.to(rewards.device)


def informative_groups(rewards: Tensor, groups: Tensor | int) -> Tensor:
    """Which samples belong to a group whose rewards differ (DAPO's dynamic sampling keeps only these).

    Args:
        rewards: (N,) finite, any device (read to the host).
        groups: (N,) integer ids in any order, or an int G for consecutive groups of G.

    Returns:
        (N,) bool on the device of ``rewards``, all False when no group is informative: there is nothing to learn
        from then, so sample more prompts or go without an update. Dropping the other samples leaves the
        gradient's direction as it is (their advantage is 0) but shrinks the denominator of a token mean.

    Raises:
        ValueError, TypeError: as :func:`group_advantages`.
    """
    values = _read_rewards(rewards)
    keep = torch.zeros(len(values), dtype=torch.bool)
    for rows in _rows_of_groups(groups, rewards):
        keep[rows] = _varies(values[rows]).expand_as(rows)
    return keep.to(rewards.device)


def _read_rewards(rewards: Tensor) -> Tensor:
    """(N,) finite rewards on the CPU, fp32 (fp64 if they were)."""
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards must be a tensor, got {type(rewards).__name__}; torch.tensor(rewards) makes one")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (samples,), got {tuple(rewards.shape)}")
    values = rewards.detach().cpu().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards must be finite; sample {bad[0]} has {values[bad[0]].item()} ({len(bad)} in all)")
    return values


def _rows_of_groups(groups: Tensor | int, rewards: Tensor) -> list[Tensor]:
    """Sample numbers as (K, size) matrices, a row a group, a matrix for every size of group that occurs.

    A row keeps the order of its samples, so that its fp32 mean is that of the peers, who take a group at a time.
    """
    if isinstance(groups, Tensor):
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"group ids must be integers, got {groups.dtype}")
        if groups.shape != rewards.shape:
            raise ValueError(
                f"group ids have shape {tuple(groups.shape)} but rewards have shape {tuple(rewards.shape)}"
            )
        index, sizes = torch.unique(groups.cpu(), return_inverse=True, return_counts=True)[1:]
        order, starts = index.argsort(stable=True), sizes.cumsum(0) - sizes
        return [order[starts[sizes == size][:, None] + torch.arange(size)] for size in torch.unique(sizes).tolist()]
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be a tensor of ids or a number of generations, got {type(groups).__name__}")
    if groups < 1 or rewards.numel() % groups:
        raise ValueError(
            f"{rewards.numel()} rewards cannot be cut into consecutive groups of {groups}; "
            "pass group ids for groups of unequal size"
        )
    return [torch.arange(rewards.numel()).view(-1, groups)]


def _deviation(centred: Tensor) -> Tensor:
    """(K, 1) unbiased standard deviation of each row of values less their mean; squares are summed in fp64."""
    squares = centred.double().square().sum(1, keepdim=True)
    return (squares / max(centred.shape[1] - 1, 1)).sqrt().to(centred.dtype)


def _varies(group: Tensor) -> Tensor:
    """(K, 1) bool: max and min of the row differ."""
    return group.amax(1, keepdim=True) > group.amin(1, keepdim=True)
