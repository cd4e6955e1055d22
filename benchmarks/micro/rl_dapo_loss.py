"""`dapo_loss`, forward and backward with its metrics, against verl's `compute_policy_loss_vanilla`.

64 sequences of at most 512 tokens, with dual clip as verl always has it; the tensors are those verl wants: advantages
per token, a mask of floats. A call copies the log-probabilities (the leaf of the graph), computes loss and metrics and
runs the backward. verl turns its three metrics into numbers; ours are left as eight tensors, and "with numbers" turns
them too. Without verl installed the reference is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.micro import rl_peers
from benchmarks.micro.measure import Case, Contender
from qnoise.rl import dapo_loss

TITLE = "DAPO loss, forward and backward with metrics, against verl's"
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, dict[str, Any]]]


def cases(quick: bool) -> Iterator[Case]:
    shape = (8, 64) if quick else (64, 512)
    for weighted in (False, True):
        yield case(shape, weighted)


def case(shape: tuple[int, int], weighted: bool) -> Case:
    batch, tokens = shape
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(shape, generator=generator)
    new = old + 0.2 * torch.randn(shape, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).float()
    advantages = torch.randn(batch, 1, generator=generator) * mask
    weights = torch.rand(shape, generator=generator) + 0.5 if weighted else None

    def run(loss: Loss) -> tuple[Tensor, dict[str, Any], Tensor]:
        leaf = new.clone().requires_grad_()
        value, metrics = loss(leaf, old, advantages, mask, weights)
        value.backward()
        assert leaf.grad is not None
        return value, metrics, leaf.grad

    def with_numbers() -> object:
        return [value.item() for value in run(ours)[1].values()]

    def verl() -> tuple[Callable[[], object], dict[str, Any]]:
        loss = rl_peers.verl_policy_loss(clip_ratio=0.2, **CLIP)
        theirs, mine = run(loss), run(ours)
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine[2], theirs[2], rtol=1e-5, atol=1e-9)
        for name, value in theirs[1].items():
            torch.testing.assert_close(mine[1][name].item(), value, rtol=1e-4, atol=1e-7)
        return lambda: run(loss), {}

    def check() -> None:
        """The loss is that of the formula, and its gradient that of autograd."""
        leaf = new.clone().requires_grad_()
        ratio = (leaf - old).exp()
        clipped = ratio.clamp(1 - CLIP["clip_ratio_low"], 1 + CLIP["clip_ratio_high"])
        cost = torch.maximum(-advantages * ratio, -advantages * clipped)
        capped = torch.minimum(cost, -advantages * CLIP["clip_ratio_c"])
        cost = torch.where(advantages < 0, capped, cost) * (1 if weights is None else weights)
        value = (cost * mask).sum() / mask.sum()
        found = run(ours)
        torch.testing.assert_close(found[0], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[2], torch.autograd.grad(value, leaf)[0], rtol=1e-5, atol=1e-9)

    mine = [Contender("qnoise", lambda: run(ours)), Contender("qnoise, with numbers", with_numbers)]
    peer = rl_peers.contender("verl compute_policy_loss_vanilla", verl)
    return Case(
        "rl_dapo_loss",
        {"shape": list(shape), "rollout_is_weights": weighted},
        [*mine, peer] if peer.call is None else [peer, *mine],
        check,
        rounds=100,
    )


def ours(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    return dapo_loss(new, old, advantages, mask, rollout_is_weights=weights, **CLIP)  # type: ignore[arg-type]
