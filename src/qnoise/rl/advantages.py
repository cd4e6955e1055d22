"""Rewards of groups of samples turned into advantages, and the groups worth training on."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    groups: Tensor | int,
    norm_by_std: bool | str = True,
    epsilon: float = 1e-6,
    *,
    singleton: str = "zero",
) -> Tensor:
    """Advantage of each sample inside its group: (reward − mean) / (std + epsilon) (GRPO, arXiv 2402.03300).

    The standard deviation is the unbiased one. A group whose rewards are all equal has advantage exactly 0
    (its computed deviation would be rounding noise, which the division would blow up).

    Args:
        rewards: (N,) finite rewards, any dtype.
        groups: (N,) integer group ids in any order, groups of any size; or an int G: consecutive groups of G.
        norm_by_std: True divides by the group's deviation; False does not divide (Dr. GRPO); "batch" divides
            by the deviation of all N rewards.
        epsilon: added to the deviation; verl 1e-6, TRL 1e-4.
        singleton: the advantage of a group of one: "zero" or "reward" (verl: the reward itself).

    Returns:
        (N,) fp32 (fp64 for fp64 rewards), no gradient, on the device of ``rewards``.

    Raises:
        ValueError: shapes differ (both are named), N is no multiple of G, a reward is not finite (its index
            is named), an unknown option.
        TypeError: group ids that are not integers.
    """
    if norm_by_std not in (True, False, "batch"):
        raise ValueError(f"norm_by_std must be True, False or 'batch', got {norm_by_std!r}")
    if singleton not in ("zero", "reward"):
        raise ValueError(f"singleton must be 'zero' or 'reward', got {singleton!r}")
    index = _group_index(rewards, groups)
    exact = rewards.detach().double()
    out_dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if exact.numel() == 0:
        return exact.to(out_dtype)
    _check_finite(exact)

    sizes = torch.bincount(index)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=exact.device)
    mean = sums.index_add(0, index, exact) / sizes
    # The mean is subtracted in the result's precision, summed in the order of the samples: verl's and TRL's
    # rounding, which shows where the rewards of a group differ by little.
    values = rewards.detach().to(out_dtype)
    centred = values - (sums.to(out_dtype).index_add(0, index, values) / sizes)[index]
    if norm_by_std is True:
        squares = sums.index_add(0, index, (exact - mean[index]).square())
        deviation = (squares / (sizes - 1).clamp_min(1)).sqrt()
        advantage = centred / (deviation[index].to(out_dtype) + epsilon)
    elif norm_by_std == "batch":
        deviation = exact.std() if exact.numel() > 1 else sums[0]
        advantage = centred / (deviation.to(out_dtype) + epsilon)
    else:
        advantage = centred
    advantage = torch.where(_varies(exact, index, len(sizes)), advantage, 0.0)
    if singleton == "reward":
        scale = 1 + epsilon if norm_by_std is True else 1.0
        advantage = torch.where(sizes[index] == 1, values / scale, advantage)
    return advantage


def informative_groups(rewards: Tensor, groups: Tensor | int) -> Tensor:
    """Which samples belong to a group whose rewards differ (DAPO's dynamic sampling keeps only these).

    Args:
        rewards: (N,) finite.
        groups: (N,) integer ids in any order, or an int G for consecutive groups of G.

    Returns:
        (N,) bool, all False when no group is informative. Dropping the other samples leaves the gradient's
        direction as it is (their advantage is 0) but shrinks the denominator of a token mean.

    Raises:
        ValueError, TypeError: as :func:`group_advantages`.
    """
    index = _group_index(rewards, groups)
    exact = rewards.detach().double()
    if exact.numel() == 0:
        return torch.zeros(0, dtype=torch.bool, device=rewards.device)
    _check_finite(exact)
    return _varies(exact, index, int(index.max()) + 1)


def _group_index(rewards: Tensor, groups: Tensor | int) -> Tensor:
    """Group number 0..K−1 of each sample."""
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (samples,), got {tuple(rewards.shape)}")
    if isinstance(groups, Tensor):
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
            raise TypeError(f"group ids must be integers, got {groups.dtype}")
        if groups.shape != rewards.shape:
            raise ValueError(
                f"group ids have shape {tuple(groups.shape)} but rewards have shape {tuple(rewards.shape)}"
            )
        return torch.unique(groups.to(rewards.device), return_inverse=True)[1]
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be a tensor of ids or a number of generations, got {type(groups).__name__}")
    if groups < 1 or rewards.numel() % groups:
        raise ValueError(
            f"{rewards.numel()} rewards cannot be cut into consecutive groups of {groups}; "
            "pass group ids for groups of unequal size"
        )
    return torch.arange(rewards.numel(), device=rewards.device) // groups


def _check_finite(rewards: Tensor) -> None:
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards must be finite; sample {bad[0]} has {rewards[bad[0]].item()} ({len(bad)} in all)")


def _varies(rewards: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """(N,) bool: max and min of the sample's group differ."""
    start = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device)
    high = start.scatter_reduce(0, index, rewards, "amax", include_self=False)
    low = start.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return (high != low)[index]
