"""The error figures against their definitions, and their values where a ratio has none."""

import math

import pytest
import torch

from qnoise.formats import FORMATS, QuantSpec
from qnoise.functional import fake_quantize
from qnoise.metrics import error_report

KEYS = {"sqnr_db", "relative_rms", "mean_relative_error", "deadzone", "clipped", "max_abs_error"}
PERFECT = {
    "sqnr_db": math.inf,
    "relative_rms": 0,
    "mean_relative_error": 0,
    "deadzone": 0,
    "clipped": 0,
    "max_abs_error": 0,
}


def test_every_figure_on_an_example_worked_by_hand():
    # The block's maximum is 7, so its scale is 1, its grid ends at 6, and 0.2 rounds to 0.
    x = torch.tensor([7.0, 0.2, 0.0, -4.0])
    report = error_report(x, torch.tensor([6.0, 0.0, 0.0, -4.0]), "mxfp4")
    assert set(report) == KEYS
    assert all(type(value) is float for value in report.values())
    signal, noise = 49 + 0.04 + 16, 1 + 0.04
    assert report["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise))
    assert report["relative_rms"] == pytest.approx(math.sqrt(noise / signal))
    assert report["mean_relative_error"] == pytest.approx((1 / 7 + 1 + 0 + 0) / 4)
    assert report["deadzone"] == 1 / 4
    assert report["clipped"] == 1 / 4
    assert report["max_abs_error"] == 1


def test_clipped_belongs_to_the_input_and_the_format():
    x = torch.tensor([7.0, 6.5, 6.0, -7.5])
    assert error_report(x, x, "mxfp4")["clipped"] == 3 / 4
    assert error_report(x, x, QuantSpec("mxfp4", "rceil"))["clipped"] == 0
    assert error_report(x, x, "mxfp8_e4m3")["clipped"] == 1 / 4  # its grid ends at 1.75 * 2**2 = 7
    # The tail of 8 is a block of its own, with a scale of its own.
    x = torch.cat([torch.full((32,), 0.01), torch.tensor([7.0] * 8)])
    assert error_report(x, x, "mxfp4")["clipped"] == 8 / 40
    assert error_report(x.unsqueeze(1), x.unsqueeze(1), "mxfp4", axis=0)["clipped"] == 8 / 40
    # NVFP4: amax 17 asks for a scale of 17/6 * 64 = 181.3, which rounds down to 176, where the grid ends at 16.5.
    x = torch.tensor([17.0, 16.0])
    assert error_report(x, x, "nvfp4", amax=torch.tensor(42.0))["clipped"] == 1 / 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_perfect_reconstructions(fmt):
    for x in (torch.zeros(3, 40), torch.zeros(0, 40), torch.zeros(40, 0), torch.tensor(0.0)):
        assert error_report(x, fake_quantize(x, fmt), fmt) == PERFECT
    x = torch.tensor([1.0, 0.5, -0.25])
    assert error_report(x, x.clone(), fmt) == PERFECT


def test_a_zero_tensor_reconstructed_as_something_else():
    report = error_report(torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 2.0]), "mxfp4")
    assert report == PERFECT | {
        "sqnr_db": -math.inf,
        "relative_rms": math.inf,
        "mean_relative_error": math.inf,
        "max_abs_error": 2,
    }


def test_everything_lost():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    report = error_report(x, torch.zeros_like(x), "mxfp4")
    assert report["sqnr_db"] == 0
    assert (report["relative_rms"], report["mean_relative_error"], report["deadzone"]) == (1, 1, 1)


@pytest.mark.parametrize("k", [-100, -30, 30, 60])
def test_figures_do_not_depend_on_the_magnitude(k):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    one = error_report(x, fake_quantize(x, "mxfp4"), "mxfp4")
    scaled = error_report(x * 2.0**k, fake_quantize(x * 2.0**k, "mxfp4"), "mxfp4")
    assert scaled.pop("max_abs_error") == one.pop("max_abs_error") * 2.0**k
    assert scaled == one


def test_squares_do_not_overflow_in_fp64():
    x = torch.tensor([1e200, 1e-200], dtype=torch.float64)
    report = error_report(x, x * 0.5, "mxfp4")
    assert report["sqnr_db"] == pytest.approx(20 * math.log10(2))
    assert report["relative_rms"] == pytest.approx(0.5)


def test_low_precision_inputs_are_compared_in_fp64():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = fake_quantize(x, "nvfp4")
    assert error_report(x, y, "nvfp4") == error_report(x.double(), y.double(), "nvfp4")
    error = y.double() - x.double()
    assert error_report(x, y, "nvfp4")["max_abs_error"] == error.abs().max().item()


def test_nan_shows():
    x = torch.tensor([1.0, math.nan])
    report = error_report(x, fake_quantize(x, "mxfp4"), "mxfp4")
    for key in ("sqnr_db", "relative_rms", "mean_relative_error", "max_abs_error"):
        assert math.isnan(report[key]), key


def test_errors():
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"\(2, 32\).*\(64,\)"):
        error_report(x, x.flatten(), "mxfp4")
    with pytest.raises(TypeError, match=r"x_hat must be .* torch.int64"):
        error_report(x, x.long(), "mxfp4")
    with pytest.raises(TypeError, match="x must be .* list"):
        error_report([0.0], x, "mxfp4")
    with pytest.raises(ValueError, match="Did you mean 'mxfp4'"):
        error_report(x, x, "mxfp44")
