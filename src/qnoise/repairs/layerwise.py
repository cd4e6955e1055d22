"""Running a model one layer after the other: up to the layer in hand, without running again what comes before it.

A layer is an entry of one of the model's outermost `nn.ModuleList`s. What the layers before one give changes no more
once they have their last form, so they can give what they gave before, and a pass through all layers costs a few
forwards of the model instead of one a layer. That is right only where a layer needs nothing of earlier ones but what
the one before it returns (some models share keys and values between layers); so it is tried first, on a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from qnoise.names import canonical_name
from qnoise.sensitivity.batches import call


class Enough(Exception):
    """Raised out of a forward whose rest is of no interest."""


@dataclass(frozen=True, eq=False)
class Layer:
    """An entry of a list of modules: `name` is canonical, `before` are the entries before it."""

    name: str
    module: nn.Module
    before: tuple[nn.Module, ...]


def layers_with(model: nn.Module, linears: Container[nn.Module]) -> Iterator[Layer]:
    """Entries of lists of modules that are not inside another such list, in order, if they hold some of the linears."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(tuple(taken)):
            taken.append(path + ".")
            for key, layer in module.named_children():
                if any(m in linears for m in layer.modules()):
                    yield Layer(canonical_name(f"{path}.{key}"), layer, tuple(module)[: int(key)])


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a layer gave, one entry a batch."""

    of: nn.Module | None = None
    kept: tuple[Any, ...] = ()

    def skipping(self, layer: Layer, batch: int) -> Any:
        """A context in which the layers before this one return what the last of them gave, if it is that of `of`."""
        if not layer.before or self.of is not layer.before[-1]:
            return contextlib.nullcontext()
        return _returning(layer.before, self.kept[batch])


@contextmanager
def _returning(modules: tuple[nn.Module, ...], output: Any) -> Iterator[None]:
    """The modules return copies of the output, whatever they are given."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(_set_forward, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = lambda *_, **__: copy(output)
        yield


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def copy(output: Any) -> Any:
    """The output with tensors of its own: layers may write into what they are given."""
    return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, output)


@torch.no_grad()
def output_of(model: nn.Module, batch: Any, layer: nn.Module) -> Any:
    """What the layer returns, the forward being ended there; None if it is not reached."""
    found: list[Any] = []

    def end(_: nn.Module, __: Any, output: Any) -> None:
        found.append(copy(output))
        raise Enough

    handle = layer.register_forward_hook(end)
    try:
        with contextlib.suppress(Enough):
            call(model, batch)
    finally:
        handle.remove()
    return found[0] if found else None


def can_skip(model: nn.Module, batch: Any, layers: list[Layer]) -> bool:
    """Whether every layer gives the same bits when those before it are skipped. The model is to be evaluating."""
    outputs = Outputs()
    for layer in layers:
        whole = output_of(model, batch, layer.module)
        with outputs.skipping(layer, 0):
            again = output_of(model, batch, layer.module)
        if whole is None or not _same(whole, again):
            return False
        outputs = Outputs(layer.module, (whole,))
    return True


def _same(a: Any, b: Any) -> bool:
    (left, kind), (right, other) = tree_flatten(a), tree_flatten(b)
    return kind == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(left, right, strict=True)
    )
