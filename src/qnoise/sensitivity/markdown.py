"""A report as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnoise.sensitivity.report import ScanReport
    from qnoise.sensitivity.rows import ScanRow


def markdown(report: ScanReport, top: int | None) -> str:
    """See `ScanReport.to_markdown`."""
    from qnoise.sensitivity.report import pooled_decibels

    parts = [f"# What quantization does to {cell(report.source)}"]
    rows = []
    for kind in report.kinds:
        for spec in report.specs:
            own = [row for row in report.rows if row.kind == kind and row.spec == spec]
            if own:
                pooled = pooled_decibels(*([row.figures[n] for row in own] for n in ("norm", "relative_rms")))
                worst = min(own, key=lambda row: row.figures["sqnr_db"])
                flagged = sum(bool(row.issues) for row in own)
                rows.append(
                    [
                        kind, str(spec), f"{spec.bits_per_element:g}", str(len(own)), number(pooled),
                        number(_mean(own, "sqnr_db", gaussian=True)), percent(own, "deadzone"),
                        percent(own, "clipped_blocks"), percent(own, "mean_relative_error"),
                        f"`{cell(worst.name)}` {number(worst.figures['sqnr_db'])}", str(flagged),
                    ]
                )  # fmt: skip
    header = [
        "tensors", "format", "bits", "number", "SQNR dB", "gaussian", "deadzone %", "clipped blocks %", "mean rel. %",
        "worst", "flagged",
    ]  # fmt: skip
    parts.append(table(header, rows))
    if report.rows:
        advice = report.recommendation
        reasons = "\n".join(f"- {cell(reason)}" for reason in advice.reasons)
        parts.append(f"## What to do\n\n{advice.action}: {advice.spec}\n\n{reasons}")
    parts.append(_ranking(report, top))
    if report.findings:
        lines = [
            f"- {'**' if f.serious else ''}`{cell(f.name)}`: {cell(f.what)}{'**' if f.serious else ''}"
            for f in sorted(report.findings, key=lambda f: not f.serious)
        ]
        parts.append("## Findings\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _ranking(report: ScanReport, top: int | None) -> str:
    ranked = ranking(report)
    shown = ranked if top is None else ranked[:top]
    rows = [
        [
            f"`{cell(row.name)}`", row.kind, str(row.spec), number(row.figures["sqnr_db"]),
            signed(distance(row)), number(100 * row.figures["deadzone"]), number(row.figures["kurtosis"]),
            number(row.figures["block_crest"]), number(row.figures["worst_channel_sqnr_db"]),
            ", ".join(row.issues) or "–",
        ]
        for row in shown
    ]  # fmt: skip
    header = [
        "tensor", "kind", "format", "SQNR dB", "against gaussian", "deadzone %", "kurtosis", "block crest",
        "worst channel dB", "issues",
    ]  # fmt: skip
    return f"## Worst tensors ({len(shown)} of {len(ranked)})\n\n{table(header, rows)}"


def ranking(report: ScanReport) -> list[ScanRow]:
    """All rows, those furthest below their gaussian reference first."""
    return sorted(report.rows, key=lambda row: (distance(row), row.name, row.kind, str(row.spec)))


def distance(row: ScanRow) -> float:
    """SQNR minus that of the gaussian, in dB."""
    return row.figures["sqnr_db"] - row.gaussian["sqnr_db"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
    """Text of others (names of tensors, paths) with what Markdown or HTML would act on taken out."""
    text = re.sub(r"\s+", " ", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|").replace("`", "'")


def number(value: float) -> str:
    """Three digits, or the whole part; words for infinities."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"


def signed(value: float) -> str:
    """A difference in dB, with its sign."""
    return f"{value:+.2f}" if math.isfinite(value) else number(value)


def percent(rows: Sequence[ScanRow], name: str) -> str:
    """Mean over the elements of a share, in percent."""
    return number(100 * _mean(rows, name))


def _mean(rows: Sequence[ScanRow], name: str, gaussian: bool = False) -> float:
    total = sum(row.numel for row in rows) or 1
    return sum((row.gaussian if gaussian else row.figures)[name] * row.numel for row in rows) / total
