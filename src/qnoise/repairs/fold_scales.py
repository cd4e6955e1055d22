"""Per-channel factors moved into the preceding norm or linear: free at run time, and the function stays.

A channel with large activations is given more of the weights' grid: its column is multiplied by s before it is
quantized, and the norm (or the linear) in front divides its channel by s. With a the mean magnitude of the input
channel and w the largest weight of its column, s is a^alpha (AWQ, arXiv 2306.00978) or a^alpha / w^(1 - alpha)
(SmoothQuant, arXiv 2211.10438), rounded to powers of two; kind and alpha are those of the least output error

    ||Q_a(x / s) Q_w(W s)' - x W'||^2 / ||x W'||^2,  mean over the quantized linears that read the channel,

for the formats at hand, the shared per-tensor scale of fused linears included. Powers of two round nothing: the model
in full precision gives the same bits before and after, and undoing needs nothing but the exponents. (A norm that
multiplies by 1 + weight, as Gemma's does, rounds the new weight; its old one is kept for undoing.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnoise.formats import QuantSpec, as_spec
from qnoise.functional import fake_quantize
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.shared_scale import kept_amax, weight_amax
from qnoise.nn.tokens import quantize_tokens
from qnoise.patch import full_precision, patch_config, quiet
from qnoise.repairs.fold_pairs import Pair, find_pairs, lora_layers, output_of
from qnoise.repairs.self_teacher import SelfTeacher, check_unmerged
from qnoise.sensitivity.batches import batches, call, evaluating, first_row, mask_of, tokens

ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
_LARGEST_EXPONENT = 8


@dataclass(frozen=True)
class FoldRow:
    """One source and what was folded into it.

    Attributes:
        name: canonical name of the norm or linear whose channels were divided.
        readers: canonical names of the linears whose columns were multiplied.
        rule: "awq", "smoothquant", or "" where no factors were better than none; then nothing was written.
        alpha: of the rule.
        before, after: relative RMS error of the readers' outputs on the calibration tokens.
        exponents: (smallest, largest) log2 of the factors.
    """

    name: str
    readers: tuple[str, ...]
    rule: str
    alpha: float
    before: float
    after: float
    exponents: tuple[int, int]


@dataclass(eq=False)
class _Fold:
    """What is needed to take one pair back."""

    pair: Pair
    exponents: Tensor  # int8, one for each channel of the source
    kept: tuple[Tensor, Tensor] | None = None  # weight of a 1 + weight norm: before, and as it was written


@dataclass(frozen=True)
class FoldReport:
    """What `fold_scales` did; `undo()` takes it back.

    Attributes:
        rows: one for each pair, folded or not.
        skipped: canonical name of a source -> why nothing was folded into it.
        kl: mean KL from the full-precision model, in nats per token, (before, after); None for a model that is not
            patched, gives no logits, or was not measured.
        changed: largest |difference| of the full-precision output on the traced tokens, relative to its largest value:
            0 unless norms multiply by 1 + weight.
        nbytes: bytes kept for undoing.
    """

    rows: tuple[FoldRow, ...]
    skipped: Mapping[str, str]
    kl: tuple[float, float] | None
    changed: float
    nbytes: int
    _folds: list[_Fold] = field(repr=False, compare=False)
    _model: weakref.ref[nn.Module] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Take the factors out again, of LoRA matrices too, also of those added or trained since.

        Weights and adapters that were not written to since have the bits they had.

        Raises:
            ValueError: codes are pinned to a folded weight, or an adapter on it is merged.
        """
        model = self._model()
        if model is not None:
            _take_back(model, self._folds)

    def __str__(self) -> str:
        folded = [row for row in self.rows if row.rule]
        lines = [f"{len(folded)} of {len(self.rows)} sources folded; {self.nbytes:,} bytes kept to undo"]
        if folded:
            mean = [sum(getattr(row, key) for row in folded) / len(folded) for key in ("before", "after")]
            lines.append(f"  mean relative output error of their readers {mean[0]:.3g} -> {mean[1]:.3g}")
        if self.kl is not None:
            lines.append(f"  KL to the full-precision model {self.kl[0]:.3g} -> {self.kl[1]:.3g}")
        return "\n".join([*lines, *(f"  left alone: {name}: {why}" for name, why in self.skipped.items())])


@torch.no_grad()
def fold_scales(
    model: nn.Module,
    inputs: Any,
    *,
    fmt: str | QuantSpec | None = None,
    act_fmt: str | QuantSpec | None = None,
    alphas: Sequence[float] = ALPHAS,
    max_tokens: int = 512,
    measure: bool = True,
) -> FoldReport:
    """Move per-channel factors in front of quantized linears so that their outputs suffer less.

    The raw weights are written; a LoRA adapter on a folded linear is scaled with it, so that it does what it did: its A
    on a reader, its B on a source. Adapters trained from here on belong to the folded weights: save those beside them,
    or `undo()` first, which takes the factors out of the adapters as well.

    Fold before `gptq` and before adapters are started from the residual.

    Args:
        model: patched, or not, then with `fmt`; PEFT-wrapped or not.
        inputs: what `qnoise.scan(inputs=)` takes.
        fmt, act_fmt: formats to fold for, of a model that is not patched; the linears are those that `patch_model`
            would convert.
        alphas: exponents in (0, 1] to try, with either rule.
        max_tokens: tokens whose inputs are kept for the search: a row for each source at a time.
        measure: the KL of the report; it takes most of the time where there is little text.

    Returns:
        A report, with `.undo()`.

    Raises:
        ValueError: no format; formats of a patched model given again; pinned codes or merged adapters; packed storage;
            no batch; an alpha out of range; the folded model is not the same function in full precision (the model is
            then as it was).
    """
    specs = _specs(model, fmt, act_fmt)
    for alpha in alphas:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it must be above 0 and at most 1")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}; it must be a whole number of at least 1")
    check_unmerged(model)
    _check_unpinned(specs)
    given = list(batches(inputs))
    if not given:
        raise ValueError("inputs holds no batch; give at least one (a tensor, a tuple of arguments or a mapping)")
    little = first_row(given[0])
    with full_precision(model), evaluating(model):
        pairs, skipped = find_pairs(model, little, specs.__contains__)
        stock = output_of(model, little)
    kl_before = _kl(model, given) if measure else None
    rows, folds = [], []
    try:
        for pair, x in _sampled(model, given, pairs, max_tokens):
            row, exponents = _search(pair, x, specs, alphas)
            if row.rule:
                why = _leaves_range(pair, exponents)
                if why:
                    skipped[pair.name] = why
                    continue
                folds.append(_Fold(pair, exponents.to(torch.int8)))
                _apply(model, folds[-1])
            rows.append(row)
        with full_precision(model), evaluating(model):
            changed = _difference(output_of(model, little), stock)
        rounds = any(fold.pair.one_plus for fold in folds)
        if changed > (min(64 * torch.finfo(stock.dtype).eps, 0.05) if rounds else 0.0):
            raise ValueError(
                f"{type(model).__name__}: the fold changes its full-precision output by {changed:.2g}, so the model "
                "does something with its norms or linears that was not seen"
            )
        kl_after = _kl(model, given) if measure else None
    except BaseException:
        _take_back(model, folds)
        raise
    kl = None if kl_before is None or kl_after is None else (kl_before, kl_after)
    nbytes = sum(fold.exponents.nbytes + sum(t.nbytes for t in fold.kept or ()) for fold in folds)
    return FoldReport(tuple(rows), skipped, kl, changed, nbytes, folds, weakref.ref(model))


def _specs(
    model: nn.Module, fmt: str | QuantSpec | None, act_fmt: str | QuantSpec | None
) -> dict[nn.Module, tuple[QuantSpec, QuantSpec | None]]:
    """Linear -> (weight format, input format)."""
    from qnoise.config import PatchConfig
    from qnoise.targets import decide

    config = patch_config(model)
    if config is not None:
        if fmt is not None or act_fmt is not None:
            raise ValueError("the model is patched, so it is folded for the formats it has; leave fmt and act_fmt out")
        specs: dict[nn.Module, Any] = {
            m: (m._qnoise.weight_spec, m._qnoise.act_spec)
            for m in model.modules()
            if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec is not None
        }
    elif fmt is None:
        raise ValueError(
            f"{type(model).__name__} is not patched, so it is not known what to fold for: give fmt=, or call "
            "qnoise.patch_model first"
        )
    else:
        specs = {
            d.module: (d.weight_spec, d.act_spec)
            for d in decide(model, PatchConfig(as_spec(fmt), None if act_fmt is None else as_spec(act_fmt)))
            if d.kind == "linear" and not d.reason and d.weight_spec is not None
        }
    if not specs:
        raise ValueError(f"no linear of {type(model).__name__} is quantized, so there is nothing to fold for")
    return specs


def _check_unpinned(linears: Mapping[nn.Module, Any]) -> None:
    for linear in linears:
        if isinstance(linear, FakeQuantLinear) and linear._qnoise.pin is not None:
            raise ValueError(
                f"{linear._qnoise.name}: its codes are pinned (gptq, init_lora_from_residual), and a fold would leave "
                "them behind. Fold first, or undo() what pinned them"
            )


def _sampled(
    model: nn.Module, given: Sequence[Any], pairs: Sequence[Pair], max_tokens: int
) -> Iterator[tuple[Pair, Tensor]]:
    """Each pair with the inputs of its readers, (tokens, in_features), of the model in full precision."""
    share = -(-max_tokens // len(given))
    kept: dict[Pair, list[Tensor]] = {pair: [] for pair in pairs}
    mask: list[Tensor | None] = [None]
    outer_of = lora_layers(model)
    with ExitStack() as stack:
        for pair in pairs:
            reader = next(iter(pair.readers.values()))

            def see(_: nn.Module, args: Any, kwargs: Any, pair: Pair = pair) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                rows = tokens(x.detach(), mask[0])
                kept[pair].append(rows[:: max(1, -(-len(rows) // share))].clone())

            outer = outer_of.get(reader, reader)
            stack.callback(outer.register_forward_pre_hook(see, with_kwargs=True).remove)
        with full_precision(model), evaluating(model):
            for batch in given:
                mask[0] = mask_of(batch)
                call(model, batch)
    for pair in pairs:
        rows = torch.cat(kept.pop(pair)).float()
        if not torch.isfinite(rows).all():
            raise ValueError(f"{pair.name}: NaN or Inf in its output; calibrate on inputs on which the model is finite")
        yield pair, rows


def _search(
    pair: Pair,
    x: Tensor,
    specs: Mapping[nn.Module, tuple[QuantSpec, QuantSpec | None]],
    alphas: Sequence[float],
) -> tuple[FoldRow, Tensor]:
    """The best factors, as exponents of the source's channels."""
    columns = pair.columns.to(x.device)
    linears = {name: linear for name, linear in pair.readers.items() if linear in specs}
    weights = {name: cast(Tensor, linear._parameters["weight"]).float() for name, linear in linears.items()}
    outputs = {name: F.linear(x, weight) for name, weight in weights.items()}
    largest = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    a = _log2_by_channel(x.abs().mean(0), columns, pair.channels)
    w = _log2_by_channel(largest, columns, pair.channels)
    none = torch.zeros(pair.channels, device=x.device)
    tried = [("", 0.0, none)]
    for alpha in alphas:
        tried.append(("awq", alpha, _rounded(alpha * a)))
        tried.append(("smoothquant", alpha, _rounded(alpha * a - (1 - alpha) * w)))
    errors = [
        _output_error(linears, weights, outputs, x, torch.exp2(exponents)[columns], specs) for _, _, exponents in tried
    ]
    best = min(range(len(tried)), key=errors.__getitem__)
    rule, alpha, exponents = tried[best]
    low, high = (int(value) for value in exponents.aminmax())
    row = FoldRow(pair.name, tuple(pair.readers), rule, alpha, errors[0] ** 0.5, errors[best] ** 0.5, (low, high))
    return row, exponents


def _log2_by_channel(sizes: Tensor, columns: Tensor, channels: int) -> Tensor:
    """log2 of the largest size of the columns that read a channel; of dead ones, that of the smallest that counts."""
    of_channel = sizes.new_zeros(channels).scatter_reduce(0, columns, sizes, "amax")
    return of_channel.clamp_min(max(1e-4 * float(of_channel.max()), 1e-30)).log2()


def _rounded(exponents: Tensor) -> Tensor:
    """Whole numbers around zero."""
    return (exponents - exponents.median()).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)


def _output_error(
    linears: Mapping[str, nn.Linear],
    weights: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    x: Tensor,
    factor: Tensor,
    specs: Mapping[nn.Module, tuple[QuantSpec, QuantSpec | None]],
) -> float:
    """Mean over the readers of the squared relative error of their outputs, with the columns multiplied by `factor`."""
    scaled: dict[nn.Module, Tensor] = {linears[name]: weight * factor for name, weight in weights.items()}
    total = 0.0
    for name, linear in linears.items():
        spec, act_spec = specs[linear]
        generator = torch.Generator().manual_seed(0) if spec.rounding == "stochastic" else None
        dtype = cast(Tensor, linear._parameters["weight"]).dtype
        weight = scaled[linear].to(dtype)
        q = fake_quantize(weight, spec, amax=_joint_amax(linear, spec, scaled), generator=generator).float()
        inputs = x / factor
        if act_spec is not None:
            inputs = quantize_tokens(inputs.to(dtype), act_spec, None).float()
        size = outputs[name].square().sum(dtype=torch.float64)
        error = (F.linear(inputs, q) - outputs[name]).square().sum(dtype=torch.float64)
        total += (error / size).item() if size > 0 else 0.0
    return total / len(linears)


def _joint_amax(linear: nn.Linear, spec: QuantSpec, scaled: Mapping[nn.Module, Tensor]) -> Tensor | None:
    """What fixes the per-tensor scale, with the siblings that share it."""
    group = linear._qnoise.scale_group if isinstance(linear, FakeQuantLinear) else ()
    if not spec.per_tensor_scale or len(group) < 2:
        return None
    weights = [scaled.get(peer, peer._parameters.get("weight")) for peer in group]
    return torch.stack([weight_amax(w) for w in weights if w is not None]).amax()


def _leaves_range(pair: Pair, exponents: Tensor) -> str:
    """Why some value would be rounded by a power of two (overflow, subnormal); empty if none is."""
    factor = torch.exp2(exponents)
    columns = factor[pair.columns.to(factor.device)]
    writes = [(name, cast(Tensor, m._parameters["weight"]), columns) for name, m in pair.readers.items()]
    if not pair.one_plus:
        by_row = factor.reciprocal()
        for own in pair.source._parameters.values():
            if own is not None:
                writes.append((pair.name, own, by_row[:, None] if own.dim() == 2 else by_row))
    for name, values, by in writes:
        by = by.to(values)
        if not torch.equal(values * by * by.reciprocal(), values):
            return f"its factors would take values of {name} out of the range of {values.dtype}"
    return ""


def _apply(model: nn.Module, fold: _Fold, back: bool = False) -> None:
    """Write the factors, or take them out."""
    pair = fold.pair
    exponents = fold.exponents.float().neg() if back else fold.exponents.float()
    factor = torch.exp2(exponents)
    columns = factor[pair.columns.to(factor.device)]
    adapters = lora_layers(model)
    for linear in pair.readers.values():
        weight = cast(Tensor, linear._parameters["weight"])
        weight.mul_(columns.to(weight))
        if linear in adapters:
            for a in adapters[linear].lora_A.values():
                a.weight.mul_(columns.to(a.weight))
    inverse = factor.reciprocal()
    source = pair.source
    weight = cast(Tensor, source._parameters["weight"])
    if pair.one_plus:
        _write_one_plus(fold, weight, inverse.to(weight.device), back)
    else:
        weight.mul_((inverse if weight.dim() == 1 else inverse[:, None]).to(weight))
    bias = source._parameters.get("bias")
    if bias is not None:
        bias.mul_(inverse.to(bias))
    if source in adapters:
        for b in adapters[source].lora_B.values():
            b.weight.mul_(inverse[:, None].to(b.weight))
            if getattr(b, "bias", None) is not None:
                b.bias.mul_(inverse.to(b.bias))
    for module in [*pair.readers.values(), source]:
        # Of the weight that is there now, for a time when it is out of reach.
        if isinstance(module, FakeQuantLinear) and module._qnoise.patched_amax is not None:
            module._qnoise.patched_amax = kept_amax(cast(Tensor, module._parameters["weight"]))


def _write_one_plus(fold: _Fold, weight: Tensor, inverse: Tensor, back: bool) -> None:
    if back and fold.kept is not None and torch.equal(weight, fold.kept[1].to(weight.device)):
        weight.copy_(fold.kept[0])
        return
    before = weight.clone()
    weight.copy_((weight.float() + 1) * inverse - 1)
    if not back:
        fold.kept = (before, weight.clone())


def _take_back(model: nn.Module, folds: list[_Fold]) -> None:
    _check_unpinned({linear: None for fold in folds for linear in fold.pair.readers.values()})
    check_unmerged(model)
    with torch.no_grad():
        while folds:
            _apply(model, folds.pop(), back=True)


def _difference(now: Tensor, before: Tensor) -> float:
    if torch.equal(now, before):
        return 0.0
    return ((now.float() - before.float()).abs().max() / before.float().abs().max()).item()


def _kl(model: nn.Module, given: Sequence[Any]) -> float | None:
    """Mean KL from the full-precision model, its adapters as they are; None where there is none."""
    if patch_config(model) is None:
        return None
    teacher = SelfTeacher(model, adapters=True, start=())
    total = count = 0.0
    with evaluating(model), quiet(model):
        for batch in given:
            try:
                kl, seen = teacher.kl(batch)
            except TypeError:
                return None
            total, count = total + kl, count + seen
    return total / count if count else None
