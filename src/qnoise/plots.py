"""Figures: each function draws one thing into the matplotlib `Axes` it is given, and returns them.

matplotlib is not imported here: the axes bring it, so that everything else works without it. The colours are those
of Okabe and Ito, told apart with every common kind of colour vision; what is drawn together differs in line style or
marker too, so that it survives a grey print.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qnoise.formats import ElementFormat, QuantSpec, as_spec
from qnoise.functional import fake_quantize
from qnoise.packing import decode
from qnoise.reference import block_scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qnoise.sensitivity import ScanReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of the lines of a figure, in their order: blue, vermilion, green, purple, orange, sky, black."""
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (3, 1)))
"""Line styles that go with them."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Markers that go with them."""

_GREY = "#6b7480"
_DARKEST_DB = 4.0


def magnitudes(element: ElementFormat) -> Tensor:
    """The magnitudes that an element can have, zero first: fp32 (n,), ascending."""
    values = decode(torch.arange(2**element.bits), element).abs()
    return values[values <= element.max].unique()


def number_line(ax: Axes, elements: Sequence[ElementFormat]) -> Axes:
    """The magnitudes of elements as ticks on lines that end at their largest; shaded is what rounds to zero."""
    for place, element in enumerate(elements):
        values = magnitudes(element) / torch.full((), element.max)
        width = 1.4 if len(values) < 40 else 0.5
        ax.barh(place, values[1].item() / 2, height=0.8, color=COLOURS[4], alpha=0.45, zorder=1)
        ax.vlines(values.tolist(), place - 0.4, place + 0.4, color=COLOURS[0], lw=width, zorder=2)
    labels = [f"{e.name}: {len(magnitudes(e))} values up to {e.max:g}" for e in elements]
    ax.set_yticks(range(len(elements)), labels)
    ax.invert_yaxis()
    ax.set_xlim(-0.01, 1.01)
    ax.set_xlabel("magnitude, as a share of the largest")
    return _bare(ax)


def blocks(ax: Axes, x: Tensor, fmt: str | QuantSpec) -> Axes:
    """Neighbouring values, what they become, and the grid of each block, which the block's scale stretches.

    Args:
        ax: where to draw.
        x: (n,), floating point; a few blocks at most.
        fmt: format or spec without `rotation`, `macro_block` and `residual`, under which x has one grid for a block.

    Raises:
        ValueError: `x` has another number of dimensions; a spec that does something around the quantizer.
    """
    spec = as_spec(fmt)
    if x.ndim != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; a figure of blocks needs one dimension")
    if not spec.plain:
        raise ValueError(f"{spec} has no one grid for a block of x; draw {spec.fmt!r} in a scale mode instead")
    size, hat = spec.block_format.block_size, fake_quantize(x, spec)
    scales = block_scales(x[None], spec)[0, ::size].tolist()
    grid = magnitudes(spec.block_format.element)
    for start, scale in zip(range(0, len(x), size), scales, strict=True):
        span = (start - 0.5, min(start + size, len(x)) - 0.5)
        levels = torch.cat([-grid[1:], grid]) * scale
        ax.hlines(levels.tolist(), *span, color=_GREY, lw=0.6, alpha=0.6, zorder=1)
        ax.axvline(span[0], color=_GREY, lw=1.2, zorder=1)
    dead = (hat == 0) & (x != 0)
    at = torch.arange(len(x))
    ax.vlines(at, x.float(), hat.float(), color=COLOURS[1], lw=1.2, zorder=2)
    ax.plot(at, x.float(), "o", mfc="white", mec=COLOURS[0], ms=5.5, zorder=3, label="before")
    ax.plot(at[~dead], hat[~dead].float(), "o", color=COLOURS[1], ms=4, zorder=4, label="after")
    ax.plot(at[dead], hat[dead].float(), "X", color=COLOURS[1], ms=6.5, zorder=4, label="after: zero")
    ax.set_xlim(-0.8, len(x) - 0.2)
    ax.set_xlabel("element")
    ax.set_title(f"{spec}, blocks of {size}", fontsize=10.5)
    ax.grid(visible=False)
    return _bare(ax)


def heat_strip(ax: Axes, report: ScanReport, fmt: str | QuantSpec | None = None, kind: str | None = None) -> Axes:
    """SQNR by layer and module; the darker, the further below a gaussian tensor of the same size (in dB, up to 4).

    Args:
        ax: where to draw.
        report: a scan.
        fmt, kind: as `ScanReport.select` takes them. Rows outside numbered layers are left out, and named in the title.

    Raises:
        ValueError: no such format or kind; no row lies in a layer; the model has several stacks of layers.
    """
    rows = report.select(kind, fmt)
    inside = [row for row in rows if row.layer is not None]
    stacks = sorted({row.stack for row in inside})
    if len(stacks) != 1:
        found = f"stacks {', '.join(stacks)}" if stacks else "no row in a numbered layer"
        raise ValueError(f"{report.source}: {found}; a heat strip shows one stack (report.to_html() shows them all)")
    layers = sorted({row.layer for row in inside if row.layer is not None})
    names = list(dict.fromkeys(row.in_layer for row in inside))
    below = [[math.nan] * len(layers) for _ in names]
    small = len(layers) <= 16
    for row in inside:
        line, column = names.index(row.in_layer), layers.index(row.layer)  # type: ignore[arg-type]
        own, gaussian = row.figures["sqnr_db"], row.gaussian["sqnr_db"]
        distance = 0.0 if math.isinf(own) else max(0.0, gaussian - own)
        below[line][column] = distance
        if small:
            ink = "white" if distance > 0.55 * _DARKEST_DB else "#1c2430"
            ax.text(column, line, f"{own:.1f}", ha="center", va="center", color=ink, fontsize=9)
    image = ax.imshow(below, cmap="Blues", vmin=0.0, vmax=_DARKEST_DB, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="dB below a gaussian", extend="max")
    ax.set_yticks(range(len(names)), names)
    if small:
        ax.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_xlabel("layer")
    outside = [row.name for row in rows if row.layer is None]
    ax.set_title(f"SQNR in dB, {rows[0].spec}" + (f" (not shown: {', '.join(outside)})" if outside else ""))
    ax.grid(visible=False)
    return ax


def sigma(ax: Axes, schedules: Mapping[str, Callable[[float], float]], total_steps: int) -> Axes:
    """What a `NoiseScheduler` makes of schedules: sigma by step, on a logarithmic axis; silent steps are gaps."""
    for at, (name, schedule) in enumerate(schedules.items()):
        values = [schedule(step / total_steps) for step in range(total_steps)]
        shown = [value if value > 0 else math.nan for value in values]
        colour, style = COLOURS[at % len(COLOURS)], STYLES[at % len(STYLES)]
        ax.plot(range(total_steps), shown, color=colour, ls=style, lw=1.8, drawstyle="steps-post", label=name)
    ax.set_yscale("log")
    ax.set_xlabel("generation")
    ax.set_ylabel("σ")
    ax.legend(fontsize=9)
    return _bare(ax)


def with_spread(ax: Axes, x: Sequence[float], samples: Sequence[Sequence[float]], label: str, place: int = 0) -> Axes:
    """A line through means, with every sample beside it.

    Args:
        ax: where to draw.
        x: (n,) places.
        samples: n sequences, those measured at each place.
        label: of the line.
        place: of the line in the figure; it has the colour, style and marker of that place.
    """
    colour, style, marker = (each[place % len(each)] for each in (COLOURS, STYLES, MARKERS))
    for at, values in zip(x, samples, strict=True):
        ax.plot([at] * len(values), list(values), marker, color=colour, ms=4, alpha=0.4, mew=0)
    means = [statistics.fmean(values) for values in samples]
    ax.plot(x, means, color=colour, ls=style, marker=marker, ms=5, lw=1.8, label=label)
    return _bare(ax)


def _bare(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    return ax
