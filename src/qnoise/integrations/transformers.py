"""`NoiseCallback`: noise on a schedule in `transformers.Trainer` and in TRL's trainers.

    model = qnoise.patch_model(model, fmt="mxfp4", noise="rmsnorm")
    trainer = GRPOTrainer(model, ..., callbacks=[NoiseCallback(StagedExponential(1e-2, 1e-4, 10))])

Written for transformers 5 and TRL 1; transformers 4.57 has the same events.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from qnoise import schedules
from qnoise.config_file import write_config
from qnoise.nn.linear import FakeQuantLinear
from qnoise.noise_control import Multiplier, NoiseScheduler
from qnoise.patch import patched_modules

LOG_KEY = "noise/sigma"


class NoiseCallback(TrainerCallback, ExportableState):
    """Sets sigma and draws new noise once per *generation*, and keeps noise out of evaluation.

    In a trainer that samples (TRL's GRPO, RLOO), a generation is `steps_per_generation * num_iterations` batches: a
    rollout reused over several optimizer steps keeps its noise. Elsewhere it is an optimizer step. The phases of
    `NoiseConfig(during=)` follow the trainer: `generate` is "rollout", the rest of training "training", and while the
    model is in eval mode it is "evaluation", where noise is off and quantization stays on.

    Sigma is logged as `noise/sigma` wherever the trainer's numbers go. Checkpoints hold clean weights (noise never
    touches a parameter) and qnoise_config.json. A resumed run continues with the noise it would have had; one resumed
    in the middle of a generation samples again, and with new noise.

    A rollout that TRL leaves to vLLM does not run through this model, so it has no noise: see
    `qnoise.rl.rollout_weights`.

    Args:
        schedule: sigma as a function of progress in [0, 1] (`qnoise.schedules`); or the mapping `state()` made of one.
        total_steps: generations over which the schedule runs; None for those of the whole run.
        seed: of the noise; the same on all ranks.
        multipliers: see `qnoise.NoiseScheduler`.

    Raises:
        ValueError: when training begins: no module of the model is noisy; the head is quantized, and the trainer
            computes its loss from `lm_head.weight` without calling the head; a checkpoint saved with another schedule.
    """

    def __init__(
        self,
        schedule: Callable[[float], float] | Mapping[str, Any],
        *,
        total_steps: int | None = None,
        seed: int = 0,
        multipliers: Mapping[str | int, Multiplier] | Sequence[tuple[str | int, Multiplier]] | None = None,
    ) -> None:
        if schedule is None:
            raise ValueError(
                "a checkpoint can rebuild this callback only with a schedule of qnoise.schedules and multipliers that "
                "are numbers; resume with restore_callback_states_from_checkpoint=False and pass the callback anew "
                "(its noise continues all the same)"
            )
        self.schedule = _schedule(schedule) if isinstance(schedule, Mapping) else schedule
        self.total_steps = total_steps
        self.seed = seed
        self.multipliers = dict(multipliers or {})
        self.scheduler_state: dict[str, Any] | None = None
        self._scheduler: NoiseScheduler | None = None
        self._batches = 0

    @property
    def sigma(self) -> float:
        """Of the generation that is running; 0 before the first."""
        return self._scheduler.sigma if self._scheduler is not None else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: the arguments, and how far the noise has come."""
        plain = not any(callable(value) for value in self.multipliers.values())
        arguments = {
            "schedule": _values(self.schedule) if plain else None,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "multipliers": [list(pair) for pair in self.multipliers.items()] if plain else None,
        }
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        return {"args": arguments, "attributes": {"scheduler_state": scheduler}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _stand_first(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _stand_first(self)
        model = kwargs["model"]
        inner = _inner(model)
        _refuse_bypassed_head(inner, args)
        self._every = _batches_per_generation(args)
        batches = state.max_steps * args.gradient_accumulation_steps
        self._scheduler = NoiseScheduler(
            model, self.schedule, self.total_steps or ceil(batches / self._every), self.seed, self.multipliers
        )
        self._batches = 0
        if state.global_step and (saved := self.scheduler_state or _saved(state)):
            self._scheduler.load_state_dict(saved)
        _Phases.follow(inner, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next_batch()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next_batch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs[LOG_KEY] = self.sigma
            if state.log_history:
                state.log_history[-1][LOG_KEY] = self.sigma

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            write_config(kwargs["model"], directory)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _Phases.leave(_inner(kwargs["model"]))

    def _next_batch(self) -> None:
        if self._scheduler is None:
            raise ValueError("NoiseCallback was added after training had begun; give it to the trainer before train()")
        if self._batches % self._every == 0:
            self._scheduler.step()
        self._batches += 1


class _Phases:
    """Keeps the phase of a model's patched modules in step with what a trainer does with it.

    `train` and `generate` of the model instance are led through here. Objects, not closures: a copy of the model gets
    copies that refer to the copy.
    """

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        self.inner, self.outer = inner, outer
        self.before = {module._qnoise.name: module._qnoise.phase for module in patched_modules(outer)}
        self.sampling = False

    @staticmethod
    def follow(inner: nn.Module, outer: nn.Module) -> None:
        _Phases.leave(inner)
        phases = _Phases(inner, outer)
        inner.__dict__["_qnoise_phases"] = phases
        inner.__dict__["train"] = _Train(phases)
        for name in ("generate", "generate_batch"):
            if hasattr(type(inner), name):
                inner.__dict__[name] = _Sample(phases, name)
        phases.settle()

    @staticmethod
    def leave(inner: nn.Module) -> None:
        phases = inner.__dict__.pop("_qnoise_phases", None)
        if phases is None:
            return
        for name in ("train", "generate", "generate_batch"):
            if isinstance(inner.__dict__.get(name), _Train | _Sample):
                del inner.__dict__[name]
        for module in patched_modules(phases.outer):
            module._qnoise.phase = phases.before.get(module._qnoise.name, "training")

    def settle(self) -> None:
        phase = "evaluation" if not self.inner.training else "rollout" if self.sampling else "training"
        for module in patched_modules(self.outer):
            if module._qnoise.phase != phase:
                module._qnoise.phase = phase


class _Train:
    def __init__(self, phases: _Phases) -> None:
        self.phases = phases

    def __call__(self, mode: bool = True) -> nn.Module:
        inner = self.phases.inner
        changed = inner.training != mode
        type(inner).train(inner, mode)
        if changed:
            self.phases.settle()
        return inner


class _Sample:
    def __init__(self, phases: _Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.phases.inner
        outermost, self.phases.sampling = not self.phases.sampling, True
        self.phases.settle()
        try:
            return getattr(type(inner), self.name)(inner, *args, **kwargs)
        finally:
            if outermost:
                self.phases.sampling = False
                self.phases.settle()


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def _batches_per_generation(args: Any) -> int:
    """How many batches pass between two generations: TRL's two counts, or one optimizer step."""
    per_generation = getattr(args, "steps_per_generation", None)
    if per_generation:
        return int(per_generation) * int(getattr(args, "num_iterations", 1) or 1)
    return int(args.gradient_accumulation_steps)


def _refuse_bypassed_head(inner: nn.Module, args: Any) -> None:
    get_head = getattr(inner, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, FakeQuantLinear) or head._qnoise.weight_spec is None:
        return
    # TRL puts a forward on the instance that multiplies by `lm_head.weight`; liger's losses do the same in a kernel.
    code = getattr(getattr(inner.__dict__.get("forward"), "__func__", None), "__code__", None)
    fused = code is not None and "fused_lm_head" in code.co_varnames
    if fused or any(getattr(args, name, False) for name in ("use_liger_kernel", "use_liger_loss")):
        raise ValueError(
            f"{head._qnoise.name} is quantized, but this trainer computes its loss from {head._qnoise.name}.weight "
            "without calling the module, so the loss would see the full-precision head and generation the quantized "
            "one. Leave the head out (it is left out by default), or switch the fused loss off."
        )


def _stand_first(callback: NoiseCallback) -> None:
    """Move the callback before those that report: they pass on what is in `logs` when their turn comes.

    A callback is told of the trainer's numbers, not of the trainer; the handler that calls it is found in the stack.
    Where it is not, sigma still stands in `state.log_history`.
    """
    frame = sys._getframe(1)
    for _ in range(6):
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if callback in handler.callbacks:
                handler.callbacks.remove(callback)
                handler.callbacks.insert(0, callback)
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def _saved(state: Any) -> dict[str, Any] | None:
    """What the checkpoint a run was resumed from kept of this callback's scheduler."""
    saved = (state.stateful_callbacks or {}).get(NoiseCallback.__name__)
    saved = saved[0] if isinstance(saved, list) else saved
    attributes = saved.get("attributes", {}) if isinstance(saved, Mapping) else {}
    return cast("dict[str, Any] | None", attributes.get("scheduler_state"))


def _values(schedule: Any) -> dict[str, Any] | None:
    """A schedule of this package as plain values. Others cannot be written down, and the caller passes them anew."""
    kind = type(schedule)
    if getattr(schedules, kind.__name__, None) is not kind:
        return None
    return {"name": kind.__name__, **asdict(schedule)}


def _schedule(values: Mapping[str, Any]) -> Callable[[float], float]:
    arguments = dict(values)
    kind: type = getattr(schedules, arguments.pop("name"))
    return cast(Callable[[float], float], kind(**arguments))
