"""A patched model beside its own full-precision self: KL(teacher || student) on logits, and its gradient.

Both are forwards of the one model, the teacher's under `full_precision` and without noise, dropout and (on request)
adapters. With p of the teacher and q of the student at temperature T, per predicted token and in nats,

    KL = sum_j p_j log(p_j / q_j) - p_j + q_j        T^2 dKL/dz_j = T (q_j - p_j)

The last two terms of the sum cancel in exact arithmetic and take out the rounding of the softmaxes' own sums, which
would hide a small KL; T^2 keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

Of the logits only a few rows exist at a time. The model's head is run on one position inside the model, and again on
chunks of the hidden states it would have seen: where that gives what the model gives. A model that does something to
its logits behind the head (`final_logit_softcapping` of Gemma 2), that is sharded, or that has no head, gives all of
them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.patch import full_precision, quiet
from qnoise.rl.adapters import is_adapted
from qnoise.sensitivity.batches import evaluating

_IGNORED = -100  # the label of a token that does not count, as torch's cross entropy and transformers have it
_ELEMENTS_PER_CHUNK = 1 << 22
_FLOOR = -1e4  # exp of it is 0; stands for -inf where 0 * (-inf) has to be 0


class SelfTeacher:
    """The model, and how to make the teacher of it.

    Args:
        model: patched; gives logits (batch, tokens, vocabulary), as an attribute `logits` or as its output.
        adapters: whether the teacher has the adapters too.
        start: parameters that training moves and the teacher has as they were, with those values; empty where none is.
        temperature: of both softmaxes.
        chunk_rows: rows of logits at a time; None for about four million logits.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: bool,
        start: Sequence[tuple[nn.Parameter, Tensor]],
        temperature: float = 1.0,
        chunk_rows: int | None = None,
    ) -> None:
        self.model, self.adapters, self.start = model, adapters, start
        self.temperature, self.chunk_rows = temperature, chunk_rows
        self._head: nn.Module | None = None
        self._found_head = False

    def kl(self, batch: Any, backward: bool = False) -> tuple[float, int]:
        """Sum over the tokens that count of the KL, and their number.

        Args:
            batch: a tensor (batch, tokens) of ids, or keyword arguments of the model with "input_ids". A position
                counts if neither it nor the next is padding ("attention_mask"), and the next token's label is not -100
                ("labels", which the model does not get).
            backward: also add the gradient of T^2 times the mean KL to the parameters' `.grad`.
        """
        inputs = as_mapping(batch)
        counts = counted(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if not self._found_head:
            self._head, self._found_head = self._usable_head(inputs), True
        tokens = int(counts.sum())
        if not tokens:
            return 0.0, 0
        scale = self.temperature / tokens if backward else None
        if self._head is None:
            with torch.no_grad(), self._as_teacher(self.model):
                teacher = self._logits(inputs)[:, :-1][counts]
            with quiet(self.model), torch.set_grad_enabled(backward):
                student = self._logits(inputs)[:, :-1][counts]
            return self._of_logits(student, teacher, scale), tokens
        with torch.no_grad(), self._as_teacher(self.model):
            hidden_of_teacher = self._hidden(inputs, self._head)[:, :-1][counts]
        with quiet(self.model), torch.set_grad_enabled(backward):
            hidden = self._hidden(inputs, self._head)[:, :-1][counts]
            return self._of_hidden(hidden, hidden_of_teacher, self._head, scale), tokens

    def adapters_kl(self, batch: Any) -> float:
        """Mean KL from the full-precision model without adapters to the one with them."""
        inputs = as_mapping(batch)
        counts = counted(inputs)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        both = []
        for adapters in (False, True):
            with (
                torch.no_grad(),
                full_precision(self.model),
                adapters_set(self.model, adapters),
                evaluating(self.model),
            ):
                both.append(self._logits(inputs)[:, :-1][counts])
        return self._of_logits(both[1], both[0], None) / max(1, len(both[0]))

    @contextmanager
    def _as_teacher(self, module: nn.Module) -> Iterator[None]:
        own = {id(p) for p in module.parameters()} if module is not self.model else None
        start = [(p, value) for p, value in self.start if own is None or id(p) in own]
        with full_precision(module), evaluating(module), ExitStack() as stack:
            if not self.adapters:
                stack.enter_context(adapters_set(module, False))
            stack.enter_context(_swapped(start))
            yield

    def _of_logits(self, student: Tensor, teacher: Tensor, scale: float | None) -> float:
        """The sum of the KL of all rows; with a scale, their gradient goes backward."""
        total = 0.0
        # The teacher's rows make room for the gradient.
        step = self._rows(student)
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            kl, slope = kl_rows(student[rows].detach(), teacher[rows], self.temperature)
            total += kl.sum(dtype=torch.float64).item()
            if scale is not None:
                teacher[rows] = slope.mul_(scale)
        if scale is not None:
            student.backward(teacher.to(student.dtype))
        return total

    def _of_hidden(self, hidden: Tensor, of_teacher: Tensor, head: nn.Module, scale: float | None) -> float:
        """The same from hidden states (rows, width), a chunk of logits at a time."""
        total = 0.0
        slopes = torch.empty_like(hidden) if scale is not None else None
        width = getattr(head, "out_features", 1 << 17)
        step = self.chunk_rows or max(16, _ELEMENTS_PER_CHUNK // width)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            with torch.no_grad(), self._as_teacher(head):
                teacher = head(of_teacher[rows])
            leaf = hidden[rows].detach().requires_grad_(scale is not None)
            student = head(leaf)
            kl, slope = kl_rows(student.detach(), teacher, self.temperature)
            total += kl.sum(dtype=torch.float64).item()
            if slopes is not None and scale is not None:
                student.backward(slope.mul_(scale).to(student.dtype))
                slopes[rows] = cast(Tensor, leaf.grad)
            del teacher, student, slope  # before the next chunk is there
        if slopes is not None:
            hidden.backward(slopes)
        return total

    def _rows(self, logits: Tensor) -> int:
        return self.chunk_rows or max(1, _ELEMENTS_PER_CHUNK // max(1, logits.shape[-1]))

    def _logits(self, inputs: Mapping[str, Any]) -> Tensor:
        output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        ids = inputs["input_ids"]
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:-1] != ids.shape:
            raise TypeError(
                f"{type(self.model).__name__} gives no logits of shape (batch, tokens, vocabulary) for ids of shape "
                f"{tuple(ids.shape)}; self-distillation on logits needs a language model"
            )
        return logits

    def _hidden(self, inputs: Mapping[str, Any], head: nn.Module) -> Tensor:
        """What the head is given, (batch, tokens, width)."""
        seen, _ = self._run_to_head(inputs, head)
        return seen

    def _run_to_head(self, inputs: Mapping[str, Any], head: nn.Module) -> tuple[Tensor, Any]:
        """What the head is given, and the output of the model whose head is given the last position only."""
        seen: list[Tensor] = []

        def last_position(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, -1:], *args[1:])

        handle = head.register_forward_pre_hook(last_position)
        try:
            output = self.model(**inputs)
        finally:
            handle.remove()
        return (seen[0] if len(seen) == 1 else torch.empty(0)), output

    def _usable_head(self, inputs: Mapping[str, Any]) -> nn.Module | None:
        """The head, if the model's logits are what it makes of its hidden states and nothing else."""
        get: Any = getattr(self.model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if not isinstance(head, nn.Module) or any(hasattr(p, "device_mesh") for p in self.model.parameters()):
            return None
        with torch.no_grad(), quiet(self.model), evaluating(self.model):
            try:
                hidden, output = self._run_to_head(inputs, head)
            except (IndexError, TypeError):
                return None
            logits = getattr(output, "logits", None)
            if hidden.dim() != 3 or hidden.shape[:-1] != inputs["input_ids"].shape or not isinstance(logits, Tensor):
                return None
            again = head(hidden[:, -1:])
        return head if logits.shape == again.shape and torch.equal(logits, again) else None


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Per row of logits (rows, vocabulary): the KL, and q - p, both fp32."""
    q, p = student.float(), teacher.float()
    if temperature != 1.0:
        q, p = q / temperature, p / temperature
    log_q, log_p = q.log_softmax(-1).clamp_(min=_FLOOR), p.log_softmax(-1).clamp_(min=_FLOOR)
    q, p = log_q.exp(), log_p.exp()
    slope = q - p
    return log_p.sub_(log_q).mul_(p).add_(slope).sum(-1), slope


def as_mapping(batch: Any) -> Mapping[str, Any]:
    """A batch as keyword arguments.

    Raises:
        TypeError: neither a tensor of ids nor a mapping with "input_ids".
    """
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch
    raise TypeError(
        f"a batch is a {type(batch).__name__}; it must be a tensor of token ids or a mapping with 'input_ids', so that "
        "it is known which positions predict"
    )


def counted(inputs: Mapping[str, Any]) -> Tensor:
    """(batch, tokens - 1) bool: the positions that predict a token that counts."""
    ids = inputs["input_ids"]
    counts = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if isinstance(mask := inputs.get("attention_mask"), Tensor):
        counts = mask.to(ids.device).bool()
    counts = counts[:, :-1] & counts[:, 1:]
    if isinstance(labels := inputs.get("labels"), Tensor):
        counts = counts & (labels.to(ids.device)[:, 1:] != _IGNORED)
    return counts


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that PEFT added, which a forward with adapters disabled does not use."""
    found = set()
    for module in model.modules():
        kind: Any = type(module)
        for attribute in getattr(kind, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module):
                found |= {id(p) for p in part.parameters()}
            elif isinstance(part, nn.ParameterDict | dict):
                found |= {id(p) for p in part.values()}
    return found


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError if an adapter is merged into a weight: then no forward is without it."""
    for name, module in model.named_modules():
        merged: Any = getattr(module, "merged_adapters", None)
        if is_adapted(module) and merged:
            raise ValueError(f"{name}: adapter {merged[0]!r} is merged into the weight; call unmerge_adapter() first")


@contextmanager
def adapters_set(model: nn.Module, on: bool) -> Iterator[None]:
    """All adapters on, or off, for a while. PEFT's own `disable_adapter` also writes `requires_grad`."""
    layers = [m for m in model.modules() if "_disable_adapters" in m.__dict__ or hasattr(type(m), "_disable_adapters")]
    before = [layer.__dict__.get("_disable_adapters", False) for layer in layers]
    for layer in layers:
        layer.__dict__["_disable_adapters"] = not on
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.__dict__["_disable_adapters"] = disabled


@contextmanager
def _swapped(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Other values in the parameters for a while, by changing places: nothing is copied."""
    held = [(parameter, parameter.data) for parameter, _ in values]
    for parameter, value in values:
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in held:
            parameter.data = value
