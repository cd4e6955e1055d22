"""A report as one web page: no script, no font, no picture from elsewhere; it opens from a file or an attachment.

Names of tensors and paths come from strangers. Every text goes through `text`, and a content security policy in the
page forbids scripts and requests even if one did not.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qnoise.formats import ElementFormat, QuantSpec
from qnoise.sensitivity.figures import Histogram
from qnoise.sensitivity.markdown import distance, number, percent, ranking, signed
from qnoise.sensitivity.rows import ScanRow

if TYPE_CHECKING:
    from qnoise.sensitivity.comparison import Comparison
    from qnoise.sensitivity.report import ScanReport

_TITLES = {
    "weight": "Weights",
    "merged": "Weights with the adapters added",
    "delta": "What the adapters add",
    "input": "Inputs of the linears",
    "output": "Outputs of the layers",
}
# dB below the gaussian: upper end of each step, and its colour, light to dark.
_STEPS = (
    (0.25, "#eef3fb"),
    (0.5, "#cfdff3"),
    (1.0, "#9fc1e6"),
    (2.0, "#649bd3"),
    (4.0, "#2f6fb3"),
    (math.inf, "#123f75"),
)
_NO_ERROR, _DARK_FROM = "#d9ead9", 2.0
_RANKED, _PICTURED = 25, 3

_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6674; --line: #d7dde5; --accent: #2f6fb3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .35rem; overflow-wrap: anywhere; }
p, li { overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.box { border-left: 4px solid var(--accent); padding: .4rem 0 .4rem .9rem; margin: 1.25rem 0; }
.box p { margin: 0; font-weight: 600; } .box ul { margin: .3rem 0 0; padding-left: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .25rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th.l, td.l { text-align: left; }
td.name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 12.5px; text-align: left; }
.strips { display: flex; flex-wrap: wrap; gap: 0 2.5rem; } .strips > div { min-width: 0; max-width: 100%; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .5rem 1.5rem; }
.pictures svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); }
.key { display: inline-block; margin-right: .9rem; white-space: nowrap; font-size: 13px; }
.key i { display: inline-block; width: 1em; height: 1em; margin-right: .35em; vertical-align: -2px;
  border: 1px solid var(--line); }
.serious { font-weight: 600; }
@media (max-width: 40rem) { body { padding: 1rem .75rem 3rem; font-size: 14px; } h1 { font-size: 1.25rem; } }
"""


def page(report: ScanReport) -> str:
    """See `ScanReport.to_html`."""
    parts = [
        f"<h1>What quantization does to {text(report.source)}</h1>",
        f'<p class="soft">{len(report.rows)} rows; formats: {text(", ".join(map(str, report.specs)))}; issues by '
        f"{text(report.thresholds)} thresholds.</p>",
    ]
    if report.rows:
        advice = report.recommendation
        reasons = "".join(f"<li>{text(reason)}</li>" for reason in advice.reasons)
        parts.append(f'<div class="box"><p>{text(advice.action)}: {text(str(advice.spec))}</p><ul>{reasons}</ul></div>')
        parts += ["<h2>Formats</h2>", _formats(report), "<h2>Where</h2>", _legend(), *_strips(report)]
        parts += [f"<h2>Worst tensors</h2>{_ranking(report)}", *_pictures(report)]
    if report.findings:
        items = "".join(
            f"<li{' class=serious' if f.serious else ''}>{text(f.name)}: {text(f.what)}</li>"
            for f in sorted(report.findings, key=lambda f: not f.serious)
        )
        parts.append(f"<h2>Findings</h2><ul>{items}</ul>")
    return _document(f"Scan of {report.source}", parts)


def comparison_page(comparison: Comparison) -> str:
    """See `Comparison.to_html`."""
    pairs = comparison.pairs
    before, after = comparison.before, comparison.after
    shown = pairs[:_RANKED]
    cells = [
        [
            a.name, a.kind, str(a.spec) if a.spec == b.spec else f"{a.spec} → {b.spec}", number(a.figures["sqnr_db"]),
            number(b.figures["sqnr_db"]), number(100 * a.figures["deadzone"]), number(100 * b.figures["deadzone"]),
        ]
        for a, b in shown
    ]  # fmt: skip
    header = ["tensor", "kind", "format", "SQNR dB before", "after", "deadzone % before", "after"]
    parts = [
        "<h1>Before and after</h1>",
        f'<p class="soft">before: {text(before.source)} ({text(", ".join(map(str, before.specs)))}); '
        f"after: {text(after.source)} ({text(', '.join(map(str, after.specs)))}). {len(pairs)} pairs, "
        f"{len(comparison.only_before)} rows before only, {len(comparison.only_after)} after only. The largest losses "
        "first.</p>",
        '<p><span class="key"><i style="background:#9aa4b1"></i>before</span>'
        '<span class="key"><i style="background:#2f6fb3"></i>after</span></p>',
        _dumbbells(shown),
        _table(header, cells, left=3),
    ]
    return _document("Before and after", parts)


def text(value: str) -> str:
    """Text as HTML shows it, and nothing that HTML would act on; control characters become U+FFFD."""
    plain = "".join(c if c.isprintable() or c == " " else "\ufffd" for c in value)
    return html.escape(plain, quote=True)


def _document(title: str, parts: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text, the first of them a name."""
    head = "".join(f"<th{' class=l' if at < left else ''}>{text(name)}</th>" for at, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=name' if at == 0 else ' class=l' if at < left else ''}>{text(value)}</td>"
            for at, value in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _formats(report: ScanReport) -> str:
    from qnoise.sensitivity.report import pooled_decibels

    rows = []
    for kind in report.kinds:
        for spec in report.specs:
            own = [row for row in report.rows if row.kind == kind and row.spec == spec]
            if own:
                pooled = pooled_decibels(*([row.figures[n] for row in own] for n in ("norm", "relative_rms")))
                worst = min(own, key=lambda row: row.figures["sqnr_db"])
                rows.append(
                    [
                        f"{_TITLES[kind]}, {spec}", f"{spec.bits_per_element:g}", str(len(own)),
                        number(pooled), number(worst.figures["sqnr_db"]), percent(own, "deadzone"),
                        percent(own, "clipped_blocks"), percent(own, "mean_relative_error"),
                        str(sum(bool(row.issues) for row in own)),
                    ]
                )  # fmt: skip
    header = [
        "", "bits", "tensors", "SQNR dB", "worst", "deadzone %", "clipped blocks %", "mean relative error %", "flagged",
    ]  # fmt: skip
    return _table(header, rows)


def _legend() -> str:
    keys, low = [f'<span class="key"><i style="background:{_NO_ERROR}"></i>no error</span>'], 0.0
    for high, colour in _STEPS:
        label = f"over {low:g}" if math.isinf(high) else f"{low:g} to {high:g}" if low else f"up to {high:g}"
        keys.append(f'<span class="key"><i style="background:{colour}"></i>{label}</span>')
        low = high
    return (
        "<p>Colour: how many dB below a gaussian tensor of the same size the tensor is. Columns are layers.</p><p>"
        + "".join(keys)
        + "</p>"
    )


def _strips(report: ScanReport) -> list[str]:
    """For each kind of tensors, stack and format a grid of module kinds over layers."""
    groups: dict[tuple[str, str, QuantSpec], list[ScanRow]] = {}
    for row in report.rows:
        if row.layer is not None:
            groups.setdefault((row.kind, row.stack, row.spec), []).append(row)
    strips = [
        f"<div><h3>{_TITLES[kind]}, {text(str(spec))}{f' ({text(stack)})' if stack else ''}</h3>{_strip(rows)}</div>"
        for (kind, stack, spec), rows in groups.items()
    ]
    return ['<div class="strips">', *strips, "</div>"]


def _strip(rows: Sequence[ScanRow]) -> str:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    column = {layer: at for at, layer in enumerate(layers)}
    kinds = list(dict.fromkeys(row.in_layer for row in rows))
    line = {kind: at for at, kind in enumerate(kinds)}
    cell = 46 if len(layers) <= 16 else 22
    label, height = min(220, 12 + 7 * max(map(len, kinds))), 22
    parts = []
    for row in rows:
        if row.layer is None:
            continue
        x, y = label + cell * column[row.layer], height * (1 + line[row.in_layer])
        value, below = row.figures["sqnr_db"], -distance(row)
        fill, dark = _colour(value, below)
        tip = f"{row.name}: {number(value)} dB, gaussian {number(row.gaussian['sqnr_db'])} dB"
        tip += f"; {', '.join(row.issues)}" if row.issues else ""
        parts.append(
            f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{height - 2}" fill="{fill}"><title>{text(tip)}</title>'
            "</rect>"
        )
        if cell > 40:
            colour = "#fff" if dark else "#1c2430"
            parts.append(
                f'<text x="{x + cell / 2 - 1}" y="{y + 14}" text-anchor="middle" style="fill:{colour}" '
                f'pointer-events="none">{number(value)}</text>'
            )
    every = 1 if cell > 40 or len(layers) <= 40 else 5
    for layer in layers:
        if column[layer] % every == 0:
            middle = label + cell * column[layer] + cell / 2 - 1
            parts.append(f'<text x="{middle}" y="15" text-anchor="middle">{layer}</text>')
    for kind in kinds:
        shown = kind if len(kind) <= 29 else "…" + kind[-28:]
        parts.append(f'<text x="0" y="{height * (1 + line[kind]) + 14}">{text(shown)}</text>')
    width, total = label + cell * len(layers), height * (1 + len(kinds))
    return (
        f'<div class="wide"><svg width="{width}" height="{total}" viewBox="0 0 {width} {total}" role="img" '
        f'aria-label="SQNR by module kind and layer">{"".join(parts)}</svg></div>'
    )


def _colour(value: float, below: float) -> tuple[str, bool]:
    """Fill for a cell, and whether it is dark."""
    if math.isinf(value) and value > 0:
        return _NO_ERROR, False
    colour = next((colour for high, colour in _STEPS if below <= high), _STEPS[-1][1])
    return colour, not below <= _DARK_FROM


def _ranking(report: ScanReport) -> str:
    rows = [
        [
            row.name, row.kind, str(row.spec), ", ".join(row.issues) or "–", number(row.figures["sqnr_db"]),
            signed(distance(row)), number(100 * row.figures["deadzone"]), number(row.figures["kurtosis"]),
            number(row.figures["block_crest"]), number(row.figures["worst_channel_sqnr_db"]),
        ]
        for row in ranking(report)[:_RANKED]
    ]  # fmt: skip
    header = [
        "tensor", "kind", "format", "issues", "SQNR dB", "vs gaussian", "deadzone %", "kurtosis", "block crest",
        "worst channel dB",
    ]  # fmt: skip
    shown = f'<p class="soft">{len(rows)} of {len(report.rows)}, those furthest below their gaussian first.</p>'
    return shown + _table(header, rows, left=4)


def _pictures(report: ScanReport) -> list[str]:
    """The worst tensors: where their values lie on the format's number line, and their errors."""
    worst = [(row, row.histogram) for row in ranking(report) if row.histogram is not None][:_PICTURED]
    parts = ["<h2>The worst, closer</h2>"] if worst else []
    for row, histogram in worst:
        element = row.spec.block_format.element
        figures = "".join(
            f'<div>{svg}<p class="soft">{caption}</p></div>'
            for svg, caption in (
                (
                    _number_line(histogram, element),
                    "|value| / block scale. The lines are the values of the format; the last bar is what lies beyond.",
                ),
                (_errors(histogram), "error / block scale. The outer bars are what lies beyond."),
            )
        )
        parts.append(
            f"<h3>{text(row.name)} ({row.kind}, {text(str(row.spec))})</h3>"
            f'<p class="soft">{_causes(row)}</p><div class="pictures">{figures}</div>'
        )
    return parts


def _causes(row: ScanRow) -> str:
    parts = row.decomposition
    if not parts:
        return ""
    return (
        f"Energy of the error: scale bias {number(parts['scale_bias'])}, deadzone {number(parts['deadzone'])}, grid "
        f"noise {number(parts['grid'])} of the whole; cosine of scale bias and grid noise {number(parts['cosine'])}."
    )


_WIDTH, _HEIGHT = 360, 130


def _bars(counts: Sequence[int]) -> str:
    top, width = max([*counts, 1]), _WIDTH / len(counts)
    return "".join(
        f'<rect x="{at * width:.2f}" y="{_HEIGHT - h:.2f}" width="{width - 0.8:.2f}" height="{h:.2f}" fill="#9fc1e6"/>'
        for at, h in ((at, (_HEIGHT - 12) * count / top) for at, count in enumerate(counts))
        if h
    )


def _number_line(histogram: Histogram, element: ElementFormat) -> str:
    edge = element.max * 4 / 3
    points = grid(element)
    strength = 1.0 if len(points) < 20 else 0.35
    lines = "".join(
        f'<line x1="{_WIDTH * p / edge:.2f}" x2="{_WIDTH * p / edge:.2f}" y1="0" y2="{_HEIGHT}" stroke="#b5541c" '
        f'stroke-width="1" opacity="{strength}"/>'
        for p in points
    )
    labels = [points[-1]] if len(points) >= 20 else points
    marks = "".join(
        f'<text x="{_WIDTH * p / edge:.2f}" y="{_HEIGHT + 13}" text-anchor="middle">{p:g}</text>'
        for p in labels
        if p == 0 or p >= 0.12 * element.max
    )
    return _picture(_bars(histogram.magnitudes) + lines + marks, "values on the number line of the format")


def _errors(histogram: Histogram) -> str:
    width = histogram.width
    marks = "".join(
        f'<text x="{_WIDTH * at}" y="{_HEIGHT + 13}" text-anchor="{anchor}">{(2 * at - 1) * width:g}</text>'
        for at, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    return _picture(_bars(histogram.errors) + marks, "histogram of errors")


def _picture(inner: str, label: str) -> str:
    return f'<svg viewBox="-6 0 {_WIDTH + 12} {_HEIGHT + 18}" role="img" aria-label="{label}">{inner}</svg>'


def grid(element: ElementFormat) -> list[float]:
    """The non-negative values of an element, in order."""
    if element.is_integer:
        step = 2.0**-element.mantissa_bits
        return [n * step for n in range(round(element.max / step) + 1)]
    steps = 1 << element.mantissa_bits
    values = [m * 2.0 ** (element.emin - element.mantissa_bits) for m in range(steps)]
    for exponent in range(element.emin, element.emax + 1):
        values += [(1 + m / steps) * 2.0**exponent for m in range(steps)]
    return [value for value in values if value <= element.max]


def _dumbbells(pairs: Sequence[tuple[ScanRow, ScanRow]]) -> str:
    """A line for each pair from its SQNR before to that after; without those that have no error."""
    finite = [(a, b) for a, b in pairs if math.isfinite(a.figures["sqnr_db"]) and math.isfinite(b.figures["sqnr_db"])]
    if not finite:
        return '<p class="soft">No pair has an error on both sides.</p>'
    values = [row.figures["sqnr_db"] for pair in finite for row in pair]
    low, high = math.floor(min(values) - 0.5), math.ceil(max(values) + 0.5)
    label, width, height = 260, 480, 20

    def place(value: float) -> float:
        return label + width * (value - low) / (high - low)

    ticks = [low + (high - low) * at / 4 for at in range(5)]
    parts = [
        f'<line x1="{place(t):.1f}" x2="{place(t):.1f}" y1="18" y2="{24 + height * len(finite)}" stroke="#d7dde5"/>'
        f'<text x="{place(t):.1f}" y="12" text-anchor="middle">{t:g} dB</text>'
        for t in ticks
    ]
    for at, (a, b) in enumerate(finite):
        y = 32 + height * at
        x1, x2 = place(a.figures["sqnr_db"]), place(b.figures["sqnr_db"])
        shown = a.name if len(a.name) <= 36 else "…" + a.name[-35:]
        parts.append(
            f'<text x="0" y="{y + 4}">{text(shown)}</text>'
            f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="#9aa4b1" stroke-width="2"/>'
            f'<circle cx="{x1:.1f}" cy="{y}" r="4" fill="#9aa4b1"/>'
            f'<circle cx="{x2:.1f}" cy="{y}" r="4" fill="#2f6fb3"/>'
        )
    across, down = label + width + 30, 34 + height * len(finite)
    return (
        f'<div class="wide"><svg width="{across}" height="{down}" viewBox="0 0 {across} {down}" role="img" '
        f'aria-label="SQNR before and after">{"".join(parts)}</svg></div>'
    )
