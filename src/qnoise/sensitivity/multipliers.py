"""Layer-wise noise: factors on sigma that follow from a scan.

With err_l the mean relative error of layer l, r_l = err_l / mean err, and L layers (published as "RIN", resilient-
improving noise; the shares are those of the original on 28 layers):

* targeted: 1 on the L/7 layers of the largest error (at least one), 0 on the others and outside the layers.
* variable: 1.5 on the L/7 layers of the largest error, 1.2 on the next 2L/7, 1 on the others.
* proportional: r_l.
* inverse: max(0, 2 - r_l): more noise where there is less error.
* ceiling: inverse divided by its largest value, so that none exceeds 1.
* zones: 1 on the first and last fifth of the layers; 1 between them until half of the steps, then 0.5. A function of
  progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnoise.formats import QuantSpec
from qnoise.spelling import check_choice

if TYPE_CHECKING:
    from qnoise.noise_control import Multiplier
    from qnoise.sensitivity.report import ScanReport

MULTIPLIERS = ("targeted", "variable", "proportional", "inverse", "ceiling", "zones")


@dataclass(frozen=True)
class Switch:
    """A factor that changes once: `before` until progress `at`, then `after`."""

    before: float = 1.0
    after: float = 0.5
    at: float = 0.5

    def __call__(self, progress: float) -> float:
        return self.before if progress < self.at else self.after


def multipliers(
    report: ScanReport, kind: str, fmt: str | QuantSpec | None = None, of: str | None = None
) -> dict[str | int, Multiplier]:
    """See `ScanReport.multipliers`. Keys are layer indices, or globs where the model has several stacks of layers."""
    from qnoise.sensitivity.report import layer_kind

    check_choice("kind of multipliers", kind, MULTIPLIERS)
    of, spec = layer_kind(report, of), report.spec_of(fmt)
    stacks: dict[str, dict[int, float]] = {}
    for each in report.layers:
        if each.kind == of and each.spec == spec and each.layer is not None:
            stacks.setdefault(each.stack, {})[each.layer] = each.figures["mean_relative_error"]
    if not stacks:
        raise ValueError(f"{report.source} has no rows of kind {of!r} inside numbered layers")
    # The last match wins in a NoiseScheduler.
    factors: dict[str | int, Multiplier] = {"*": 0.0} if kind == "targeted" else {}
    for stack, errors in stacks.items():
        for layer, factor in _factors(kind, errors).items():
            factors[layer if len(stacks) == 1 else f"{stack}.{layer}.*"] = factor
    return factors


def _factors(kind: str, errors: dict[int, float]) -> dict[int, Multiplier]:
    count = len(errors)
    worst_first = sorted(errors, key=lambda layer: (-errors[layer], layer))
    few, more = max(1, round(count / 7)), max(1, round(3 * count / 7))
    if kind == "targeted":
        return {layer: 1.0 if layer in worst_first[:few] else 0.0 for layer in errors}
    if kind == "variable":
        return {
            layer: 1.5 if layer in worst_first[:few] else 1.2 if layer in worst_first[:more] else 1.0
            for layer in errors
        }
    if kind == "zones":
        ordered = sorted(errors)
        first, last = -(-count // 5), count - count // 5
        return {layer: Switch() if first <= at < last else 1.0 for at, layer in enumerate(ordered)}
    mean = sum(errors.values()) / count
    relative = {layer: error / mean if mean else 1.0 for layer, error in errors.items()}
    if kind == "proportional":
        return dict(relative)
    inverse = {layer: max(0.0, 2.0 - ratio) for layer, ratio in relative.items()}
    if kind == "inverse":
        return dict(inverse)
    largest = max(inverse.values())
    return {layer: value / largest if largest else 1.0 for layer, value in inverse.items()}
