"""A result as text, as a picture and as one HTML file. Every number comes from the summary; none is made here."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

from benchmarks.files import write_bytes, write_json, write_text
from benchmarks.recovery.figure import draw

Table = tuple[list[str], list[list[str]]]


def write_report(summary: dict[str, Any], folder: Path, name: str = "demo") -> list[Path]:
    """Write NAME.json, NAME.png (with matplotlib) and NAME.html into the folder; returns what was written."""
    paths = [folder / f"{name}.json"]
    write_json(paths[0], summary)
    picture = draw(summary) if summary["rows"] else None
    if picture is not None:
        paths.append(folder / f"{name}.png")
        write_bytes(paths[-1], picture)
    paths.append(folder / f"{name}.html")
    write_text(paths[-1], to_html(summary, picture))
    return paths


def to_text(summary: dict[str, Any]) -> str:
    """The tables and the sentences under them, for a terminal."""
    parts = [_text_table(table) for table in tables(summary)]
    return "\n\n".join(part for part in [*parts, "\n".join(f"- {line}" for line in sentences(summary))] if part)


def tables(summary: dict[str, Any]) -> list[Table]:
    """(header, rows) of the accuracy table and of the table of what happened during training."""
    rows = summary["rows"]
    if not rows:
        return []
    accuracy = (
        ["arm", "bits", "strict 0", "strict end", "flexible 0", "flexible end", "by seed", "Δ to MXFP4"],
        [
            [
                row["label"],
                f"{row['bits_per_weight']:g}",
                _percent(row["initial_strict"]),
                _percent(row["final_strict"]),
                _percent(row["initial_flexible"]),
                _percent(row["final_flexible"]),
                " ".join(f"{100 * value:.1f}" for value in row["final_flexible"]["seeds"]),
                _points(row["difference_flexible"]),
            ]
            for row in rows
        ],
    )
    training = (
        ["arm", "reward", "entropy", "length", "mismatch", "|Δ log p|", "clipped", "noise σ", "s/step", "CPU s"],
        [
            [
                row["label"],
                f"{row['end_reward']:.3f}",
                f"{row['end_entropy']:.4f}",
                f"{row['end_response_length']:.1f}",
                _scientific(row["mean_mismatch_kl"]),
                _scientific(row["mean_mismatch_abs"]),
                "–" if row["mean_clip_fraction"] is None else f"{100 * row['mean_clip_fraction']:.2f} %",
                _sigma(row["sigma"]),
                f"{row['mean_seconds']:.2f}",
                f"{row['mean_cpu_seconds']:.2f}",
            ]
            for row in rows
        ],
    )
    return [accuracy, training]


def sentences(summary: dict[str, Any]) -> list[str]:
    """How to read the tables, and how far not to trust them."""
    rows = {row["arm"]: row for row in summary["rows"]}
    lines = []
    if rows:
        row = next(iter(rows.values()))
        lines.append(
            f"Accuracy in %: {row['problems']} held-out problems, answered greedily under the quantization of the arm, "
            "noise off; [95 % interval], which covers the choice of problems and not the chance of training. "
            "Strict asks for `#### N`; flexible takes the last number. Δ: flexible, paired over problems, in points."
        )
        lines.append(
            "Reward, entropy and length: mean of the last 5 steps. Mismatch: the policy that is trained against the "
            "one that sampled. Entropy is that of the policy that sampled, noise included. "
            "Seconds: sampling and training of one step."
        )
        count = max(len(row["seeds"]) for row in rows.values())
        lines.append(
            f"{count} seed{'s' * (count > 1)} an arm {'are' if count > 1 else 'is'} no evidence: this shows how such a "
            "run looks, not which arm is better."
        )
    chance, noise = rows.get("mxfp4-aa"), rows.get("mxfp4+noise")
    if chance and chance["difference_flexible"]:
        line = (
            f"The A/A row is MXFP4 once more with other random samples: {_points(chance['difference_flexible'])} "
            "points from nothing but chance."
        )
        if noise and noise["difference_flexible"]:
            line += f" Noise: {_points(noise['difference_flexible'])} points; read it against that."
        lines.append(line)
    if summary["preset"]["task"] == "words":
        lines.append(
            "The policy has planted outlier channels that make 4 bits costly, and learned to end in `#### N` only 15 % "
            "of the time: much of what strict accuracy gains is the format."
        )
    if summary["unfinished"]:
        lines.append(f"Not finished, so not in the tables: {', '.join(summary['unfinished'])}.")
    if len(summary["code_hashes"]) > 1:
        lines.append("The runs were made with different versions of the code: compare them with care.")
    return lines


def to_html(summary: dict[str, Any], picture: bytes | None) -> str:
    """One self-contained page."""
    preset = summary["preset"]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        image = f'<img alt="Accuracy before and after, and curves over RL steps" src="data:image/png;base64,{data}">'
    else:
        image = "<p>No picture: matplotlib is not installed (<code>pip install matplotlib</code>).</p>"
    facts = {
        "command": summary["command"],
        "seeds": ", ".join(map(str, summary["seeds"])),
        "commit": ", ".join(summary["commits"]),
        "code": ", ".join(summary["code_hashes"]),
        "device": summary["device"],
        "versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
    }
    if summary["rows"]:
        row = summary["rows"][0]
        facts["parameters"] = f"{row['trainable_parameters']:,} trained of {row['parameters']:,}"
        facts["peak memory"] = f"{max(row['peak_memory_mb'] for row in summary['rows']):.0f} MB a process"
    arms = [(arm["label"], arm["note"]) for arm in summary["arms"]]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qnoise: {html.escape(preset["name"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.facts td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>What 4 bits cost an RL run: preset {html.escape(preset["name"])}</h1>
{"".join(map(_html_table, tables(summary))) or "<p>No run is finished.</p>"}
<ul>{"".join(f"<li>{_prose(line)}</li>" for line in sentences(summary))}</ul>
{image}
<h2>Arms</h2>{_facts(arms)}
<h2>How it was made</h2>{_facts(list(facts.items()))}
<h2>Settings</h2>{_facts([(name, str(value)) for name, value in preset.items()])}
</body></html>
"""


def _prose(line: str) -> str:
    return re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(line))


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _points(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _sigma(sigmas: list[float]) -> str:
    some = [sigma for sigma in sigmas if sigma > 0]
    return f"{some[0]:g} → {some[-1]:g}" if some else "0"


def _text_table(table: Table) -> str:
    header, rows = table
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _html_table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(pairs: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts">{cells}</table>'
