"""GPTQ for block-scaled formats: the error of a column is made good by the columns that are still to be rounded.

What counts is the output, ||(W^ - W) X||, not the weight. With the damped second moment H = mean(x x') + lambda I of
the inputs and U the upper Cholesky factor of H^-1 (H^-1 = U' U), column j is rounded to q_j and every later column k
takes

    w_k <- w_k - (w_j - q_j) U_jk / U_jj

(Frantar et al., arXiv 2210.17323, eq. 2 and section 3.3). The weight error *rises* by this, often by half, while the
output error falls: do not judge the result by SQNR.

A block format adds the question of when the scale of a block is fixed. Three ways are tried, with the same per-tensor
scale, and each output row takes the one of least error tr(e H e'), ties to the first:

* `nearest`: plain rounding to nearest, no feedback. So no row gets worse on the calibration text.
* `entered`: the scale is chosen by the format's rule from the block as it is when its first column is reached, that is
  with the errors of all earlier blocks in it.
* `before`: the scale is that of the original block.

Then `sweeps` passes of coordinate descent over the row, with its scales kept (as QuantEase does, arXiv 2309.01885):
column after column is rounded anew to what is best given all others, w_j - sum over k != j of e_k H_kj / H_jj. No pass
raises the error.

With `asymmetric=True` all this is done to the weight of least output error against the full-precision model in place of
W itself (`asymmetric.py`).

All arithmetic of the feedback is in fp64 (on the CPU for devices that have none); rounding itself is that of
`reference.py`, in fp32, so the result is exact codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.linear_record import Pin
from qnoise.nn.packed import PackedLinear
from qnoise.nn.shared_scale import joint_amax
from qnoise.packing import BlockQuantized, encode, pack
from qnoise.patch import patch_config
from qnoise.reference import divisor_of, rotated_blocks, round_units, signed_values
from qnoise.repairs.asymmetric import PairedMoments, by_input
from qnoise.repairs.calibration import SecondMoments, by_layer, second_moments
from qnoise.rotation import hadamard
from qnoise.scales import Scales, select_scales

WAYS = ("nearest", "entered", "before")
_LAZY = 128  # columns between updates of all later ones


@dataclass(frozen=True)
class GptqRow:
    """What became of one linear. Errors are relative: ||(W^ - W) X|| / ||W X|| and ||W^ - W|| / ||W||.

    Of `gptq(asymmetric=True)` the output error is ||W^ X - W X^|| / ||W X^||, with X^ as in the full-precision model.

    `rows` counts the output rows that took each of the `WAYS`.
    """

    name: str
    spec: QuantSpec
    tokens: int
    output_error_before: float
    output_error_after: float
    weight_error_before: float
    weight_error_after: float
    rows: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class GptqReport:
    """What `gptq` did. `skipped`: canonical name -> why a quantized linear was left as it is."""

    rows: tuple[GptqRow, ...]
    skipped: Mapping[str, str]
    _before: dict[FakeQuantLinear, Pin | None] = field(repr=False, default_factory=dict)

    def undo(self) -> None:
        """Give every linear the codes it had before: its own Q(W), or what was pinned then."""
        _put_back(self._before)
        self._before.clear()

    def __str__(self) -> str:
        lines = [f"{'linear':<44} {'output error':>20} {'weight error':>20}"]
        for row in self.rows:
            output = f"{row.output_error_before:.4f} -> {row.output_error_after:.4f}"
            weight = f"{row.weight_error_before:.4f} -> {row.weight_error_after:.4f}"
            lines.append(f"{row.name[-44:]:<44} {output:>20} {weight:>20}")
        lines += [f"{name}: left as it is: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def gptq(
    model: nn.Module,
    inputs: Any = None,
    *,
    hessians: SecondMoments | Mapping[str, Tensor] | str | Path | None = None,
    damping: float = 0.01,
    share_siblings: bool = True,
    sequential: bool = True,
    asymmetric: bool = False,
    sweeps: int = 2,
    progress: bool = False,
) -> GptqReport:
    """Choose the codes of every frozen quantized linear by what they do to its output, and pin them.

    The bits and the format stay what they are. The weights themselves are not touched: `unpatch_model` gives the stock
    model back, `report.undo()` the plain Q(W), and `bake`, `rollout_weights` and packed storage hold the pinned values.
    The weight error rises; the output error falls (see the module's text).

    Args:
        model: patched, with `storage` other than "packed"; wrapped by PEFT or not. A merged adapter is part of the
            weight; one that is not merged acts in the forward and is not quantized.
        inputs: calibration text, as `qnoise.scan(inputs=)` takes it: one batch (a tensor of ids, or a mapping of
            keyword arguments), or an iterable of batches. Text that the model writes itself is a good choice.
        hessians: second moments in place of inputs: what `repairs.calibration.second_moments` gives, the path of what
            its `save` wrote, or a mapping from canonical names to (in_features, in_features) tensors.
        damping: lambda as a share of the mean of H's diagonal.
        share_siblings: linears that were patched to share their per-tensor scale (NVFP4) keep that of their joint amax;
            False: each takes its own.
        sequential: one decoder layer after the other, each seeing what the layers before it give now that they are
            quantized, as in the paper. False: all at once, from the model as it is when called. Needs `inputs`.
        asymmetric: match the outputs that the full-precision model has, and not those that the original weight gives on
            inputs which earlier linears have spoilt: the linears make good what was lost before them (see
            `qnoise.repairs.asymmetric`). One input after the other, in some six forwards of the model where layers that
            are done can be skipped.
        sweeps: passes of coordinate descent after the feedback; 0 for GPTQ alone.
        progress: show a bar.

    Returns:
        A report; its errors are measured on the calibration text.

    Raises:
        ValueError: not patched; packed weights; neither or both of inputs and hessians; asymmetric without inputs or
            not sequential; no linear that can be done; a weight, an input or a moment with NaN or Inf, a moment of a
            wrong shape, one that cannot be factored (with damping=0), a weight out of reach: the linear is named. Pins
            are then what they were.
        FileNotFoundError: no such file of moments.
    """
    if patch_config(model) is None:
        raise ValueError(f"{type(model).__name__} is not patched; call qnoise.patch_model(model) first")
    if (inputs is None) == (hessians is None):
        raise ValueError("gptq needs calibration inputs or hessians=, one of the two")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping={damping} must be a finite number >= 0; 0.01 is usual")
    if not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps={sweeps!r} must be an integer >= 0")
    if asymmetric and (hessians is not None or not sequential):
        raise ValueError(
            "asymmetric=True goes from one input to the next on the inputs themselves: give inputs, no hessians=, and "
            "leave sequential=True"
        )
    targets, skipped = _targets(model)
    before = {module: module._qnoise.pin for module in targets.values()}
    factors = _Factors(damping)
    rows: list[GptqRow] = []
    try:
        given = _moments(model, inputs, hessians, targets, sequential, asymmetric)
        for moments in _with_progress(given, len(targets), progress):
            done = _repair([targets[name] for name in moments.names], moments, factors, share_siblings, sweeps)
            for row, codes in done:
                targets[row.name].pin(codes, asymmetric=asymmetric)
                rows.append(row)
    except BaseException:
        _put_back(before)
        raise
    reached = {row.name for row in rows}
    missing = "no input reached it" if hessians is None else "hessians has nothing of it"
    skipped |= {name: missing for name in targets if name not in reached}
    if not rows:
        raise ValueError(
            f"no linear of {type(model).__name__} could be done: {'; '.join(map(': '.join, skipped.items()))}"
        )
    return GptqReport(tuple(rows), skipped, {targets[name]: before[targets[name]] for name in reached})


def _put_back(before: Mapping[FakeQuantLinear, Pin | None]) -> None:
    for module, pin in before.items():
        if pin is None:
            module.pin(None)
        else:
            module.pin(pin.quantized, asymmetric=pin.asymmetric)


def _targets(model: nn.Module) -> tuple[dict[str, FakeQuantLinear], dict[str, str]]:
    """The linears to do, by canonical name, and the others with the reason."""
    targets: dict[str, FakeQuantLinear] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        # PEFT keeps the untrained original of a module it trains whole, and does not use it.
        if not isinstance(module, FakeQuantLinear) or ".original_module" in path:
            continue
        name, record, weight = canonical_name(path), module._qnoise, module._parameters.get("weight")
        spec = record.weight_spec
        if spec is None:
            continue
        if isinstance(module, PackedLinear):
            raise ValueError(
                f"{name}: its weight is packed already, and what was lost by that cannot be made good. Patch with "
                "storage='auto', call gptq, then qnoise.patch.pack_model(model)."
            )
        if weight is None or weight.is_meta or type(weight) is not nn.Parameter:
            skipped[name] = "its weight is out of reach (offloaded, sharded, or computed by a hook)"
        elif weight.requires_grad:
            skipped[name] = "its weight is trained, and pinned codes would not follow it"
        elif record.noise_during:
            skipped[name] = "noise acts on its weight before it is quantized"
        elif spec.rounding == "stochastic":
            skipped[name] = "its rounding is stochastic, and the feedback needs one that is fixed"
        elif not spec.storable:
            what = "macro_block" if spec.macro_block is not None else "residual"
            skipped[name] = f"{spec}: codes of a {what} cannot be stored, so none can be pinned"
        else:
            targets[name] = module
    if not targets:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise ValueError(f"{type(model).__name__} has no linear that gptq can do. {why}")
    return targets, skipped


def _moments(
    model: nn.Module,
    inputs: Any,
    hessians: Any,
    targets: Mapping[str, FakeQuantLinear],
    sequential: bool,
    asymmetric: bool,
) -> Iterator[PairedMoments]:
    """The moments of each linear, or of those that share an input, as late as possible."""
    if asymmetric:
        yield from by_input(model, inputs, targets.values())
        return
    found: Iterable[SecondMoments]
    if hessians is not None:
        given = SecondMoments.load(hessians) if isinstance(hessians, str | Path) else hessians
        if not isinstance(given, SecondMoments):
            given = SecondMoments(given, {})
        found = [SecondMoments({name: given.of[name] for name in targets if name in given.of}, given.tokens)]
    elif sequential:
        found = (moments for _, moments in by_layer(model, inputs, targets.values()))
    else:
        found = [second_moments(model, inputs, targets.values())]
    for moments in found:
        for name, moment in moments.of.items():
            yield PairedMoments.same(name, moment, moments.tokens.get(name, 0))


def _with_progress(steps: Iterator[PairedMoments], linears: int, progress: bool) -> Iterator[PairedMoments]:
    if not progress:
        yield from steps
        return
    from tqdm.auto import tqdm

    with tqdm(total=linears, desc="gptq", unit="linear") as bar:
        for moments in steps:
            yield moments
            bar.update(len(moments.names))


class _Factors:
    """The factor of the last second moment: siblings that see one input come one after the other."""

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self._last: tuple[Any, ...] = ()

    def of(self, moment: Tensor, spec: QuantSpec, name: str) -> tuple[Tensor, Tensor]:
        """H, damped, and U / diag(U), in the basis the spec quantizes in, padded to whole blocks; fp64."""
        key = (spec.rotation, spec.block_format.block_size)
        if not self._last or self._last[0] is not moment or self._last[1] != key:
            self._last = (moment, key, *_factor(moment, spec, self.damping, name))
        return self._last[2], self._last[3]


def _factor(moment: Tensor, spec: QuantSpec, damping: float, name: str) -> tuple[Tensor, Tensor]:
    size = spec.block_format.block_size
    h = nn.functional.pad(moment, (0, -moment.shape[0] % size, 0, -moment.shape[0] % size))
    if spec.rotation:
        for _ in range(2):
            h = hadamard(h.unflatten(-1, (-1, size))).flatten(-2).T
    else:
        h = h.clone()
    mean = moment.diagonal().mean()
    diagonal = h.diagonal()
    diagonal += damping * mean
    # An input that is never on says nothing of its column, which is then rounded to nearest.
    diagonal[diagonal == 0] = 1.0
    # P H P = L L' with P the reversal gives U = P L^-1 P: no inverse of H is formed.
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed:
        raise ValueError(
            f"{name}: the second moment of its input is not positive definite with damping={damping}: there are fewer "
            "calibration tokens than inputs, or inputs that always move together. Raise damping (0.01 is usual)."
        )
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    return h, upper / upper.diagonal().clone().unsqueeze(1)


@torch.no_grad()
def _repair(
    modules: list[FakeQuantLinear], moments: PairedMoments, factors: _Factors, share_siblings: bool, sweeps: int
) -> list[tuple[GptqRow, BlockQuantized]]:
    """Linears that have an input in common; those of one spec and one per-tensor scale in one go."""
    weights = [cast(Tensor, module._parameters["weight"]) for module in modules]
    for name, weight in zip(moments.names, weights, strict=True):
        _check(name, weight, moments.now)
    # Not every device has fp64.
    device = torch.device("cpu") if weights[0].device.type == "mps" else weights[0].device
    moments = moments.to(device)
    sets: list[_Set] = []
    with torch.inference_mode(False):
        for name, module, weight in zip(moments.names, modules, weights, strict=True):
            w = weight.detach().to(device)
            if moments.paired:
                w = moments.target(w, factors.damping).to(torch.float32)
            amax = joint_amax(module._qnoise, weight) if share_siblings else None
            spec = cast(QuantSpec, module._qnoise.weight_spec)
            divisor = divisor_of(w, spec, -1, None if amax is None else amax.to(device))
            if not sets or not sets[-1].fits(spec, divisor):
                sets.append(_Set(spec, divisor))
            sets[-1].members.append((name, module, weight))
            sets[-1].blocks.append(rotated_blocks(w, spec))
        return [done for each in sets for done in _round(each, moments, factors, sweeps)]


def _check(name: str, weight: Tensor, moment: Tensor) -> None:
    width = weight.shape[1]
    if tuple(moment.shape) != (width, width):
        raise ValueError(f"{name}: its second moment has shape {tuple(moment.shape)}, and must have ({width}, {width})")
    for what, tensor in (("weight", weight), ("second moment", moment)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: NaN or Inf in its {what}; gptq needs finite numbers")


@dataclass
class _Set:
    """Linears of one spec and one divisor of their block scales, whose rows are rounded together."""

    spec: QuantSpec
    divisor: Tensor | None
    members: list[tuple[str, FakeQuantLinear, Tensor]] = field(default_factory=list)
    blocks: list[Tensor] = field(default_factory=list)

    def fits(self, spec: QuantSpec, divisor: Tensor | None) -> bool:
        if divisor is None or self.divisor is None:
            return spec == self.spec and divisor is self.divisor
        return spec == self.spec and torch.equal(divisor, self.divisor)


def _round(
    given: _Set, moments: PairedMoments, factors: _Factors, sweeps: int
) -> Iterator[tuple[GptqRow, BlockQuantized]]:
    spec, divisor, blocks = given.spec, given.divisor, torch.cat(given.blocks)
    h, steps = factors.of(moments.now, spec, given.members[0][0])
    way, scales, rounded, negative = _choose(blocks, h, steps, spec, divisor)
    if sweeps:
        rounded, negative = _descend(blocks, h, spec, Scales(scales, divisor).value(), rounded, negative, sweeps)
    element = spec.block_format.element
    start = 0
    for name, module, weight in given.members:
        own = slice(start, start + len(weight))
        start += len(weight)
        codes = pack(encode(rounded[own], negative[own], element), element.bits).contiguous()
        after = BlockQuantized(codes, scales[own].contiguous(), divisor, weight.shape, spec, 1, weight.dtype)
        whole = weight.detach().to(h.device, torch.float64)
        values = [q.dequantize(torch.float32).to(whole) for q in (module.quantized().to(h.device), after)]
        out = [moments.error(whole, v) for v in values]
        plain = [_ratio((v - whole).square().sum().item(), whole.square().sum().item()) for v in values]
        row = GptqRow(
            name=name,
            spec=spec,
            tokens=moments.tokens,
            output_error_before=out[0],
            output_error_after=out[1],
            weight_error_before=plain[0],
            weight_error_after=plain[1],
            rows={each: int((way[own] == number).sum()) for number, each in enumerate(WAYS)},
        )
        yield row, after.to(weight.device)


def _ratio(error: float, whole: float) -> float:
    return max(error / whole, 0.0) ** 0.5 if whole > 0 else 0.0


def _choose(
    blocks: Tensor, h: Tensor, steps: Tensor, spec: QuantSpec, divisor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row the best of the `WAYS`: (rows,) its number, then scale bytes (rows, blocks), magnitudes in units of
    the scale and signs, (rows, blocks * block_size)."""
    wanted = blocks.flatten(-2).to(torch.float64)
    plain = select_scales(blocks, spec, divisor)
    magnitude = round_units(blocks, plain.value(), spec, None)
    values = signed_values(magnitude, blocks, plain.value(), spec)
    best = (plain.codes.clone(), magnitude.flatten(-2), torch.signbit(values.flatten(-2)))
    least = _row_errors(values.flatten(-2), wanted, h)
    way = torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
    # Both ways in one go, one below the other.
    codes, magnitude, values = _feed_back(wanted, steps, spec, divisor, plain)
    for number in (1, 2):
        rows = slice((number - 1) * len(wanted), number * len(wanted))
        error = _row_errors(values[rows], wanted, h)
        better = error < least
        least = torch.where(better, error, least)
        way = way.masked_fill(better, number)
        given = (codes[rows], magnitude[rows], torch.signbit(values[rows]))
        for new, old in zip(given, best, strict=True):
            old[better] = new[better]
    return way, *best


def _row_errors(values: Tensor, wanted: Tensor, h: Tensor) -> Tensor:
    error = values.to(torch.float64) - wanted
    return ((error @ h) * error).sum(-1)


def _feed_back(
    wanted: Tensor, steps: Tensor, spec: QuantSpec, divisor: Tensor | None, before: Scales
) -> tuple[Tensor, Tensor, Tensor]:
    """Round column after column, each error made good by the later ones: the ways "entered" and "before".

    Args:
        wanted: (rows, columns) fp64, columns a multiple of the block size.
        steps: (columns, columns) fp64, U_jk / U_jj.
        before: the scales of the blocks as they are wanted.

    Returns:
        Scale bytes, uint8 (2 * rows, blocks); magnitudes in units of the scale and values, fp32 (2 * rows, columns).
        The first half chose the scale of a block when it was reached, the second half kept those of `before`.
    """
    size = spec.block_format.block_size
    lazy = max(_LAZY, size)
    rows, columns = wanted.shape
    # A column of the weight is a row here, to lie in one piece.
    left = wanted.T.repeat(1, 2)
    magnitudes = torch.empty(columns, 2 * rows, dtype=torch.float32, device=left.device)
    values = torch.empty_like(magnitudes)
    codes = []
    kept, scale = before.value(), magnitudes[0]
    for start in range(0, columns, lazy):
        part = left[start : start + lazy]
        errors = torch.empty_like(part)
        for at in range(len(part)):
            column = start + at
            if column % size == 0:
                block = part[at : at + size, :rows].to(torch.float32).T.unsqueeze(-2)
                entered = select_scales(block.contiguous(), spec, divisor)
                codes.append(torch.cat([entered.codes[:, 0], before.codes[:, column // size]]))
                scale = torch.cat([entered.value(), kept[:, column // size, None]])
            w = part[at].to(torch.float32).view(-1, 1, 1)
            magnitude = round_units(w, scale, spec, None)
            rounded = signed_values(magnitude, w, scale, spec)
            magnitudes[column], values[column] = magnitude.view(-1), rounded.view(-1)
            errors[at] = part[at] - values[column]
            part[at + 1 :].addr_(steps[column, column + 1 : start + len(part)], errors[at], alpha=-1)
        end = start + len(part)
        left[end:].addmm_(steps[start:end, end:].T, errors, alpha=-1)
    return torch.stack(codes, dim=-1), magnitudes.T.contiguous(), values.T.contiguous()


def _descend(
    blocks: Tensor, h: Tensor, spec: QuantSpec, scale: Tensor, magnitudes: Tensor, negative: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Round every column anew to what is best given the others, `sweeps` times; new magnitudes and signs."""
    size = blocks.shape[-1]
    lazy = max(_LAZY, size)
    # Columns of the weight are rows here.
    magnitude, sign = magnitudes.T.contiguous(), negative.T.contiguous()
    value = torch.where(negative, -magnitudes, magnitudes).unflatten(-1, (-1, size)) * scale.unsqueeze(-1)
    value = value.flatten(-2).T.to(torch.float64, memory_format=torch.contiguous_format)
    scale = scale.T.contiguous()
    slope = h @ (value - blocks.flatten(-2).T.to(torch.float64))
    for _ in range(sweeps):
        for start in range(0, len(value), lazy):
            part = slope[start : start + lazy]
            end = start + len(part)
            moves = torch.empty_like(part)
            for at in range(len(part)):
                column = start + at
                best = value[column] - part[at] / h[column, column]
                of_block = scale[column // size].unsqueeze(-1)
                w = best.to(torch.float32).view(-1, 1, 1)
                units = round_units(w, of_block, spec, None)
                rounded = signed_values(units, w, of_block, spec).view(-1)
                moves[at] = rounded - value[column]
                value[column] = rounded
                magnitude[column], sign[column] = units.view(-1), torch.signbit(rounded)
                part.addr_(h[start:end, column], moves[at])
            slope[:start].addmm_(h[:start, start:end], moves)
            slope[end:].addmm_(h[end:, start:end], moves)
    return magnitude.T.contiguous(), sign.T.contiguous()
