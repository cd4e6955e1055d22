"""`WeightReader`: a module that computes with the weights of its linears itself sees Q(W) in them.

Mamba's mixers multiply by `self.dt_proj.weight`, their fused kernels take the weights of three linears, and the fast
path of `torch.nn.TransformerEncoderLayer` those of two: the forwards of those linears are never called there. While the
forward of such a module runs, and only then, `weight` of these linears is their `effective_weight()`. Outside it stays
the raw parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.patched import Patched, PatchRecord


@dataclass
class ReaderRecord(PatchRecord):
    """State of a converted module: the names of the linears whose weights it reads."""

    children: tuple[str, ...] = ()


class WeightReader(Patched, nn.Module):
    """Mixin over a stock class; `reader_class` makes the class. The stock forward runs unchanged."""

    _qnoise: ReaderRecord

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._served():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _served(self) -> Iterator[None]:
        # Below PEFT's layer or on its own; what PEFT adds is no FakeQuantLinear.
        linears = [
            m
            for name in self._qnoise.children
            for m in self.get_submodule(name).modules()
            if isinstance(m, FakeQuantLinear)
        ]
        for linear in linears:
            linear.__dict__["_qnoise_read"] = True
        try:
            yield
        finally:
            for linear in linears:
                linear.__dict__.pop("_qnoise_read", None)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time; pickle, deepcopy and spawn make it again from the stock class.
        return _rebuild, (self._qnoise.stock_class,), self.__dict__


_CLASSES: dict[type[nn.Module], type[WeightReader]] = {}


def reader_class(stock_class: type[nn.Module]) -> type[WeightReader]:
    """The reading subclass of a stock class (one per class). It has the stock class's name, by which transformers
    knows layers that must not be split, and which `save_pretrained` writes down."""
    if stock_class not in _CLASSES:
        namespace = {
            "__module__": stock_class.__module__,
            "__qualname__": stock_class.__qualname__,
            "__doc__": stock_class.__doc__,
        }
        made = type(stock_class.__name__, (WeightReader, stock_class), namespace)
        _CLASSES[stock_class] = cast(type[WeightReader], made)
    return _CLASSES[stock_class]


def _rebuild(stock_class: type[nn.Module]) -> WeightReader:
    cls = reader_class(stock_class)
    return cls.__new__(cls)
