"""The compiled sums of an error: the same figures as the PyTorch path, however rows and threads come."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

import qnoise
from qnoise.formats import FORMATS, QuantSpec
from qnoise.kernels import error_sums, native
from qnoise.sensitivity.figures import Figures

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler is installed")

SPECS = [
    *map(QuantSpec, FORMATS),
    QuantSpec("mxfp4", "rceil"),
    QuantSpec("nvfp4", "four_over_six"),
    QuantSpec("mxfp4", rounding="stochastic"),
    QuantSpec("mxfp4", macro_block=128),
    QuantSpec("nvfp4", residual=0.5),
    QuantSpec("mxfp4", rotation="hadamard"),
]


def hard_rows(dtype: torch.dtype) -> torch.Tensor:
    """(37, 203): ragged, with zeros, an outlier, a zero block, NaN, Inf, and rows of very different sizes."""
    x = torch.randn(37, 203, generator=torch.Generator().manual_seed(0)) * 0.02
    x[:, 64:128] *= 1e-4
    x[3, 5], x[4, :64], x[6, ::3], x[7, 200], x[8, 40], x[9] = 3.0, 0.0, 0.0, math.nan, -math.inf, x[9] * 50
    return x.to(dtype)


def gathered(x: torch.Tensor, spec: QuantSpec, channels: str = "row", pieces: int = 1) -> Figures:
    finite = torch.where(x.isfinite(), x, 0).float()
    amax = qnoise.functional.rotate(finite, spec).abs().amax() if spec.per_tensor_scale else None
    figures = Figures(spec, channels)
    for piece in x.tensor_split(pieces):
        figures.add(piece, amax)
    return figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_compiled_sums_are_those_of_pytorch(spec, dtype, monkeypatch) -> None:
    x = hard_rows(dtype)
    assert error_sums.serves(x.float(), spec), native.status()
    pairs = {}
    for channels in ("row", "column"):
        # Pieces of other sizes would draw other random numbers.
        compiled = gathered(x, spec, channels, pieces=1)
        with monkeypatch.context() as patch:
            patch.setattr(error_sums, "_library", lambda: None)
            pairs[channels] = compiled, gathered(x, spec, channels)
    for compiled, eager in pairs.values():
        assert compiled.left_out == eager.left_out > 0
        assert compiled.count == eager.count
        for name, value in eager.result().items():
            # 2e-6 of an energy is 1e-5 dB, whatever the dB are.
            absolute = 1e-5 if name.endswith("_db") else 1e-12
            assert compiled.result()[name] == pytest.approx(value, rel=2e-6, abs=absolute), name
        for name, value in eager.decomposition().items():
            assert compiled.decomposition()[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert compiled.histogram == eager.histogram
        assert (compiled.histogram is None) != spec.plain
        assert bool(compiled.decomposition()) == compiled.parted


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**110])
def test_no_power_overflows_and_none_vanishes(scale) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    here, there = gathered(x, QuantSpec("mxfp4")).result(), gathered(x * scale, QuantSpec("mxfp4")).result()
    assert there["kurtosis"] == here["kurtosis"]
    assert there["norm"] == here["norm"] * scale


def test_totals_depend_neither_on_threads_nor_on_pieces() -> None:
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        seen = []
        for threads, pieces in ((1, 1), (2, 1), (3, 1), (2, 7), (1, 300)):
            torch.set_num_threads(threads)
            seen.append(gathered(x, QuantSpec("nvfp4"), pieces=pieces)._totals)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(totals, seen[0]) for totals in seen)


def test_values_near_the_top_are_counted_by_value() -> None:
    spec = QuantSpec("mxint8")
    hat = torch.tensor([[1.0, 127 / 64, -126 / 64, 127 / 64] * 8, [0.5] * 32, [-127 / 64] * 32])
    per_row = error_sums.add(hat, hat, torch.ones(3, 1), spec, error_sums.new_totals(), parts=True)
    assert error_sums.values_from(hat, per_row, 126 / 64) == {127 / 64: 48, 126 / 64: 8}
    assert error_sums.values_from(hat, per_row, 127 / 64) == {127 / 64: 48}
    assert error_sums.values_from(hat, per_row, 2.0) == {}
    many = torch.linspace(1.0, 1.009, 65).repeat(2, 1)
    per_row = error_sums.add(many, many, torch.ones(2, 3), spec, error_sums.new_totals(), parts=True)
    assert error_sums.values_from(many, per_row, 0.99) is None
    assert len(error_sums.values_from(many, per_row, 1.001)) == int((many[0] >= 1.001).sum())
    # Where they are too many to keep apart, PyTorch counts.
    assert gathered(many, QuantSpec("mxfp4", rotation="hadamard")).result()["at_maximum"] > 0


def test_operands_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 64)
    spec, scales, totals = QuantSpec("mxfp4"), torch.ones(4, 2), error_sums.new_totals()
    for name, arguments in {
        "x_hat": (x, x.bfloat16(), scales, spec, totals),
        "scales": (x, x, torch.ones(4, 3), spec, totals),
        "totals": (x, x, scales, spec, totals[:3]),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be contiguous"):
            error_sums.add(*arguments, parts=True)
    with pytest.raises(ValueError, match="columns must be"):
        error_sums.add(x, x, scales, spec, totals, parts=True, columns=torch.zeros(2, 63, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"no compiled sums for torch\.float16"):
        error_sums.add(x.half(), x.half(), scales, spec, totals, parts=True)


def test_without_the_compiled_path_pytorch_serves(monkeypatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert not error_sums.serves(torch.zeros(1, 32), QuantSpec("mxfp4"))
