"""Packing (`quantize`) and unpacking (`BlockQuantized.dequantize`) against a copy and against peers.

Bytes moved: the tensor, and its codes and scales; NVFP4 reads the tensor a second time when it packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qnoise
from benchmarks.micro import peers
from benchmarks.micro.fake_quantize import DTYPES, bits, divisor, values
from benchmarks.micro.measure import Case, Contender
from qnoise import QuantSpec, reference
from qnoise.kernels import chunked

TITLE = "packing to codes and scales, and back, against Tensor.copy_"


def cases(quick: bool) -> Iterator[Case]:
    size = 512 if quick else 4096
    for dtype in DTYPES:
        x = values(size, dtype)
        for fmt in qnoise.FORMATS:
            yield from both(QuantSpec(fmt), x)


def both(spec: QuantSpec, x: Tensor) -> Iterator[Case]:
    out = torch.empty_like(x)
    packed = qnoise.quantize(x, spec)
    codes, scales = torch.empty_like(packed.codes), torch.empty_like(packed.scales, dtype=torch.uint8)
    moved = x.nbytes + packed.nbytes
    copy = Contender("copy_", lambda: out.copy_(x), bytes_moved=2 * x.nbytes)
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "quantize": {
            "qnoise": lambda: qnoise.quantize(x, spec),
            "qnoise eager, out=": lambda: chunked.quantize_rows(x, spec, divisor(x, spec), None, codes, scales),
        },
        "dequantize": {
            "qnoise": packed.dequantize,
            "qnoise eager, out=": lambda: chunked.dequantize_rows(
                packed.codes, packed.scales.view(torch.uint8), packed.per_tensor_scale, spec, out
            ),
        },
    }
    others = peers.packing(spec.fmt, x)
    for operation, contenders in calls.items():
        passes_more = int(operation == "quantize" and spec.per_tensor_scale)
        bytes_moved = moved + passes_more * x.nbytes
        ours = [Contender(name, call, bytes_moved=bytes_moved) for name, call in contenders.items()]
        parameters = {"fmt": spec.fmt, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
        yield Case(operation, parameters, [copy, *ours, *others[operation]], lambda: check(x, spec), rounds=15)


def check(x: Tensor, spec: QuantSpec) -> None:
    """Codes and scales are those of the reference, and decode to the fake-quantized tensor, on both paths."""
    expected = reference.quantize(x, spec)
    wanted = bits(reference.fake_quantize(x, spec))
    packed = qnoise.quantize(x, spec)
    codes, scales = torch.empty_like(packed.codes), torch.empty_like(packed.scales, dtype=torch.uint8)
    out = torch.empty_like(x)
    gs = divisor(x, spec)
    chunked.quantize_rows(x, spec, gs, None, codes, scales)
    chunked.dequantize_rows(codes, scales, gs, spec, out)
    for path, found, found_scales, back in (
        ("qnoise", packed.codes, packed.scales.view(torch.uint8), packed.dequantize()),
        ("eager", codes, scales, out),
    ):
        if not torch.equal(found, expected.codes) or not torch.equal(found_scales, expected.scales.view(torch.uint8)):
            raise ValueError(f"{path}: codes or scales differ from the reference")
        if not torch.equal(bits(back), wanted):
            raise ValueError(f"{path}: dequantize gives another tensor than the reference's fake_quantize")
