"""Draw block.svg, the block of docs/numerics.md over the grid of e2m1: `python docs/figures/block.py` writes it.

Greys and colours are chosen to be read on a white page and on a black one, and told apart by people who see fewer.
"""

from __future__ import annotations

from pathlib import Path

import torch

import qnoise
from qnoise.packing import decode

BLOCK = (0.90, -0.31, 0.24, 0.06, -0.02, 0.55, 0.70, 0.11)
GREY, BLUE, ORANGE = "#768390", "#3b8fd4", "#d98200"
UNIT, ZERO, TOP, BOTTOM = 50, 350, 70, 165
"""Pixels of one scale; where zero, the elements and the grid are."""


def x_of(units: float) -> str:
    return f"{ZERO + UNIT * units:.1f}"


def text(units: float, y: int, words: str, colour: str, size: int) -> str:
    words = words.replace("-", "\N{MINUS SIGN}")
    return f'<text x="{x_of(units)}" y="{y}" fill="{colour}" font-size="{size}">{words}</text>'


def line(first: float, y1: int, last: float, y2: int, colour: str, width: float) -> str:
    ends = f'x1="{x_of(first)}" y1="{y1}" x2="{x_of(last)}" y2="{y2}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def band(first: float, last: float, label: str) -> list[str]:
    box = f'x="{x_of(first)}" y="36" width="{UNIT * (last - first):.1f}" height="{BOTTOM - 36}"'
    return [
        f'<rect {box} fill="{ORANGE}" fill-opacity="0.22"/>',
        text((first + last) / 2, 26, label, ORANGE, 14),
    ]


def draw() -> str:
    """The picture."""
    block = torch.tensor(BLOCK)
    q = qnoise.quantize(block, "mxfp4")
    scale = q.scales.float()
    element = qnoise.FORMATS["mxfp4"].element
    grid = decode(torch.arange(2**element.bits, dtype=torch.uint8), element).unique().tolist()
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 225" width="780" height="225" '
        'font-family="sans-serif" text-anchor="middle">',
        "<title>Eight numbers in units of their scale, and the point of the grid of e2m1 that each goes to</title>",
        *band(-0.25, 0.25, "deadzone"),
        *band(6, 8, "clipped"),
        line(-6.5, BOTTOM, 8, BOTTOM, GREY, 1.5),
    ]
    for value in grid:
        lines += [
            line(value, BOTTOM - 7, value, BOTTOM + 7, GREY, 2.5),
            text(value, BOTTOM + 26, f"{value:g}", GREY, 12),
        ]
    lines.append(text(0.75, BOTTOM + 50, f"x / {scale.item():g}, and the grid of e2m1", GREY, 14))
    places = zip((block / scale).tolist(), (q.dequantize() / scale).tolist(), BLOCK, strict=True)
    before = -8.0
    for units, rounded, number in sorted(places):
        colour = ORANGE if rounded == 0 or units > element.max else BLUE
        lines += [
            line(units, TOP, rounded, BOTTOM - 8, colour, 1.5),
            f'<circle cx="{x_of(units)}" cy="{TOP}" r="5" fill="{colour}"/>',
        ]
        crowded = units - before < 0.6
        beside = (units + 0.35, TOP + 18) if crowded else (units, TOP - 13)
        lines.append(text(*beside, f"{number:.2f}", colour, 12))
        before = units
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
