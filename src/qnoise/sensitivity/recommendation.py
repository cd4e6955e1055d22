"""What to do after a scan, and why: words that follow from the figures by rules written here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnoise.formats import QuantSpec

if TYPE_CHECKING:
    from qnoise.sensitivity.report import ScanReport
    from qnoise.sensitivity.rows import ScanRow

ACTIONS = ("quantize", "mixed", "reconsider")
_FEW = 0.25


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        action: "quantize" (no tensor is worse than the format is on gaussian data), "mixed" (a quarter of the modules
            at most are: give them another format), "reconsider" (more are, or the scan is incomplete).
        spec: the format it speaks of: that of the highest SQNR among those of the fewest bits.
        modules: names of the modules with issues in that format, worst first.
        reasons: sentences.
    """

    action: str
    spec: QuantSpec
    modules: tuple[str, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.action}: {self.spec}", *(f"- {reason}" for reason in self.reasons)])


def recommend(report: ScanReport) -> Recommendation:
    """See `ScanReport.recommendation`.

    Raises:
        ValueError: the report has no rows.
    """
    from qnoise.sensitivity.report import main_rows, pooled_decibels

    rows = main_rows(report) if report.rows else ()
    if not rows:
        raise ValueError(f"the report on {report.source} has no rows to judge by")
    by_spec: dict[QuantSpec, list[ScanRow]] = {}
    for row in rows:
        by_spec.setdefault(row.spec, []).append(row)
    pooled = {
        spec: pooled_decibels(*([row.figures[name] for row in own] for name in ("norm", "relative_rms")))
        for spec, own in by_spec.items()
    }
    spec = min(pooled, key=lambda each: (math.ceil(each.bits_per_element), -pooled[each]))
    own = by_spec[spec]
    bad = sorted((row for row in own if row.issues), key=lambda row: row.figures["sqnr_db"] - row.gaussian["sqnr_db"])
    reasons = []
    if len(pooled) > 1:
        shown = ", ".join(f"{each} {_db(pooled[each])}" for each in sorted(pooled, key=lambda each: -pooled[each]))
        reasons.append(f"Weights taken together: {shown}.")
    serious = [finding for finding in report.findings if finding.serious]
    if serious:
        first = f"{serious[0].name}: {serious[0].what}"
        reasons.append(f"{len(serious)} findings make this scan incomplete or the model unusable, first: {first}.")
    if not bad:
        reasons.append(f"In {spec} none of {len(own)} tensors is {_worse(report)}.")
    else:
        row = bad[0]
        reasons.append(
            f"In {spec} {len(bad)} of {len(own)} tensors are {_worse(report)}; the worst is {row.name} "
            f"with {_db(row.figures['sqnr_db'])} (a gaussian has {_db(row.gaussian['sqnr_db'])}), kurtosis "
            f"{row.figures['kurtosis']:.3g} (3): {', '.join(row.issues)}."
        )
    few = len(bad) <= _FEW * len(own)
    if bad and few:
        reasons.append(
            "plan(bits=...) chooses a better format for them within a budget; or leave them out by exclude=."
        )
    elif bad and report.thresholds == "classic":
        reasons.append("The classic thresholds flag plain gaussian data too: judge by thresholds='gaussian'.")
    elif bad:
        reasons.append(
            "So many stand out that the cause is common to them (outlier channels, most likely): compare with formats "
            "of smaller blocks or more bits, and measure the model itself before deciding."
        )
    activations = [row for row in report.rows if row.kind == "input" and row.spec == spec and row.issues]
    if activations:
        worst = min(activations, key=lambda row: row.figures["sqnr_db"])
        reasons.append(
            f"Inputs of {len(activations)} linears are harder than gaussian, the worst that of {worst.name} "
            f"({_db(worst.figures['sqnr_db'])}): weight-only quantization does not touch them, act_fmt does."
        )
    action = "reconsider" if serious or not few else "mixed" if bad else "quantize"
    return Recommendation(action, spec, tuple(row.name for row in bad), tuple(reasons))


def _worse(report: ScanReport) -> str:
    return (
        "beyond the classic limits" if report.thresholds == "classic" else "worse than the format is on gaussian data"
    )


def _db(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "no error" if value > 0 else "nothing left"
