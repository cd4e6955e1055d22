"""A training run that is killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import qnoise
from qnoise.integrations.transformers import NoiseCallback
from qnoise.schedules import Linear
from tests.tiny_models import tiny_model, with_lora

pytestmark = pytest.mark.slow
STEPS, SAVE_EVERY = 12, 3
# Where in a step, or in the writing of a checkpoint, the process dies.
MOMENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
WHILE_SAVING = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state")


class Killed(TrainerCallback):
    """Dies at one moment of one step, as the machine would have it."""

    def __init__(self, step: int, moment: str) -> None:
        def now(args: object, state: TrainerState, control: object, **_: object) -> None:
            if state.global_step == step:
                die()

        setattr(self, moment, now)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trainer(directory: Path, *callbacks: TrainerCallback) -> Trainer:
    """A LoRA with dropout on a quantized base with noisy norms; the data are shuffled anew in each epoch."""
    base = qnoise.patch_model(tiny_model("qwen2", num_hidden_layers=1), fmt="nvfp4", noise="rmsnorm")
    rows = torch.randint(3, 99, (10, 8), generator=torch.Generator().manual_seed(3))
    return Trainer(
        with_lora(base, lora_dropout=0.2),
        TrainingArguments(
            output_dir=str(directory),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_steps=SAVE_EVERY,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=5,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[NoiseCallback(Linear(0.5, 0.1), seed=9), *callbacks],
    )


def run_until_killed(_: int, directory: Path, step: int, moment: str) -> None:
    torch.set_num_threads(1)
    if moment in WHILE_SAVING:
        write, name = getattr(Trainer, moment), f"checkpoint-{step}"

        def write_half(self: Trainer, to: str | None = None, *args: object, **kwargs: object) -> object:
            done = write(self, to, *args, **kwargs)
            return die() if to is not None and Path(to).name == name else done

        setattr(Trainer, moment, write_half)
        trainer(directory).train()
    trainer(directory, Killed(step, moment)).train()


def last_complete(directory: Path) -> Path | None:
    """The state of the trainer is what it writes last."""
    complete = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    run = trainer(tmp_path_factory.mktemp("undisturbed"))
    run.train()
    return weights(run)


def kill_points(seed: int) -> list[tuple[int, str]]:
    """Four anywhere in the run, one in the writing of a checkpoint that is not the first."""
    draw = random.Random(seed)
    points = [(draw.randrange(1, STEPS), draw.choice(MOMENTS)) for _ in range(4)]
    return [*points, (draw.randrange(2, STEPS // SAVE_EVERY) * SAVE_EVERY, draw.choice(WHILE_SAVING))]


@pytest.mark.parametrize(("step", "moment"), kill_points(20261122))
def test_killed_and_resumed(tmp_path, undisturbed, step: int, moment: str) -> None:
    print(f"killed in {moment} of step {step}")
    with pytest.raises(mp.ProcessExitedException) as caught:
        mp.spawn(run_until_killed, args=(tmp_path, step, moment), nprocs=1)
    assert caught.value.signal_name == "SIGKILL"
    left = sorted(tmp_path.glob("checkpoint-*"))
    resume_from = last_complete(tmp_path)
    if moment in WHILE_SAVING:
        assert tmp_path / f"checkpoint-{step}" in left
        assert resume_from == tmp_path / f"checkpoint-{step - SAVE_EVERY}"
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    assert run.state.global_step == STEPS
    found = weights(run)
    assert found.keys() == undisturbed.keys()
    for name, value in undisturbed.items():
        assert torch.equal(found[name], value), name


def test_what_is_compared_depends_on_the_noise(tmp_path, undisturbed) -> None:
    """A resumed run whose noise began anew ends elsewhere."""
    run = trainer(tmp_path)
    run.train()
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(run).items())
    state = tmp_path / f"checkpoint-{SAVE_EVERY}" / "trainer_state.json"
    state.write_text(state.read_text().replace('"seed": 9', '"seed": 10'))
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(state.parent))
    assert any(not torch.equal(value, undisturbed[name]) for name, value in weights(again).items())
