"""Reading `inputs`: one batch or an iterable of them, run through a model that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnoise.patch import quiet


def batches(inputs: Any) -> Iterator[Any]:
    """The batches of `inputs`: a single tensor or mapping is one batch; anything else is an iterable of batches."""
    if isinstance(inputs, Tensor | Mapping):
        yield inputs
    else:
        yield from inputs


def call(model: nn.Module, batch: Any) -> Any:
    """What the model gives for one batch: a mapping of keyword arguments, a tuple of positional ones, or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def first_row(batch: Any) -> Any:
    """The first row of a batch, as a batch, if it is known how to take it; else the batch."""
    if isinstance(batch, Tensor):
        return batch[:1]
    if isinstance(batch, Mapping):
        values = list(batch.values())
        if all(isinstance(v, Tensor) and v.dim() and v.shape[0] == values[0].shape[0] for v in values):
            return {name: value[:1] for name, value in batch.items()}
    return batch


def mask_of(batch: Any) -> Tensor | None:
    """The batch's attention_mask, if it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(..., features) as (tokens, features), without padding where the mask fits, flattened as mixtures do or not."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and tuple(x.shape[:-1]) in (tuple(mask.shape), (mask.numel(),)):
        return rows[mask.to(x.device).reshape(-1) != 0]
    return rows


def watch(
    model: nn.Module,
    inputs: Any,
    handles: Iterable[RemovableHandle],
    mask: list[Tensor | None],
    run: Callable[[nn.Module, Any], Any] = call,
) -> None:
    """Run every batch through the model, quiet and evaluating, and take the hooks off again whatever happens.

    Args:
        handles: of the hooks that look on.
        mask: its one element is the mask of the batch that runs, for the hooks.
        run: what is done with a batch.

    Raises:
        ValueError: there is no batch.
    """
    count = 0
    try:
        with quiet(model), evaluating(model):
            for batch in batches(inputs):
                mask[0] = mask_of(batch)
                run(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("inputs holds no batch; give at least one (a tensor, a tuple of arguments or a mapping)")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout and no running statistics for a while. Flags are set one by one: `eval()` may do more."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training
