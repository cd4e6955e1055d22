"""The compiled CPU path gives the bits of the reference."""

from __future__ import annotations

import io
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import fuzz
from qnoise import formats, reference
from qnoise.formats import E2M1, E3M2, E4M3, INT8, MX_SCALE_MODES, NV_SCALE_MODES, BlockFormat, QuantSpec
from qnoise.kernels import native

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler is installed")

NEAREST = [spec for spec in fuzz.PLAIN if spec.rounding == "nearest"]


def name(spec):
    return f"{spec.fmt}-{spec.scale_mode}"


def differences(x, spec, amax=None, seed=(5, 2**63 + 11)):
    return [what for what, *_ in fuzz.mismatches(x, spec, amax, seed)]


def test_it_is_active_where_there_is_a_compiler():
    assert native.available(), native.status()
    assert native.status().startswith("on: ")


def test_modes_of_the_first_caller_do_not_matter(monkeypatch):
    monkeypatch.setattr(native, "_state", None)
    with torch.device("meta"), torch.inference_mode(), FakeTensorMode():
        assert native.available(), native.status()


# ---- bits ----


@pytest.mark.parametrize("lap", range(8))
def test_bit_patterns(lap):
    """Each lap is one dtype and one kind of input, for every format, scale mode and rounding."""
    found = fuzz.fuzz(first=lap * len(fuzz.SPECS), rounds=len(fuzz.SPECS), elements=1 << 10)
    assert found["values"] > 90_000
    assert not found["differences"], "\n".join(found["reports"])


@pytest.mark.slow
def test_many_more_bit_patterns():
    found = fuzz.fuzz(values=2e7, seed=1)
    assert not found["differences"], "\n".join(found["reports"])


@pytest.mark.parametrize("spec", NEAREST, ids=name)
def test_every_bf16_number(spec):
    """All 65,536 patterns, beside their neighbours and beside numbers of other binades."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    mixed = (finite * 48271 + finite.numel() // 2) % finite.numel()
    narrow = finite[(torch.arange(finite.numel()) % 32) * (finite.numel() // 32) + torch.arange(finite.numel()) // 32]
    for x in (patterns.view(256, 256), finite[mixed].view(255, 256), narrow.view(255, 256)):
        assert not differences(x.to(torch.int16).view(torch.bfloat16), spec)


def test_golden_inputs():
    archive = Path(__file__).parent / "golden" / "golden.npz.xz"
    with np.load(io.BytesIO(lzma.decompress(archive.read_bytes()))) as arrays:
        inputs = [torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("x/")]
    assert len(inputs) > 20
    for spec in NEAREST:
        for x in inputs:
            rows = x.reshape(-1, x.shape[-1])
            assert not differences(rows, spec), (spec, x.shape)


def test_errors_are_summed_by_halves():
    """Blocks in which two scales have errors so close that another order of the sum decides otherwise in some."""
    x = torch.rand(1 << 14, 32, generator=torch.Generator().manual_seed(0)) * 0.25
    x[:, 0], x[:, 1], x[:, 5], x[:, 20] = 4, 3.5, 0.25 + 2.0**-23, 0.25 + 2.0**-24
    assert not differences(x, QuantSpec("mxfp4", "mse"))


@pytest.mark.parametrize(
    "block",
    [
        BlockFormat("wide_e2m1", E2M1, 128, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("short_e3m2", E3M2, 4, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("short_int8", INT8, 8, "e8m0", False, MX_SCALE_MODES),
        BlockFormat("nv_e4m3", E4M3, 32, "e4m3", True, NV_SCALE_MODES),
        BlockFormat("nv_int8", INT8, 64, "e4m3", True, NV_SCALE_MODES),
        BlockFormat(
            "int4", formats.ElementFormat("int4", 4, 0, 2, emin=0, max=1.75), 32, "e8m0", False, MX_SCALE_MODES
        ),
    ],
    ids=lambda block: block.name,
)
def test_formats_of_a_user(block, monkeypatch):
    monkeypatch.setitem(formats._TABLE, block.name, block)
    specs = [QuantSpec(block.name, mode, rounding) for mode in block.scale_modes for rounding in formats.ROUNDINGS]
    macro = None if block.per_tensor_scale else 128
    specs += [QuantSpec(block.name, rotation="hadamard"), QuantSpec(block.name, macro_block=macro, residual=0.5)]
    for spec in specs:
        for kind in fuzz.INPUTS:
            x = fuzz.inputs(kind, 9, 3 * block.block_size + 5, torch.Generator().manual_seed(1))
            for dtype in fuzz.DTYPES:
                assert native.supports(spec, dtype)
                assert not differences(x.to(dtype), spec), (spec, kind, dtype)


@pytest.mark.parametrize("size", [4, 8, 64, 128, 256])
def test_rotations_and_macro_blocks_of_other_sizes(size, monkeypatch):
    """Tiles in fp32 hold fewer blocks the longer these are; rows of several tiles, with and without a tail."""
    block = BlockFormat(f"size_{size}", E2M1, size, "e8m0", False, MX_SCALE_MODES)
    monkeypatch.setitem(formats._TABLE, block.name, block)
    for columns in (9000, 8192):
        x = fuzz.inputs("normal", 2, columns, torch.Generator().manual_seed(1)).bfloat16()
        assert not differences(x, QuantSpec(block.name, "even", rotation="hadamard"))
        if size <= 128:
            assert not differences(x, QuantSpec(block.name, "mse", "stochastic", 128, 0.5, "hadamard"))


def test_what_it_leaves_to_others(monkeypatch):
    long = BlockFormat("long", E2M1, 512, "e8m0", False, MX_SCALE_MODES)
    far = BlockFormat("far", formats.ElementFormat("far", 8, 7, 0, -62, 2.0**63), 32, "e8m0", False, ("floor",))
    for block in (long, far):
        monkeypatch.setitem(formats._TABLE, block.name, block)
        assert not native.supports(QuantSpec(block.name), torch.float32)
    for dtype in (torch.float16, torch.float64, torch.int8):
        assert not native.supports(QuantSpec(), dtype)


@pytest.mark.parametrize("shape", [(301, 96), (301, 100), (1, 30_007)], ids=str)
def test_threads_do_not_change_a_bit(shape, monkeypatch):
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1000)
    x = fuzz.inputs("binades", *shape, torch.Generator().manual_seed(4))
    amax = torch.where(x.isfinite(), x, 0).abs().amax(-1, keepdim=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert native._threads(x) == threads
            for spec, given in (
                (QuantSpec("mxfp4", rounding="stochastic"), None),
                (QuantSpec("nvfp4"), amax),
                (QuantSpec("mxfp4", "even", "stochastic", 128, 0.5, "hadamard"), None),
                (QuantSpec("nvfp4", rotation="hadamard"), amax),
            ):
                assert not differences(x, spec, given)
            assert torch.equal(native.amax_rows(x), amax[:, 0])
            assert torch.equal(native.tensor_amax(x), amax.max())
    finally:
        torch.set_num_threads(before)
    assert native._threads(torch.empty(999)) == 1


@pytest.mark.parametrize("dtype", fuzz.DTYPES)
def test_maximum_over_finite_values(dtype):
    x = torch.tensor([[1.0, -3.0, torch.nan], [torch.inf, 2.0**-140, -torch.inf], [torch.nan] * 3, [0.0, -0.0, 0.0]])
    x = x.to(dtype)
    want = torch.tensor([3.0, 2.0**-140, 0.0, 0.0]).to(dtype).float()
    assert torch.equal(native.amax_rows(x), want)
    assert native.tensor_amax(x).item() == 3
    assert native.tensor_amax(torch.empty(0, 7, dtype=dtype)).item() == 0
    assert native.tensor_amax(x[0, 1]).item() == 3


def test_written_in_place_or_over_part_of_the_input():
    spec = QuantSpec("nvfp4", "four_over_six")
    divisor = torch.tensor(300.0)
    for dtype in fuzz.DTYPES:
        memory = torch.randn(40 * 70 + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = memory[: 40 * 70].view(40, 70)
        want = torch.empty_like(x)
        native.fake_quantize_rows(x, spec, divisor, None, want)
        for shift in (0, 1, 3):  # odd shifts are aligned to two or four bytes only
            again = memory.clone()
            out = again[shift : shift + 40 * 70].view(40, 70)
            native.fake_quantize_rows(again[: 40 * 70].view(40, 70), spec, divisor, None, out)
            assert torch.equal(out, want)


def test_subnormals_are_kept_in_a_thread_that_flushes_them():
    spec = QuantSpec("mxfp8_e5m2")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 2.0**-130
    want, out = reference.fake_quantize(x, spec), torch.empty_like(x)
    assert (want != 0).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        native.fake_quantize_rows(x, spec, None, None, out)
        assert not (x * 1).abs().view(torch.int32).any()  # the mode of the thread is as it was
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, want)


def test_operands_that_do_not_fit_are_named():
    x, spec = torch.zeros(4, 64), QuantSpec("nvfp4")
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    bad = [
        (lambda: native.fake_quantize_rows(x.half(), spec, None, None, x.half()), "x must be"),
        (lambda: native.fake_quantize_rows(x.t(), spec, None, None, x.t()), "not contiguous"),
        (lambda: native.fake_quantize_rows(x, spec, None, None, x.bfloat16()), "out must be"),
        (lambda: native.fake_quantize_rows(x, spec, torch.ones(3), None, x), "divisor must be"),
        (lambda: native.fake_quantize_rows(x, spec, torch.ones(4).double(), None, x), "divisor must be"),
        (lambda: native.fake_quantize_rows(x, QuantSpec("mxfp4", rounding="stochastic"), None, None, x), "seed"),
        (lambda: native.quantize_rows(x, spec, None, None, codes[:, :-1], scales), "codes must be"),
        (lambda: native.quantize_rows(x, spec, None, None, codes, scales[:3]), "scales must be"),
        (lambda: native.dequantize_rows(codes, scales.float(), None, spec, x), "scales must be"),
        (lambda: native.dequantize_rows(codes, scales, None, spec, x.double()), "out must be"),
        (lambda: native.amax_rows(x[0]), "amax_rows takes"),
    ]
    for call, words in bad:
        with pytest.raises(ValueError, match=words):
            call()
