"""`FakeQuantMatrices`: a module whose stock forward works on matrices of its own sees Q(W) in them.

For what is no `nn.Linear` and has a forward that does more or other than F.linear: GPT-2's `Conv1D`, whose weight is
stored the other way round, known subclasses of `nn.Linear`, and fused mixture-of-experts, which hold the matrices of
all experts in one three-dimensional parameter. The stock forward runs unchanged, whichever kernel it picks; while it
runs, and only then, the attributes it reads its matrices from give the quantized ones. Blocks lie along the
contraction axis, as `axes` tells it for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.functional import fake_quantize
from qnoise.nn import weight_cache
from qnoise.nn.effective import StraightThrough
from qnoise.nn.patched import Patched, PatchRecord, stand_in
from qnoise.nn.sharding import check_gathered
from qnoise.nn.tokens import quantize_tokens


@dataclass
class MatricesRecord(PatchRecord):
    """State of a converted module: the contraction axis of each matrix, and the format of those that have one."""

    axes: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    # Of the input; where there is one matrix only, whose input is the module's.
    act_spec: QuantSpec | None = None
    act_amax: float | None = None
    storage: str = "auto"


class FakeQuantMatrices(Patched, nn.Module):
    """Mixin over a stock class; `matrices_class` makes the class.

    Gradients pass straight through the rounding to the raw parameters, which are never written to. A frozen parameter
    is quantized once and kept (storage "auto" and "cached"), a trained one in every forward.
    """

    _qnoise: MatricesRecord

    @property
    def effective_names(self) -> tuple[str, ...]:
        """The parameters whose quantized values the forward sees."""
        return tuple(self._qnoise.specs)

    def effective_weight(self, name: str = "weight") -> Tensor:
        """What the forward sees for this parameter, of its shape and dtype. Differentiable, straight through."""
        record = self._qnoise
        weight = cast(Tensor, self._parameters[name])
        spec = record.specs.get(name)
        if spec is None or record.full_precision:
            return weight
        if not torch.compiler.is_compiling():
            check_gathered(weight, f"{record.name}.{name}")
        axis = record.axes[name]
        trained = weight.requires_grad and torch.is_grad_enabled()
        kept_is_right = record.storage == "cached" or (record.storage == "auto" and not trained)
        if torch.compiler.is_compiling() or record.shards or not kept_is_right:
            return quantize_matrices(weight, spec, axis)
        kept = weight_cache.derived(weight, (spec, axis), None, lambda w: quantize_matrices(w, spec, axis))
        return StraightThrough.apply(weight, kept) if trained else kept

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        record = self._qnoise
        if record.full_precision:
            return super().forward(*args, **kwargs)
        if record.act_spec is not None:
            args = (quantize_tokens(args[0], record.act_spec, record.act_amax), *args[1:])
        if torch.compiler.is_compiling():
            twin = stand_in(self, **{name: self.effective_weight(name) for name in record.specs})
            return record.stock_class.forward(twin, *args, **kwargs)
        with self._serving():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        self.__dict__["_qnoise_served"] = {name: self.effective_weight(name) for name in self._qnoise.specs}
        try:
            yield
        finally:
            del self.__dict__["_qnoise_served"]

    def train(self, mode: bool = True) -> FakeQuantMatrices:
        for name in self._qnoise.specs:
            weight_cache.check_sample(cast(Tensor, self._parameters[name]))
        return super().train(mode)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time; pickle, deepcopy and spawn make it again from the stock class.
        state = {key: value for key, value in self.__dict__.items() if key != "_qnoise_served"}
        return _rebuild, (self._qnoise.stock_class, tuple(self._qnoise.axes)), state


def quantize_matrices(weight: Tensor, spec: QuantSpec, axis: int) -> Tensor:
    """Q(W) along `axis`; of three dimensions, each matrix of the first one by itself (its own per-tensor scale)."""
    if weight.dim() == 2 or not spec.per_tensor_scale:
        return fake_quantize(weight, spec, axis=axis)
    return torch.stack([fake_quantize(matrix, spec, axis=axis - 1) for matrix in weight])


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[FakeQuantMatrices]] = {}


def matrices_class(stock_class: type[nn.Module], names: tuple[str, ...]) -> type[FakeQuantMatrices]:
    """The subclass of a stock class that serves these parameters quantized (one per class and names)."""
    key = (stock_class, names)
    if key not in _CLASSES:
        namespace = {"__module__": stock_class.__module__, "__doc__": stock_class.__doc__}
        members = namespace | {name: _served(name) for name in names}
        made = type(f"FakeQuant{stock_class.__name__}", (FakeQuantMatrices, stock_class), members)
        _CLASSES[key] = cast(type[FakeQuantMatrices], made)
    return _CLASSES[key]


def _served(name: str) -> property:
    """A parameter as an attribute: inside the forward the quantized one, outside the raw one, which may be written to
    from there."""

    def get(self: nn.Module) -> Any:
        served = self.__dict__.get("_qnoise_served")
        if served is not None and name in served:
            return served[name]
        parameter = self._parameters[name]
        if parameter is not None and not torch.compiler.is_compiling():
            weight_cache.touch(parameter)
        return parameter

    return property(get)


def _rebuild(stock_class: type[nn.Module], names: tuple[str, ...]) -> FakeQuantMatrices:
    cls = matrices_class(stock_class, names)
    return cls.__new__(cls)


# Classes of transformers whose forward is not that of a linear, with the contraction axes of their matrices: (in, out);
# (out, in), multiplied by the transpose; blocks of a block-diagonal matrix, (groups * out, in of a group); stacks of
# (experts, out, in) that have nothing to tell their orientation by.
_KNOWN: dict[str, dict[str, int]] = {
    "Conv1D": {"weight": 0},
    "FalconLinear": {"weight": 1},
    "DeepseekV4GroupedLinear": {"weight": 1},
    "JetMoeParallelExperts": {"weight": 2},
    "InklingSharedExperts": {"gate_proj": 2, "up_proj": 2, "down_proj": 2},
}


def matrix_axes(module: nn.Module) -> dict[str, int]:
    """The matrices of a module this file knows how to serve, with their contraction axes; empty if it knows none.

    Some are known by their class; of transformers only, as others use the same names for other things. Other fused
    experts hold (experts, out, in) or (experts, in, out): their `is_transposed` says which, and where there is no such
    attribute (Llama 4) the shapes of the pair do: what goes into the second matrix comes out of the first.
    """
    kind = type(module)
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    known = _KNOWN.get(kind.__name__)
    if known and kind.__module__.startswith("transformers.") and all(len(shapes.get(name, ())) >= 2 for name in known):
        return dict(known)
    first, second = next((n for n in ("gate_up_proj", "up_proj") if n in shapes), ""), "down_proj"
    stacked = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    if "experts" not in kind.__name__.lower() or first not in stacked or second not in stacked:
        return {}
    names = [name for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj") if name in stacked]
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        gates = 2 if first == "gate_up_proj" else 1
        (_, a, b), (_, c, d) = stacked[first], stacked[second]
        out_in, in_out = (a == gates * d and b == c), (b == gates * c and a == d)
        if out_in == in_out:
            return {}
        transposed = in_out
    return dict.fromkeys(names, 1 if transposed else 2)
