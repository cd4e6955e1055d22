"""Injected hardware faults: what a unit that computes wrongly does to a model.

    with qnoise.faults.inject(model, qnoise.faults.Deadzone(0.003), layers=2):
        ...  # the output of layer 2 is zero where |x| < 0.003 max|x|

A fault changes a tensor on its way: the input or the output of a module, or the weight its forward reads. It is put
there by hooks; no parameter is written to, and `remove()` leaves the model as it was. The backward is that of the
module without the fault (straight through): a unit that errs in the forward does not change the formula of the
gradient. What it saves for the backward is what the unit gave out.

The random part of a fault is no stream. It is Philox keyed by (seed, step, canonical name) and counted by what is in
the token's vector, so that the same vector meets the same error whoever its batch mates are, on every rank, in a
resumed run and when gradient checkpointing computes it again; any other vector meets another. A new `step` draws anew.

A copy of a model made while a fault is in it has the fault for good: remove it first.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnoise.names import canonical_name, check_layer, layer_index, matches
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.packed import PackedLinear
from qnoise.nn.patched import PHASES, Patched
from qnoise.philox import philox4x32
from qnoise.spelling import check_choice, nearest

PLACES = ("input", "output", "weight")
"""Where a fault can act. "output" also means the layer's output for a module that returns a tuple: its first entry."""


class Fault(Protocol):
    """A function of a tensor. `key` fixes the draw of faults that have a random part."""

    def apply(self, x: Tensor, key: int = 0) -> Tensor:
        """The faulty tensor: shape, dtype and device of `x`, a tensor of its own."""
        ...  # pragma: no cover


@dataclass(frozen=True)
class Deadzone:
    """Zero where |x| < threshold * max|x|, the largest finite magnitude of the whole tensor.

    Args:
        threshold: above 0, at most 1.
    """

    threshold: float = 0.01

    def __post_init__(self) -> None:
        _check_number("Deadzone", "threshold", self.threshold, 1.0)

    def apply(self, x: Tensor, key: int = 0) -> Tensor:
        if not x.numel():
            return x.clone()
        magnitude = _wide(x).abs()
        limit = self.threshold * magnitude.nan_to_num(nan=0.0, posinf=0.0).amax()
        return x.masked_fill(magnitude < limit, 0.0)


@dataclass(frozen=True)
class GaussianError:
    """x + sigma |x| z (relative) or x + sigma z, z standard normal: one value for each element.

    Computed in fp32 (fp64 for fp64) and rounded to the dtype of x once. z is made of 24-bit uniform numbers by the
    Box-Muller transform; it is never beyond 5.8.
    """

    sigma: float = 1e-5
    relative: bool = True

    def __post_init__(self) -> None:
        _check_number("GaussianError", "sigma", self.sigma)

    def apply(self, x: Tensor, key: int = 0) -> Tensor:
        wide = _wide(x)
        error = self.sigma * _normal(x, key).to(wide.dtype)
        return (wide + error * wide.abs() if self.relative else wide + error).to(x.dtype)


@dataclass(frozen=True)
class Bias:
    """x + magnitude sign(x): every value is too large by the same amount; relative: x (1 + magnitude).

    Zeros stay zeros. A negative magnitude makes values too small; where it is larger than the value, the sign turns.
    """

    magnitude: float = 1e-5
    relative: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.magnitude) or self.magnitude == 0:
            raise ValueError(f"Bias: magnitude is {self.magnitude!r}; it must be a finite number other than 0")

    def apply(self, x: Tensor, key: int = 0) -> Tensor:
        wide = _wide(x)
        unit = wide if self.relative else wide.sign()
        return (wide + self.magnitude * unit).to(x.dtype)


class Injection:
    """A fault that is in a model, until `remove()` or the end of the `with` block.

    Attributes:
        fault, at: what acts, and where.
        names: canonical names of the modules it acts on, in the order of `named_modules`.
        seed, step: what fixes the random part. `step` may be set at any time.
        during: phases it acts in; None: always.
    """

    def __init__(self, fault: Fault, at: str, names: tuple[str, ...], seed: int, during: tuple[str, ...] | None):
        self.fault, self.at, self.names, self.seed, self.during = fault, at, names, seed, during
        self.step = 0
        self._handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Take the fault out. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Injection:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"at the {self.at} of {len(self.names)} modules" if self._handles else "removed"
        return f"Injection({self.fault}, {state})"


def inject(
    model: nn.Module,
    fault: Fault,
    include: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    layers: int | Iterable[int] | None = None,
    at: str = "output",
    seed: int = 0,
    during: str | Iterable[str] | None = None,
) -> Injection:
    """Put a fault into a model; it acts from now on.

    Args:
        model: any model, patched or not, wrapped by PEFT or not. In a PEFT model a name means the stock module: the
            fault is in the base linear, and the adapters' matrices are left out.
        fault: a `Deadzone`, `GaussianError` or `Bias`, or anything with their `apply`.
        include: globs on canonical names, or a function of (canonical name, module) that says which. None: the
            repeated layers (decoder or encoder layers) themselves.
        exclude: globs on canonical names.
        layers: indices of layers.
        at: "input" (the first floating tensor among the arguments), "output" (a tensor, or the first entry of a tuple
            or list), or "weight": what the module's forward reads as its weight, quantized and noisy where it is.
        seed: fixes the random part.
        during: phases ("rollout", "training", "evaluation") in which the fault acts; None: always. The phase is the
            one `qnoise.phase` sets, so the model must be patched.

    Returns:
        The injection: a context manager, with `.remove()`. Faults in one place act in the order they were injected.

    Raises:
        ValueError: unknown place or phase; a pattern or layer that matches nothing; `during` for a model that is not
            patched; a module whose weight is packed, absent or computed, for at="weight".
        TypeError: `model` is no module or `fault` no fault. In the forward: a module without a floating tensor there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; inject takes a torch.nn.Module")
    if isinstance(fault, type) or not callable(getattr(fault, "apply", None)):
        raise TypeError(f"fault is {fault!r}; give a Deadzone(...), GaussianError(...) or Bias(...)")
    check_choice("at", at, PLACES)
    phases = None if during is None else _strings(during)
    for phase in phases or ():
        check_choice("phase in during", phase, PHASES)
    anchor = next((m for m in model.modules() if isinstance(m, Patched)), None)
    if phases is not None and anchor is None:
        raise ValueError(
            f"during is {phases}, but no module of {type(model).__name__} is patched, so nothing knows the phase; "
            "patch the model first, or leave during out and inject for the time it should act"
        )
    chosen = _chosen(model, include, _strings(exclude), layers)
    if at == "weight":
        for name, module in chosen:
            _check_weight(name, module)
    injection = Injection(fault, at, tuple(name for name, _ in chosen), seed, phases)
    for name, module in chosen:
        acting = _Acting(injection, name, anchor)
        if at == "output":
            injection._handles.append(module.register_forward_hook(acting.on_output))
        elif at == "input":
            injection._handles.append(module.register_forward_pre_hook(acting.on_input, with_kwargs=True))
        else:
            injection._handles.append(module.register_forward_pre_hook(acting.lay_weight))
            injection._handles.append(module.register_forward_hook(acting.lift_weight, always_call=True))
    return injection


def repeated_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical name, module) of the outermost repeated layers: entries of lists of modules that are not inside
    another such list."""
    taken: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(p) for p in taken):
            taken.append(path + ".")
            for key, layer in module.named_children():
                yield canonical_name(f"{path}.{key}"), layer


@dataclass(eq=False)
class _Acting:
    """The hooks of one module."""

    injection: Injection
    name: str
    anchor: nn.Module | None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._now():
            return None
        if _is_floating(output):
            return self._faulty(output)
        if isinstance(output, tuple | list) and output and _is_floating(output[0]):
            entries = [self._faulty(output[0]), *output[1:]]
            return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
        raise TypeError(
            f"{self.name}: its output is {_described(output)}, and a fault needs a floating tensor there, or a tuple "
            "that begins with one; choose the module inside that computes it"
        )

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._now():
            return None
        for at, value in enumerate(args):
            if _is_floating(value):
                return (*args[:at], self._faulty(value), *args[at + 1 :]), kwargs
        for key, value in kwargs.items():
            if _is_floating(value):
                return args, {**kwargs, key: self._faulty(value)}
        raise TypeError(
            f"{self.name}: there is no floating tensor among its arguments for a fault to act on; use at='output', or "
            "leave it out with exclude="
        )

    def lay_weight(self, module: nn.Module, args: Any) -> None:
        if not self._now():
            return
        own = module.__dict__
        if not isinstance(module, Patched):
            own["weight"] = self._faulty(own.get("weight", cast(Tensor, module._parameters["weight"])))
            return
        if torch.compiler.is_compiling():
            raise ValueError(f"{self.name}: a fault in the weight of a patched module does not act in compiled code")
        method = "effective_weight"
        if isinstance(module, FakeQuantLinear) and module._qnoise.full_precision:
            method = "_raw_weight"
        faulty = self._faulty(getattr(module, method)())
        own[method] = lambda: faulty
        if not isinstance(module, FakeQuantLinear):  # a norm's forward asks for it only where noise acts
            own["weight"] = faulty

    def lift_weight(self, module: nn.Module, *_: Any) -> None:
        for attribute in ("weight", "effective_weight", "_raw_weight"):
            module.__dict__.pop(attribute, None)

    def _now(self) -> bool:
        during = self.injection.during
        if during is None:
            return True
        record = cast(nn.Module, self.anchor).__dict__.get("_qnoise")
        if record is None:
            raise ValueError(
                f"{self.name}: the fault acts during {', '.join(during)}, and the model was unpatched since, so "
                "nothing knows the phase; remove the injection before unpatching"
            )
        return record.phase in during

    def _faulty(self, x: Tensor) -> Tensor:
        injection = self.injection
        digest = hashlib.blake2b(f"{injection.seed}:{injection.step}:{self.name}".encode(), digest_size=8).digest()
        return cast(Tensor, _StraightThrough.apply(x, injection.fault, int.from_bytes(digest, "little")))


class _StraightThrough(torch.autograd.Function):
    """The faulty tensor with the gradient of the clean one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Fault, key: int) -> Tensor:
        return fault.apply(x, key)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _chosen(
    model: nn.Module,
    include: str | Iterable[str] | Callable[[str, nn.Module], bool] | None,
    exclude: tuple[str, ...],
    layers: int | Iterable[int] | None,
) -> list[tuple[str, nn.Module]]:
    """The modules a fault goes into."""
    modules = _stock_modules(model)
    wanted: list[tuple[str, nn.Module]]
    globs: tuple[str, ...] = ()
    if include is None:
        wanted = list(repeated_layers(model))
        if not wanted:
            raise ValueError(f"{type(model).__name__} has no repeated layers; name the modules with include=")
    elif callable(include):
        wanted = [(name, module) for name, module in modules if include(name, module)]
    else:
        globs = _strings(include)
        wanted = [(name, module) for name, module in modules if any(matches(name, glob) for glob in globs)]
    names = [name for name, _ in modules if name]
    for argument, patterns in (("include", globs), ("exclude", exclude)):
        for glob in patterns:
            if not any(matches(name, glob) for name in names):
                near = nearest(glob.rpartition(".")[2], sorted({n.rpartition(".")[2] for n in names}), cutoff=0.5)
                hint = f" Did you mean {near!r}?" if near else ""
                raise ValueError(f"{argument} names {glob!r}, which matches no module of {type(model).__name__}.{hint}")
    if layers is not None:
        indices = (layers,) if isinstance(layers, int) else tuple(layers)
        for index in indices:
            check_layer(index, names, model)
        wanted = [(name, module) for name, module in wanted if layer_index(name) in indices]
    wanted = [(name, module) for name, module in wanted if not any(matches(name, glob) for glob in exclude)]
    if not wanted:
        raise ValueError(
            f"include, exclude and layers together leave no module of {type(model).__name__} for the fault; it has, "
            f"among others: {', '.join(names[1:7])}"
        )
    return wanted


def _stock_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(canonical name, module), without adapters' matrices; of wrappers around a module, only the module itself."""
    adapters: list[str] = []
    named: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        own = getattr(type(module), "adapter_layer_names", ())
        adapters += [f"{path}.{layer}." for layer in own if layer != "modules_to_save"]
        if path.startswith(tuple(adapters)) or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        name = canonical_name(path)
        outer = [each for each in named.get(name, []) if not path.startswith(each[0] + "." if each[0] else "")]
        named[name] = [*outer, (path, module)]
    return [(name, module) for name, each in named.items() for _, module in each]


def _check_weight(name: str, module: nn.Module) -> None:
    if isinstance(module, PackedLinear):
        raise ValueError(f"{name}: its weight is packed, and no fault can be laid over it; patch with storage='auto'")
    if isinstance(module, Patched):
        return
    if isinstance(getattr(type(module), "weight", None), property) or module._parameters.get("weight") is None:
        raise ValueError(
            f"{name}: {type(module).__name__} has no weight parameter of its own for a fault to act on; use "
            "at='output', or leave it out with exclude="
        )


def _normal(x: Tensor, key: int) -> Tensor:
    """Standard normal values, fp32, one for each element of x: a function of the key, the index in the last axis and
    the bits of the vector along it."""
    width = x.shape[-1] if x.dim() else 1
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().reshape(-1, width).contiguous().view(integer).to(torch.int64)
    column = torch.arange(width, dtype=torch.int64, device=x.device)
    # An odd weight for each place; sums wrap modulo 2**64. Philox mixes what is left alike.
    weights = (2 * column + 1) * 0x1E3779B97F4A7C15
    vector = (bits * weights).sum(-1, keepdim=True)
    low, high = vector & 0xFFFFFFFF, (vector >> 32) & 0xFFFFFFFF
    counter = (column.expand_as(bits), low.expand_as(bits), high.expand_as(bits), torch.zeros_like(bits))
    first, second, _, _ = philox4x32(counter, (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
    radius = ((first >> 8) + 1).float().mul(2.0**-24).log().mul(-2.0).sqrt()
    angle = (second >> 8).float().mul(2.0**-24 * 2.0 * math.pi)
    return (radius * angle.cos()).reshape(x.shape)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} that begins with {_described(value[0])}" if value else "empty"
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_number(fault: str, field: str, value: float, most: float = math.inf) -> None:
    if not _is_number(value) or not 0 < value <= most:
        allowed = "a positive number" if most == math.inf else f"above 0 and at most {most:g}"
        raise ValueError(f"{fault}: {field} is {value!r}; it must be {allowed}")


def _strings(value: str | Iterable[str]) -> tuple[str, ...]:
    values: Sequence[str] = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(each, str) for each in values):
        raise TypeError(f"{values!r} must be a string or strings")
    return tuple(values)
