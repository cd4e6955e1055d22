"""What the figures show is what the numbers are; matplotlib is brought by whoever draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import qnoise
from qnoise import plots, schedules
from qnoise.formats import E2M1, E4M3, INT8

matplotlib_figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    return matplotlib_figure.Figure().subplots()


class Stack(nn.Module):
    """Two layers of two linears, and one linear outside."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 32), "down": nn.Linear(32, 64)}) for _ in "ab")
        if head:
            self.score = nn.Linear(64, 8)


def test_magnitudes() -> None:
    assert plots.magnitudes(E2M1).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(plots.magnitudes(E4M3), e4m3)
    assert plots.magnitudes(INT8)[-2:].tolist() == [126 / 64, 127 / 64]


def test_the_number_line_ends_at_the_largest_and_shades_half_the_smallest(ax) -> None:
    plots.number_line(ax, [E2M1, INT8])
    places = [segment[0][0] for segment in ax.collections[0].get_segments()]
    assert places == pytest.approx([v / 6 for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
    assert ax.patches[0].get_width() == pytest.approx(0.25 / 6)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_blocks_show_the_values_and_every_value_lies_on_a_drawn_level(ax, fmt: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40)  # a ragged tail, too
    plots.blocks(ax, x, fmt)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    hat = qnoise.fake_quantize(x, fmt)
    dead = hat == 0
    assert dead.any()
    assert lines["before"][:, 1].tolist() == x.tolist()
    assert lines["after"][:, 1].tolist() == hat[~dead].tolist()
    assert lines["after: zero"][:, 0].tolist() == dead.nonzero().flatten().tolist()
    levels = [segment for each in ax.collections for segment in each.get_segments() if segment[0][1] == segment[1][1]]
    for at, value in enumerate(hat.tolist()):
        assert any(left <= at <= right and y == pytest.approx(value) for (left, y), (right, _) in levels), at


def test_blocks_refuse_what_has_no_one_grid(ax) -> None:
    with pytest.raises(ValueError, match="one dimension"):
        plots.blocks(ax, torch.zeros(2, 32), "mxfp4")
    with pytest.raises(ValueError, match="hadamard"):
        plots.blocks(ax, torch.zeros(32), qnoise.QuantSpec("mxfp4", rotation="hadamard"))


def test_heat_strip_has_a_cell_for_each_module_of_each_layer(ax) -> None:
    report = qnoise.scan(Stack(head=True), ["mxfp4", "nvfp4"])
    plots.heat_strip(ax, report, "nvfp4")
    names = [label.get_text() for label in ax.get_yticklabels()]
    shown = {
        (text.get_position()[0], names[text.get_position()[1]]): text.get_text() for text in ax.texts
    }  # (layer, module) -> SQNR
    rows = [row for row in report.select("weight", "nvfp4") if row.layer is not None]
    assert shown == {(row.layer, row.in_layer): f"{row.figures['sqnr_db']:.1f}" for row in rows}
    assert sorted(names) == ["down", "up"]
    assert "not shown: score" in ax.get_title()
    cells = ax.images[0].get_array()
    worst = max(rows, key=lambda row: row.gaussian["sqnr_db"] - row.figures["sqnr_db"])
    distance = max(0.0, worst.gaussian["sqnr_db"] - worst.figures["sqnr_db"])
    assert cells[names.index(worst.in_layer), worst.layer] == pytest.approx(distance)


def test_heat_strip_refuses_a_model_without_layers_and_one_with_two_stacks(ax) -> None:
    with pytest.raises(ValueError, match="no row in a numbered layer"):
        plots.heat_strip(ax, qnoise.scan(nn.ModuleDict({"up": nn.Linear(32, 32)})))
    both = nn.ModuleDict({"encoder": Stack(), "decoder": Stack()})
    with pytest.raises(ValueError, match=r"decoder\.layers, encoder\.layers"):
        plots.heat_strip(ax, qnoise.scan(both))


def test_sigma_shows_what_the_scheduler_sets_and_leaves_silent_steps_out(ax) -> None:
    staged = schedules.StagedExponential(1e-2, 1e-4, num_stages=5)
    plots.sigma(ax, {"staged": staged, "flat": schedules.Constant(1e-3)}, total_steps=10)
    drawn = ax.lines[0].get_ydata()
    assert [math.isnan(value) for value in drawn] == [True, True, *[False] * 8]
    assert list(drawn[2:]) == [staged(step / 10) for step in range(2, 10)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["staged", "flat"]


def test_with_spread_draws_the_means_and_every_sample(ax) -> None:
    plots.with_spread(ax, [0.0, 1.0], [[1.0, 3.0], [5.0, 6.0, 7.0]], "line", place=8)
    assert [[float(y) for y in line.get_ydata()] for line in ax.lines] == [[1.0, 3.0], [5.0, 6.0, 7.0], [2.0, 6.0]]
