"""Where per-channel factors can move without changing the function: found by running the model, not by its names.

A *pair* is a source, a norm or a linear, and all the linears that read its output: dividing the source's channels by s
and multiplying the readers' columns by s leaves the function as it is. Three questions are put to the model, in full
precision and with powers of two, which round nothing, so that the answers are exact:

- Which linears are given the very tensor that a norm returned?
- Which linears are given twice as much when the outputs of another one are doubled, and which column comes from which
  channel? The channels are doubled by the binary digits of their index, so a few runs tell. While this is asked every
  linear gets the input it had, so that the answer is about one step only (a value and its output projection, the two
  factors of a gated MLP), in all layers at once.
- Does the model still give the same bits if the source's channels are divided by random powers of two and the readers'
  inputs multiplied by them? It does if, and only if, nothing else reads the source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.packed import PackedLinear
from qnoise.rl.adapters import is_adapted
from qnoise.sensitivity.batches import call
from qnoise.targets import decide

_EXPONENTS = 3  # of the random powers of two: -3 to 3


@dataclass(frozen=True, eq=False)
class Pair:
    """One source and its readers.

    Attributes:
        name: canonical name of the source.
        source: a module with a weight for each channel (a norm), or a linear; inside PEFT's layer, if it has one.
        readers: canonical name -> linear, inside PEFT's layer.
        columns: int64 (in_features of the readers,): the channel of the source that each column reads.
        one_plus: the norm multiplies by 1 + weight, as Gemma's do.
    """

    name: str
    source: nn.Module
    readers: Mapping[str, nn.Linear]
    columns: Tensor
    one_plus: bool = False

    @property
    def channels(self) -> int:
        return int(self.source._parameters["weight"].shape[0])  # type: ignore[union-attr]

    @property
    def of_norm(self) -> bool:
        return not isinstance(self.source, nn.Linear)


@dataclass(eq=False)
class _Place:
    """A linear, and the module that is given its input and gives its output: PEFT's layer, or itself."""

    name: str
    path: str
    linear: nn.Module
    outer: nn.Module

    @property
    def channels(self) -> int:
        """Of its output; 0 if it does not say."""
        return int(getattr(self.linear, "out_features", 0))


@dataclass(eq=False)
class _Seen:
    """What a plain run showed."""

    output: Tensor
    given: dict[nn.Module, Tensor] = field(default_factory=dict)  # outer -> input
    calls: dict[nn.Module, int] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    norms: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=dict)
    readers: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)


@torch.no_grad()
def find_pairs(model: nn.Module, batch: Any, wanted: Callable[[nn.Module], bool]) -> tuple[list[Pair], dict[str, str]]:
    """All pairs that a batch can prove.

    Args:
        model: in evaluation mode and in full precision (see `full_precision`, `evaluating`).
        batch: an argument of the model, or a tuple or mapping of arguments; a few tokens will do.
        wanted: whether a linear is one worth folding into (a quantized one).

    Returns:
        Pairs with at least one wanted reader, and for other sources of wanted linears: canonical name -> why not.

    Raises:
        ValueError: the model gives no tensor, or not the same bits twice.
    """
    places = _places(model)
    by_outer = {place.outer: place for place in places}
    norms = _norms(model, by_outer)
    seen = _look(model, batch, places, norms)
    if not torch.equal(seen.output, output_of(model, batch)):
        raise ValueError(
            f"{type(model).__name__} does not give the same output twice, so it cannot be told whether a fold changes "
            "it; look for what is random in its forward"
        )
    holders, lora = _holders(model), lora_layers(model)
    found: list[tuple[Pair, list[_Place]]] = []
    skipped: dict[str, str] = {}
    for norm, name in norms.items():
        readers = [by_outer[outer] for outer in seen.readers.get(norm, ())]
        if not any(wanted(reader.linear) for reader in readers):
            continue
        width = norm._parameters["weight"].shape[0]  # type: ignore[union-attr]
        one_plus, why = _multiplies(norm, *seen.norms[norm])
        why = why or _unfit(norm, name, readers, width, holders, seen, lora)
        if why:
            skipped[name] = why
        else:
            linears = {reader.name: reader.linear for reader in readers}
            found.append((Pair(name, norm, linears, torch.arange(width), one_plus), readers))  # type: ignore[arg-type]
    for source, reader, columns, why in _linear_pairs(model, batch, places, seen):
        if not wanted(reader.linear):
            continue
        why = why or _unfit(source.linear, source.name, [reader], None, holders, seen, lora)
        if source.name in skipped or any(pair.source is source.linear for pair, _ in found):
            why = f"several linears read it, {reader.name} among them"
            found = [each for each in found if each[0].source is not source.linear]
        if why:
            skipped[source.name] = why
        else:
            found.append((Pair(source.name, source.linear, {reader.name: reader.linear}, columns), [reader]))  # type: ignore[dict-item]
    outer_of = {place.linear: place.outer for place in places}
    proven = _proven(model, batch, seen.output, found, outer_of)
    for pair, _ in found:
        if pair not in proven:
            skipped[pair.name] = f"something else reads its output besides {', '.join(pair.readers)}"
    return proven, skipped


def lora_layers(model: nn.Module) -> dict[nn.Module, Any]:
    """Linear -> PEFT's layer around it."""
    return {m.base_layer: m for m in model.modules() if is_adapted(m)}  # type: ignore[misc]


def _places(model: nn.Module) -> list[_Place]:
    outer_of = lora_layers(model)
    return [
        _Place(d.name, d.path, d.module, outer_of.get(d.module, d.module))
        for d in decide(model, PatchConfig("mxfp4"))
        if d.kind == "linear" and d.reason != "adapter matrix"
    ]


def _norms(model: nn.Module, linears: Mapping[nn.Module, _Place]) -> dict[nn.Module, str]:
    """Modules with a weight for each channel, whatever they are called; only what they compute will tell."""
    norms = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and module not in linears:
            norms[module] = path if "modules_to_save" in path or "original_module" in path else canonical_name(path)
    return norms


def _look(model: nn.Module, batch: Any, places: Sequence[_Place], norms: Mapping[nn.Module, str]) -> _Seen:
    """One plain run, and who was given what."""
    seen = _Seen(torch.empty(0))

    def after_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.calls[module] = seen.calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            seen.norms[module] = (args, kwargs, output)

    def before_linear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        seen.calls[module] = seen.calls.get(module, 0) + 1
        if not isinstance(x, Tensor):
            return
        seen.given[module] = x
        seen.order.append(module)
        for norm, (_, _, output) in seen.norms.items():
            same_memory = x.data_ptr() == output.data_ptr() and x.shape[-1:] == output.shape[-1:]
            if x is output or (same_memory and x.numel() == output.numel() and x.dtype == output.dtype):
                seen.readers.setdefault(norm, []).append(module)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(after_norm, with_kwargs=True).remove)
        for place in places:
            stack.callback(place.outer.register_forward_pre_hook(before_linear, with_kwargs=True).remove)
        seen.output = output_of(model, batch)
    return seen


def _multiplies(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> tuple[bool, str]:
    """(whether it multiplies by 1 + weight, "" or why it does neither): asked with half the factor."""
    own = {key: p for key, p in norm._parameters.items() if p is not None}
    half = output.mul(0.5)

    def same(values: dict[str, Tensor], exact: bool) -> bool:
        got = torch.func.functional_call(norm, values, args, kwargs)
        if exact:
            return torch.equal(got, half)
        # 1 + weight is rounded where it is small.
        tolerance = 8 * torch.finfo(half.dtype).eps
        return torch.allclose(got, half, rtol=tolerance, atol=tolerance * float(half.abs().max()))

    if set(own) <= {"weight", "bias"}:
        if same({key: p.mul(0.5) for key, p in own.items()}, exact=True):
            return False, ""
        one_plus = {key: p.add(1).mul(0.5).sub(1) if key == "weight" else p.mul(0.5) for key, p in own.items()}
        if same(one_plus, exact=False):
            return True, ""
    return False, f"its output is no multiple of its weight, or of 1 + its weight ({type(norm).__name__})"


def _unfit(
    source: nn.Module,
    name: str,
    readers: Sequence[_Place],
    width: int | None,
    holders: Mapping[int, int],
    seen: _Seen,
    outer_of: Mapping[nn.Module, Any],
) -> str:
    """Why the values of a pair cannot be written; empty if they can."""
    if "modules_to_save" in name or "original_module" in name:
        return "an adapter trains a copy of it, and only one of the two would be folded"
    modules = [(name, source, seen.calls.get(source, 1))]
    modules += [(reader.name, reader.linear, seen.calls.get(reader.outer, 0)) for reader in readers]
    for each, module, calls in modules:
        if isinstance(module, PackedLinear):
            return f"{each} is packed"
        if module is not source or width is None:
            if not isinstance(module, nn.Linear) or (
                type(module) is not nn.Linear and not isinstance(module, FakeQuantLinear)
            ):
                return f"{each} is a {type(module).__name__}, not an nn.Linear"
            if isinstance(module, FakeQuantLinear) and module._qnoise.act_amax is not None:
                return f"the scale of {each}'s input is static (act_amax), measured before the fold; fold first"
        if why := _odd_adapter(each, outer_of.get(module)):
            return why
        if calls > 1:
            return f"{each} runs {calls} times in a forward"
        for key in ("weight", "bias"):
            parameter = module._parameters.get(key)
            if parameter is None:
                if key == "weight":
                    return f"{each}.weight is no parameter of its own"
                continue
            if holders.get(id(parameter), 0) > 1:
                return f"{each}.{key} is shared with another module"
            if parameter.is_meta or hasattr(parameter, "device_mesh"):
                return f"{each}.{key} is out of reach (offloaded or sharded)"
    if width is not None:
        for reader in readers:
            if reader.linear.in_features != width:
                return f"{reader.name} has {reader.linear.in_features} columns for its {width} channels"
    return ""


def _odd_adapter(name: str, layer: Any) -> str:
    """Why an adapter around a linear cannot be scaled with it; empty if it can, or there is none."""
    if layer is None:
        return ""
    odd = [each for each in getattr(layer, "lora_variant", {}).values() if each is not None]
    if odd or not hasattr(layer, "lora_A") or not hasattr(layer, "get_delta_weight"):
        return f"{name} has an adapter that is no plain LoRA ({type(odd[0] if odd else layer).__name__})"
    return ""


def _linear_pairs(
    model: nn.Module, batch: Any, places: Sequence[_Place], seen: _Seen
) -> list[tuple[_Place, _Place, Tensor, str]]:
    """(source, reader, column -> channel, "" or why not) of linears that read another one's channels, scaled.

    Linears whose names differ in numbers only are asked together: they stand in different layers.
    """
    by_outer = {place.outer: place for place in places}
    groups: dict[str, list[_Place]] = {}
    for place in places:
        if place.outer in seen.given and place.channels:
            groups.setdefault(re.sub(r"\d+", "*", place.name), []).append(place)
    pairs = []
    for group in groups.values():
        sources = {place.outer: place for place in group}
        readers: dict[nn.Module, _Place] = {}  # outer of the reader -> source
        last: _Place | None = None
        doubled = _scaled_run(model, batch, places, seen, {outer: torch.tensor(2.0) for outer in sources})
        for outer in seen.order:
            given = seen.given[outer]
            if last is not None and given.any() and torch.equal(doubled[outer], given * 2):
                readers[outer] = last
            last = sources.get(outer, last)
        if not readers:
            continue
        widths = [place.channels for place in group]
        digits = [
            _scaled_run(
                model,
                batch,
                places,
                seen,
                {o: 1.0 + ((torch.arange(p.channels) >> digit) & 1) for o, p in sources.items()},
            )
            for digit in range(max(1, (max(widths) - 1).bit_length()))
        ]
        for outer, source in readers.items():
            columns, why = _decode(seen.given[outer], [run[outer] for run in digits], source)
            pairs.append((source, by_outer[outer], columns, why))
    return pairs


def _decode(given: Tensor, runs: Sequence[Tensor], source: _Place) -> tuple[Tensor, str]:
    """The channel each column comes from: its binary digits are the runs in which the column was doubled."""
    width = given.shape[-1]
    flat = given.reshape(-1, width)
    columns = torch.zeros(width, dtype=torch.int64)
    if not flat.ne(0).any(0).all():
        return columns, "a column of its reader stayed zero, so it is not known which channel it reads"
    for digit, run in enumerate(runs):
        now = run.reshape(-1, width)
        twice, once = (now == flat * 2).all(0), (now == flat).all(0)
        if not (twice | once).all():
            return columns, "its reader mixes its channels"
        columns |= twice.cpu().long() << digit
    if columns.max() >= source.channels:
        return columns, "its reader mixes its channels"
    return columns, ""


def _scaled_run(
    model: nn.Module, batch: Any, places: Sequence[_Place], seen: _Seen, factors: Mapping[nn.Module, Tensor]
) -> dict[nn.Module, Tensor]:
    """What each linear would be given if some had their outputs scaled; all are given what they had."""
    got: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or module not in seen.given:
            return None
        got[module] = x
        if args:
            return (seen.given[module], *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): seen.given[module]}

    with ExitStack() as stack:
        for place in places:
            stack.callback(place.outer.register_forward_pre_hook(before, with_kwargs=True).remove)
        for outer, factor in factors.items():
            stack.callback(outer.register_forward_hook(_times(factor)).remove)
        output_of(model, batch)
    return {outer: got.get(outer, given) for outer, given in seen.given.items()}


def _times(factor: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return output * factor.to(output) if isinstance(output, Tensor) else None

    return hook


def _proven(
    model: nn.Module,
    batch: Any,
    expected: Tensor,
    found: Sequence[tuple[Pair, list[_Place]]],
    outer_of: Mapping[nn.Module, nn.Module],
) -> list[Pair]:
    """The pairs with which the model gives the same bits: all at once if they do, else one by one."""

    def same(some: Sequence[tuple[Pair, list[_Place]]]) -> bool:
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            for pair, readers in some:
                exponents = torch.randint(-_EXPONENTS, _EXPONENTS + 1, (pair.channels,), generator=generator)
                factor = torch.ldexp(torch.ones(pair.channels), exponents)
                outer = outer_of.get(pair.source, pair.source)
                stack.callback(outer.register_forward_hook(_times(factor.reciprocal())).remove)
                for reader in readers:
                    hook = _times_input(factor[pair.columns])
                    stack.callback(reader.outer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return torch.equal(output_of(model, batch), expected)

    if same(found):
        return [pair for pair, _ in found]
    return [each[0] for each in found if same([each])]


def _times_input(factor: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * factor.to(args[0]), *args[1:]), kwargs
        key, x = next(iter(kwargs.items()))
        return args, {**kwargs, key: x * factor.to(x)}

    return hook


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The logits, the last hidden state, or the first tensor the model gives."""
    output = call(model, batch)
    for attribute in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, attribute, None), Tensor):
            return getattr(output, attribute)
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"{type(model).__name__} gives a {type(output).__name__} without logits or hidden states")
    return first


def _holders(model: nn.Module) -> dict[int, int]:
    """Parameter id -> number of modules that hold it."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count
