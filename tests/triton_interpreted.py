"""The Triton kernels under Triton's interpreter, on a CPU: `TRITON_INTERPRET=1 python tests/triton_interpreted.py`.

Triton decides when a kernel is defined whether it will be interpreted, so this runs in a process of its own; the tests
read what it prints: a JSON object, name of the check → what was wrong ("" if nothing). A program costs milliseconds
whatever its size, so tiles are made as large as the data, except where the cutting into programs is what is tested.

What the interpreter does otherwise than a GPU is put right here: it loses bf16 numbers below 2**-126 in conversions,
runs a reduction it does not know element by element, hides NaN in maxima it does know only with a warning, and warns of
overflow. That of Triton 3.6 also rounds a fused multiply-add twice, lets NaN through a minimum with a number, and
needs a numpy below 2.4.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from qnoise import NoiseScheduler, ops, patch_model, reference, unpatch_model
from qnoise.formats import E4M3, FORMATS, ROUNDINGS, QuantSpec
from qnoise.kernels.gpu import amax, fake_quantize, log_probs, pack, rounding, scales, unpack
from qnoise.nn import effective
from qnoise.packing import decode
from qnoise.packing import unpack as unpack_codes
from qnoise.philox import uniform
from qnoise.rounding import round_magnitude
from qnoise.schedules import Constant

CHECKS: dict[str, Callable[[], None]] = {}
ZERO_DRAW = (0, 14883995)  # (seed, offset) whose first uniform number is 0
ALL_OF_IT = 1 << 20  # the most that Triton allows


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def correct_the_interpreter() -> None:
    cast, reduce = interpreter.InterpreterBuilder.cast_impl, interpreter.ReduceOps.apply_impl
    types = {tl.bfloat16: torch.bfloat16, tl.float32: torch.float32}

    def cast_impl(self, src, to):
        if {src.dtype.scalar, to.scalar} != {tl.bfloat16, tl.float32}:
            return cast(self, src, to)
        wide = torch.from_numpy(np.atleast_1d(src.data).view(np.int16 if to.scalar == tl.float32 else np.int32))
        result = wide.view(types[src.dtype.scalar]).to(types[to.scalar])
        data = result.view(torch.int16).numpy().view(np.uint16) if to.scalar == tl.bfloat16 else result.numpy()
        return interpreter.TensorHandle(data.reshape(src.data.shape), to.scalar)

    def apply_impl(self, input):
        if self.combine_fn is rounding.larger:
            return self.min_max(input[0], val_reduce_op=np.max)  # propagates NaN
        return reduce(self, input)

    builder = interpreter.InterpreterBuilder
    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_fp_to_fp = lambda self, src, to, mode: cast_impl(self, src, to)
    interpreter.ReduceOps.apply_impl = apply_impl
    builder.create_fma = lambda self, x, y, z: interpreter.TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        setattr(builder, name, lambda self, a, b, function=function: self.binary_op(a, b, function))
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z, fp32, rounded once: the fp64 sum of the exact product is rounded to odd, so that the second rounding
    sees on which side of a tie it is."""
    product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = np.atleast_1d(product + addend)
    rest = total - product
    lost = (product - (total - rest)) + (addend - rest)
    bits = total.view(np.int64)
    even = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
    bits += np.where(even, np.where((lost > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32).reshape(np.broadcast_shapes(x.shape, y.shape, z.shape))


def tiles_of(elements: int) -> None:
    for module in (fake_quantize, pack, unpack):
        module._TILE = elements


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def equal(got: Tensor, want: Tensor, what: object) -> None:
    """Same bits, the sign of zero too; NaN equals NaN."""
    wrong = bits(got) != bits(want)
    if want.is_floating_point():
        wrong &= ~(got.isnan() & want.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first {got[at]} for {want[at]}")


def all_kernels_equal(x: Tensor, spec: QuantSpec, amax: Tensor | None, seed: tuple[int, int] | None = None) -> None:
    """Fake-quantize, pack and unpack of (R, K) against the reference."""
    what = (str(spec), x.dtype, tuple(x.shape))
    want, packed = (f(x, spec, amax=amax, seed=seed) for f in (reference.fake_quantize, reference.quantize))
    gs = packed.per_tensor_scale
    divisor = None if gs is None else gs.reshape(() if gs.ndim == 0 else -1).contiguous()
    out = guarded(x)
    fake_quantize.fake_quantize_rows(x, spec, divisor, seed, out)
    equal(out, want, ("fake_quantize", *what))
    want_scales = packed.scales.view(torch.uint8)
    codes, scale_bytes = guarded(packed.codes), guarded(want_scales)
    pack.quantize_rows(x, spec, divisor, seed, codes, scale_bytes)
    equal(scale_bytes, want_scales, ("scales", *what))
    equal(codes, packed.codes, ("codes", *what))
    out_again = guarded(x)
    unpack.dequantize_rows(packed.codes, want_scales, divisor, spec, out_again)
    equal(out_again, want, ("dequantize", *what))
    for written in (out, codes, scale_bytes, out_again):
        behind = written.as_strided((64,), (1,), written.numel())
        assert (behind == 77).all(), f"{what}: written behind the end"


def guarded(like: Tensor) -> Tensor:
    """A contiguous tensor of this shape and dtype full of 77s, with more of them behind it."""
    return torch.full((like.numel() + 64,), 77, dtype=like.dtype)[: like.numel()].view(like.shape)


def specs(*roundings: str) -> Iterator[QuantSpec]:
    for fmt, block in FORMATS.items():
        for mode in block.scale_modes:
            for each in roundings:
                yield QuantSpec(fmt, mode, each)


def golden_inputs() -> Tensor:
    """All inputs of the golden vectors, each family padded with zeros to blocks: (1, K)."""
    compressed = (Path(__file__).parent / "golden" / "golden.npz.xz").read_bytes()
    with np.load(io.BytesIO(lzma.decompress(compressed))) as file:
        families = [torch.from_numpy(file[name]) for name in file.files if name.startswith("x/")]
    rows = [torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).flatten() for x in families]
    return torch.cat(rows)[None]


def hard_numbers(seed: int) -> Tensor:
    """(1, K) blocks of 32: random bit patterns; every magnitude of fp32; ties; maxima where scale modes change."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, (256, 32), dtype=np.uint32).view(np.float32)
    scale = 2.0 ** rng.integers(-148, 127, (512, 1))
    normal = (rng.standard_normal((512, 32)) * scale).astype(np.float32)
    ties = (rng.integers(-256, 257, (512, 32)) / 32 * 2.0 ** rng.integers(-146, 120, (512, 1))).astype(np.float32)
    maxima = np.float32([1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.984375, 1.9921875, 147 / 128, 217 / 128])
    maxima = np.concatenate([np.nextafter(maxima, 0), maxima, np.nextafter(maxima, 9)])
    edges = rng.uniform(-1, 1, (len(maxima) * 24, 32)).astype(np.float32)
    edges[:, 5] = np.tile(maxima, 24)
    edges *= np.repeat(np.float32(2.0) ** np.r_[-130:-122, -4:4, 119:127].astype(np.float32), len(maxima))[:, None]
    special = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4028235e38])
    mixed = normal[:64].copy()
    mixed[rng.random(mixed.shape) < 0.03] = rng.choice(special)
    zeros = np.float32([[0, -0.0] * 16])
    return torch.from_numpy(np.concatenate([patterns, normal, ties, edges, mixed, zeros])).reshape(1, -1)


@check
def golden_vectors() -> None:
    tiles_of(ALL_OF_IT)
    x = golden_inputs()
    for spec in specs("nearest"):
        all_kernels_equal(x, spec, None if not spec.per_tensor_scale else torch.tensor(3.0))


@check
def hard_numbers_in_fp32() -> None:
    tiles_of(ALL_OF_IT)
    x = hard_numbers(1)
    for spec in specs("nearest"):
        all_kernels_equal(x, spec, None)


@check
def hard_numbers_in_16_bits() -> None:
    tiles_of(ALL_OF_IT)
    x = hard_numbers(2)
    every_bf16 = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)[None]
    for spec in specs("nearest"):
        if spec.scale_mode != "mse":
            all_kernels_equal(torch.cat([every_bf16, x.bfloat16()], 1), spec, None)
            all_kernels_equal(x.clamp(-1e5, 1e5).half(), spec, None)


@check
def other_roundings() -> None:
    tiles_of(ALL_OF_IT)
    x = hard_numbers(3)
    for i, spec in enumerate(specs("half_away", "stochastic")):
        if spec.scale_mode in ("floor", "rceil", "two_level", "single_level", "four_over_six_mae"):
            # Counters that pass 2**64, and one with its bit 31 set.
            offset = 2**64 - 1000 if i % 4 == 1 else 3 * 2**31
            seed = (i * 0x9E3779B97F4A7C15 - 2**63, offset) if spec.rounding == "stochastic" else None
            all_kernels_equal(x if i % 8 < 4 else x.bfloat16(), spec, None, seed)


@check
def divisors_of_every_size() -> None:
    """NVFP4 with the scale fixed for each row, from the smallest to the largest amax, fitting the row or not."""
    tiles_of(ALL_OF_IT)
    rng = np.random.default_rng(4)
    amax_of_row = torch.tensor([3e38, 1.0, 147 / 128, 2e-23, 3e-24, 1e-35, 1e-38, 2e-43, 0.0, 1e-5, 1e30, torch.inf])
    x = torch.from_numpy(rng.standard_normal((12, 1600)).astype(np.float32))
    x *= torch.exp2(torch.from_numpy(rng.integers(-14, 1, (12, 100)))).repeat_interleave(16, 1)
    x *= amax_of_row[:, None].clamp(max=1e38) / 3
    x[9] *= 1e30
    x[10] *= 1e-30
    for mode in ("two_level", "four_over_six", "mse"):
        rows = slice(None) if mode == "two_level" else slice(None, None, 3)
        for each in ROUNDINGS if mode == "two_level" else ["nearest"]:
            seed = (5, 6) if each == "stochastic" else None
            all_kernels_equal(x[rows].contiguous(), QuantSpec("nvfp4", mode, each), amax_of_row[rows, None], seed)
    all_kernels_equal(x[:1], QuantSpec("nvfp4", "mse"), torch.tensor(torch.inf))
    # A peak of (6 T + 3) * 2**-149 over 6 is halfway from T to T + 1, and T = 17 * 2**j is a tie of E4M3.
    peaks = 6 * 17 * 2 ** torch.arange(8, 16) + 3
    all_kernels_equal(peaks.float().mul(2.0**-149)[:, None], QuantSpec("nvfp4"), torch.tensor(1e-36))
    # The second quotient is 2 - 2**-23: a 16-bit input does not mean a quotient of few bits.
    x = torch.tensor([[5.96875, 255 / 128]]).bfloat16()
    all_kernels_equal(x, QuantSpec("nvfp4"), torch.tensor(float.fromhex("0x1.7e8002p+2")))


@check
def rotated() -> None:
    """Every format, with sums that overflow, NaN and Inf; ragged rows, several programs, other roundings and modes."""
    tiles_of(ALL_OF_IT)
    x = hard_numbers(9).reshape(-1, 32)[::5].reshape(1, -1)
    for i, fmt in enumerate(FORMATS):
        all_kernels_equal(x if i % 2 else x.bfloat16(), QuantSpec(fmt, rotation="hadamard"), None)
    for fmt, mode, each, tile in (
        ("mxfp4", "mse", "half_away", 256),
        ("nvfp4", "four_over_six_absmax", "stochastic", 512),
        ("nvfp4", "two_level", "nearest", ALL_OF_IT),
    ):
        tiles_of(tile)
        part = x[:, 9000 : 9000 + 2 * 665].reshape(2, 665).contiguous()
        finite = part.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
        given = finite if tile == 512 else None
        all_kernels_equal(part, QuantSpec(fmt, mode, each, rotation="hadamard"), given, (7, 9))


@check
def relative_noise() -> None:
    """Bits of the noisy weight that `qnoise.nn` makes, quantized."""
    generator = torch.Generator().manual_seed(10)
    numbers = hard_numbers(10)[0, ::6][:11000].contiguous()
    for dtype, z_dtype, fmt in (
        (torch.float32, torch.float32, "mxfp4"),
        (torch.bfloat16, torch.float32, "nvfp4"),
        (torch.float16, torch.float16, "mxfp6_e3m2"),
        (torch.bfloat16, torch.bfloat16, "mxint8"),
    ):
        for rotation in (None, "hadamard"):
            tiles_of(4096 if rotation else ALL_OF_IT)
            x = numbers.reshape(2, 5500).to(dtype)
            z = torch.randn(x.shape, generator=generator).to(z_dtype)
            noisy = (x.to(torch.float32) * (1.0 + 0.0123 * z.to(torch.float32))).to(dtype)
            spec = QuantSpec(fmt, rotation=rotation)
            want = reference.quantize(noisy, spec)
            out = guarded(x)
            fake_quantize.fake_quantize_rows(x, spec, want.per_tensor_scale, None, out, (z, 0.0123))
            equal(out, reference.fake_quantize(noisy, spec), (str(spec), dtype))
            found = amax.rotated_amax(x, spec, (z, 0.0123)) if rotation else amax.tensor_amax(x, (z, 0.0123))
            equal(found, reference.amax_of(noisy, spec, -1), ("amax", str(spec), dtype))
    for wrong in ((x.double(), z.double()), (x, z[:, :32]), (x, z.T.contiguous().T), (x, z.to(torch.int32))):
        try:
            fake_quantize.fake_quantize_rows(wrong[0], spec, None, None, out, (wrong[1], 0.1))
        except (TypeError, ValueError):
            continue
        raise AssertionError(f"noise {wrong[1].dtype} {wrong[1].shape} on {wrong[0].dtype} {x.shape} was taken")


@check
def noise_of_a_linear() -> None:
    """With the fused kernel a patched linear has the effective weight it has without, shared scales included."""
    tiles_of(ALL_OF_IT)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(80, 48, bias=False) for name in ("q_proj", "k_proj")}).bfloat16()
    model.requires_grad_(False)
    calls, noisy = [], effective.fake_quantize_noisy
    for fmt in (QuantSpec("nvfp4"), QuantSpec("nvfp4", rotation="hadamard"), QuantSpec("mxfp4")):
        patch_model(model, fmt, noise="linear", storage="dynamic")
        NoiseScheduler(model, Constant(0.02), total_steps=10).step()
        assert len(model["q_proj"]._qnoise.scale_group) == (2 if fmt.per_tensor_scale else 0)
        quiet = reference.fake_quantize(model["q_proj"].weight, fmt)
        want = [linear.effective_weight() for linear in model.values()]
        assert not torch.equal(want[0], quiet)
        effective.fuses_noise = lambda weight, spec: True
        effective.fake_quantize_noisy = lambda *a: calls.append(a) or noisy(*a)
        try:
            got = [linear.effective_weight() for linear in model.values()]
        finally:
            effective.fuses_noise, effective.fake_quantize_noisy = ops.fuses_noise, noisy
        for a, b in zip(got, want, strict=True):
            equal(a, b, ("effective weight", str(fmt)))
        unpatch_model(model)
    assert len(calls) == 6


@check
def a_draw_of_zero() -> None:
    """It rounds up whatever is not 0, so of the smallest quotients too it matters which are rounded to 0."""
    tiles_of(ALL_OF_IT)
    x = torch.tensor([[2.0**-130, 1.0, 0.0]])
    for fmt in ("mxfp4", "nvfp4", "mxint8"):
        spec = QuantSpec(fmt, rounding="stochastic")
        assert uniform(torch.zeros((), dtype=torch.int64), *ZERO_DRAW) == 0
        assert reference.fake_quantize(x, spec, seed=ZERO_DRAW)[0, 0] > 0
        all_kernels_equal(x, spec, None, ZERO_DRAW)
    # 0.45 * 2**-149 is 0; rounded in two steps it would not be.
    all_kernels_equal(
        torch.tensor([[0.675 * 2.0**-49, 9 * 2.0**100]]), QuantSpec("nvfp4", rounding="stochastic"), None, ZERO_DRAW
    )


@check
def cutting_into_programs() -> None:
    """Several programs a row, ragged rows, one divisor a row, every dtype."""
    tiles_of(256)
    x = hard_numbers(5)[0, 8192 : 8192 + 5 * 1024].reshape(5, 1024)
    for fmt in FORMATS:
        for columns, dtype in ((1024, torch.bfloat16), (543, torch.float32), (7, torch.float64), (33, torch.float16)):
            for each in ("nearest", "stochastic") if fmt in ("mxfp6_e3m2", "nvfp4") else ["nearest"]:
                seed = (7, 2**63) if each == "stochastic" else None
                spec = QuantSpec(fmt, rounding=each)
                part = x[: 1 + (columns > 100), :columns].to(dtype).contiguous()
                finite = part.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True).float()
                all_kernels_equal(part, spec, finite if spec.per_tensor_scale and columns != 33 else None, seed)


@check
def in_place() -> None:
    tiles_of(1024)
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    want = reference.fake_quantize(x, QuantSpec())
    fake_quantize.fake_quantize_rows(x, QuantSpec(), None, None, x)
    equal(x, want, "out=x")
    empty = torch.empty(0, 32)
    fake_quantize.fake_quantize_rows(empty, QuantSpec(), None, None, empty)


@check
def codes_that_are_never_written() -> None:
    """They give NaN, as in the reference; so do E4M3's NaN and negative scales what they mean."""
    tiles_of(ALL_OF_IT)
    for fmt in ("mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxfp6_e3m2", "mxfp4", "nvfp4"):
        spec = QuantSpec(fmt)
        size = spec.block_format.block_size * spec.block_format.element.bits // 8
        every = torch.arange(256, dtype=torch.uint8)
        codes = every.repeat(256 * size // 256).reshape(1, -1)
        divisor = torch.tensor(0.7) if fmt == "nvfp4" else None
        out = torch.empty(1, 256 * spec.block_format.block_size)
        unpack.dequantize_rows(codes, every[None], divisor, spec, out)
        equal(out, decoded(codes, every[None], divisor, spec), fmt)


def decoded(codes: Tensor, scale_bytes: Tensor, divisor: Tensor | None, spec: QuantSpec) -> Tensor:
    """By the tables of `packing` and torch's own float8 conversions."""
    block = spec.block_format
    values = decode(unpack_codes(codes, block.element.bits), block.element).unflatten(-1, (-1, block.block_size))
    dtype = torch.float8_e8m0fnu if divisor is None else torch.float8_e4m3fn
    scale = scale_bytes.view(dtype).float()
    return (values * (scale if divisor is None else scale / divisor)[..., None]).flatten(-2)


@check
def reciprocals_of_all_mantissas() -> None:
    """With the scaling by powers of two this is every divisor there is."""

    @triton.jit
    def kernel(x_pointer, y_pointer, SIZE: tl.constexpr):
        offset = tl.arange(0, SIZE)
        _, _, inverse = rounding.reciprocal(tl.load(x_pointer + offset))
        tl.store(y_pointer + offset, inverse)

    x = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    got = torch.empty_like(x)
    for part, result in zip(x.chunk(8), got.chunk(8), strict=True):
        kernel[(1,)](part, result, SIZE=2**20)
    equal(got, torch.ones_like(x) / x, "1 / x")


@check
def rounding_next_to_ties() -> None:
    """Magnitudes in every binade of every grid: next to each tie, to each value and to the ends of the binade."""

    @triton.jit
    def kernel(
        u_pointer, y_pointer, SIZE: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, EMAX: tl.constexpr
    ):
        offset = tl.arange(0, SIZE)
        y = rounding.round_nearest(tl.load(u_pointer + offset), MANTISSA, EMIN, EMAX)
        tl.store(y_pointer + offset, y)

    near = np.r_[-40:41, 2**15 : 2**23 : 2**15 + 1]
    mantissas = ((np.arange(32)[:, None] << 18) + near).reshape(-1) % 2**23
    for element in {block.element for block in FORMATS.values()} | {E4M3}:
        binades = np.r_[max(element.emin - 8, -126) : element.emax + 1]
        bit_patterns = ((binades[:, None] + 127) << 23) + mantissas
        u = torch.from_numpy(np.r_[0, 1, 2**22, bit_patterns.reshape(-1)].astype(np.int32)).view(torch.float32)
        u = torch.nn.functional.pad(u[u <= element.max], (0, 2**20))[: 2**20]
        got = torch.empty_like(u)
        arguments = {"MANTISSA": element.mantissa_bits, "EMIN": element.emin, "EMAX": element.emax}
        kernel[(1,)](u, got, SIZE=2**20, **arguments)
        equal(got, round_magnitude(u, element), element)


@check
def quotients_next_to_ties() -> None:
    """Rounding to e2m1 sees the corrected quotient where it would see the exact one."""

    @triton.jit
    def kernel(a_pointer, b_pointer, y_pointer, SIZE: tl.constexpr):
        offset = tl.arange(0, SIZE)
        b = tl.load(b_pointer + offset)
        q = scales._clipped_quotient(tl.load(a_pointer + offset)[:, None], b, 1, 6.0)
        tl.store(y_pointer + offset, tl.reshape(rounding.round_nearest(q, 1, 0, 2), [SIZE]))

    rng = np.random.default_rng(6)
    near = np.concatenate([np.arange(2048), (1 << 22) + np.arange(-1024, 1024), (1 << 23) - 1 - np.arange(2048)])
    b = np.concatenate([near, rng.integers(0, 1 << 23, (1 << 14) - len(near))]).astype(np.int32) + (127 << 23)
    b = b.view(np.float32)
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    a = (b[:, None] * ties).view(np.int32)[..., None] + np.arange(-4, 4, dtype=np.int32)
    a = torch.from_numpy(np.pad(a.view(np.float32), [(0, 0), (0, 1), (0, 0)], constant_values=1.0).reshape(-1))
    b = torch.from_numpy(np.repeat(b, 64))
    got = torch.empty_like(a)
    kernel[(1,)](a, b, got, SIZE=a.numel())
    equal(got, round_magnitude(a / b, FORMATS["nvfp4"].element), "a / b on the grid")


@check
def largest_finite_magnitudes() -> None:
    x = hard_numbers(7).reshape(4, -1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else x.to(dtype)
        y[2] = torch.nan
        finite = torch.where(y.isfinite(), y, 0).abs().float()
        equal(amax.tensor_amax(y), finite.amax(), ("tensor_amax", dtype))
        equal(amax.amax_rows(y), finite.amax(1), ("amax_rows", dtype))
    amax._TILE, amax._PROGRAMS = 256, 3  # several tiles a program
    for at in range(100, 5003, 256):
        odd = torch.ones(5003)
        odd[at] = -5
        equal(amax.tensor_amax(odd), torch.tensor(5.0), ("several tiles", at))
    equal(amax.tensor_amax(torch.empty(0)), torch.zeros(()), "empty")


@check
def log_probabilities() -> None:
    log_probs._TILE = 512
    generator = torch.Generator().manual_seed(8)
    cases = (torch.float32, 1.0, 0.0), (torch.bfloat16, 0.7, 50.0), (torch.float16, 2.0, 0.0)
    for dtype, temperature, shift in cases:
        logits = (4 * torch.randn(4, 1500, generator=generator) + shift).to(dtype)
        logits[0, 600:] = -torch.inf  # tiles without a single token
        logits[1, :700] = -torch.inf
        logits[1, 3] = 90
        ids = torch.tensor([5, 1499, 77, 0])
        grads = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.3, 1.0, -1.0, 2.0]])
        for use in ((True, True), (True, False), (False, True)):
            leaf = logits.double().requires_grad_()
            log_p = torch.log_softmax(leaf / temperature, -1)
            want = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
            given = [g if u else None for g, u in zip(grads, use, strict=True)]
            total = sum((w * g).sum() for w, g in zip(want, given, strict=True) if g is not None)
            (want_grad,) = torch.autograd.grad(total, leaf)
            got_log_prob, got_entropy, *rest = log_probs.log_prob_forward(logits, ids, temperature)
            # Half an fp32 ulp of the result, and 2e-7 for the logarithm of the sum.
            for got, exact in ((got_log_prob, want[0]), (got_entropy, want[1])):
                torch.testing.assert_close(got.double(), exact.detach(), rtol=2.0**-24, atol=4e-7)
            stats = (got_entropy, *rest)
            got_grad = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
            log_probs.log_prob_backward(logits, ids, temperature, stats, given, got_grad)
            assert got_grad.dtype == dtype
            rtol = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
            torch.testing.assert_close(got_grad.double(), want_grad, rtol=rtol, atol=2e-7)
    # Far down, where a difference of two logits is rounded by more than the result may be off.
    deep = 4 * torch.randn(48, 64, generator=generator)
    deep[:, 0] += 40
    for temperature in (1.0, 0.75):
        got = log_probs.log_prob_forward(deep, torch.full((48,), 5), temperature)[0]
        exact = torch.log_softmax(deep.double() / temperature, -1)[:, 5]
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-24, atol=2e-7)
    log_prob = log_probs.log_prob_forward(logits, torch.tensor([700, 0, 1, 2]), 1.0)[0]
    assert log_prob[0] == -torch.inf
    for bad in (torch.nan, torch.inf):
        logits[2, 1000] = bad
        assert log_probs.log_prob_forward(logits, ids, 1.0)[0].isnan().tolist() == [False, False, True, False]
    assert log_probs.log_prob_forward(torch.full((1, 9), -torch.inf), ids[:1], 1.0)[0].isnan().all()
    for wrong, error in ((torch.zeros(1, 8, dtype=torch.float64), TypeError), (torch.zeros(8, 2).T, ValueError)):
        try:
            log_probs.log_prob_forward(wrong, ids, 1.0)
        except error:
            continue
        raise AssertionError(f"{wrong.dtype} logits with strides {wrong.stride()} were taken")


def main() -> None:
    correct_the_interpreter()
    found = {}
    for name in sys.argv[1:] or CHECKS:
        try:
            CHECKS[name]()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
