"""Which layer carries a hardware fault, found without a healthy machine to compare with.

Every module inside the repeated layers is looked at while the model runs three times: as it is, and with the input of
the first layer moved by a large and by a small random vector. Two things give a fault away.

*A gap.* Values that come out of a sum of many terms have a continuous density around zero. Let g be the smallest
magnitude that is not zero. If the density is continuous, a value below 2g is as likely to lie below g as above it: that
n values lie in (g, 2g) and none in (0, g) has probability 2^-n, whatever the density, the tensor or the model.
A deadzone empties (0, threshold * max|x|) and leaves (g, 2g) as full as it was: the evidence for it is that number, in
bits, and the limit follows from the false alarms one accepts and the number of places looked at; there is nothing to
tune. Values are not all independent (a channel may be nearly constant, a token repeated), so what is counted is the
least of the distinct channels, the distinct tokens and the distinct values.

*The gain*, output change over input change, separates the rest. Where a gap holds zeros that do not answer to the small
movement, gain 0, it is a deadzone; a gap without them is a bias away from zero. A gain that grows as the movement
shrinks is noise: the output differs by something the input did not cause.

A fault goes on through the network, so what is reported is where it appears first: a module's output is not suspected
for zeros its input had, nor a tensor that was suspected where it came from. Kurtosis is in the figures, because
published scans use it. A deadzone hardly moves it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.faults import repeated_layers
from qnoise.names import canonical_name, layer_index
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.packed import PackedLinear
from qnoise.noise import unit_normal
from qnoise.patch import full_precision, quiet
from qnoise.sensitivity.batches import batches, call, evaluating

FALSE_ALARMS = 1e-6
"""Accepted probability of a deadzone or bias reported anywhere in a healthy model, by one scan."""

_KEPT = 2048  # smallest magnitudes kept of each place


@dataclass(frozen=True)
class Suspicion:
    """A place where a fault shows first.

    Attributes:
        name: canonical name of the module.
        at: "input" or "output" of it.
        fault: "deadzone", "bias" or "noise".
        magnitude: deadzone: its threshold, a share of max|x| (an estimate from above); bias: what is added to |x|;
            noise: the relative RMS error of the tensor.
        evidence: deadzone and bias: bits, see the module's docstring; noise: how often more the layer answers to the
            small movement than to the large one.
        share: of the elements that are zero and do not answer.
    """

    name: str
    at: str
    fault: str
    magnitude: float
    evidence: float
    share: float

    @property
    def layer(self) -> int | None:
        """Index of the layer the module is, or lies in."""
        return layer_index(self.name)

    def __str__(self) -> str:
        if self.fault == "deadzone":
            what = f"zero below {self.magnitude:.3g} of the largest magnitude; {self.share:.2%} of it does not answer"
        elif self.fault == "bias":
            what = f"no value but 0 is below {self.magnitude:.3g}: magnitudes are raised by about that"
        else:
            what = f"an error of {self.magnitude:.3g} of its rms that its input does not cause"
        return f"{self.fault} at its {self.at}: {what}"


@dataclass(frozen=True)
class LayerResponse:
    """What the scan has seen of one layer.

    Attributes:
        name: canonical name of the layer.
        gain, gain_small: change of the output over change of the input, median over the tokens, for the large and the
            small movement. None where they cannot be compared.
        dead: share of the output's elements that are zero and do not answer to the small movement.
        kurtosis: of the output's elements; 3 for a gaussian; None if they are all the same.
        detectable: the smallest threshold of a deadzone at its output that these inputs would have shown; infinite if
            they are too few.
    """

    name: str
    gain: float | None
    gain_small: float | None
    dead: float
    kurtosis: float | None
    detectable: float


@dataclass(frozen=True)
class Localisation:
    """What `scan(localise=True)` found out about faults.

    Attributes:
        suspicions: in the order of execution; empty: no fault found.
        layers: figures of every layer, in the order of execution.
        needed: bits of evidence a gap needs.
        places: number of inputs and outputs looked at.
    """

    suspicions: tuple[Suspicion, ...]
    layers: tuple[LayerResponse, ...]
    needed: int
    places: int

    @property
    def detectable(self) -> float:
        """The smallest deadzone that would have been seen at the output of any layer."""
        return max(layer.detectable for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Localisation:
        """What `to_dict` wrote."""

        def number(value: Any) -> Any:
            return value if value is None else float(value)

        suspicions = [
            {key: each[key] if key in ("name", "at", "fault") else number(each[key]) for key in each}
            for each in values["suspicions"]
        ]
        layers = [{key: each[key] if key == "name" else number(each[key]) for key in each} for each in values["layers"]]
        return cls(
            tuple(Suspicion(**each) for each in suspicions),
            tuple(LayerResponse(**each) for each in layers),
            int(values["needed"]),
            int(values["places"]),
        )


def localise(model: nn.Module, inputs: Any, *, false_alarms: float = FALSE_ALARMS) -> Localisation:
    """Find the layers that carry a fault.

    Three forwards for each batch, without gradient, dropout, noise and quantization (that of packed weights stays on).
    Hooks that are on the model act as they would; ours are gone afterwards.

    Args:
        model: any model with repeated layers.
        inputs: as `qnoise.scan` takes them. More tokens find smaller deadzones, down to `detectable`.
        false_alarms: accepted probability of a deadzone or bias reported in a healthy model.

    Raises:
        ValueError: the model has no repeated layers, or they were not run; no inputs; `false_alarms` not in (0, 1).
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms is {false_alarms!r}; it must be a probability above 0 and below 1")
    layers = list(repeated_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no repeated layers in which a fault could be localised")
    looking = _Looking(layers)
    packed = any(isinstance(module, PackedLinear) for module in model.modules())
    count = 0
    with (quiet if packed else full_precision)(model), evaluating(model), looking.at(layers):
        for batch in batches(inputs):
            for movement in _MOVEMENTS:
                looking.begin(count, movement)
                call(model, batch)
            looking.end()
            count += 1
    if not count:
        raise ValueError("inputs holds no batch; give at least one (a tensor, a tuple of arguments or a mapping)")
    places = looking.places
    if not places:
        raise ValueError(f"the forward of {type(model).__name__} runs none of its layers: {layers[0][0]} and so on")
    needed = math.ceil(math.log2(len(places) / false_alarms))
    quantized = packed and any(
        isinstance(m, FakeQuantLinear) and m._qnoise.act_spec is not None for m in model.modules()
    )
    suspicions = _gaps(looking, needed)
    if not quantized:
        # A gap makes steps, which answer to small movements as noise does.
        taken = {(each.name, each.at) for each in suspicions}
        suspicions += [each for each in looking.noises() if (each.name, each.at) not in taken]
    order = {(place.name, place.at): number for number, place in enumerate(places)}
    suspicions.sort(key=lambda each: order[each.name, each.at])
    seen = {place.name: place for place in places if place.at == "output"}
    responses = [looking.response(seen[name], needed) for name, _ in layers if name in seen]
    return Localisation(tuple(suspicions), tuple(responses), needed, len(places))


_MOVEMENTS = ("none", "large", "small")


def _size(movement: str, dtype: torch.dtype) -> float:
    """Relative to the rms of a token. Rounding errors are far below the small one and the large one is far below 1:
    the four stand in one ratio."""
    return float(torch.finfo(dtype).eps ** (1 / 3 if movement == "large" else 2 / 3))


@dataclass(eq=False)
class _Place:
    """The input or output of one module. `path` tells wrappers from what they wrap; they have one name."""

    path: str
    at: str
    is_layer: bool
    dtype: torch.dtype = torch.float32
    elements: int = 0
    rows: int = 0
    zero: int = 0
    dead: int = 0
    own_dead: int = 0  # not so at the module's input
    pattern: int = 0  # the sum of their positions
    amax: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0] * 4)
    smallest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    where: Tensor = field(default_factory=lambda: torch.empty(2, 0, dtype=torch.int64))  # row, channel
    zeros: list[Tensor | None] = field(default_factory=list)  # of each call in the run without a movement
    still: Tensor | None = None  # of the last call: what is zero with the small movement too
    gains: dict[str, list[Tensor]] = field(default_factory=dict)
    changes: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return canonical_name(self.path)

    def look(self, x: Tensor) -> None:
        """The run without a movement."""
        width = x.shape[-1] if x.dim() else 1
        magnitude = torch.nan_to_num(x.reshape(-1).float(), nan=0.0, posinf=0.0, neginf=0.0).abs_()
        zero = x == 0
        count = int(zero.sum())
        self.zero += count
        self.zeros.append(zero if count else None)
        self.dtype = x.dtype
        self.elements += x.numel()
        amax = float(magnitude.max()) if x.numel() else 0.0
        if amax:
            self._keep(magnitude, amax, width)
            self.amax = max(self.amax, amax)
        self.rows += x.numel() // max(1, width)
        if self.is_layer and self.at == "output":
            double = x.double()
            for power in range(4):
                self.moments[power] += double.pow(power + 1).sum().item()

    def _keep(self, magnitude: Tensor, amax: float, width: int) -> None:
        """The smallest magnitudes, and where more than are kept lie in (g, 2g) a sample of those."""
        shown = magnitude.masked_fill(magnitude == 0, math.inf)
        values, index = torch.topk(shown, min(_KEPT, shown.numel()), largest=False)
        if len(values) == _KEPT and values[-1] < 2 * values[0]:
            inside = (shown < 2 * values[0]).nonzero().reshape(-1)
            index = torch.cat([index[:1], inside[:: -(-len(inside) // _KEPT)]])
            values = shown[index]
        found = values.isfinite()
        index = index[found].cpu()
        where = torch.stack([index // width + self.rows, index % width])
        merged, order = torch.cat([self.smallest, values[found].cpu().double() / amax]).sort()
        where = torch.cat([self.where, where], 1)[:, order]
        inside_gap = int((merged < 2 * merged[0]).sum())
        if inside_gap > _KEPT:
            step = -(-inside_gap // _KEPT)
            self.smallest, self.where = merged[:inside_gap:step].contiguous(), where[:, :inside_gap:step]
        else:
            self.smallest, self.where = merged[:_KEPT], where[:, :_KEPT]

    def left(self, edge: float) -> int:
        """Number of kept values in (edge, 2 edge)."""
        band = self._band(edge)
        return band.stop - band.start

    def _band(self, edge: float) -> slice:
        first, last = torch.searchsorted(self.smallest, torch.tensor([edge, 2 * edge], dtype=torch.float64), right=True)
        return slice(int(first), int(last))

    def evidence(self, edge: float) -> int:
        """Independent values in (edge, 2 edge): distinct values, tokens and channels, the least of them."""
        band = self._band(edge)
        values = self.smallest[band].to(torch.bfloat16).float()
        return min(each.unique().numel() for each in (values, *self.where[:, band]))

    @property
    def gap(self) -> float:
        return float(self.smallest[0]) if len(self.smallest) else 0.0

    def kurtosis(self) -> float | None:
        m1, m2, m3, m4 = (moment / max(1, self.elements) for moment in self.moments)
        variance = m2 - m1**2
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 if variance > 0 else None

    def detectable(self, needed: int) -> float:
        edge, last = self.gap, float(self.smallest[-1]) / 2 if len(self.smallest) else 0.0
        while 0 < edge <= last:
            if self.evidence(edge) >= needed:
                return edge
            edge *= 1.1
        return math.inf


class _Looking:
    """The hooks, and what they have seen."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        self._found: dict[tuple[str, str], _Place] = {}
        # The place at which a tensor that is alive was seen: the inputs of q, k and v are one tensor.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, _Place]] = {}
        self._movement = "none"
        self._batch = 0
        self._calls: dict[tuple[str, str], int] = {}
        self._layers = {name for name, _ in layers}
        # Outputs and inputs of layers in the order of execution; one list for each stack that a movement starts.
        self._chain: list[tuple[_Place | None, Tensor]] = []
        self._base: list[tuple[_Place | None, Tensor]] = []

    @property
    def places(self) -> list[_Place]:
        return list(dict.fromkeys(self._found.values()))

    def input_of(self, place: _Place) -> _Place | None:
        """The place of the tensor that this module got."""
        return self._found.get((place.path, "input"))

    def begin(self, batch: int, movement: str) -> None:
        self._batch, self._movement = batch, movement
        self._calls.clear()
        self._seen.clear()
        if movement == "none":
            for place in self._found.values():
                place.zeros.clear()
        self._chain = []

    def end(self) -> None:
        self._base = []

    @contextmanager
    def at(self, layers: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        handles = []
        moved: set[str] = set()
        for name, layer in layers:
            stack = name.rpartition(".")[0]
            if stack not in moved:
                # Before every other hook: a fault at the layer's input comes after the movement.
                handles.append(layer.register_forward_pre_hook(self._move(name), with_kwargs=True, prepend=True))
                moved.add(stack)
            for path, module in layer.named_modules():
                inner = f"{name}.{path}" if path else name
                handles.append(module.register_forward_pre_hook(self._on_input(inner), with_kwargs=True))
                handles.append(module.register_forward_hook(self._on_output(inner)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _move(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            slot, x = _first_floating(args, kwargs)
            if x is None:
                return None
            if self._movement == "none":
                self._chain.append((None, x))
                return None
            z = torch.from_numpy(unit_normal(0, self._batch, name, tuple(x.shape))).to(x.device)
            rms = x.float().square().mean(-1, keepdim=True).sqrt()
            moved = (x.float() + _size(self._movement, x.dtype) * rms * z).to(x.dtype)
            self._chain.append((None, moved))
            if isinstance(slot, int):
                return (*args[:slot], moved, *args[slot + 1 :]), kwargs
            return args, {**kwargs, slot: moved}

        return hook

    def _on_input(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(path, "input", _first_floating(args, kwargs)[1])

        return hook

    def _on_output(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple | list) and output else output
            self._see(path, "output", x if isinstance(x, Tensor) and x.is_floating_point() else None)

        return hook

    def _see(self, path: str, at: str, x: Tensor | None) -> None:
        """Take note of a tensor, unless it was seen at another place."""
        if x is None or not x.dim():
            return
        key, is_layer = (path, at), path in self._layers
        if key not in self._found:
            ref, version, earlier = self._seen.get(id(x), (None, 0, None))
            same = ref is not None and ref() is x and version == _version(x) and not (is_layer and at == "output")
            self._found[key] = earlier if same and earlier is not None else _Place(path, at, is_layer)
        place = self._found[key]
        if (place.path, place.at) != key:
            return
        self._seen[id(x)] = weakref.ref(x), _version(x), place
        number = self._calls[key] = self._calls.get(key, -1) + 1
        if is_layer:
            self._follow(place, x)
        if self._movement == "none":
            place.look(x)
        elif self._movement == "small":
            zeros = place.zeros[number] if number < len(place.zeros) else None
            place.still = None if zeros is None or zeros.shape != x.shape else zeros & (x == 0)
            if place.still is not None:
                given = self.input_of(place) if at == "output" else None
                had = given.still if given is not None else None
                place.dead += int(place.still.sum())
                place.pattern += int(place.still.reshape(-1).nonzero().sum())
                own = place.still if had is None or had.shape != x.shape else place.still & ~had
                place.own_dead += int(own.sum())

    def _follow(self, place: _Place, x: Tensor) -> None:
        """One step along the layers: how much more this tensor moved than the one before."""
        at = len(self._chain)
        self._chain.append((place, x))
        if self._movement == "none":
            self._base = self._chain
            return
        if at == 0 or at >= len(self._base):
            return
        here, there = self._change(at), self._change(at - 1)
        if here is None or there is None or here.shape != there.shape:
            return
        moved = there > 0
        place.gains.setdefault(self._movement, []).append((here[moved] / there[moved]).cpu())
        if self._movement == "small":
            size = self._base[at][1].float().square().sum(-1).sqrt().reshape(-1)
            place.changes.append(float((here / size.clamp_min(torch.finfo(torch.float32).tiny)).median()))

    def _change(self, at: int) -> Tensor | None:
        """The norm of each token's movement at one point of the chain."""
        base, now = self._base[at][1], self._chain[at][1]
        if base.shape != now.shape:
            return None
        return (now.float() - base.float()).square().sum(-1).sqrt().reshape(-1)

    def noises(self) -> list[Suspicion]:
        """Where the gain is the larger the smaller the movement."""
        found = []
        for place in self.places:
            large, small = (_median(place.gains.get(movement, [])) or 0.0 for movement in ("large", "small"))
            # An error that dominates the small movement has grown by the whole ratio of the two.
            ratio = _size("large", place.dtype) / _size("small", place.dtype)
            if large > 0 and small > math.sqrt(ratio) * large:
                size = median(place.changes) / math.sqrt(2)  # the difference of two draws
                found.append(Suspicion(place.name, place.at, "noise", size, small / large, 0.0))
        return found

    def response(self, place: _Place, needed: int) -> LayerResponse:
        gains = [_median(place.gains.get(movement, [])) for movement in ("large", "small")]
        dead = place.dead / max(1, place.elements)
        return LayerResponse(place.name, gains[0], gains[1], dead, place.kurtosis(), place.detectable(needed))


def _gaps(looking: _Looking, needed: int) -> list[Suspicion]:
    """The places at which a gap appears first."""
    found: list[Suspicion] = []
    seen: list[tuple[int, int, float]] = []
    suspected: set[_Place] = set()
    for place in looking.places:
        evidence = place.evidence(place.gap) if place.gap else 0
        if evidence < needed:
            continue
        suspected.add(place)
        # The same zeros under the same gap: this tensor again, reshaped or scaled on its way.
        again = any((d, p) == (place.dead, place.pattern) and abs(g / place.gap - 1) <= 0.01 for d, p, g in seen)
        seen.append((place.dead, place.pattern, place.gap))
        passed_on = place.at == "output" and looking.input_of(place) in suspected and place.own_dead < needed
        if again or passed_on:
            continue
        share = place.dead / place.elements
        # As many were emptied below g as are left in (g, 2g), or nearly; a sum can be 0 by chance in half precision.
        if place.dead and 4 * place.zero >= place.left(place.gap):
            found.append(Suspicion(place.name, place.at, "deadzone", place.gap, evidence, share))
        else:
            found.append(Suspicion(place.name, place.at, "bias", place.gap * place.amax, evidence, share))
    return found


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _median(gains: Sequence[Tensor]) -> float | None:
    gathered = torch.cat(list(gains)) if gains else torch.empty(0)
    return float(gathered.median()) if gathered.numel() else None


def _first_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor | None]:
    """The tensor a module computes on: the first floating one among its arguments, and where it stands."""
    slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for slot, value in slots:
        if isinstance(value, Tensor) and value.is_floating_point():
            return slot, value
    return 0, None
