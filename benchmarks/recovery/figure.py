"""The picture of a result: accuracy before and after, and what happened in between."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with every common kind of colour vision; line styles tell A/A arms apart too.
COLOURS = {
    "bf16": "#000000", "mxfp4": "#D55E00", "mxfp4-aa": "#E69F00", "mxfp4+noise": "#0072B2",
    "mxfp4+shared-noise": "#56B4E9", "nvfp4": "#009E73", "nvfp4-aa": "#F0E442", "nvfp4+noise": "#CC79A7",
}  # fmt: skip
PANELS = (
    ("reward", "reward of the samples", False),
    ("flexible", "flexible accuracy of the samples", False),
    ("entropy", "entropy, nats a token", False),
    ("mismatch_kl", "KL(rollout ‖ training), nats a token", True),
    ("sigma", "noise σ", True),
)


def draw(summary: dict[str, Any]) -> bytes | None:
    """The figure as a PNG, or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        return None
    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _draw_accuracy(axes[0, 0], summary)
    for axis, (name, title, logarithmic) in zip(axes.flat[1:], PANELS, strict=True):
        _draw_curves(axis, summary, name, title, logarithmic)
    labels = {row["arm"]: row["label"] for row in summary["rows"]}
    handles = [Line2D([], [], color=COLOURS[arm], ls=_style(arm), lw=2, label=label) for arm, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_accuracy(axis: Axes, summary: dict[str, Any]) -> None:
    rows = summary["rows"]
    for place, row in enumerate(reversed(rows)):
        colour = COLOURS[row["arm"]]
        before, after = row["initial_flexible"], row["final_flexible"]
        axis.plot(100 * before["mean"], place, "o", mfc="white", mec=colour, ms=7, zorder=3)
        axis.plot(100 * after["mean"], place, "o", color=colour, ms=7, zorder=4)
        axis.plot([100 * after["low"], 100 * after["high"]], [place, place], color=colour, lw=2)
        for value in after["seeds"]:
            axis.plot(100 * value, place - 0.28, "|", color=colour, ms=9, mew=1.5)
    axis.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    axis.set_ylim(-0.7, len(rows) - 0.4)
    axis.set_title("greedy flexible accuracy, %: ○ before, ● after, | seeds", fontsize=10.5)
    axis.grid(axis="x", alpha=0.3)


def _draw_curves(axis: Axes, summary: dict[str, Any], name: str, title: str, logarithmic: bool) -> None:
    for arm in [row["arm"] for row in summary["rows"]]:
        seeds = [curve[name] for curve in summary["curves"].values() if curve["arm"] == arm]
        if logarithmic and not any(value for curve in seeds for value in curve):
            continue  # nothing but zeros: an arm without noise
        mean = [_mean([curve[step] for curve in seeds]) for step in range(len(seeds[0]))]
        steps = range(1, len(mean) + 1)
        shape = "steps-mid" if name == "sigma" else "default"
        for curve in seeds if len(seeds) > 1 else []:
            axis.plot(steps, _gaps(curve, logarithmic), color=COLOURS[arm], lw=0.6, alpha=0.35, drawstyle=shape)
        axis.plot(steps, _gaps(mean, logarithmic), color=COLOURS[arm], ls=_style(arm), lw=1.8, drawstyle=shape)
    if logarithmic:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=10.5)
    axis.set_xlabel("RL step")
    axis.set_xlim(0, summary["preset"]["steps"] + 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def _style(arm: str) -> str:
    return "--" if arm.endswith("-aa") else "-"


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _gaps(values: list[float | None], logarithmic: bool) -> list[float]:
    """Missing values, and zeros on a logarithmic axis, as gaps in the line."""
    return [float("nan") if value is None or (logarithmic and value <= 0) else value for value in values]
