"""What a repair has to know of a linear's inputs: their second moment, H = mean of x x', over calibration text.

The relative error of a linear's output follows from H alone, sqrt(tr(E H E') / tr(W H W')) for an error E of the
weight W, so the inputs themselves need not be kept. x is what the matrix product sees: with `act_fmt` it is Q(x).
Products are taken in fp32 and summed in fp64, padding left out where the batch has an attention_mask that fits.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.tokens import quantize_tokens
from qnoise.repairs.layerwise import Enough, layers_with
from qnoise.sensitivity.batches import batches, call, tokens, watch

_SCHEMA = "qnoise-second-moments-1"
_CHUNK = 1 << 13  # tokens that are multiplied at a time


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Second moments of the inputs of linears.

    Attributes:
        of: canonical name of a linear -> (in_features, in_features) fp64, symmetric, the mean of x x' over the tokens
            it saw. Linears that are given the same tensor have one between them.
        tokens: canonical name -> number of tokens.
    """

    of: Mapping[str, Tensor]
    tokens: Mapping[str, int]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: one fp32 matrix for each set of linears that share it."""
        from safetensors.torch import save_file

        first: dict[int, str] = {}
        shared = {name: first.setdefault(id(moment), name) for name, moment in self.of.items()}
        tensors = {name: self.of[name].to("cpu", torch.float32).contiguous() for name in first.values()}
        table = {"matrix": shared, "tokens": dict(self.tokens)}
        save_file(tensors, path, metadata={"schema": _SCHEMA, "linears": json.dumps(table)})

    @classmethod
    def load(cls, path: str | Path) -> SecondMoments:
        """What `save` wrote, fp32 values.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file of second moments")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("schema") != _SCHEMA:
                    raise ValueError(f"its schema is {metadata.get('schema')!r}, not {_SCHEMA!r}")
                table = json.loads(metadata["linears"])
                names = {str(k): str(v) for k, v in table["matrix"].items()}
                matrices = {name: file.get_tensor(name).to(torch.float64) for name in set(names.values())}
                counts = {name: int(table["tokens"][name]) for name in names}
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of second moments that can be read: {error}") from None
        return cls({name: matrices[matrix] for name, matrix in names.items()}, counts)


def second_moments(model: nn.Module, inputs: Any, linears: Iterable[nn.Module] | None = None) -> SecondMoments:
    """Run the model on the inputs, noise off, and collect the second moments of its linears' inputs.

    It takes 8 bytes x in_features^2 for each set of linears that share an input; `by_layer` holds those of one layer at
    a time.

    Args:
        model: patched, wrapped by PEFT or not; adapters take part in the forward. Stays as it is.
        inputs: what `qnoise.scan(inputs=)` takes: one batch (a tensor of ids, or a mapping of keyword arguments), or an
            iterable of batches.
        linears: the patched linears to watch; None: all.

    Returns:
        The moments. A linear that got no input has none.

    Raises:
        ValueError: no batch; no patched linear; an input with NaN or Inf, whose linear is named.
    """
    watched = watched_linears(model, linears)
    return _collect(model, batches(inputs), watched, None)


def by_layer(
    model: nn.Module, inputs: Any, linears: Iterable[nn.Module] | None = None
) -> Iterator[tuple[str, SecondMoments]]:
    """The second moments of one layer after the other, so that a layer can be changed before the next one is seen.

    A layer is an entry of the model's outermost `nn.ModuleList`s that holds watched linears. For each, the model is run
    up to its end, which costs about half as many forwards of the whole model as there are layers. Linears outside the
    layers come last, together.

    Yields:
        (canonical name of the layer, moments of its linears); the name is "" for the linears outside.
    """
    watched = watched_linears(model, linears)
    kept = list(batches(inputs))
    left = dict(watched)
    for layer in layers_with(model, watched):
        own = {m: left.pop(m) for m in layer.module.modules() if m in left}
        if own:
            yield layer.name, _collect(model, kept, own, layer.module)
    if left:
        yield "", _collect(model, kept, left, None)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b' over rows (tokens, width): fp64, (width of a, width of b). Chunks of rows are summed in fp32."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    # Not every device has fp64.
    where = torch.device("cpu") if a.device.type == "mps" else a.device
    total = torch.zeros(a.shape[-1], b.shape[-1], dtype=torch.float64, device=where)
    for left, right in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        total += (left.to(wide).T @ right.to(wide)).to(where, torch.float64)
    return total


def check_finite(name: str, rows: Tensor) -> Tensor:
    """The rows; raises ValueError naming the linear if one is not finite."""
    if not torch.isfinite(rows).all():
        raise ValueError(f"{name}: NaN or Inf in its input; calibrate on inputs on which the model is finite")
    return rows


class _Moment:
    """The sum of x x' over what one set of linears has been given."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.tokens = 0
        # What was given last: the siblings are given the very same tensor.
        self.last: weakref.ref[Tensor] | None = None
        # In the forward under way: how many tensors were added, and how many each linear was given.
        self.added = 0
        self.given: Counter[str] = Counter()

    def add(self, rows: Tensor) -> None:
        more = product(rows, rows)
        self.sum = more if self.sum is None else self.sum.add_(more)
        self.tokens += rows.shape[0]
        self.added += 1


def _collect(
    model: nn.Module, given: Iterable[Any], watched: Mapping[nn.Module, str], stop_after: nn.Module | None
) -> SecondMoments:
    moments: dict[str, _Moment] = {}
    mask: list[Tensor | None] = [None]

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return
            known = moments.get(name)
            if known is None:
                sibling = (other for other in moments.values() if other.last is not None and other.last() is x)
                moments[name] = known = next(sibling, None) or _Moment()
            known.given[name] += 1
            if known.last is not None and known.last() is x:
                return  # a sibling, or the module itself, has added it
            known.last = weakref.ref(x)
            known.add(check_finite(name, seen(module, tokens(x.detach(), mask[0]))))

        return look

    def stop(*_: Any) -> None:
        raise Enough

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for m, name in watched.items()]
    if stop_after is not None:
        handles.append(stop_after.register_forward_hook(stop))

    def run(of: nn.Module, batch: Any) -> None:
        with contextlib.suppress(Enough):
            call(of, batch)
        _check_shared(moments)

    watch(model, given, handles, mask, run)
    means: dict[int, Tensor] = {}
    for each in moments.values():
        if each.sum is not None and id(each) not in means:
            means[id(each)] = each.sum.div_(max(1, each.tokens))
    given_any = {name: each for name, each in moments.items() if each.tokens}
    return SecondMoments(
        {name: means[id(each)] for name, each in given_any.items()}, {n: e.tokens for n, e in given_any.items()}
    )


def _check_shared(moments: Mapping[str, _Moment]) -> None:
    """Raise if linears that were given one tensor in an earlier forward were given several in this one."""
    for name, each in moments.items():
        if each.given[name] not in (0, each.added):
            others = ", ".join(other for other in each.given if other != name)
            raise ValueError(
                f"{name} was given the same tensor as {others} in one batch and another one in a later batch, so they "
                "have no second moment in common; calibrate on batches of one kind, or on these linears apart"
            )
    for each in moments.values():
        each.last, each.added = None, 0
        each.given.clear()


def seen(module: nn.Module, rows: Tensor) -> Tensor:
    """(tokens, in_features): what the matrix product of the linear sees."""
    record: Any = module.__dict__.get("_qnoise")
    if record is None or record.act_spec is None or record.full_precision:
        return rows
    return quantize_tokens(rows, record.act_spec, record.act_amax)


def watched_linears(model: nn.Module, linears: Iterable[nn.Module] | None) -> dict[nn.Module, str]:
    """Patched linears (None: all) -> canonical names; raises ValueError if there is none."""
    wanted = None if linears is None else {id(module) for module in linears}
    watched = {
        module: canonical_name(path)
        for path, module in model.named_modules()
        if (isinstance(module, FakeQuantLinear) if wanted is None else id(module) in wanted)
        and ".original_module" not in path
    }
    if not watched:
        raise ValueError(f"{type(model).__name__} has no quantized linear; call qnoise.patch_model(model) first")
    return watched
