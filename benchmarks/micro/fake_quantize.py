"""`fake_quantize` against a copy of the same tensor, against our own path without a compiler, and against peers.

Values of deviation 0.02 (the size of language-model weights). Bytes moved: the tensor read and written once; NVFP4's
`two_level`, `four_over_six` and `mse` read it a second time, for the maximum that fixes the scale of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qnoise
from benchmarks.micro import peers
from benchmarks.micro.measure import Case, Contender
from qnoise import QuantSpec, reference
from qnoise.kernels import chunked
from qnoise.philox import seed_from

TITLE = "fake quantization against Tensor.copy_, on the CPU"
DTYPES = (torch.bfloat16, torch.float32)
FOUR_BITS = ("mxfp4", "nvfp4")
SLOW_ROUNDS = 5

_GENERATOR = torch.Generator()


def cases(quick: bool) -> Iterator[Case]:
    size = 512 if quick else 4096
    # Resident memory is counted in pages: in a small tensor those of the process itself would show.
    for fmt in FOUR_BITS[:1] if quick else FOUR_BITS:
        for dtype in DTYPES[:1] if quick else DTYPES:
            yield memory(fmt, values(max(size, 2048), dtype), with_peers=not quick and dtype is torch.bfloat16)
    for dtype in DTYPES:
        x = values(size, dtype)
        for fmt in qnoise.FORMATS:
            yield speed(QuantSpec(fmt), x, with_peers=fmt in FOUR_BITS)
        for fmt in FOUR_BITS:
            yield threads(QuantSpec(fmt), x)
        if quick:
            continue
        for name, each in qnoise.FORMATS.items():
            for mode in each.scale_modes[1:]:
                yield speed(QuantSpec(name, mode), x)
        for name in FOUR_BITS:
            for rounding in ("half_away", "stochastic"):
                yield speed(QuantSpec(name, rounding=rounding), x)


def values(size: int, dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))).to(dtype)


def speed(spec: QuantSpec, x: Tensor, with_peers: bool = False) -> Case:
    out = torch.empty_like(x)
    common = spec.scale_mode == spec.block_format.scale_modes[0] and spec.rounding == "nearest"
    once = 2 * x.nbytes
    ours = 3 * x.nbytes if spec.per_tensor_scale else once
    contenders = [
        Contender("copy_", lambda: out.copy_(x), bytes_moved=once),
        Contender("clone", x.clone, bytes_moved=once),
        Contender("qnoise, out=", lambda: fake_quantize(x, spec, out), bytes_moved=ours),
        Contender("qnoise", lambda: fake_quantize(x, spec), bytes_moved=ours),
        Contender("qnoise eager, out=", lambda: eager(x, spec, out), rounds=eager_rounds(spec, common)),
    ]
    if with_peers:
        contenders += peers.contenders(spec.fmt, x)
    rounds = 30 if common else 15
    return Case("fake_quantize", parameters(spec, x), contenders, lambda: check(spec, x, out), rounds)


def eager_rounds(spec: QuantSpec, common: bool) -> int | None:
    """As many as of the others for what everyone uses; fewer where it takes half a second, and one where seconds."""
    searches = (spec.scale_mode or "").startswith(("mse", "four_over_six")) or spec.rounding == "stochastic"
    return 1 if searches else None if common else SLOW_ROUNDS


def threads(spec: QuantSpec, x: Tensor) -> Case:
    """One thread and two in one run, each beside a copy with as many."""
    out = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "copy_": lambda: out.copy_(x),
        "qnoise, out=": lambda: fake_quantize(x, spec, out),
    }
    contenders = [
        Contender(f"{name}, {count}", call, before=lambda n=n: torch.set_num_threads(n))
        for n, count in ((1, "1 thread"), (2, "2 threads"))
        for name, call in calls.items()
    ]

    def checks() -> None:
        for n in (1, 2):
            torch.set_num_threads(n)
            check(spec, x, out)

    return Case("fake_quantize_threads", parameters(spec, x), contenders, checks)


def memory(fmt: str, x: Tensor, with_peers: bool) -> Case:
    """Peak memory in multiples of the output, which is counted: a copy has to show 1.00."""
    spec = QuantSpec(fmt)
    contenders = [
        Contender("clone", x.clone),
        Contender("qnoise", lambda: fake_quantize(x, spec)),
        Contender("qnoise eager", lambda: eager(x, spec, torch.empty_like(x))),
    ]
    if with_peers:
        contenders += peers.contenders(fmt, x)
    return Case(
        "fake_quantize_memory",
        parameters(spec, x),
        contenders,
        lambda: check(spec, x, torch.empty_like(x)),
        rounds=0,
        memory_unit=x.nbytes,
    )


def parameters(spec: QuantSpec, x: Tensor) -> dict[str, object]:
    return {
        "fmt": spec.fmt,
        "scale_mode": spec.scale_mode,
        "rounding": spec.rounding,
        "dtype": str(x.dtype).removeprefix("torch."),
        "shape": list(x.shape),
    }


def fake_quantize(x: Tensor, spec: QuantSpec, out: Tensor | None = None) -> Tensor:
    return qnoise.fake_quantize(x, spec, generator=_GENERATOR, out=out)


def eager(x: Tensor, spec: QuantSpec, out: Tensor) -> None:
    """The path that serves where there is no compiler, called directly."""
    seed = seed_from(_GENERATOR) if spec.rounding == "stochastic" else None
    chunked.fake_quantize_rows(x, spec, divisor(x, spec), seed, out)


def divisor(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """NVFP4's fp32 divisor, found without temporaries as large as the tensor; None for the other formats."""
    amax = chunked.tensor_amax(x) if spec.per_tensor_scale else None
    return reference.divisor_of(x, spec, -1, amax)


def check(spec: QuantSpec, x: Tensor, out: Tensor) -> None:
    """Both paths give the bits of the reference, on rows from all over the tensor."""
    # The random numbers of stochastic rounding count from the first element: there the first rows are compared.
    rows = slice(0, 64) if spec.rounding == "stochastic" else slice(None, None, max(1, len(x) // 64))
    some = x[rows].contiguous()
    amax = x.abs().amax().float() if spec.per_tensor_scale else None
    seed = seed_from(_GENERATOR.manual_seed(0)) if spec.rounding == "stochastic" else None
    expected = bits(reference.fake_quantize(some, spec, amax=amax, seed=seed))
    _GENERATOR.manual_seed(0)
    fake_quantize(x, spec, out.fill_(torch.nan))
    if not torch.equal(bits(out[rows]), expected):
        raise ValueError("fake_quantize differs from the reference")
    found = torch.empty_like(some)
    chunked.fake_quantize_rows(some, spec, divisor(x, spec), seed, found)
    if not torch.equal(bits(found), expected):
        raise ValueError("the eager path differs from the reference")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)
