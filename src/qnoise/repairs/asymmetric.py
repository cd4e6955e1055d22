"""What linears are given in the quantized model beside what they are given in full precision, input after input.

With x^ an input in the full-precision model and x the one of the same token in the model as it is, the weight that
makes good what was lost on the way to a linear is the V of least mean ||W x^ - V x||^2, held near W by damping:

    V (H + d) = W (C + d),    H = mean of x x',  C = mean of x^ x',  d = damping * mean of H's diagonal

(asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). A linear must not make good what a linear
before it is about to: so x is taken when everything before the linear has its last form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.patch import full_precision, quiet
from qnoise.repairs.calibration import check_finite, product, seen, watched_linears
from qnoise.repairs.layerwise import Enough, Layer, Outputs, can_skip, copy, layers_with
from qnoise.repairs.self_teacher import adapters_set
from qnoise.sensitivity.batches import batches, call, evaluating, first_row, tokens, watch


@dataclass(frozen=True, eq=False)
class PairedMoments:
    """Of one input that a set of linears has in common, with n = in_features.

    Attributes:
        names: canonical names of the linears.
        now: (n, n) fp64, H.
        cross: (n, n) fp64, C; `now` itself where tokens cannot be paired, as in experts that another router feeds.
        stock: (n, n) fp64, the mean of x^ x^'.
        tokens: how many.
    """

    names: tuple[str, ...]
    now: Tensor
    cross: Tensor
    stock: Tensor
    tokens: int

    @classmethod
    def same(cls, name: str, moment: Tensor, tokens: int) -> PairedMoments:
        """Of one linear whose inputs are taken as they are."""
        return cls((name,), moment, moment, moment, tokens)

    @property
    def paired(self) -> bool:
        return self.cross is not self.now

    def to(self, device: torch.device) -> PairedMoments:
        """The same in fp64 on another device."""
        if all(each.device == device and each.dtype == torch.float64 for each in (self.now, self.cross, self.stock)):
            return self
        now = self.now.to(device, torch.float64)
        cross, stock = (each.to(device, torch.float64) if self.paired else now for each in (self.cross, self.stock))
        return PairedMoments(self.names, now, cross, stock, self.tokens)

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """V for a weight (out_features, n), fp64; the weight itself where nothing is paired."""
        weight = weight.to(torch.float64)
        if not self.paired:
            return weight
        ridge = damping * self.now.diagonal().mean() * torch.eye(len(self.now)).to(self.now)
        left, right = (each.cpu() for each in (self.now + ridge, (weight @ (self.cross + ridge)).T))
        # By way of the SVD, for inputs that always move together where nothing is damped; only the CPU has it.
        return torch.linalg.lstsq(left, right, driver="gelsd").solution.T.contiguous().to(weight.device)

    def error(self, weight: Tensor, values: Tensor) -> float:
        """||V X - W X^|| / ||W X^|| of V = `values`; both fp64."""
        rest = values - weight
        whole = ((weight @ self.stock) * weight).sum()
        error = ((rest @ self.now) * rest).sum()
        if self.paired:
            moved = self.cross - self.now
            error -= 2 * ((weight @ moved) * rest).sum()
            error += ((weight @ (self.stock - self.cross - moved.T)) * weight).sum()
        return (error.clamp_min(0) / whole).sqrt().item() if whole > 0 else 0.0


def by_input(
    model: nn.Module, inputs: Any, linears: Iterable[nn.Module] | None = None, *, adapters: bool = True
) -> Iterator[PairedMoments]:
    """The moments of one input after the other, in the order of the forward.

    Whoever takes them is to give the linears of one their last form before asking for the next. Linears that are given
    the same tensor come together; those outside of the model's lists of layers come last. It costs a few forwards of
    the model, or, where layers need more of one another than their outputs, a few for each layer.

    Args:
        model, inputs, linears: as `second_moments` takes them.
        adapters: whether the full-precision model has the adapters, too.

    Raises:
        ValueError: no batch; no patched linear; an input with NaN or Inf, whose linear is named.
    """
    watched = watched_linears(model, linears)
    given = list(batches(inputs))
    layers = list(layers_with(model, watched))
    with quiet(model), evaluating(model):
        skips = bool(given) and can_skip(model, first_row(given[0]), layers)
    left = dict(watched)
    stock, now = Outputs(), Outputs()
    for layer in layers:
        own = {left.pop(m): m for m in layer.module.modules() if m in left}
        with _in_full_precision(model, adapters):
            in_stock, outputs = _inputs(model, given, own, layer, stock)
        yield from _of_each(model, given, own, in_stock, layer, now)
        if skips:
            stock = outputs
            now = _inputs(model, given, {}, layer, now)[1]
    if left:
        own = {name: m for m, name in left.items()}
        with _in_full_precision(model, adapters):
            in_stock, _ = _inputs(model, given, own)
        yield from _of_each(model, given, own, in_stock)


@contextlib.contextmanager
def _in_full_precision(model: nn.Module, adapters: bool) -> Iterator[None]:
    with full_precision(model), contextlib.nullcontext() if adapters else adapters_set(model, False):
        yield


def _of_each(
    model: nn.Module,
    given: list[Any],
    linears: Mapping[str, nn.Module],
    stock: list[dict[str, Tensor]],
    layer: Layer | None = None,
    before: Outputs | None = None,
) -> Iterator[PairedMoments]:
    for names in _in_order(stock):
        found, _ = _inputs(model, given, {names[0]: linears[names[0]]}, layer, before, stop=True)
        if moments := _moments(names, found, stock):
            yield moments


def _inputs(
    model: nn.Module,
    given: list[Any],
    linears: Mapping[str, nn.Module],
    layer: Layer | None = None,
    before: Outputs | None = None,
    stop: bool = False,
) -> tuple[list[dict[str, Tensor]], Outputs]:
    """For each batch, name -> the rows that the linear is given first, one tensor where they are the same.

    The forward goes to the end of the layer, of which the outputs are kept if every batch reaches it; with `stop` to
    the first linear.
    """
    found: list[dict[str, Tensor]] = []
    outputs: list[Any] = []
    mask: list[Tensor | None] = [None]
    last: tuple[Tensor, Tensor] | None = None

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal last
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not x.is_floating_point() or name in found[-1]:
                return
            if last is None or last[0] is not x:
                last = (x, check_finite(name, seen(module, tokens(x.detach(), mask[0]))))
            found[-1][name] = last[1]
            if stop:
                raise Enough

        return look

    def end(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(copy(output))
        raise Enough

    def run(of: nn.Module, batch: Any) -> None:
        nonlocal last
        found.append({})
        last = None
        skipping = before.skipping(layer, len(found) - 1) if layer and before else contextlib.nullcontext()
        with contextlib.suppress(Enough), skipping:
            call(of, batch)

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in linears.items()]
    if layer is not None and not stop:
        handles.append(layer.module.register_forward_hook(end))
    watch(model, given, handles, mask, run)
    whole = layer is not None and len(outputs) == len(given)
    return found, Outputs(layer.module, tuple(outputs)) if layer and whole else Outputs()


def _in_order(found: list[dict[str, Tensor]]) -> Iterator[tuple[str, ...]]:
    """Names that are given the same tensor in every batch; each set after those that come before it in any batch."""
    left = list(dict.fromkeys(name for batch in found for name in batch))

    def waits(name: str) -> bool:
        """Whether another tensor comes before that of `name`."""
        having = [batch for batch in found if name in batch]
        return any(batch[next(each for each in batch if each in left)] is not batch[name] for batch in having)

    while left:
        first = next((name for name in left if not waits(name)), left[0])
        together = tuple(name for name in left if all(batch.get(name) is batch.get(first) for batch in found))
        left = [name for name in left if name not in together]
        yield together


def _moments(
    names: tuple[str, ...], found: list[dict[str, Tensor]], stock: list[dict[str, Tensor]]
) -> PairedMoments | None:
    """Of the rows of the first of the names; None if there are none."""
    sums: list[Tensor] = []
    count, paired = 0, True
    for rows, twins in zip(found, stock, strict=True):
        own, twin = rows.get(names[0]), twins.get(names[0])
        if own is None:
            continue
        # Tokens that are chosen for a linear (experts) may be others in full precision.
        if twin is None or not len(own) == len(twin) == len(next(iter(twins.values()))):
            paired, twin = False, own
        count += len(own)
        products = product(own, own), product(twin, own), product(twin, twin)
        sums = [total.add_(more) for total, more in zip(sums, products, strict=True)] if sums else list(products)
    if not count:
        return None
    now, cross, of_stock = (total.div_(count) for total in sums)
    return PairedMoments(names, now, cross if paired else now, of_stock if paired else now, count)
