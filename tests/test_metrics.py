"""The error figures against their definitions, and their values where a ratio has none."""

import math

import pytest
import torch

from qnoise.formats import E2M1, FORMATS, QuantSpec
from qnoise.functional import fake_quantize, rotate
from qnoise.metrics import decompose, error_report, split_error

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


def gaussian(sigma: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(seed)) * sigma


def test_the_parts_of_an_error_worked_by_hand():
    # Ideal scale 5/6, on whose grid 5 is exact, 2 becomes 2 * 5/6, and 0.2 is dead. Q has the scale 1
    # (rceil): 5 is a tie and becomes 4, and 2 is exact.
    x = torch.tensor([[5.0, 2.0, 0.2, -0.2]])
    x_hat = fake_quantize(x, QuantSpec("mxfp4", "rceil"))
    assert x_hat.tolist() == [[4.0, 2.0, 0.0, -0.0]]
    bias, dead, grid, is_dead = split_error(x, x_hat, E2M1)
    ideal = torch.tensor([[5.0, 2 * 5 / 6, 0.0, 0.0]])
    torch.testing.assert_close(bias, x_hat - ideal)
    torch.testing.assert_close(dead, torch.tensor([[0.0, 0.0, -0.2, 0.2]]))
    torch.testing.assert_close(grid, torch.tensor([[0.0, 2 * 5 / 6 - 2, 0.0, 0.0]]))
    assert is_dead.tolist() == [[False, False, True, True]]
    parts = decompose(x, "mxfp4")
    error = 1 + 0.08
    assert parts["scale_bias"] == pytest.approx((1 + (1 / 3) ** 2) / error, rel=1e-6)
    assert parts["deadzone"] == pytest.approx(0.08 / error, rel=1e-6)
    assert parts["grid"] == pytest.approx((1 / 3) ** 2 / error, rel=1e-6)
    assert parts["dead"] == 0.5
    assert parts["inflation"] == pytest.approx(math.log2(6 / 5), rel=1e-6)


@pytest.mark.parametrize("octave", [0.0, 0.25, 0.5, 0.75])
def test_the_published_decomposition_of_gaussian_data(octave):
    """arXiv 2605.20402: 1.69-1.77, .02, .71-.75 and a cosine of about -.65; 7.7 % dead."""
    parts = decompose(gaussian(2.0**octave), "mxfp4")
    assert 1.69 < parts["scale_bias"] < 1.78
    assert 0.019 < parts["deadzone"] < 0.0215
    assert 0.70 < parts["grid"] < 0.755
    assert -0.675 < parts["cosine"] < -0.645
    assert parts["cosine_deadzone"] == 0.0
    assert parts["dead"] == pytest.approx(0.077, abs=0.0015)
    assert 0.4 < parts["inflation"] < 0.6


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_parts_add_up_in_every_mode(fmt):
    for mode in FORMATS[fmt].scale_modes:
        spec = QuantSpec(fmt, mode)
        for x in (gaussian(0.7)[:32, :80], gaussian(0.02)[:32, :80].bfloat16()):
            parts = decompose(x, spec)
            s, d, g = parts["scale_bias"], parts["deadzone"], parts["grid"]
            total = s + d + g + 2 * parts["cosine"] * math.sqrt(s * g) + 2 * parts["cosine_deadzone"] * math.sqrt(s * d)
            assert total == pytest.approx(1, abs=1e-5), spec
            if mode in ("rceil", "ceil"):
                assert parts["cosine_deadzone"] == 0, spec


def test_the_format_and_axis_of_a_decomposition():
    x = gaussian()[:64, :96]
    assert decompose(x, "mxfp4") == decompose(x, QuantSpec("mxfp4", "rceil")) != decompose(x, QuantSpec("mxfp4"))
    assert decompose(x, "nvfp4") == decompose(x, QuantSpec("nvfp4"))
    assert decompose(x.T, "mxfp4", axis=0) == pytest.approx(decompose(x, "mxfp4"), rel=1e-9)
    assert decompose(x, "nvfp4", amax=torch.tensor(40.0)) != decompose(x, "nvfp4")
    with pytest.raises(ValueError, match="rounds 'stochastic'"):
        decompose(x, QuantSpec("mxfp4", rounding="stochastic"))
    with pytest.raises(TypeError, match="x must be .* torch.int64"):
        decompose(x.long(), "mxfp4")


def test_a_decomposition_of_nothing():
    for x in (torch.zeros(3, 40), torch.zeros(0, 40), torch.tensor(3.0), torch.full((4, 32), 6.0)):
        parts = decompose(x, "mxfp4")
        assert all(parts[key] == 0 for key in ("scale_bias", "deadzone", "grid", "cosine", "dead")), x
    assert math.isnan(decompose(torch.tensor([1.0, math.nan]), "mxfp4")["grid"])


@pytest.mark.parametrize("k", [-100, 60])
def test_a_decomposition_does_not_depend_on_the_magnitude(k):
    x = gaussian()[:16, :64]
    assert decompose(x * 2.0**k, "mxfp4") == pytest.approx(decompose(x, "mxfp4"), rel=1e-9)


def test_figures_of_specs_that_do_something_around():
    """Clipping happens in the rotated basis, which is where it is counted; the parts of the error are refused there."""
    x = torch.randn(8, 72, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 30.0
    spec = QuantSpec("mxfp4", rotation="hadamard")
    turned = rotate(x, spec)
    want = error_report(turned, fake_quantize(turned, "mxfp4"), "mxfp4")
    got = error_report(x, fake_quantize(x, spec), spec)
    assert got["clipped"] * x.numel() == pytest.approx(want["clipped"] * turned.numel())
    assert got["clipped"] > 0
    assert error_report(x.T, fake_quantize(x.T, spec, axis=0), spec, axis=0)["clipped"] == got["clipped"]
    whole = error_report(x[:, :64], fake_quantize(x[:, :64], spec), spec)
    rotated = error_report(turned[:, :64], fake_quantize(turned[:, :64], "mxfp4"), "mxfp4")
    assert whole["sqnr_db"] == pytest.approx(rotated["sqnr_db"], abs=1e-4), "H keeps the length of x and of the error"
    macro = QuantSpec("mxfp4", macro_block=128)
    assert error_report(x, fake_quantize(x, macro), macro)["clipped"] < error_report(x, x, "mxfp4")["clipped"]
    assert sum(decompose(x, macro)[part] for part in ("scale_bias", "deadzone", "grid")) > 0.9
    with pytest.raises(ValueError, match="leave rotation out and decompose qnoise.functional.rotate"):
        decompose(x, spec)
    with pytest.raises(ValueError, match="leave residual out"):
        decompose(x, QuantSpec("mxfp4", residual=0.5))
