"""The chunked path against the reference: the same bits from any piece, and nothing that another device lacks."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves

from qnoise import formats, reference
from qnoise.formats import FORMATS, BlockFormat, ElementFormat, QuantSpec
from qnoise.kernels import chunked
from qnoise.scales import finite_amax, per_tensor_divisor

# Every scale mode; for the other roundings, which do not depend on it, the first and the last.
SPECS = [
    QuantSpec(fmt, mode, rounding)
    for fmt, block in FORMATS.items()
    for rounding in formats.ROUNDINGS
    for mode in (block.scale_modes if rounding == "nearest" else block.scale_modes[:: len(block.scale_modes) - 1])
]
AROUND = [
    QuantSpec("mxfp4", rotation="hadamard"),
    QuantSpec("nvfp4", rotation="hadamard"),
    QuantSpec("mxint8", rotation="hadamard"),
    QuantSpec("nvfp4", "four_over_six", "stochastic", None, 0.3, "hadamard"),
    QuantSpec("mxfp6_e3m2", "rceil", "nearest", 128),
    QuantSpec("mxfp4", "even", "stochastic", 128, 0.5, "hadamard"),
    QuantSpec("mxfp8_e4m3", None, "half_away", None, 1.0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bit_patterns(*shape, seed):
    """fp32 numbers of random bits: every binade, subnormals, NaN and Inf."""
    bits = torch.randint(-(2**31), 2**31 - 1, shape, generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def hard_inputs():
    normal = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.randint(-256, 257, (8, 96), generator=torch.Generator().manual_seed(1)) / 64  # ties of every grid
    special = normal.clone()
    special[0], special[1, ::2] = -0.0, 0.0
    special[2, 5], special[3, 40], special[4, 63] = torch.nan, torch.inf, -torch.inf
    patterns = bit_patterns(40, 64, seed=2)
    return {
        "ties": steps,
        "special": special,
        "ragged": torch.cat([normal[:, :45], patterns[:9, :45]]),
        "short": normal[:, :3],
        "patterns": patterns,
        "finite patterns": patterns.nan_to_num(posinf=1.0, neginf=-1.0),
        "smallest": normal * 2.0**-130,
        "subnormal scales": normal * 2.0**-104,
        "largest": (1 + normal.abs() % 1) * 2.0**127,
    }


INPUTS = hard_inputs()


def same(a, b):
    """Equal bits, the sign of zero included; NaN equals NaN."""
    a, b = a.double(), b.double()
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def differences(x, spec, divisor=None, amax=None):
    """What of the chunked path differs from the reference on x."""
    seed = (7, 2**63 + 5) if spec.rounding == "stochastic" else None
    want = reference.fake_quantize(x, spec, amax=amax, seed=seed)
    if spec.macro_block or spec.residual:  # no codes
        out = torch.empty_like(x)
        chunked.fake_quantize_rows(x, spec, reference.divisor_of(x, spec, -1, amax), seed, out)
        return [] if same(out, want) else ["fake_quantize"]
    q = reference.quantize(x, spec, amax=amax, seed=seed)
    divisor = q.per_tensor_scale if divisor is None else divisor
    out, codes, scales, back = (torch.empty_like(t) for t in (x, q.codes, q.scale_codes, x))
    chunked.fake_quantize_rows(x, spec, divisor, seed, out)
    chunked.quantize_rows(x, spec, divisor, seed, codes, scales)
    chunked.dequantize_rows(q.codes, q.scale_codes, divisor, spec, back)
    found = {
        "fake_quantize": same(out, want),
        "codes": torch.equal(codes, q.codes),
        "scales": torch.equal(scales, q.scale_codes),
        "dequantize": same(back, want) and same(reference.dequantize(q, x.dtype), want),
    }
    return [name for name, equal in found.items() if not equal]


@pytest.mark.parametrize("spec", [*SPECS, *AROUND], ids=str)
def test_bits_are_those_of_the_reference(spec, monkeypatch):
    # Pieces of a few rows or of parts of rows, with a last one of another size; the real size would hold each input.
    monkeypatch.setattr(chunked, "_PIECE", 160)
    monkeypatch.setattr(chunked, "_PIECE_OF_REFERENCE", 384)
    wrong = {}
    common = spec.plain and spec.rounding == "nearest" and spec.scale_mode == spec.block_format.scale_modes[0]
    for name, x in INPUTS.items():
        for dtype in DTYPES if common else DTYPES[:2]:
            if found := differences(x.to(dtype), spec):
                wrong[name, dtype] = found
    assert not wrong


@pytest.mark.parametrize("mode", FORMATS["nvfp4"].scale_modes)
@pytest.mark.parametrize("length", [64, 45])
def test_a_divisor_for_each_row(mode, length, monkeypatch):
    monkeypatch.setattr(chunked, "_PIECE", 160)
    monkeypatch.setattr(chunked, "_PIECE_OF_REFERENCE", 32)
    x, spec = INPUTS["special"][:, :length], QuantSpec("nvfp4", mode)
    amax = torch.stack([finite_amax(row) for row in x]).unsqueeze(-1)
    amax[5] = 0.25  # below the maximum of its row: blocks whose scale saturates
    amax[6] = -1.0  # an error that shows as NaN
    divisor = per_tensor_divisor(amax, spec).flatten()
    assert not differences(x.contiguous(), spec, divisor, amax)


@pytest.mark.parametrize(("fmt", "mode"), [("mxfp4", "floor"), ("nvfp4", "two_level"), ("mxint8", "even")])
def test_pieces_of_the_real_size(fmt, mode):
    """More than one of them, cut by rows (whole and ragged) and inside one long row."""
    spec = QuantSpec(fmt, mode)
    for shape in ((3, 100_000), (1_000, 331), (1, chunked._PIECE + 33)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
        assert not differences(x, spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 45])
def test_the_output_may_be_the_input(dtype, length):
    x = INPUTS["special"][:, :length].to(dtype).contiguous()
    for spec in (QuantSpec("mxfp4"), QuantSpec("mxint8"), QuantSpec("mxfp8_e4m3", "mse")):
        own = x.clone()
        chunked.fake_quantize_rows(own, spec, None, None, own)
        assert same(own, reference.fake_quantize(x, spec))


def test_tensor_amax_is_over_the_finite_values(monkeypatch):
    monkeypatch.setattr(chunked, "_PIECE", 100)
    for x in INPUTS.values():
        for dtype in DTYPES:
            assert chunked.tensor_amax(x.to(dtype).contiguous()) == finite_amax(x.to(dtype))
            for spec in AROUND[:2]:
                rotated = reference.amax_of(x.to(dtype), spec)
                assert chunked.rotated_amax(x.to(dtype).contiguous(), spec) == rotated
    assert chunked.tensor_amax(torch.zeros(0, 5)) == chunked.rotated_amax(torch.zeros(0, 5), AROUND[0]) == 0


@pytest.mark.parametrize(
    "element",
    [
        ElementFormat("e1m2", 4, 1, 2, emin=0, max=1.75),
        ElementFormat("int4", 4, 0, 2, emin=0, max=1.75),
        ElementFormat("e3m4", 8, 3, 4, emin=-2, max=31.0),
        ElementFormat("far", 8, 7, 0, emin=-10, max=2.0**110),
    ],
    ids=lambda e: e.name,
)
def test_formats_of_the_user(element, monkeypatch):
    """Also one whose grid leaves no room for the addition that rounds."""
    block = BlockFormat(f"own_{element.name}", element, 8, "e8m0", False, formats.MX_SCALE_MODES)
    monkeypatch.setitem(formats._TABLE, block.name, block)
    for mode in formats.MX_SCALE_MODES:
        for name in ("ties", "special", "ragged", "subnormal scales"):
            assert not differences(INPUTS[name], QuantSpec(block.name, mode)), (mode, name)


class Dtypes(TorchDispatchMode):
    """Notes every dtype that an operator is given or gives."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = arg_tree_leaves(args, kwargs or {}, result)
        self.seen |= {leaf.dtype if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves}
        return result

    def lacking(self):
        """What MPS and others do not have: fp64, and all of float8."""
        dtypes = {leaf for leaf in self.seen if isinstance(leaf, torch.dtype)}
        return {dtype for dtype in dtypes if dtype == torch.float64 or "float8" in str(dtype)}


def test_the_mode_sees_dtypes():
    with Dtypes() as mode:
        torch.ones(4).to(torch.float8_e5m2)
        torch.ones(4).sum(dtype=torch.float64)
    assert mode.lacking() == {torch.float8_e5m2, torch.float64}


@pytest.mark.parametrize("spec", [*SPECS, *AROUND], ids=str)
def test_nothing_is_asked_of_the_cpu_or_of_dtypes_a_device_may_lack(spec):
    """On the meta device a copy to the CPU, a number read, or a tensor of another device in the arithmetic raises."""
    seed = (1, 2) if spec.rounding == "stochastic" else None
    x = torch.empty(3, 45, device="meta")
    with Dtypes() as mode:
        peak = chunked.rotated_amax(x, spec) if spec.rotation else chunked.tensor_amax(x)
        divisor = per_tensor_divisor(peak, spec) if spec.block_format.per_tensor_scale else None
        chunked.fake_quantize_rows(x, spec, divisor, seed, torch.empty_like(x))
        if spec.macro_block or spec.residual:
            assert not mode.lacking()
            return
        blocks, bits = -(-45 // spec.block_format.block_size), spec.block_format.element.bits
        scales = torch.empty(3, blocks, device="meta", dtype=torch.uint8)
        codes = torch.empty(3, blocks * spec.block_format.block_size * bits // 8, device="meta", dtype=torch.uint8)
        chunked.quantize_rows(x, spec, divisor, seed, codes, scales)
        chunked.dequantize_rows(codes, scales, divisor, spec, torch.empty_like(x))
    assert torch.uint8 in mode.seen
    assert not mode.lacking()


def peak_bytes(function):
    """The most memory that torch held at a time for what `function` allocated."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_measure_of_memory():
    assert 8000 <= peak_bytes(lambda: torch.ones(1000).add(1).add(1)) <= 8200


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("mxfp4"), QuantSpec("nvfp4"), QuantSpec("mxint8", None, "half_away"), *AROUND[:2]],
    ids=str,
)
def test_nothing_as_large_as_the_tensor_is_allocated(spec):
    x = torch.ones(1024, 4096, dtype=torch.bfloat16)
    out, divisor = torch.empty_like(x), torch.ones(()) if spec.block_format.per_tensor_scale else None
    assert peak_bytes(lambda: chunked.fake_quantize_rows(x, spec, divisor, None, out)) <= 2.5e6
    assert peak_bytes(lambda: chunked.tensor_amax(x)) <= 1e6
    assert not spec.rotation or peak_bytes(lambda: chunked.rotated_amax(x, spec)) <= 2e6
