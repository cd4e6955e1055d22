"""The figures of the study, as SVG: differences with their intervals, curves, and cost against accuracy.

An SVG holds the hash of what it shows, so that a figure that does not belong to the committed results is found without
drawing it again. Its ground is white, to be read on a light page and on a dark one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.recovery.study.bootstrap import Bootstrap
from benchmarks.recovery.study.chance import chance
from benchmarks.recovery.study.power import MARGIN
from benchmarks.recovery.study.rows import HOWS, Stage
from benchmarks.recovery.study.tables import plain, reference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = dict[str, Any]

VERSION = 2  # of the drawing; part of the hash
COLOURS = {None: "#000000", "mxfp4": "#D55E00", "nvfp4": "#0072B2"}
"""A colour for each format, of Okabe and Ito's; treatments are told apart by their lines."""
_LINES = (("-aa", ":"), ("+aqn", "--"), ("+recipe-2", (0, (4, 1))), ("+recipe", "-"), ("-cost", "-."), ("", "-"))
_CURVES = (
    ("flexible", "flexible accuracy of the samples"),
    ("entropy", "entropy, nats a token"),
    ("mismatch_kl", "KL(rollout ‖ training), nats a token"),
    ("response_length", "response length, tokens"),
)


def differences(source: Bootstrap, aa: Bootstrap) -> Data:
    """Of the forest plot: (arm, format, how, mean, low, high, half width of chance) for each row of each panel."""
    sizes = {fmt: chance(aa, fmt) for fmt in ("mxfp4", "nvfp4")}
    panels = {}
    for title, other in (("against bf16", reference), ("against the same format, unrepaired", plain)):
        rows = []
        for arm, runs in source.stage.arms.items():
            base = other(source.stage, arm)
            for how in HOWS if base else ():
                found = source.difference({arm: 1, str(base): -1}, how)
                if found and found.freedom > 0:
                    fmt = next(iter(runs.values())).settings.get("fmt")
                    size = sizes.get(str(fmt)) if base == fmt and how == "greedy" else None
                    values = (found.mean, *found.interval, size.half_width(found.runs) if size else 0.0)
                    rows.append([arm, fmt, how, *(round(value, 4) for value in values)])
        panels[title] = rows
    return {"panels": panels}


def curves(source: Bootstrap, aa: Bootstrap) -> Data:
    """Mean over runs, step by step, of every curve and arm; None where no run trained anything."""
    found: Data = {}
    for name, _ in _CURVES:
        for arm, runs in source.stage.arms.items():
            lines = [row.curve(name) for row in runs.values() if row.curve(name)]
            steps = max(map(len, lines), default=0)
            columns = [[line[step] for line in lines if step < len(line)] for step in range(steps)]
            means = [_mean([value for value in column if value is not None]) for column in columns]
            if any(value is not None for value in means):
                fmt = next(iter(runs.values())).settings.get("fmt")
                found.setdefault(name, {})[arm] = {"fmt": fmt, "values": means}
    return found


_TOKENS = ("prepare_tokens", "rollout_tokens", "train_tokens")


def costs(source: Bootstrap, aa: Bootstrap) -> Data:
    """Tokens of a run and final accuracy in percent, a mean over runs for each arm. Tokens, and not seconds: those
    depend on what else the machine does."""
    found: Data = {}
    for arm, runs in source.stage.arms.items():
        tokens = [[row.data["cost"].get(name) for name in _TOKENS] for row in runs.values()]
        ends = [_mean([v for row in runs.values() if (v := row.accuracy("final", how)) is not None]) for how in HOWS]
        if all(value is not None for each in tokens for value in each):
            fmt = next(iter(runs.values())).settings.get("fmt")
            total = _mean([float(sum(each)) for each in tokens])
            found[arm] = {"fmt": fmt, "tokens": total, **dict(zip(HOWS, ends, strict=True))}
    return found


def _mean(values: list[float]) -> float | None:
    return float(f"{math.fsum(values) / len(values):.6g}") if values else None


def draw_differences(figure: Figure, data: Data) -> None:
    panels = data["panels"]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        arms = list(dict.fromkeys(row[0] for row in rows))
        places = {arm: len(arms) - 1 - index for index, arm in enumerate(arms)}
        for arm, fmt, how, mean, low, high, half in rows:
            place = places[arm] + (0.15 if how == "greedy" else -0.15)
            fill = COLOURS[fmt] if how == "greedy" else "white"
            axis.plot([low, high], [place, place], color=COLOURS[fmt], lw=1.4, ls="-" if how == "greedy" else ":")
            axis.plot(mean, place, "o", mec=COLOURS[fmt], mfc=fill, ms=5)
            if half:
                axis.fill_between(
                    [-half, half], places[arm] - 0.42, places[arm] + 0.42, color="#BBBBBB", lw=0, zorder=0
                )
        axis.axvline(0, color="black", lw=0.8)
        if title == "against bf16":
            axis.axvline(-MARGIN, color="black", lw=0.8, ls="--")
        axis.set_yticks(list(places.values()), list(places))
        axis.set_ylim(-0.7, len(arms) - 0.3)
        axis.set_title(f"{title}, points", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        "● greedy, ○ sampled, with 95 % bootstrap intervals; grey: chance alone (A/A, greedy); dashed: the margin",
        fontsize=9,
    )


def draw_curves(figure: Figure, data: Data) -> None:
    axes = figure.subplots(2, 2)
    labels: dict[str, Any] = {}
    for axis, (name, title) in zip(axes.flat, _CURVES, strict=True):
        for arm, line in data.get(name, {}).items():
            values = [math.nan if value is None else value for value in line["values"]]
            (labels[arm],) = axis.plot(range(1, len(values) + 1), values, **_look(arm, line["fmt"]))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("RL step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if any(value and value > 0 for line in data.get("mismatch_kl", {}).values() for value in line["values"]):
        axes.flat[2].set_yscale("log")
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def draw_costs(figure: Figure, data: Data) -> None:
    for axis, how in zip(figure.subplots(1, len(HOWS)), HOWS, strict=True):
        points = sorted((point[how], arm) for arm, point in data.items() if point[how] is not None)
        if not points:
            continue
        right = max(data[arm]["tokens"] for _, arm in points) / 1000
        left = min(data[arm]["tokens"] for _, arm in points) / 1000
        room = max(right - left, 1.0)
        gap = max(points[-1][0] - points[0][0], 0.5) / max(1, len(points) - 1)
        label = -math.inf
        for value, arm in points:  # names in a column, so that none lies upon another
            label = max(value, label + 0.9 * gap)
            place = data[arm]["tokens"] / 1000
            axis.plot([place, right + 0.12 * room], [value, label], color="#BBBBBB", lw=0.6, zorder=0)
            axis.plot(place, value, "o", mec=COLOURS[data[arm]["fmt"]], mfc=COLOURS[data[arm]["fmt"]], ms=6)
            axis.text(right + 0.14 * room, label, arm, fontsize=8, va="center")
        axis.set_xlim(left - 0.1 * room, right + 0.9 * room)
        axis.set_xlabel("thousand tokens of a run, what came before RL included")
        axis.set_title(f"{how}: flexible accuracy at the end, %", fontsize=10)
        axis.grid(alpha=0.3)


def _look(arm: str, fmt: str | None) -> dict[str, Any]:
    style = next(line for ending, line in _LINES if ending in arm)
    return {"color": COLOURS[fmt], "ls": style, "lw": 2.4 if "+recipe" in arm else 1.3}


KINDS: Mapping[str, tuple[Callable[[Bootstrap, Bootstrap], Data], Callable[[Any, Data], None], str]] = {
    "differences": (differences, draw_differences, "Differences of accuracy with 95 % intervals"),
    "curves": (curves, draw_curves, "Accuracy, entropy, mismatch and response length over the steps of RL"),
    "cost": (costs, draw_costs, "Cost of a run and accuracy at its end"),
}


def data(kind: str, source: Bootstrap, aa: Bootstrap) -> Data:
    """What a figure of a stage shows; `aa` has the A/A arms."""
    return KINDS[kind][0](source, aa)


def digest(data: Data) -> str:
    """What tells the figure of these data."""
    return hashlib.blake2b(json.dumps([VERSION, data]).encode(), digest_size=8).hexdigest()


def svg(kind: str, data: Data, stage: Stage) -> bytes:
    """The figure; the same bytes for the same data and version of matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    _, draw, title = KINDS[kind]
    rows = len(data["panels"]["against bf16"]) if kind == "differences" else 0
    sizes = {"differences": (10, 1.6 + 0.19 * rows), "curves": (10, 7), "cost": (10, 4.5)}
    with matplotlib.rc_context({"svg.hashsalt": kind, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=sizes[kind], layout="constrained", facecolor="white")
        draw(figure, data)
        buffer = io.BytesIO()
        about = {"Date": None, "Creator": None, "Title": f"{title}, {stage.name}", "Description": digest(data)}
        figure.savefig(buffer, format="svg", metadata=about)
    return buffer.getvalue()


def drawn(path: Path) -> str | None:
    """The hash of the data that a figure shows; None where there is no such file, or it says nothing."""
    if not path.is_file():
        return None
    found = re.search(r"<dc:description>([0-9a-f]+)</dc:description>", path.read_text(encoding="utf-8"))
    return found[1] if found else None


def name(kind: str, stage: str) -> str:
    """File name of a figure, in `docs/figures`."""
    return f"recovery-{stage}-{kind}.svg"
