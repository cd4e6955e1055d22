"""Short self-distillation: the adapters of a patched model learn to undo what quantization did to it.

The teacher is the same model in full precision, so there is no second copy in memory; the loss is KL(teacher ||
student) on the logits (quantization-aware distillation, as in LLM-QAT, arXiv 2305.17888, and QLoRA-style adapters).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.patch import patch_config
from qnoise.repairs.self_teacher import SelfTeacher, adapter_parameters, check_unmerged
from qnoise.rl.adapters import is_adapted
from qnoise.sensitivity.batches import evaluating
from qnoise.spelling import check_choice

TEACHERS = ("base", "adapted")
# An adapter that moves the full-precision model by less than this share of what quantization does is a fresh one:
# of one that has learnt nothing only rounding is seen.
_FRESH = 0.01


@dataclass(frozen=True)
class DistillReport:
    """What a distillation did.

    Attributes:
        kl: mean KL per counted token, in nats, of each step's batch before the step.
        before, after: mean KL on the holdout, or on the first batch if there was none. `after` is that of the
            parameters the model has now.
        measured_on: "holdout" or "first batch".
        history: (steps done, KL) of each measurement on the holdout.
        steps: optimizer steps that were taken.
        kept_step: after how many of them the parameters that the model has now were reached.
        stopped: "steps", "patience", or "batches" if they ran out.
        tokens: tokens that counted, over all steps.
        trained: number of parameters that moved.
        seconds: wall time.
    """

    kl: tuple[float, ...]
    before: float
    after: float
    measured_on: str
    history: tuple[tuple[int, float], ...]
    steps: int
    kept_step: int
    stopped: str
    tokens: int
    trained: int
    seconds: float

    def __str__(self) -> str:
        kept = "" if self.kept_step == self.steps else f", kept those after step {self.kept_step}"
        why = {"steps": "", "patience": ", stopped early", "batches": ", the batches ran out"}[self.stopped]
        return (
            f"distilled {self.trained:,} parameters for {self.steps} steps ({self.tokens:,} tokens, "
            f"{self.seconds:.1f} s{why}{kept}): KL {self.before:.3g} -> {self.after:.3g} on the {self.measured_on}"
        )


def distill(
    model: nn.Module,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    temperature: float = 1.0,
    teacher: str | None = None,
    scheduler: Any = None,
    max_grad_norm: float | None = 1.0,
    holdout: Any = None,
    every: int = 10,
    patience: int | None = None,
    chunk_rows: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> DistillReport:
    """Train what the optimizer holds so that the quantized model predicts what it predicts in full precision.

    A repair of 60 steps or so, not a training run: text that the model wrote itself serves best (see
    `qnoise.repairs.text.self_generated`). Noise is off; quantization of weights and activations is on in the student.
    Dropout acts in the student if it is in training mode.

    Args:
        model: a patched model, with LoRA adapters (or any PEFT adapters) as a rule. Without adapters whatever requires
            grad is trained, and a copy of it is kept for the teacher.
        batches: one batch, or an iterable of them, gone through again if it is a sequence; a batch is a tensor
            (batch, tokens) of ids or a mapping of keyword arguments with "input_ids". Padding ("attention_mask") and
            tokens of label -100 ("labels") do not count.
        optimizer: the caller's, over the parameters to train. Adapters that `init_lora_from_residual` started are
            larger than fresh ones, and a step of theirs moves the function more: give them a learning rate ten times
            lower.
        steps: optimizer steps, a batch each.
        temperature: > 0, of both softmaxes; the gradient is that of T^2 KL.
        teacher: "base": full precision without adapters: for adapters that are there to repair, fresh or started by
            `init_lora_from_residual`. "adapted": full precision with the adapters as they are at the call: for
            adapters that have learnt something through the quantized base, or beside it, that is to be kept. None:
            "base", if the adapters do nothing yet; an error otherwise.
        scheduler: a learning-rate scheduler, stepped after each step.
        max_grad_norm: clip the gradient of all parameters together to this norm; None: do not.
        holdout: batches to measure on: before, every `every` steps and at the end. The parameters of the best
            measurement are those the model has in the end.
        patience: stop after so many steps without a better measurement.
        chunk_rows: rows of logits that exist at a time; None for about four million logits.
        seed: of dropout and stochastic rounding; the caller's random state is left as it was.
        progress: a bar on stderr.

    Returns:
        A report. Gradients are None afterwards.

    Raises:
        ValueError: the model is not patched, or packed; nothing to train, or nothing of it in the optimizer; adapters
            that do something already and no `teacher`; a merged adapter; no token counts; a loss or gradient that is
            not finite; a number out of its range; `patience` without `holdout`.
        TypeError: a batch of another kind; a model without logits.
        After an error, parameters and optimizer are as they were. After an interrupt they are as far as they got.
    """
    _check_numbers(steps, temperature, every, patience, holdout, max_grad_norm)
    if teacher is not None:
        check_choice("teacher", teacher, TEACHERS)
    if patch_config(model) is None:
        raise ValueError(
            f"{type(model).__name__} is not patched, so it is its own teacher already; call qnoise.patch_model first"
        )
    check_unmerged(model)
    trained = _trained(model, optimizer)
    stream = _Stream(batches)
    began = time.perf_counter()
    devices = sorted({p.device.index or 0 for p in trained if p.device.type == "cuda"})
    state = copy.deepcopy(optimizer.state_dict())
    values = [(p, p.detach().clone()) for p in trained]
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            of_teacher = SelfTeacher(model, teacher == "adapted", (), temperature, chunk_rows)
            first = stream.first()
            if teacher is None:
                _check_fresh(of_teacher, first)
            of_teacher.start = _kept_for_teacher(model, values, of_teacher.adapters)
            run = _Run(of_teacher, optimizer, scheduler, trained, max_grad_norm)
            measured = [first] if holdout is None else _as_list(holdout)
            return run.go(stream, steps, measured, holdout is not None, every, patience, progress, began)
    except Exception:
        for parameter, value in values:
            with torch.no_grad():
                parameter.copy_(value)
        optimizer.load_state_dict(state)
        raise
    finally:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None


class _Run:
    def __init__(
        self,
        teacher: SelfTeacher,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        trained: list[nn.Parameter],
        max_grad_norm: float | None,
    ) -> None:
        self.teacher, self.optimizer, self.scheduler = teacher, optimizer, scheduler
        self.trained, self.max_grad_norm = trained, max_grad_norm

    def go(
        self,
        stream: _Stream,
        steps: int,
        measured: list[Any],
        held_out: bool,
        every: int,
        patience: int | None,
        progress: bool,
        began: float,
    ) -> DistillReport:
        history = [(0, self.measure(measured))]
        best, best_values = history[0], self._values() if held_out else None
        losses: list[float] = []
        tokens, stopped = 0, "steps"
        bar = _bar(steps, progress)
        for batch in stream:
            kl, count = self.step(batch, len(losses) + 1)
            losses.append(kl)
            tokens += count
            done = len(losses)
            if bar is not None:
                bar.set_postfix_str(f"KL {kl:.3g}", refresh=False)
                bar.update()
            if held_out and (done % every == 0 or done == steps):
                history.append((done, self.measure(measured)))
                if history[-1][1] < best[1]:
                    best, best_values = history[-1], self._values()
                elif patience is not None and done - best[0] >= patience and done < steps:
                    stopped = "patience"
                    break
            if done == steps:
                break
        else:
            stopped = "batches"
        if bar is not None:
            bar.close()
        done = len(losses)
        if history[-1][0] != done:
            history.append((done, self.measure(measured)))
            if held_out and history[-1][1] < best[1]:
                best, best_values = history[-1], None
        kept, after = history[-1]
        if held_out and best[0] != done and best_values is not None:
            with torch.no_grad():
                for parameter, value in zip(self.trained, best_values, strict=True):
                    parameter.copy_(value)
            kept, after = best
        return DistillReport(
            kl=tuple(losses),
            before=history[0][1],
            after=after,
            measured_on="holdout" if held_out else "first batch",
            history=tuple(history) if held_out else (),
            steps=done,
            kept_step=kept,
            stopped=stopped,
            tokens=tokens,
            trained=sum(p.numel() for p in self.trained),
            seconds=time.perf_counter() - began,
        )

    def step(self, batch: Any, number: int) -> tuple[float, int]:
        """(mean KL of the batch before the step, tokens)."""
        for parameter in self.teacher.model.parameters():
            parameter.grad = None
        total, tokens = self.teacher.kl(batch, backward=True)
        if not tokens:
            raise ValueError(f"step {number}: no token of the batch counts; leave such batches out")
        grads = [p.grad for p in self.trained if p.grad is not None]
        if not grads:
            raise ValueError("the KL does not depend on what the optimizer holds: are the adapters disabled?")
        norm = torch.nn.utils.get_total_norm(grads)
        if not math.isfinite(total) or not torch.isfinite(norm):
            raise ValueError(
                f"step {number}: the KL is {total / tokens:.3g} and the norm of its gradient {float(norm):.3g}. Lower "
                "the learning rate, or look for what is not finite with qnoise.scan"
            )
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.max_grad_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return total / tokens, tokens

    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> float:
        """Mean KL over batches, without dropout."""
        total = tokens = 0.0
        with evaluating(self.teacher.model):
            for batch in batches:
                kl, count = self.teacher.kl(batch)
                total, tokens = total + kl, tokens + count
        if not tokens:
            raise ValueError("no token counts: the batches are empty, or all masked; give at least two tokens in a row")
        return total / tokens

    def _values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]


class _Stream:
    """Batches, again and again if they can be gone through again."""

    def __init__(self, batches: Any) -> None:
        self._batches = [batches] if isinstance(batches, Tensor | Mapping) else batches
        self._once = isinstance(self._batches, Iterator)
        self._first: list[Any] = []

    def first(self) -> Any:
        """The first batch, which iterating gives again."""
        batch = next(iter(self._batches), None)
        if batch is None:
            raise ValueError("batches is empty; give at least one")
        self._first = [batch] if self._once else []
        return batch

    def __iter__(self) -> Iterator[Any]:
        yield from self._first
        while True:
            yield from self._batches
            if self._once:
                return


def _as_list(batches: Any) -> list[Any]:
    return [batches] if isinstance(batches, Tensor | Mapping) else list(batches)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What both requires grad in the model and is in the optimizer."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    if not wanted:
        adapted = any(is_adapted(m) for m in model.modules())
        cure = "its adapters are frozen; unfreeze them" if adapted else "add an adapter (peft.get_peft_model)"
        raise ValueError(f"no parameter of {type(model).__name__} requires grad, so there is nothing to train: {cure}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in wanted if id(p) in held]
    if not trained:
        raise ValueError(
            f"the optimizer holds none of the {len(wanted)} parameters of {type(model).__name__} that require grad; "
            "make it after the adapters were added, over [p for p in model.parameters() if p.requires_grad]"
        )
    return trained


def _kept_for_teacher(
    model: nn.Module, values: list[tuple[nn.Parameter, Tensor]], adapters: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """The start values the teacher needs: of all that moves, but for adapters it does without."""
    unused = set() if adapters else adapter_parameters(model)
    return [(parameter, value) for parameter, value in values if id(parameter) not in unused]


def _check_fresh(teacher: SelfTeacher, batch: Any) -> None:
    if not any(is_adapted(m) for m in teacher.model.modules()):
        return
    moved = teacher.adapters_kl(batch)
    with evaluating(teacher.model), torch.no_grad():
        total, tokens = teacher.kl(batch)
    if tokens and moved > _FRESH * total / tokens:
        raise ValueError(
            f"the adapters do something already (they move the full-precision model by a KL of {moved:.3g}, and the "
            f"quantized model is {total / tokens:.3g} away from its base), so say what they are to learn: "
            "teacher='adapted' keeps what they have learnt, teacher='base' makes the model its full-precision base "
            "again (right after init_lora_from_residual)"
        )


def _check_numbers(
    steps: int, temperature: float, every: int, patience: int | None, holdout: Any, max_grad_norm: float | None
) -> None:
    for name, value in (("steps", steps), ("every", every), ("patience", patience)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    for name, number in (("temperature", temperature), ("max_grad_norm", max_grad_norm)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} is {number!r}; it must be positive and finite")
    if patience is not None and holdout is None:
        raise ValueError(
            "patience needs holdout=: batches that are not trained on, to tell whether it still gets better"
        )


def _bar(steps: int, progress: bool) -> Any:
    if not progress:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc="distill", unit="step")
