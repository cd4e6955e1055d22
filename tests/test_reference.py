"""The numerics against a rational-arithmetic model, special values, and the figures expected of each format."""

import math

import numpy as np
import pytest
import torch

from exact_model import ELEMENT_OF, mx_block, nv_block
from qnoise.formats import E4M3, FORMATS, MX_SCALE_MODES, NV_SCALE_MODES, QuantSpec
from qnoise.functional import fake_quantize, quantize
from qnoise.metrics import error_report
from qnoise.rounding import power_of_two, round_magnitude, split_fp32
from qnoise.scales import halving_sum

SPECS = [QuantSpec(fmt, mode) for fmt, block in FORMATS.items() for mode in block.scale_modes]


def name(spec):
    return f"{spec.fmt}-{spec.scale_mode}"


def hard_blocks(size, seed):
    """Blocks whose maxima sit on, just below and just above the places where a scale rule changes its mind,
    and whose elements sit on and next to ties."""
    rng = np.random.default_rng(seed)
    maxima = [1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.984375, 1.9921875]
    blocks = []
    for i, maximum in enumerate(maxima):
        for direction in (-np.inf, None, np.inf):
            top = np.float32(maximum)
            top = top if direction is None else np.nextafter(top, np.float32(direction))
            eighths = rng.integers(0, 65, size) / 64
            kinds = [eighths, eighths * rng.random(size), 2.0 ** rng.integers(-20, 0, size)]
            block = (kinds[i % 3] * rng.choice([-1, 1], size)).astype(np.float32)
            block = np.nextafter(block, rng.choice([-1, 0, 0, 1], size).astype(np.float32) * 9).astype(np.float32)
            block[rng.integers(size)] = top
            blocks.append(np.clip(block, -top, top) * np.float32(2.0 ** rng.integers(-30, 30)))
    return np.stack(blocks)


@pytest.mark.parametrize("rounding", ["nearest", "half_away"])
@pytest.mark.parametrize("mode", MX_SCALE_MODES)
@pytest.mark.parametrize("fmt", ELEMENT_OF)
def test_mx_equals_the_exact_model(fmt, mode, rounding):
    blocks = hard_blocks(32, seed=1)
    q = quantize(torch.from_numpy(blocks), fmt, mode, rounding=rounding)
    got = q.dequantize().numpy()
    for row, block in enumerate(blocks):
        exponent, values = mx_block(block, fmt, mode, rounding)
        assert q.scales.view(torch.uint8)[row, 0].item() == exponent + 127, row
        np.testing.assert_array_equal(got[row], np.copysign(values, block))


# 147/128 and 217/128: where libraries that multiply by a rounded reciprocal differ in bf16 (see below).
@pytest.mark.parametrize("amax", [1.0, 147 / 128, 217 / 128, 2688.0, 0.1, 1.7e-30, 3e30])
@pytest.mark.parametrize("mode", NV_SCALE_MODES)
def test_nvfp4_equals_the_exact_model(mode, amax):
    blocks = hard_blocks(16, seed=2)
    blocks = blocks / np.abs(blocks).max(1, keepdims=True)
    blocks = (blocks * np.float32(amax) * 2.0 ** -np.arange(24)[:, None]).astype(np.float32)
    rounding = "half_away" if amax == 2688 else "nearest"
    tensor_amax = np.abs(blocks).max()
    assert tensor_amax == np.float32(amax)
    q = quantize(torch.from_numpy(blocks), "nvfp4", mode, rounding=rounding)
    got = q.dequantize().numpy()
    for row, block in enumerate(blocks):
        scale, values = nv_block(block, tensor_amax, mode, rounding)
        assert q.scales.float()[row, 0].item() == scale, row
        np.testing.assert_array_equal(got[row], np.copysign(values, block))


@pytest.mark.parametrize(
    ("amax", "other"),
    [
        (147 / 128, lambda s, amax: s * (amax / 2688)),
        (217 / 128, lambda s, amax: s * (1 / (torch.tensor(2688.0) / amax))),
    ],
    ids=["multiply by amax/2688", "multiply by the reciprocal of 2688/amax"],
)
def test_order_of_nvfp4_operations_shows_in_bf16(amax, other):
    """Every normal E4M3 scale S times every code: ours is code * (S / gs); the alternatives give other numbers."""
    codes = torch.tensor([6.0, 4, 3, 2, 1.5, 1, 0.5, 0] * 2)
    scales = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    top = torch.tensor(amax)
    gs = torch.tensor(2688.0) / top
    blocks = (codes * (scales / gs).unsqueeze(-1)).bfloat16()
    want = (codes.double() * (scales / gs).unsqueeze(-1).double()).float().bfloat16()
    assert torch.equal(fake_quantize(blocks, "nvfp4", amax=top), want)
    assert not torch.equal((codes * other(scales, top).unsqueeze(-1)).bfloat16(), want)


def test_exponent_and_mantissa_of_every_binade():
    for k in range(-149, 128):
        # Around 2**k; the neighbours are computed in fp64 and are fp32 numbers.
        ulp = 2.0 ** (max(k, -126) - 23)
        for value in (2.0**k, 2.0**k + ulp, 2.0**k - 2.0 ** (max(k - 1, -126) - 23)):
            if not 0 < value < 2.0**128:
                continue
            exponent, mantissa = split_fp32(torch.tensor(value, dtype=torch.float32))
            assert exponent.item() == math.frexp(value)[1] - 1
            assert 2.0 ** exponent.item() * (1 + mantissa.item() / 2**23) == value
    powers = power_of_two(torch.arange(-127, 128, dtype=torch.int32))
    assert powers.double().tolist() == [2.0**k for k in range(-127, 128)]


def test_e4m3_scales_round_like_torch_casts():
    bits = torch.arange(0, 2**31 - 2**23, 4093, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).clamp(max=448.0)
    assert torch.equal(round_magnitude(x, E4M3), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_nan_and_inf_stay_in_their_block(spec):
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    size = spec.block_format.block_size
    amax = x.abs().amax() if spec.per_tensor_scale else None
    clean = fake_quantize(x, spec, amax=amax)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[1, size + 3] = bad
        # The same per-tensor scale with and without giving amax: it is taken over the finite values.
        assert spoilt[spoilt.isfinite()].abs().amax() == x.abs().amax()
        got = fake_quantize(spoilt, spec)
        assert got[1, size : 2 * size].isnan().all()
        keep = torch.ones_like(x, dtype=torch.bool)
        keep[1, size : 2 * size] = False
        assert torch.equal(got[keep], clean[keep])


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_zero_keeps_its_sign(spec):
    x = torch.tensor([0.0, -0.0] * 24 + [1.0, -0.0, -1e-4, 0.0])
    for dtype in (torch.float32, torch.bfloat16):
        y = fake_quantize(x.to(dtype), spec)
        expected = torch.zeros_like(x).bool() if spec.fmt == "mxint8" else x.signbit()
        zero = y == 0
        assert zero[:48].all()
        assert torch.equal(y.signbit()[zero], expected[zero])
        assert y[48] > 0.9
        assert not fake_quantize(torch.zeros(3, 40), spec).any()


def test_a_negative_that_rounds_to_zero_is_minus_zero():
    x = torch.tensor([1.0, -1e-3])
    assert fake_quantize(x, "mxfp4")[1].signbit()
    assert not fake_quantize(x, "mxint8")[1].signbit()
    assert fake_quantize(x, "mxint8")[1] == 0


@pytest.mark.parametrize("fmt", ELEMENT_OF)
def test_ends_of_the_e8m0_range(fmt):
    huge = torch.finfo(torch.float32).max
    x = torch.tensor([[huge, -huge / 2, huge / 1024], [2.0**-140, -(2.0**-141), 2.0**-149]])
    for mode in ("floor", "even", "rceil", "ceil", "mse"):
        for row in x:
            block = np.zeros(32, np.float32)
            block[:3] = row.numpy()
            exponent, values = mx_block(block, fmt, mode)
            q = quantize(row, fmt, mode)
            assert q.scales.view(torch.uint8).item() == exponent + 127
            np.testing.assert_array_equal(q.dequantize().abs().numpy(), values[:3])
    assert fake_quantize(x[0], fmt, "floor").isfinite().all()


def test_tiny_nvfp4_tensors_are_finite_and_keep_what_fp32_can():
    pattern = torch.tensor([6.0, -3.0, 1.0, 0.5] * 4)
    for exponent in range(-149, -100):
        x = pattern * 2.0**exponent
        y = fake_quantize(x, "nvfp4")
        assert y.isfinite().all()
        if exponent >= -126:
            # The divisor is at its bound from amax < 2688 * 2**-126 on; its E4M3 scale is a power of two here.
            assert torch.equal(y, x), exponent


def test_a_bad_amax_shows():
    x = torch.ones(2, 16)
    for amax in (-1.0, torch.nan, torch.inf):
        assert fake_quantize(x, "nvfp4", amax=amax).isnan().all()
    assert torch.equal(fake_quantize(torch.zeros(2, 16), "nvfp4", amax=0.0), torch.zeros(2, 16))


def test_elements_beyond_a_given_amax_saturate():
    x = torch.tensor([1.0, 100.0, -1e30])
    y = fake_quantize(x, "nvfp4", amax=6.0)
    assert y.tolist() == [1.0, 6.0, -6.0]


def test_equal_errors_go_to_the_larger_scale():
    # In units of 1: 3.5 costs 0.5 on the grid of step 1 (scale 1) and on that of step 2 (scale 2); the maximum 4 is
    # on both. All other candidates are worse.
    q = quantize(torch.tensor([4.0, 3.5]), "mxfp4", "mse")
    assert q.scales.float().item() == 2
    assert quantize(torch.tensor([4.0, 3.5]), "mxfp4").scales.float().item() == 1


def test_equal_errors_of_four_over_six_go_to_the_larger_scale():
    # gs is 1, and the maximum is 6 * 256 and 4 * 384. 160 lies 32 from 128 = 256 / 2 and 32 from 192 = 384 / 2.
    for block in ([1536.0], [1536.0, 160.0]):
        assert quantize(torch.tensor(block), "nvfp4", "four_over_six").scales.float().item() == 384
    # Where the errors differ the smaller scale can win: 128 is on its grid.
    q = quantize(torch.tensor([1536.0, 128.0]), "nvfp4", "four_over_six")
    assert q.scales.float().item() == 256


def test_mse_may_clip_the_maximum_to_keep_the_rest():
    # 31 quarters are lost on the grid of step 1/2 (a cost of 31/16) and exact on that of step 1/4, which ends at 3.
    q = quantize(torch.tensor([4.0] + [0.25] * 31), "mxfp4", "mse")
    assert q.scales.float().item() == 0.5
    assert q.dequantize()[0] == 3


def test_errors_are_summed_by_halves():
    # In fp32 1 + 2**-24 is 1, so the order shows: (1 + 0) + (2**-24 + 2**-24) keeps what (1 + 2**-24) + ... loses.
    assert halving_sum(torch.tensor([1.0, 2.0**-24, 0.0, 2.0**-24])).item() == 1 + 2.0**-23
    assert halving_sum(torch.tensor([1.0, 0.0, 2.0**-24, 2.0**-24])).item() == 1


def test_a_zero_block_keeps_the_scale_of_the_plain_rule():
    x = torch.zeros(2, 32)
    x[1, 0] = 3
    assert quantize(x, "mxfp4", "mse").scales.view(torch.uint8)[0].item() == 0
    assert quantize(x, "nvfp4", "mse").scales.float()[0].tolist() == [0, 0]


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_ragged_tail_is_its_own_block(fmt):
    size = FORMATS[fmt].block_size
    x = torch.randn(5, 3 * size + 7, generator=torch.Generator().manual_seed(3))
    amax = x.abs().amax() if fmt == "nvfp4" else None
    whole = fake_quantize(x, fmt, amax=amax)
    parts = [fake_quantize(part, fmt, amax=amax) for part in x.split(size, dim=-1)]
    assert torch.equal(whole, torch.cat(parts, dim=-1))


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(11))


# SQNR in dB; mean relative error, deadzone and clipped share in percent, for gaussian data of sigma 1.
EXPECTED = [
    ("mxfp4", "floor", 18.8, 21.0, 8.8, 2.34),
    ("mxfp4", "rceil", 18.8, 23.4, 10.7, 0),
    ("mxfp4", "even", 19.0, 22.1, 9.7, 0.62),
    ("mxfp4", "ceil", 16.8, 32.2, 17.5, 0),
    ("mxfp6_e2m3", "floor", 30.9, 6.8, 2.2, 0.37),
    ("mxfp6_e2m3", "rceil", 31.0, 7.0, 2.3, 0),
    ("mxfp6_e2m3", "even", 31.0, 6.9, 2.25, 0.16),
    ("mxfp6_e3m2", "floor", 25.4, 5.0, 0.3, 0.86),
    ("mxfp6_e3m2", "rceil", 25.5, 5.0, 0.3, 0),
    ("mxfp6_e3m2", "even", 25.5, 5.0, 0.3, 0.31),
    ("mxfp8_e4m3", "floor", 30.6, 2.3, 0, 0.86),
    ("mxfp8_e4m3", "rceil", 31.5, 2.3, 0, 0),
    ("mxfp8_e4m3", "even", 31.2, 2.3, 0, 0.55),
    ("mxfp8_e5m2", "floor", 25.4, 4.5, 0, 0.86),
    ("mxfp8_e5m2", "rceil", 25.5, 4.5, 0, 0),
    ("mxfp8_e5m2", "even", 25.5, 4.5, 0, 0.31),
    ("mxint8", "floor", 41.7, 3.5, 1.1, 0.04),
    ("nvfp4", "two_level", 20.4, 17.9, 6.8, None),
    ("nvfp4", "four_over_six", 21.2, 19.1, 8.1, None),
]


@pytest.mark.parametrize(("fmt", "mode", "sqnr", "relative", "deadzone", "clipped"), EXPECTED)
def test_figures_on_gaussian_data(fmt, mode, sqnr, relative, deadzone, clipped, gaussian):
    # Tolerances: the table's last digit, and four standard errors of a sample of this size.
    spec = QuantSpec(fmt, mode)
    report = error_report(gaussian, fake_quantize(gaussian, spec), spec)
    assert report["sqnr_db"] == pytest.approx(sqnr, abs=0.08)
    assert 100 * report["mean_relative_error"] == pytest.approx(relative, abs=0.15)
    assert 100 * report["deadzone"] == pytest.approx(deadzone, abs=0.1)
    if clipped is not None:
        assert 100 * report["clipped"] == pytest.approx(clipped, abs=0.06)


def sqnr(x, spec):
    return error_report(x, fake_quantize(x, spec), spec)["sqnr_db"]


@pytest.mark.parametrize(
    ("fmt", "mode", "low", "high"),
    [
        ("mxfp4", "floor", 18.58, 18.92),
        ("mxfp4", "rceil", 18.52, 18.77),
        ("mxfp4", "even", 18.93, 19.05),
        ("mxfp4", "ceil", 16.77, 17.27),
        ("mxfp8_e4m3", "floor", 30.13, 30.83),
        ("mxfp8_e4m3", "rceil", 31.51, 31.56),
        ("nvfp4", "two_level", 20.43, 20.43),
    ],
)
def test_sqnr_over_an_octave_of_sigma(fmt, mode, low, high, gaussian):
    """A power-of-two scale makes SQNR a periodic function of log2(sigma); the ends of its range are known."""
    values = [sqnr(gaussian * 2 ** (i / 8), QuantSpec(fmt, mode)) for i in range(8)]
    assert min(values) == pytest.approx(low, abs=0.03)
    assert max(values) == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize(("fmt", "expected"), [("mxfp4", 19.05), ("nvfp4", 21.81)])
def test_mse_is_the_best_mode_and_as_good_as_known(fmt, expected, gaussian):
    values = {mode: sqnr(gaussian, QuantSpec(fmt, mode)) for mode in FORMATS[fmt].scale_modes}
    assert values["mse"] == max(values.values())
    assert values["mse"] == pytest.approx(expected, abs=0.03)


def test_better_scales_over_an_octave_of_sigma(gaussian):
    """What a search among scales has to win at the same bits; 22.1 dB is the bound for ideal fp32 scales."""
    gaussian = gaussian[:256]

    def mean(fmt, mode):
        return sum(sqnr(gaussian * 2 ** (i / 4), QuantSpec(fmt, mode)) for i in range(4)) / 4

    assert mean("mxfp4", "mse") >= mean("mxfp4", "floor") + 0.25
    two_level, mse = mean("nvfp4", "two_level"), mean("nvfp4", "mse")
    assert 21.7 <= mse <= 22.1
    for mode, expected in (("four_over_six", 21.2), ("four_over_six_mae", 21.08), ("four_over_six_absmax", 20.93)):
        found = mean("nvfp4", mode)
        assert found == pytest.approx(expected, abs=0.05)
        assert two_level < found < mse


def faulty_nvfp4(x):
    """NVFP4 as it is often got wrong: one level, and a block scale without subnormals, so never below 2**-6."""
    blocks = x.unflatten(-1, (-1, 16))
    scale = blocks.abs().amax(-1, keepdim=True) / 6
    scale = scale.to(torch.float8_e4m3fn).float().clamp(2.0**-6, 240.0)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = ((blocks.abs() / scale).unsqueeze(-1) - grid).abs()
    return (grid[distance.argmin(-1)] * scale * blocks.sign()).flatten(-2)


def test_a_faulty_nvfp4_is_worse_than_mxfp4_and_the_right_one_is_better(gaussian):
    x = 0.02 * gaussian[:256]
    faulty = error_report(x, faulty_nvfp4(x), "nvfp4")
    assert faulty["sqnr_db"] == pytest.approx(17.69, abs=0.08)
    assert 100 * faulty["deadzone"] == pytest.approx(15.5, abs=0.3)
    assert faulty["sqnr_db"] < sqnr(x, "mxfp4") - 1
    assert sqnr(x, "nvfp4") > sqnr(x, "mxfp4") + 1.4
