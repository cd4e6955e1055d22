"""Gradient accumulation and data parallelism: any split of a batch has the loss and the gradient of the whole batch."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qnoise import rl
from qnoise.rl.losses import LOSS_AGG_MODES
from tests.ranks import run_ranks

ROWS, TOKENS, VOCABULARY = 7, 6, 11
WORLD = 2
SPLITS = ((5, 2), (1, 6), (7, 0))  # rows of rank 0 and of rank 1


class Policy(nn.Module):
    """The next token depends on the present one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.head = nn.Linear(8, VOCABULARY, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def whole_batch() -> dict[str, torch.Tensor]:
    """Ragged responses with a hole, one row fully masked, ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor([6, 1, 4, 0, 2, 5, 3])[:, None]
    mask[0, 2] = False
    with torch.no_grad():
        log_prob = rl.token_log_probs(Policy()(ids[:, :-1]), ids[:, 1:])[0]
    return {
        "ids": ids,
        "mask": mask,
        "old": log_prob + 0.3 * torch.randn(log_prob.shape, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(ROWS, generator=generator, dtype=torch.float64),
        "weights": torch.rand(log_prob.shape, generator=generator, dtype=torch.float64) + 0.5,
    }


def items(mask: torch.Tensor, mode: str) -> torch.Tensor:
    """What the mean of the mode runs over."""
    return mask.sum() if mode == "token-mean" else mask.any(-1).sum()


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], mode: str, count, level: str = "token") -> torch.Tensor:
    log_prob, _ = rl.token_log_probs(model(batch["ids"][:, :-1]), batch["ids"][:, 1:])
    return rl.dapo_loss(
        log_prob,
        batch["old"],
        batch["advantages"],
        batch["mask"],
        clip_ratio_c=1.5,
        loss_agg_mode=mode,
        rollout_is_weights=batch["weights"],
        num_items_in_batch=count,
        loss_scale_factor=TOKENS if mode == "seq-mean-token-sum-norm" else None,
        ratio_level=level,
    )[0]


def rows(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def reference(mode: str, level: str = "token") -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = Policy()
    loss = loss_of(model, whole_batch(), mode, None, level)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def assert_same(loss, gradients, want_loss, want_gradients):
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-14)
    for got, want in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cuts", [[], [4], [2, 4, 6], [1, 2, 3, 4, 5, 6], [3, 4]], ids=str)
def test_micro_batches(mode, level, cuts):
    batch, model = whole_batch(), Policy()
    count = items(batch["mask"], mode)
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in itertools.pairwise([0, *cuts, ROWS]):
        loss = loss_of(model, rows(batch, start, stop), mode, count, level)
        loss.backward()
        total += loss.detach()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert_same(total, gradients, *reference(mode, level))


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_without_the_number_of_items_the_parts_are_not_the_whole(mode):
    batch, model = whole_batch(), Policy()
    total = sum(loss_of(model, rows(batch, a, b), mode, None) / 2 for a, b in ((0, 2), (2, ROWS)))
    assert (total - reference(mode)[0]).abs() > 1e-3


def one_rank(rank: int, folder: str) -> None:
    """What a data-parallel trainer does: count the items of all ranks, divide by the ranks, let DDP average."""
    batch, results = whole_batch(), {}
    for split in SPLITS:
        own = rows(batch, 0, split[0]) if rank == 0 else rows(batch, split[0], ROWS)
        for mode in LOSS_AGG_MODES:
            model = DistributedDataParallel(Policy())
            count = items(own["mask"], mode)
            dist.all_reduce(count)
            loss = torch.zeros((), dtype=torch.float64)
            # Two micro-batches on rank 0, one on rank 1; gradients travel with the last one.
            cuts = [0, split[0] // 2, split[0]] if rank == 0 else [0, split[1]]
            for start, stop in itertools.pairwise(cuts):
                with contextlib.nullcontext() if stop == cuts[-1] else model.no_sync():
                    part = loss_of(model, rows(own, start, stop), mode, count / WORLD)
                    part.backward()
                loss += part.detach()
            dist.all_reduce(loss)
            key = f"{split[0]} {mode}"
            results[f"{key} loss"] = loss / WORLD
            for number, parameter in enumerate(model.parameters()):
                results[f"{key} {number}"] = parameter.grad
    save_file(results, f"{folder}/{rank}.safetensors")


def test_two_processes(tmp_path):
    run_ranks(one_rank, WORLD, tmp_path / "meet", str(tmp_path))
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD)]
    for mode in LOSS_AGG_MODES:
        want_loss, want = reference(mode)
        for split in SPLITS:
            for result in ranks:
                key = f"{split[0]} {mode}"
                got = [result[f"{key} {number}"] for number in range(len(want))]
                assert_same(result[f"{key} loss"], got, want_loss, want)
