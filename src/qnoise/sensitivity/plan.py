"""A format for each module within a budget of bits, and how far from the best possible it is.

The cost of a choice is the sum over the modules of the squared relative error that was measured: of the module's output
where the scan had inputs, else of its weight, which is the output error for white inputs. Choosing one candidate per
module under a sum of bits is a multiple-choice knapsack. Its relaxation, in which a module may be split between
candidates, is solved exactly by taking the steps of the lower convex hulls in the order of their gain per bit (Sinha
and Zoltners, Operations Research 27, 1979); no plan can cost less. The plan itself is found by carrying the list of
sums that are not dominated (fewer bits, or less cost) from module to module (Nemhauser and Ullmann, Management
Science 15, 1969), thinned where it grows beyond 16,384 entries. The gap to the bound is printed with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qnoise.formats import QuantSpec, as_spec
from qnoise.patch import SIBLINGS
from qnoise.sensitivity.plain_json import dumps, loads

if TYPE_CHECKING:
    from qnoise.sensitivity.report import ScanReport
    from qnoise.sensitivity.rows import ScanRow

SCHEMA = "qnoise-plan-1"

_FRONTIER = 1 << 14
_STORED_BITS = {"float64": 64.0, "float32": 32.0, "bfloat16": 16.0, "float16": 16.0}


@dataclass(frozen=True)
class Plan(Mapping[str, QuantSpec | None]):
    """Canonical names of modules -> spec, or None for the stored dtype: `patch_model(model, fmt=plan)` applies it.

    Attributes:
        choices: (name, spec) pairs; shorter names first, so that a name which ends like another does not catch it.
        bits: bits per weight over the modules, block scales included; tails count as if they filled no block.
        nbytes: bytes of the weights, from the same bits.
        cost: sum over the modules of the squared relative error.
        bound: what no plan of this budget can go below.
        measured_on: "outputs" or "weights", what the errors are of.
    """

    choices: tuple[tuple[str, QuantSpec | None], ...]
    bits: float
    nbytes: int
    cost: float
    bound: float
    measured_on: str

    def __getitem__(self, name: str) -> QuantSpec | None:
        return dict(self.choices)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def gap(self) -> float:
        """(cost - bound) / bound; 0 if both are 0."""
        if self.bound > 0:
            return max(0.0, self.cost - self.bound) / self.bound
        return math.inf if self.cost > 0 else 0.0

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for _, spec in self.choices:
            label = "stored dtype" if spec is None else str(spec)
            counts[label] = counts.get(label, 0) + 1
        lines = [f"plan for {len(self)} modules: {self.bits:.4g} bits per weight, {self.nbytes / 1e6:.4g} MB"]
        lines += [f"  {count:5d} x {label}" for label, count in sorted(counts.items())]
        rms = math.sqrt(self.cost / max(1, len(self)))
        lines.append(f"  relative error of the {self.measured_on}: {rms:.4g} (rms over the modules)")
        lines.append(f"  squared errors add up to {self.cost:.4g}; no plan can have less than {self.bound:.4g}")
        lines.append(f"  gap to that bound: {100 * self.gap:.2g} %")
        return "\n".join(lines)

    def to_json(self, indent: int | None = None) -> str:
        values = {
            "schema": SCHEMA,
            "modules": {name: None if spec is None else spec.to_dict() for name, spec in self.choices},
            "bits": self.bits,
            "nbytes": self.nbytes,
            "cost": self.cost,
            "bound": self.bound,
            "measured_on": self.measured_on,
        }
        return dumps(values, indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: no JSON, another schema, an unknown format, or a field that is missing.
        """
        values: Any = loads(text)
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"this is no plan: schema is {schema!r}, read is {SCHEMA!r}")
        try:
            choices = tuple(
                (str(name), None if spec is None else QuantSpec.from_dict(spec))
                for name, spec in values["modules"].items()
            )
            return cls(
                choices, float(values["bits"]), int(values["nbytes"]), float(values["cost"]), float(values["bound"]),
                str(values["measured_on"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this plan is damaged: {type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class _Unit:
    """Modules that have to agree, and what each candidate means for them."""

    names: tuple[str, ...]
    bits: tuple[float, ...]
    costs: tuple[float, ...]


def make_plan(
    report: ScanReport,
    bits: float | None,
    candidates: Sequence[str | QuantSpec | None] | None,
    memory: float | None,
) -> Plan:
    """See `ScanReport.plan`. Linears that engines fuse (q/k/v, gate/up) get one format."""
    from qnoise.sensitivity.report import main_rows

    specs = _candidates(report, candidates)
    by_name: dict[str, dict[QuantSpec, ScanRow]] = {}
    for row in main_rows(report):
        by_name.setdefault(row.name, {})[row.spec] = row
    measured = any("output_relative_rms" in row.figures for rows in by_name.values() for row in rows.values())
    units = _units(by_name, specs)
    total = sum(next(iter(rows.values())).numel for rows in by_name.values())
    budget = _budget(bits, memory, total, units)
    chosen = _choose(units, budget)
    used = sum(unit.bits[at] for unit, at in zip(units, chosen, strict=True))
    choices = [(name, specs[at]) for unit, at in zip(units, chosen, strict=True) for name in unit.names]
    choices.sort(key=lambda pair: (pair[0].count("."), pair[0]))
    return Plan(
        tuple(choices),
        bits=used / total,
        nbytes=math.ceil(used / 8),
        cost=math.fsum(unit.costs[at] for unit, at in zip(units, chosen, strict=True)),
        bound=_bound(units, budget),
        measured_on="outputs" if measured else "weights",
    )


def _candidates(
    report: ScanReport, candidates: Sequence[str | QuantSpec | None] | None
) -> tuple[QuantSpec | None, ...]:
    if candidates is None:
        return report.specs
    if isinstance(candidates, str | QuantSpec):
        candidates = [candidates]
    if not candidates:
        raise ValueError("candidates is empty; name at least one format")
    return tuple(dict.fromkeys(None if c is None else report.spec_of(as_spec(c)) for c in candidates))


def _units(by_name: Mapping[str, Mapping[QuantSpec, ScanRow]], specs: Sequence[QuantSpec | None]) -> list[_Unit]:
    groups: dict[Any, list[str]] = {}
    for name in by_name:
        parent, _, leaf = name.rpartition(".")
        siblings = next((each for each in SIBLINGS if leaf in each), None)
        groups.setdefault((parent, siblings) if siblings else name, []).append(name)
    units = []
    for names in groups.values():
        each = [_of_module(by_name[name], specs) for name in names]
        bits, costs = (tuple(map(math.fsum, zip(*(one[i] for one in each), strict=True))) for i in (0, 1))
        units.append(_Unit(tuple(names), bits, costs))
    return units


def _of_module(rows: Mapping[QuantSpec, ScanRow], specs: Sequence[QuantSpec | None]) -> tuple[list[float], list[float]]:
    bits, costs = [], []
    for spec in specs:
        if spec is None:
            row = next(iter(rows.values()))
            bits.append(_STORED_BITS[row.dtype] * row.numel)
            costs.append(0.0)
        else:
            row = rows[spec]
            error = row.figures.get("output_relative_rms", row.figures["relative_rms"])
            bits.append(spec.bits_per_element * row.numel)
            costs.append(error**2)
    return bits, costs


def _budget(bits: float | None, memory: float | None, total: int, units: Sequence[_Unit]) -> float:
    if bits is None and memory is None:
        raise ValueError("give a budget: bits (per weight, such as 4.5) or memory (bytes)")
    budgets = [] if bits is None else [bits * total]
    if memory is not None:
        budgets.append(8.0 * memory)
    budget, least = min(budgets), math.fsum(min(unit.bits) for unit in units)
    # A budget equal to a candidate's bits is met by it, whatever the rounding of the sums.
    budget *= 1 + 1e-12
    if not budget >= least:
        raise ValueError(
            f"the budget of {min(budgets) / total:.6g} bits per weight ({min(budgets) / 8:,.0f} bytes) is below the "
            f"smallest candidates, {least / total:.6g} bits ({least / 8:,.0f} bytes); raise it, or scan smaller formats"
        )
    return budget


def _bound(units: Sequence[_Unit], budget: float) -> float:
    """Cost of the relaxed optimum."""
    used, cost = [], []
    steps = []
    for unit in units:
        hull = _hull(unit)
        used.append(unit.bits[hull[0]])
        cost.append(unit.costs[hull[0]])
        for low, high in pairwise(hull):
            more, gain = unit.bits[high] - unit.bits[low], unit.costs[low] - unit.costs[high]
            steps.append((gain / more, more, gain))
    room, bound = budget - math.fsum(used), math.fsum(cost)
    # Along a hull the gain per bit falls, so this order keeps the steps of a unit in theirs.
    for _, more, gain in sorted(steps, reverse=True):
        share = min(1.0, room / more)
        bound -= share * gain
        room -= share * more
        if share < 1.0:
            break
    return max(0.0, bound)


def _choose(units: Sequence[_Unit], budget: float) -> list[int]:
    """Index of the candidate of each unit, of the least cost that was found within the budget."""
    least = [min(unit.bits) for unit in units]
    bits, cost = np.zeros(1), np.zeros(1)
    stages = []
    for index, unit in enumerate(units):
        all_bits = (bits[:, None] + np.array(unit.bits)).ravel()
        all_cost = (cost[:, None] + np.array(unit.costs)).ravel()
        fits = np.flatnonzero(all_bits <= budget - math.fsum(least[index + 1 :]))
        kept = fits[np.lexsort((all_cost[fits], all_bits[fits]))]
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(all_cost[kept])[:-1]))
        kept = kept[all_cost[kept] < best_before]
        if len(kept) > _FRONTIER:
            # One of each interval of bits: the last, which costs least.
            interval = (all_bits[kept] - all_bits[kept[0]]) // ((np.ptp(all_bits[kept]) or 1.0) / _FRONTIER)
            kept = kept[np.append(interval[1:] != interval[:-1], True)]
        bits, cost = all_bits[kept], all_cost[kept]
        stages.append((kept // len(unit.bits), kept % len(unit.bits)))
    at, chosen = int(cost.argmin()), []
    for before, choice in reversed(stages):
        chosen.append(int(choice[at]))
        at = int(before[at])
    return chosen[::-1]


def _hull(unit: _Unit) -> list[int]:
    """Candidates on the lower convex hull of (bits, cost), from the fewest bits on; each costs less than the last."""
    hull: list[int] = []
    for at in sorted(range(len(unit.bits)), key=lambda i: (unit.bits[i], unit.costs[i])):
        if hull and unit.costs[at] >= unit.costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(unit, hull[-2], hull[-1]) >= _slope(unit, hull[-2], at):
            hull.pop()
        hull.append(at)
    return hull


def _slope(unit: _Unit, low: int, high: int) -> float:
    return (unit.costs[high] - unit.costs[low]) / (unit.bits[high] - unit.bits[low])
