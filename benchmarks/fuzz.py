"""Bit patterns against the reference: `python -m benchmarks.fuzz --values 1e8`.

Every format, scale mode, rounding and dtype in turn, and specs with a rotation, macro-blocks and a second pass over the
residual, on inputs that a normal distribution never gives: random bits
(NaN, Inf and subnormals among them), blocks within a few binades of a random exponent up to both ends of fp32, and
numbers on, just below and just above ties. Shapes are ragged, per-tensor divisors come from the tensor, one a row, or
from an arbitrary amax. Compared are the values of `fake_quantize_rows`, the codes and scale bytes of `quantize_rows`,
and the values of `dequantize_rows`: equal bits, the sign of zero included, or NaN in both. Macro-blocks and residuals
have values only.

Each round is a function of (seed, round number): `--first N --rounds 1` repeats the one that is reported. Writes
benchmarks/results/fuzz.json; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.files import RESULTS, write_json
from qnoise import reference
from qnoise.formats import FORMATS, ROUNDINGS, QuantSpec
from qnoise.kernels import native

DTYPES = (torch.float32, torch.bfloat16)
PLAIN = [
    QuantSpec(fmt, mode, rounding)
    for fmt, block in FORMATS.items()
    for mode in block.scale_modes
    for rounding in ROUNDINGS
]
AROUND = [
    *(QuantSpec(fmt, rotation="hadamard") for fmt in FORMATS),
    *(
        QuantSpec(fmt, macro_block=128)
        for fmt, block in FORMATS.items()
        if not block.per_tensor_scale and block.block_size <= 128
    ),
    *(QuantSpec(fmt, residual=0.5) for fmt in FORMATS),
    QuantSpec("nvfp4", "mse", "half_away", rotation="hadamard"),
    QuantSpec("nvfp4", "four_over_six", "stochastic", None, 0.3, "hadamard"),
    QuantSpec("nvfp4", "single_level", "stochastic", rotation="hadamard"),
    QuantSpec("mxfp4", "mse", macro_block=128),
    QuantSpec("mxfp4", "mse", "stochastic", 128, 1.0, "hadamard"),
    QuantSpec("mxfp4", "rceil", "half_away", 128, 0.5, "hadamard"),
    QuantSpec("mxint8", "even", "stochastic", 128, 0.7, "hadamard"),
    QuantSpec("mxfp6_e2m3", "ceil", "stochastic", rotation="hadamard"),
]
"""Specs that do something around the quantizer; each field alone with every format, then together."""
SPECS = PLAIN + AROUND
INPUTS = ("bits", "binades", "ties", "normal")
ELEMENTS = 1 << 15
"""Of one tensor, about."""


def inputs(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """fp32 (rows, columns) of one of the kinds of `INPUTS`."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape or (rows, columns), generator=generator, dtype=torch.int64)

    if kind == "normal":
        return torch.randn(rows, columns, generator=generator) * 2.0 ** draw(-140, 120, rows, 1)
    bits = draw(0, 2**32)
    if kind != "bits":
        exponent = (draw(-6, 256, rows, 1) + draw(-12, 1)).clamp(0, 254)
        bits = (bits & 0x807FFFFF) | (exponent << 23)
    if kind == "ties":
        # Few mantissa bits, so that numbers lie on the grids and half-way between, then one step to either side.
        bits = (bits & 0xFFF00000) + draw(-1, 2)
        bits = torch.where(draw(0, 40) == 0, bits & 0x80000000, bits).clamp(0, 2**32 - 1)
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def case(
    seed: int, number: int, elements: int = ELEMENTS
) -> tuple[Tensor, QuantSpec, Tensor | None, tuple[int, int], str]:
    """The input, spec, amax and (seed, offset) of one round, and what to call it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    spec = SPECS[number % len(SPECS)]
    lap = number // len(SPECS)
    dtype = DTYPES[lap % 2]
    kind = INPUTS[(lap // 2) % len(INPUTS)]
    columns = [256, 32, 7, 1000, 48, elements][int(torch.randint(6, (), generator=generator))]
    rows = max(elements // columns, 1)
    x = inputs(kind, rows, columns, generator).to(dtype)
    amax = None
    if spec.per_tensor_scale:
        form = int(torch.randint(4, (), generator=generator))
        own = torch.where(x.isfinite(), x, 0).float().abs()
        if form == 1:
            amax = own.amax(-1, keepdim=True)
        elif form == 2:
            amax = inputs("bits", rows, 1, generator).abs()
        elif form == 3:
            amax = own.amax() * 2.0 ** int(torch.randint(-12, 5, (), generator=generator))
    pair = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).tolist()
    return x, spec, amax, (pair[0], pair[1]), f"{spec}, {str(dtype).removeprefix('torch.')}, {kind}, {rows}x{columns}"


def different(got: Tensor, want: Tensor) -> Tensor:
    """Where bits differ, NaN in both excepted."""
    if not got.is_floating_point():
        return got != want
    word = torch.int32 if got.dtype == torch.float32 else torch.int16
    return (got.view(word) != want.view(word)) & ~(got.isnan() & want.isnan())


def mismatches(
    x: Tensor, spec: QuantSpec, amax: Tensor | None, seed: tuple[int, int]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(what, where, got, wanted) for each output that differs."""
    values = reference.fake_quantize(x, spec, amax=amax, seed=seed)
    divisor = reference.divisor_of(x, spec, -1, amax)
    if divisor is not None and divisor.ndim:
        divisor = divisor.reshape(-1).contiguous()
    out = torch.empty_like(x)
    native.fake_quantize_rows(x, spec, divisor, seed, out)
    pairs = [("values", out, values)]
    if spec.storable:
        quantized, again = reference.quantize(x, spec, amax=amax, seed=seed), torch.empty_like(x)
        codes, scales = torch.empty_like(quantized.codes), torch.empty_like(quantized.scale_codes)
        native.quantize_rows(x, spec, divisor, seed, codes, scales)
        native.dequantize_rows(codes, scales, divisor, spec, again)
        pairs += [
            ("codes", codes, quantized.codes),
            ("scales", scales, quantized.scale_codes),
            ("values of the codes", again, values),
        ]
    if spec.rotation is not None:
        peak, own = native.rotated_amax(x, spec), reference.amax_of(x, spec)
        pairs.append(("the rotated maximum", peak.view(1, 1), own.view(1, 1)))
    for what, got, want in pairs:
        where = different(got, want)
        if where.any():
            yield what, where, got, want


def first_pattern(x: Tensor, where: Tensor, got: Tensor, want: Tensor, size: int) -> str:
    """The first difference, and the block of the input it belongs to, as bits."""
    row, column = torch.nonzero(where)[0].tolist()
    report = f"row {row}, column {column}: {got[row, column].item()!r} instead of {want[row, column].item()!r}"
    if where.shape == x.shape:
        block = x[row, column // size * size : (column // size + 1) * size]
        word, mask, digits = (torch.int32, 2**32 - 1, 8) if x.dtype == torch.float32 else (torch.int16, 2**16 - 1, 4)
        report += "; block " + " ".join(f"{b & mask:0{digits}x}" for b in block.view(word).tolist())
    return report


def fuzz(
    values: float = 0,
    seed: int = 0,
    first: int = 0,
    rounds: int | None = None,
    elements: int = ELEMENTS,
    shown: int = 10,
) -> dict[str, Any]:
    """Run `rounds` rounds, or until `values` elements are compared; the result, with the first `shown` differences."""
    number, compared, differing, reports = first, 0, 0, []
    while compared < values if rounds is None else number < first + rounds:
        x, spec, amax, pair, name = case(seed, number, elements)
        for what, where, got, want in mismatches(x, spec, amax, pair):
            differing += int(where.sum())
            if len(reports) < shown:
                report = first_pattern(x, where, got, want, spec.block_format.block_size)
                reports.append(f"round {number} ({name}): {int(where.sum())} {what} differ; {report}")
        compared += x.numel()
        number += 1
    return {"values": compared, "rounds": number - first, "differences": differing, "reports": reports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=float, default=1e8, help="elements to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, help="how many rounds, instead of --values")
    parser.add_argument("--dry-run", action="store_true", help="print, and write no result")
    arguments = parser.parse_args()
    if not native.available():
        sys.exit(f"the compiled path is {native.status()}; there is nothing to compare with the reference")
    start = time.perf_counter()
    found = fuzz(arguments.values, arguments.seed, arguments.first, arguments.rounds)
    for report in found["reports"]:
        print(report)
    print(f"{found['values']:.3g} values in {found['rounds']} rounds: {found['differences']} differences")
    if not arguments.dry_run:
        result = {
            "schema": 1,
            "benchmark": "fuzz",
            **found,
            "seconds": round(time.perf_counter() - start, 1),
            "seed": arguments.seed,
            "combinations": len(SPECS) * len(DTYPES),
            "backend": native.status(),
            "command": f"python -m benchmarks.fuzz --values {arguments.values:g} --seed {arguments.seed}",
            "environment": environment(),
        }
        write_json(RESULTS / "fuzz.json", result)
    if found["differences"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
