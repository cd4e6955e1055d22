"""`NoiseCallback`: noise on a schedule in `transformers.Trainer` and in TRL's trainers.

    model = qnoise.patch_model(model, fmt="mxfp4", noise="rmsnorm")
    trainer = GRPOTrainer(model, ..., callbacks=[NoiseCallback(StagedExponential(1e-2, 1e-4, 10))])

Versions: `qnoise.requirements`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, cast

from torch import nn

from qnoise import schedules
from qnoise.config_file import save_with_config, write_config
from qnoise.nn.linear import FakeQuantLinear
from qnoise.noise import Noise
from qnoise.noise_control import Multiplier, NoiseScheduler
from qnoise.patch import patched_modules
from qnoise.requirements import require

require("transformers", "qnoise.integrations.transformers")

from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import CallbackHandler, ExportableState  # noqa: E402

LOG_KEY = "noise/sigma"


class NoiseCallback(TrainerCallback, ExportableState):
    """Sets sigma and draws new noise once per *generation*, and keeps noise out of evaluation.

    In a trainer that samples (TRL's GRPO, RLOO), a generation is `steps_per_generation * num_iterations` batches: a
    rollout reused over several optimizer steps keeps its noise. Elsewhere it is an optimizer step. The phases of
    `NoiseConfig(during=)` follow the trainer: `generate` is "rollout", the rest of training "training", and while the
    model is in eval mode it is "evaluation", where noise is off and quantization stays on. When training ends, so does
    the noise.

    Sigma is logged as `noise/sigma` wherever the trainer's numbers go. Checkpoints hold clean weights (noise never
    touches a parameter) and qnoise_config.json, and so does from now on what `save_model` or `save_pretrained` writes.
    A resumed run continues with the noise it would have had. TRL does not save the rollout: a run resumed in the middle
    of a generation samples again, and with new noise.

    A rollout that TRL leaves to vLLM does not run through this model, so it has no noise: see
    `qnoise.rl.rollout_weights`.

    Args:
        schedule: sigma as a function of progress in [0, 1] (`qnoise.schedules`); or the mapping `state()` made of one.
            `EntropyTarget` is told of the entropy that TRL's trainers log, so it moves as often as they log.
        total_steps: generations over which the schedule runs; None for those of the whole run.
        seed: of the noise; the same on all ranks.
        multipliers: see `qnoise.NoiseScheduler`.

    Raises:
        ValueError: when training begins: no module of the model is noisy; there is another NoiseCallback; the head is
            quantized, and the trainer computes its loss from `lm_head.weight` without calling the head; a kernel
            (Liger's RMSNorm) was put in place of a patched module's forward; a checkpoint saved with another schedule.
            Later: `EntropyTarget` in a trainer that logs no entropy.
        ImportError: when training begins: a TRL or PEFT that is too old (`qnoise.requirements`).

    Warns:
        UserWarning: a checkpoint is written in the middle of a generation.
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
        # Batches that are done, where a generation is a number of batches. Like TRL's own count it runs on from one
        # `train()` to the next.
        self._batches = 0
        self._entropy: float | None = None
        self._warned = False

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
        scheduler = self._scheduler.state_dict() | {"entropy": self._entropy} if self._scheduler is not None else None
        return {"args": arguments, "attributes": {"scheduler_state": scheduler}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _stand_first(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _stand_first(self)
        model = kwargs["model"]
        inner = _inner(model)
        if inner is not model:
            require("peft", "NoiseCallback")
        if _of_trl(args):
            require("trl", "NoiseCallback")
        _refuse_bypassed_head(inner, args)
        _refuse_replaced_forwards(model)
        self._every = _batches_per_generation(args)
        steps = state.max_steps
        if self._every is not None:
            steps = ceil(steps * args.gradient_accumulation_steps / self._every)
        self._scheduler = NoiseScheduler(model, self.schedule, self.total_steps or steps, self.seed, self.multipliers)
        if state.global_step and (saved := self.scheduler_state or _saved(state)):
            self._scheduler.load_state_dict(saved)
            self._entropy = saved.get("entropy")
        save_with_config(model)
        _Phases.follow(inner, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._scheduler is None:
            raise ValueError("NoiseCallback was added after training had begun; give it to the trainer before train()")
        if self._every is None or self._batches % self._every == 0:
            self._scheduler.step(self._entropy)
            self._entropy = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1
        if self._every is not None:
            self.on_step_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs[LOG_KEY] = self.sigma
            if state.log_history:
                state.log_history[-1][LOG_KEY] = self.sigma
            if isinstance(self.schedule, schedules.EntropyTarget):
                if "entropy" not in logs:
                    raise ValueError(
                        f"EntropyTarget needs the entropy, and this trainer logs none (only {', '.join(logs)}). TRL's "
                        "trainers log it; elsewhere use a planned schedule, or NoiseScheduler.step(entropy=...)."
                    )
                self._entropy = float(logs["entropy"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and directory.is_dir():
            write_config(kwargs["model"], directory)
        if self._every is not None and self._batches % self._every and state.global_step < state.max_steps:
            self._warn_of_half_a_generation(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        _Phases.leave(_inner(model))
        for module in patched_modules(model):
            if module._qnoise.noise_during:
                module._qnoise.noise = Noise()

    def _warn_of_half_a_generation(self, step: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"checkpoint-{step} was saved in the middle of a generation ({self._every} batches share a rollout). "
                "TRL does not save the rollout, so a run resumed from it samples again and is not the undisturbed run. "
                "Choose save_steps so that checkpoints fall between generations.",
                UserWarning,
                stacklevel=2,
            )


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
        phase = "rollout" if self.sampling else "training" if self.inner.training else "evaluation"
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
        # A model in training that samples is in "rollout", also where `generate_batch` puts it into eval mode for that.
        outermost = not self.phases.sampling
        self.phases.sampling = self.phases.sampling or inner.training
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


def _batches_per_generation(args: Any) -> int | None:
    """How many batches share a rollout of TRL; None for a trainer that does not sample.

    There a generation is an optimizer step, and no number of batches: the last step of an epoch may have fewer.
    """
    per_generation = getattr(args, "steps_per_generation", None)
    return int(per_generation) * int(getattr(args, "num_iterations", 1) or 1) if per_generation else None


def _of_trl(args: Any) -> bool:
    """Whether these are the arguments of one of TRL's own trainers (or of one made of it)."""
    modules = {kind.__module__ for kind in type(args).__mro__} - {"trl.trainer.base_config"}
    return any(module.startswith("trl.trainer.") for module in modules)


def _refuse_bypassed_head(inner: nn.Module, args: Any) -> None:
    get_head = getattr(inner, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if not isinstance(head, FakeQuantLinear) or head._qnoise.weight_spec is None:
        return
    # All of TRL's own trainers that have a head multiply by `lm_head.weight`, most of them in a forward they put on the
    # instance; Liger's fused cross-entropy does the same in a kernel.
    code = getattr(getattr(inner.__dict__.get("forward"), "__func__", None), "__code__", None)
    trl = _of_trl(args) or (code is not None and "fused_lm_head" in code.co_varnames)
    kernels = getattr(args, "liger_kernel_config", None) or {}
    liger = getattr(args, "use_liger_kernel", False) and kernels.get("fused_linear_cross_entropy", True)
    if trl or liger:
        name = head._qnoise.name
        raise ValueError(
            f"{name} is quantized, but this trainer computes its loss from {name}.weight without calling the module, "
            "so the loss would see the full-precision head and generation the quantized one. Leave the head out (it is "
            "left out by default)"
            + ("." if trl else ", or switch that loss off: liger_kernel_config={'fused_linear_cross_entropy': False}.")
        )


def _refuse_replaced_forwards(model: nn.Module) -> None:
    """Kernels that are bound to instances (Liger's RMSNorm, those of `use_kernels=True`) hide what a patch does."""
    for module in patched_modules(model):
        bound = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
        function = getattr(bound, "__func__", bound)
        if bound is not None and function is not cast(Any, type(module)).forward:
            raise ValueError(
                f"{module._qnoise.name}: after patching, its forward was replaced by "
                f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}, which knows "
                "neither noise nor quantization. Switch that kernel off (for Liger: "
                "liger_kernel_config={'rms_norm': False}; for the Hub's: use_kernels=False)."
            )


def _stand_first(callback: NoiseCallback) -> None:
    """Move the callback before those that report: they pass on what is in `logs` when their turn comes.

    A callback is told of the trainer's numbers, not of the trainer; the handler that calls it is found in the stack.
    Where it is not, sigma still stands in `state.log_history`.

    Raises:
        ValueError: there are two, and each would undo what the other sets.
    """
    handler = _handler()
    if handler is None or callback not in handler.callbacks:
        return
    if sum(isinstance(other, NoiseCallback) for other in handler.callbacks) > 1:
        raise ValueError(
            "this trainer has more than one NoiseCallback, and a model has one sigma at a time. Use one; its "
            "multipliers= give modules and layers factors of their own."
        )
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def _handler() -> CallbackHandler | None:
    frame = sys._getframe(2)
    for _ in range(6):
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            return handler
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


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
