"""Render the generated parts of README.md from committed results: `python -m benchmarks.render [--check]`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. With --check nothing is written, and
the exit status is 1 if the file differs from what would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import qnoise
from benchmarks.files import RESULTS, read_json, read_jsonl, write_text
from benchmarks.recovery import report

ROOT = Path(__file__).resolve().parents[1]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def provenance(result: dict[str, Any], seeds: bool = True) -> str:
    environment = result["environment"]
    parts = [f"`{result['command']}`"]
    if seeds:
        parts.append("seeds " + ", ".join(map(str, result["seeds"])))
    parts += [
        f"torch {environment['versions']['torch']}",
        environment["device"],
        f"commit {environment['commit'][:12]}",
    ]
    return "; ".join(parts)


def formats() -> str:
    result = read_json(RESULTS / "formats.json")
    default = {row["fmt"]: row for row in result["rows"] if row["scale_mode"] == _default_mode(row["fmt"])}
    best = {
        name: max((row for row in result["rows"] if row["fmt"] == name), key=lambda row: row["sqnr_db"])
        for name in qnoise.FORMATS
    }
    rows = []
    for name, fmt in qnoise.FORMATS.items():
        scale = "E8M0" if fmt.scale == "e8m0" else "E4M3 + one fp32"
        modes = ", ".join(f"`{mode}`" for mode in fmt.scale_modes)
        rows.append(
            [
                f"`{name}`", fmt.element.name, str(fmt.block_size), scale, f"{fmt.bits_per_element:g}", modes,
                f"{default[name]['sqnr_db']:.2f}", f"{best[name]['sqnr_db']:.2f} (`{best[name]['scale_mode']}`)",
            ]
        )  # fmt: skip
    header = [
        "format",
        "element",
        "block",
        "scale",
        "bits per value",
        "scale modes (first = default)",
        "SQNR dB",
        "best",
    ]
    spread = max(row["sqnr_db_sd"] for row in result["rows"])
    note = (
        f"SQNR: signal to quantization noise on normal values of deviation {result['sigma']:g}, mean over seeds, "
        f"standard deviation at most {spread:.2g} dB; with another deviation the formats with an E8M0 scale move by "
        f"some tenths of a dB ({provenance(result)})."
    )
    return table(header, rows) + "\n\n" + note


def _default_mode(name: str) -> str:
    return qnoise.FORMATS[name].scale_modes[0]


def demo() -> str:
    result = read_json(RESULTS / "demo.json")
    parts = [table(*each) for each in report.tables(result)]
    where = (
        f"`{result['command']}`; seeds {', '.join(map(str, result['seeds']))}; torch {result['versions']['torch']}; "
        f"{result['device']}; commit {', '.join(commit[:12] for commit in result['commits'])}"
    )
    notes = [f"- {line}" for line in [*report.sentences(result), f"Made by {where}."]]
    return "\n\n".join([*parts, "\n".join(notes)])


def speed() -> str:
    rows = read_jsonl(RESULTS / "fake_quantize.jsonl")
    latest = {(row["fmt"], row["dtype"]): row for row in rows}
    names = list(dict.fromkeys(row["fmt"] for row in rows))
    cells = []
    for name in names:
        line = [f"`{name}`"]
        for dtype in ("bfloat16", "float32"):
            row = latest[name, dtype]
            low, high = row["times_copy_quartiles"]
            line.append(f"{row['times_copy']:.0f}x ({low:.0f} to {high:.0f})")
        cells.append(line)
    last = rows[-1]
    note = (
        f"Time of `fake_quantize` in units of a copy of the same {last['size']} x {last['size']} tensor, one CPU "
        f"thread, median and quartiles over {last['rounds']} rounds in one run ({provenance(last, seeds=False)}). This "
        "is the plain PyTorch reference, which puts being right first and makes whole-tensor temporaries. Not "
        "measured: any GPU."
    )
    return table(["format", "bf16", "fp32"], cells) + "\n\n" + note


PARTS = {"formats": formats, "demo": demo, "speed": speed}


def render(text: str) -> str:
    """The text with every generated part made anew.

    Raises:
        ValueError: a part of another name, or one without its end.
    """
    if text.count("<!-- generated:") != text.count("<!-- end -->"):
        raise ValueError("a `<!-- generated: NAME -->` has no `<!-- end -->`")

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if name not in PARTS:
            raise ValueError(f"no generated part is called {name!r}; there are: {', '.join(PARTS)}")
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\S+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    rendered = render(text)
    if rendered == text:
        print(f"{path.name}: up to date")
    elif arguments.check:
        sys.exit(f"{path.name} differs from the committed results; run `make results` and commit it")
    else:
        write_text(path, rendered)
        print(f"{path.name}: rendered")


if __name__ == "__main__":
    main()
