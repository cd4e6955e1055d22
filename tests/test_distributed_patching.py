"""A patched PEFT model under DDP and `fully_shard`: loss, gradients and noise are those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qnoise
from qnoise.schedules import Constant
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model, with_lora

pytestmark = pytest.mark.slow
ROWS = 8


def batch() -> torch.Tensor:
    return torch.randint(3, 99, (ROWS, 10), generator=torch.Generator().manual_seed(2))


def policy(full: bool = False, **overrides):
    """A LoRA on a frozen NVFP4 base with noisy norms; `full`: the base itself in training."""
    model = tiny_model("qwen2", **overrides).train()
    model = qnoise.patch_model(model.requires_grad_(full), fmt="nvfp4", noise="rmsnorm")
    return model if full else with_lora(model).train()


def step(model, rows: torch.Tensor, share: float) -> float:
    """One forward and backward over the sum of the rows' losses, as a share of the whole batch."""
    loss = model(input_ids=rows, labels=rows).loss * share
    loss.backward()
    return loss.detach()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = grad.clone()
    return found


def one_process(full: bool, steps: int = 2):
    """What every rank has to arrive at: losses, gradients and parameters of two steps of SGD."""
    model = policy(full)
    scheduler = qnoise.NoiseScheduler(model, Constant(0.1), steps, seed=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, grads = [], []
    for _ in range(steps):
        scheduler.step()
        optimizer.zero_grad()
        losses.append(step(model, batch(), 1.0))
        grads.append(gradients(model))
        optimizer.step()
    return losses, grads, {name: p.detach().clone() for name, p in model.named_parameters()}


def compare(rank: int, world: int, way: str, full: bool) -> None:
    losses, grads, parameters = one_process(full)
    model = policy(full)
    scheduler = qnoise.NoiseScheduler(model, Constant(0.1), 2, seed=4)
    if way == "ddp":
        run = DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.05)
    rows = batch().chunk(world)[rank]
    for k in range(2):
        scheduler.step()
        optimizer.zero_grad()
        loss = step(run, rows, 1.0)
        dist.all_reduce(loss)
        # Ranks average gradients, and every rank holds as many rows: the mean over ranks is that of the batch.
        torch.testing.assert_close(loss / world, losses[k], rtol=1e-5, atol=1e-6)
        found = gradients(run)
        assert found.keys() == grads[k].keys()
        for name, expected in grads[k].items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        optimizer.step()
    for name, parameter in run.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        expected = parameters[name.removeprefix("module.")]
        torch.testing.assert_close(whole.detach(), expected, rtol=1e-4, atol=1e-6)
    # The noise is a function of seed, step and name: equal on every rank, and nobody had to send it.
    norm = next(m for m in run.modules() if getattr(m, "_qnoise", None) is not None and m._qnoise.noise_during)
    z = qnoise.noise.unit_normal(4, 1, norm._qnoise.name, (64,))
    every = [torch.empty(64) for _ in range(world)]
    dist.all_gather(every, torch.from_numpy(z))
    assert all(torch.equal(each, every[0]) for each in every)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", ["ddp", "fully_shard"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_equal_to_one_process(tmp_path, world: int, way: str, full: bool) -> None:
    run_ranks(compare, world, tmp_path / "meet", world, way, full)


def test_one_process_can_fail() -> None:
    """The noise does something, and another seed something else: what is compared is not nothing."""
    losses, grads, _ = one_process(False)
    model = policy()
    assert abs(float(step(copy.deepcopy(model), batch(), 1.0) - losses[0])) > 1e-4
    assert any(g.abs().max() > 1e-5 for g in grads[0].values())
