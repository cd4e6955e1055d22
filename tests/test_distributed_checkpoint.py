"""A sharded run saved with torch.distributed.checkpoint continues on any number of processes.

The run that continues starts from a model of other weights: whatever the checkpoint does not bring is wrong. On as many
processes as it was saved from, it ends with the bits of the run that was never stopped. On another number the mean over
the rows is summed in another order, in fp32: sums of a few terms differ by some 1e-7, which the optimizer passes on
(eps keeps it from dividing by less than 1e-3) times its step of 1e-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import qnoise
from qnoise.nn.linear import FakeQuantLinear
from qnoise.schedules import Linear
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model, with_lora

pytestmark = pytest.mark.slow
ROWS, SAVED_AFTER, STEPS = 8, 2, 4
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


@dataclass(frozen=True)
class Case:
    fmt: str
    storage: str
    full: bool = False
    # Each linear is a unit of its own: siblings never see each other's weights.
    apart: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in (self.fmt, self.storage, self.full, self.apart))


CASES = (
    Case("nvfp4", "auto"),
    Case("nvfp4", "auto", apart=True),
    Case("nvfp4", "cached", full=True),
    Case("nvfp4", "dynamic", full=True, apart=True),
    Case("mxfp4", "dynamic"),
    Case("nvfp4", "packed"),
)


class Run:
    """A model in training: sharded over all processes, or on one."""

    def __init__(self, case: Case, seed: int) -> None:
        model = tiny_model("qwen2", seed=seed, num_hidden_layers=1).train().requires_grad_(case.full)
        qnoise.patch_model(model, case.fmt, noise="rmsnorm", storage=case.storage)
        self.model = model if case.full else with_lora(model).train()
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if dist.is_initialized():
            shard(self.model, case)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
        self.scheduler = qnoise.NoiseScheduler(self.model, Linear(0.2, 0.05), STEPS, seed=4)

    def train(self, steps: range) -> list[Tensor]:
        """The losses of these steps, over all rows."""
        losses = []
        for k in steps:
            self.scheduler.step()
            rows = torch.randint(3, 99, (ROWS, 8), generator=torch.Generator().manual_seed(k))
            part = rows.chunk(self.world)[dist.get_rank()] if self.world > 1 else rows
            loss = self.model(input_ids=part, labels=part).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss = loss.detach()
            if self.world > 1:
                dist.all_reduce(loss)
            losses.append(loss / self.world)
        return losses

    def whole(self) -> dict[str, Tensor]:
        """Every entry of the state dict, gathered."""
        state = self.model.state_dict()
        return {name: whole(value).clone() for name, value in state.items()}

    def save(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer, "noise": self.scheduler}, checkpoint_id=path)

    def load(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer, "noise": self.scheduler}, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def shard(model: nn.Module, case: Case) -> None:
    from torch.distributed.fsdp import fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        if case.apart:
            for module in [m for m in layer.modules() if isinstance(m, FakeQuantLinear)]:
                fully_shard(module)
        fully_shard(layer)
    fully_shard(model)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def uninterrupted(rank: int, world: int, directory: Path) -> None:
    """Train each case to the end, with a checkpoint on the way."""
    for case in CASES:
        run = Run(case, seed=0)
        run.train(range(SAVED_AFTER))
        run.save(directory / f"{case.name}-{world}")
        losses, state = run.train(range(SAVED_AFTER, STEPS)), run.whole()
        if rank == 0:
            torch.save((losses, state), directory / f"{case.name}-{world}.end")


def resumed(_rank: int, world: int, directory: Path, saved_from: int) -> None:
    for case in CASES:
        check_resumed(case, directory, saved_from, exact=world == saved_from)


def check_resumed(case: Case, directory: Path, saved_from: int, exact: bool) -> None:
    run = Run(case, seed=1)
    run.load(directory / f"{case.name}-{saved_from}")
    losses = run.train(range(SAVED_AFTER, STEPS))
    expected_losses, expected = torch.load(directory / f"{case.name}-{saved_from}.end")
    state = run.whole()
    assert state.keys() == expected.keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else TOLERANCE
    for name, value in {**state, "losses": torch.stack(losses)}.items():
        other = torch.stack(expected_losses) if name == "losses" else expected[name]
        torch.testing.assert_close(value, other, **tolerance, msg=lambda m, n=name: f"{case.name}: {n}: {m}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Runs of 2 and of 4 processes, and their checkpoints."""
    made = tmp_path_factory.mktemp("runs")
    for world in (2, 4):
        run_ranks(uninterrupted, world, made / f"meet-{world}", world, made)
    return made


@pytest.mark.parametrize(("saved_from", "world"), [(2, 2), (2, 4), (4, 2)])
def test_the_run_goes_on(directory, saved_from: int, world: int) -> None:
    run_ranks(resumed, world, directory / f"meet-{saved_from}-{world}", world, directory, saved_from)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_run_goes_on_in_a_process_of_its_own(directory, case: Case) -> None:
    """No process group, nothing sharded."""
    check_resumed(case, directory, saved_from=4, exact=False)


def test_the_checkpoint_has_the_names_of_a_stock_model(directory) -> None:
    for case in CASES:
        if case.storage != "packed":
            stock = tiny_model("qwen2", num_hidden_layers=1)
            stock = stock if case.full else with_lora(stock)
            saved = dcp.FileSystemReader(directory / f"{case.name}-2").read_metadata().state_dict_metadata
            names = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
            assert names == set(stock.state_dict())


def test_the_noise_is_part_of_it(directory) -> None:
    """What is compared depends on the step the noise is at."""
    case = CASES[0]
    run = Run(case, seed=1)
    run.load(directory / f"{case.name}-2")
    assert run.scheduler.steps_taken == SAVED_AFTER
    run.scheduler.steps_taken = 0
    losses = run.train(range(SAVED_AFTER, STEPS))
    expected, _ = torch.load(directory / f"{case.name}-2.end")
    assert not torch.allclose(torch.stack(losses), torch.stack(expected), **TOLERANCE)
