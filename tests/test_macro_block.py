"""Macro-blocks and the second pass over a residual against models written down once more, and what they are worth."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import qnoise
from exact_model import ELEMENT_OF, LARGEST, floor_log2, mx_block, tree_sum
from qnoise import QuantSpec, fake_quantize, quantize, reference
from qnoise.macro_block import macro_factors
from qnoise.metrics import error_report
from qnoise.philox import uniform
from qnoise.reference import second_pass, to_blocks
from test_chunked import same

f32 = np.float32


def hard_rows(seed):
    """Rows of 128 and a short 40 more, over many binades; maxima where the factor changes, at 1 and just below 2."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((12, 168)).astype(f32) * 2.0 ** rng.integers(-3, 4, (12, 168)).astype(f32)
    tops = [6.0, 3.0, 3.0000002, 2.9999998, 4.0, 3.9999998, 5.9765625, 5.976563, 1e-41, 3.4e38, 1.0, 0.75]
    for row, top in zip(rows, tops, strict=True):
        row *= f32(top) / np.abs(row).max() / f32(1.01)
        row[5] = -f32(top)
    rows[10, 128:] = 0
    return torch.from_numpy(rows)


def static_factor(block, element):
    """1 + m of the magnitudes of one macro-block."""
    top = block.max()
    if top == 0:
        return f32(1)
    mantissa = f32(float(Fraction(float(top)) / Fraction(2) ** floor_log2(Fraction(float(top)))))
    ratio = Fraction(float(f32(LARGEST[element]) / mantissa))
    ratio /= Fraction(2) ** floor_log2(ratio)
    factor = f32(float(Fraction(int(ratio * 256), 256)))
    with np.errstate(over="ignore"):
        return factor if np.isfinite(factor * top) else f32(1)


def searched_factor(block, fmt):
    top = block.max()
    if top == 0:
        return f32(1)
    unit, best = f32(2.0 ** max(floor_log2(Fraction(float(top))), -127)), None
    for step in range(16):
        factor = f32(1 + step / 16)
        with np.errstate(over="ignore", invalid="ignore"):
            raised = block * factor
            if not np.isfinite(raised).all():
                continue
            values = np.concatenate([mx_block(part, fmt, "mse")[1] for part in raised.reshape(-1, 32)]) / factor
            error = (values - block) / unit
            total = tree_sum(np.pad(error * error, (0, 128 - len(error))))
        if best is None or total < best[0]:
            best = (total, factor)
    return best[1]


@pytest.mark.parametrize(("fmt", "mode"), [("mxfp4", "floor"), ("mxint8", "even"), ("mxfp4", "mse")])
def test_factors_and_values_equal_the_model(fmt, mode):
    x, spec = hard_rows(1), QuantSpec(fmt, mode, macro_block=128)
    if mode == "mse":  # the model is slow
        x = x[[2, 6, 8, 9, 10]]
    got, values = macro_factors(to_blocks(x, -1, spec), spec), fake_quantize(x, spec)
    for row in range(len(x)):
        for start, stop in ((0, 128), (128, 168)):
            block = np.zeros(-(-(stop - start) // 32) * 32, f32)
            block[: stop - start] = x[row, start:stop]
            magnitude = np.abs(block)
            factor = searched_factor(magnitude, fmt) if mode == "mse" else static_factor(magnitude, ELEMENT_OF[fmt])
            assert (got[row, start // 32 : -(-stop // 32)] == float(factor)).all(), (row, start)
            parts = [mx_block(part, fmt, mode)[1] / factor for part in (block * factor).reshape(-1, 32)]
            want = np.copysign(np.concatenate(parts), block)[: stop - start]
            np.testing.assert_array_equal(values[row, start:stop].numpy(), want)


def test_the_largest_of_a_macro_block_reaches_the_top_of_the_grid():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 64).unsqueeze(-1)
    spec = QuantSpec("mxfp4", macro_block=128)
    error = (fake_quantize(x, spec) - x).abs().flatten()[x.abs().argmax(-1) + 128 * torch.arange(64)]
    assert (error <= x.abs().amax(-1) * 2.0**-8).all()
    assert (fake_quantize(x, "mxfp4") - x).abs().amax() > x.abs().amax() * 2.0**-8


def test_equal_errors_go_to_the_smaller_factor():
    """One number that each of several factors represents exactly: 3 * 1 and 3 * (1 + 1/3...) but 1 is first."""
    x = torch.zeros(1, 128)
    x[0, 0] = 3.0
    spec = QuantSpec("mxfp4", "mse", macro_block=128)
    assert (macro_factors(to_blocks(x, -1, spec), spec) == 1).all()
    x[0, 0] = 2.5  # not on the grid; 2.5 * 1.25 = 3.125, 2.5 * 1.1875 = 2.97 ... and 2.5 * 1.6 = 4 is between two
    factor = macro_factors(to_blocks(x, -1, spec), spec)[0, 0].item()
    errors = {
        k: abs(float(fake_quantize(torch.tensor([2.5 * (1 + k / 16)]), "mxfp4", "mse")) / (1 + k / 16) - 2.5)
        for k in range(16)
    }
    assert factor == 1 + min(errors, key=lambda k: (errors[k], k)) / 16


def test_nan_stays_in_its_block_and_out_of_the_factor():
    for mode in ("floor", "mse"):
        spec = QuantSpec("mxfp4", mode, macro_block=128)
        x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
        for bad in (torch.nan, torch.inf):
            spoilt = x.clone()
            spoilt[0, 40] = bad
            silent = x.clone()
            silent[0, 40] = 0
            got = fake_quantize(spoilt, spec)
            assert got[0, 32:64].isnan().all()
            keep = torch.ones(256, dtype=torch.bool)
            keep[32:64] = False
            assert torch.equal(got[0, keep], fake_quantize(silent, spec)[0, keep])


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("mxfp4", residual=0.3),
        QuantSpec("nvfp4", residual=1.0),
        QuantSpec("mxint8", "even", residual=0.5),
        QuantSpec("mxfp4", "even", macro_block=128, residual=0.5),
        QuantSpec("mxfp4", "floor", "stochastic", None, 0.5),
    ],
    ids=str,
)
def test_a_residual_is_a_second_pass(spec):
    """In fp32 between the passes, each sum and product rounded; NVFP4 keeps its per-tensor scale."""
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    once = QuantSpec(spec.fmt, spec.scale_mode, spec.rounding, spec.macro_block)
    amax = x.float().abs().amax() if spec.per_tensor_scale else None
    seed = (3, 2**63 - 5)
    first = reference.fake_quantize(x.float(), once, amax=amax, seed=seed)
    second = reference.fake_quantize(x.float() - first, once, amax=amax, seed=second_pass(seed))
    want = (first + second * torch.tensor(spec.residual)).bfloat16()
    assert same(reference.fake_quantize(x, spec, seed=seed), want)
    around = (spec.macro_block, spec.residual, None)
    assert same(
        torch.ops.qnoise.fake_quantize(x, spec.fmt, spec.scale_mode, spec.rounding, -1, None, *seed, *around), want
    )


def test_the_second_pass_draws_other_numbers():
    index = torch.arange(1000)
    first, second = uniform(index, 7, 11), uniform(index, *second_pass((7, 11)))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1


def test_stochastic_rounding_stays_unbiased_around():
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    for spec in (
        QuantSpec("mxfp4", "ceil", "stochastic", None, 1.0, "hadamard"),
        QuantSpec("mxfp4", "ceil", "stochastic", 128),
    ):
        many = fake_quantize(x.expand(4000, -1), spec, generator=torch.Generator().manual_seed(1))
        assert (many.mean(0) - x).abs().max() < 5 * many.std(0).max() / 4000**0.5


def test_what_has_no_packed_storage_is_refused_by_name():
    x = torch.ones(2, 128)
    with pytest.raises(ValueError, match=r"mxfp4 \(macro_block=128\) cannot be stored packed.*storage='auto'"):
        quantize(x, QuantSpec("mxfp4", macro_block=128))
    with pytest.raises(ValueError, match=r"residual=0.5.* has no place for a second pass.*leave residual out"):
        quantize(x, QuantSpec("nvfp4", residual=0.5))
    with pytest.raises(ValueError, match="cannot be stored packed"):
        reference.quantize(x, QuantSpec("mxfp4", macro_block=128))


def sqnr(x, spec):
    return error_report(x, fake_quantize(x, spec), spec)["sqnr_db"]


def test_what_it_is_worth():
    """Mean over an octave of sigma, in dB; heavy tails are a gaussian with 0.2 % of its elements times 30."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(128, 512, generator=generator)
    tails = torch.where(torch.rand(gaussian.shape, generator=generator) < 0.002, 30 * gaussian, gaussian)

    def mean(x, **fields):
        return sum(sqnr(x * 2 ** (i / 4), QuantSpec(**fields)) for i in range(4)) / 4

    around = {
        "even": {"scale_mode": "even"},
        "static": {"scale_mode": "even", "macro_block": 128},
        "searched": {"scale_mode": "mse", "macro_block": 128},
        "rotated": {"scale_mode": "even", "rotation": "hadamard"},
        "twice": {"scale_mode": "rceil", "residual": 1.0},
        "half": {"scale_mode": "rceil", "residual": 0.5},
    }
    on = {name: (mean(gaussian, **fields), mean(tails, **fields)) for name, fields in around.items()}
    expected = {
        "even": (18.98, 16.9), "static": (19.31, 19.2), "searched": (19.96, 19.4), "rotated": (18.99, 19.45),
        "twice": (37.19, 33.3), "half": (24.66, 22.5),
    }  # fmt: skip
    for name, (plain, heavy) in expected.items():
        assert on[name][0] == pytest.approx(plain, abs=0.06), name
        assert on[name][1] == pytest.approx(heavy, abs=0.35), name


def test_a_patched_model_has_both_says_its_true_bits_and_comes_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 32), nn.Linear(32, 8)).requires_grad_(False)
    x, stock = torch.randn(3, 160), copy.deepcopy(model.state_dict())
    before = model(x)
    spec = QuantSpec("mxfp4", "mse", macro_block=128, residual=0.5)
    qnoise.patch_model(model, spec, act_fmt=QuantSpec("mxfp4", residual=1.0))
    assert torch.equal(model[0].effective_weight(), fake_quantize(stock["0.weight"], spec))
    assert "bits per quantized weight: 8.625" in str(qnoise.summary(model))
    assert not torch.equal(model(x), before)
    qnoise.unpatch_model(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(stock[name], tensor) for name, tensor in model.state_dict().items())
