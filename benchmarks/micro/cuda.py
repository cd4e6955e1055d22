"""The operations on a GPU, in its own time; no cases where there is no GPU.

Sizes far over the second-level cache, and so many sets of operands, taken in turn, that none is found there. The copy
of the same tensor is the measured bandwidth. In `cuda_decode` the weights lie in memory as they do for each layer of a
model: what is read is the weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qnoise
from benchmarks.micro import norm, peers, rl_log_probs
from benchmarks.micro.fake_quantize import FOUR_BITS, bits
from benchmarks.micro.measure import Case, Contender
from qnoise import QuantSpec, reference
from qnoise.nn import FakeQuantLinear

TITLE = "on a GPU, with its own clock: quantization, packing, linears, decoding, norms, log-probabilities"
ROUNDS = 30
SOME = 64
"""Rows that are compared with the reference, which runs on the CPU."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of a tensor; tokens and width of a linear; weights of the decoding; rows of a norm; logits."""

    tensor: tuple[int, int] = (16_384, 8192)
    linear: tuple[int, int] = (4096, 4096)
    weights: tuple[tuple[int, int], ...] = ((4096, 4096), (14_336, 4096))
    norm: tuple[int, int] = (16_384, 4096)
    logits: tuple[int, int, int] = (4, 1024, 131_072)


SMALL = Sizes((256, 512), (64, 128), ((256, 128),), (64, 128), (2, 16, 256))


def cases(quick: bool) -> Iterator[Case]:
    if torch.cuda.is_available():
        yield from on("cuda", SMALL if quick else Sizes())


def on(device: str, sizes: Sizes) -> Iterator[Case]:
    """The cases on a device; on "cpu" they run as well, which shows that they are right."""
    kind = torch.device(device).type
    named = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    for case in _cases(device, sizes):
        yield replace(case, device=kind, parameters={"device": named, **case.parameters})


def _cases(device: str, sizes: Sizes) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for fmt in qnoise.FORMATS:
            yield fake_quantize(QuantSpec(fmt), dtype, sizes.tensor, device)
    for fmt in qnoise.FORMATS:
        yield from packing(QuantSpec(fmt), torch.bfloat16, sizes.tensor, device)
    for weight in sizes.weights:
        for tokens in (1, 2, 4, 8):
            yield decode(tokens, weight, device)
    for frozen in (True, False):
        yield linear(sizes.linear, frozen, device)
    for training in (False, True):
        yield norms(sizes.norm, training, device)
    for dtype in (torch.bfloat16, torch.float32):
        case = rl_log_probs.from_logits(sizes.logits, dtype, device)
        yield replace(case, operation="cuda_rl_log_probs")


def fake_quantize(spec: QuantSpec, dtype: torch.dtype, shape: tuple[int, int], device: str) -> Case:
    xs = _tensors(shape, dtype, device)
    outs = [torch.empty_like(x) for x in xs]
    pairs = list(zip(xs, outs, strict=True))
    once = 2 * xs[0].nbytes
    ours = once + xs[0].nbytes * spec.per_tensor_scale  # read once more, for the scale of the tensor

    def check() -> None:
        for x in xs:
            _compare(x, spec, qnoise.fake_quantize(x, spec))

    others = peers.contenders(spec.fmt, xs[0], rounds=None) if spec.fmt in FOUR_BITS else []
    return Case(
        "cuda_fake_quantize",
        {"fmt": spec.fmt, "dtype": _short(dtype), "shape": list(shape)},
        [
            Contender("copy_", in_turn([lambda x=x, out=out: out.copy_(x) for x, out in pairs]), bytes_moved=once),
            Contender(
                "qnoise, out=",
                in_turn([lambda x=x, out=out: qnoise.fake_quantize(x, spec, out=out) for x, out in pairs]),
                bytes_moved=ours,
            ),
            Contender("qnoise", in_turn([lambda x=x: qnoise.fake_quantize(x, spec) for x in xs]), bytes_moved=ours),
            *others,
        ],
        check,
        ROUNDS,
    )


def packing(spec: QuantSpec, dtype: torch.dtype, shape: tuple[int, int], device: str) -> Iterator[Case]:
    xs = _tensors(shape, dtype, device)
    packed = [qnoise.quantize(x, spec) for x in xs]
    outs = [torch.empty_like(x) for x in xs]
    copies = in_turn([lambda x=x, out=out: out.copy_(x) for x, out in zip(xs, outs, strict=True)])
    moved = xs[0].nbytes + packed[0].nbytes

    def check() -> None:
        some = _some(xs[0])
        expected = reference.quantize(some, spec, amax=_amax(xs[0], spec))
        rows = _rows(xs[0])
        same = torch.equal(packed[0].codes[rows].cpu(), expected.codes)
        if not same or not torch.equal(packed[0].scale_codes[rows].cpu(), expected.scale_codes):
            raise ValueError("codes or scales differ from the reference")
        _compare(xs[0], spec, packed[0].dequantize())

    work: dict[str, tuple[list[Call], int]] = {
        "cuda_quantize": (
            [lambda x=x: qnoise.quantize(x, spec) for x in xs],
            moved + xs[0].nbytes * spec.per_tensor_scale,
        ),
        "cuda_dequantize": ([q.dequantize for q in packed], moved),
    }
    others = peers.packing(spec.fmt, xs[0])
    for operation, (calls, bytes_moved) in work.items():
        yield Case(
            operation,
            {"fmt": spec.fmt, "dtype": _short(dtype), "shape": list(shape)},
            [
                Contender("copy_", copies, bytes_moved=2 * xs[0].nbytes),
                Contender("qnoise", in_turn(calls), bytes_moved=bytes_moved),
                *(replace(other, rounds=None) for other in others[operation.removeprefix("cuda_")]),
            ],
            check,
            ROUNDS,
        )


def decode(tokens: int, shape: tuple[int, int], device: str) -> Case:
    """A few tokens through a weight (out, in) in bf16, and through its codes; no gradient."""
    outputs, inputs = shape
    stocks = [_linear(inputs, outputs, device, seed=n) for n in range(_sets(2 * inputs * outputs, device))]
    x = _randn((tokens, inputs), torch.bfloat16, device)
    ours = {
        f"packed {fmt}": [FakeQuantLinear.from_linear(stock, fmt, storage="packed") for stock in stocks]
        for fmt in FOUR_BITS
    }

    def call(module: nn.Module) -> Call:
        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward

    def check() -> None:
        for name, modules in ours.items():
            weight = modules[0].effective_weight()
            _compare(stocks[0].weight.detach(), QuantSpec(name.split()[1]), weight)
            with torch.no_grad():
                torch.testing.assert_close(modules[0](x), F.linear(x, weight), rtol=2e-2, atol=2e-2)

    return Case(
        "cuda_decode",
        {"dtype": "bfloat16", "tokens": tokens, "out x in": list(shape)},
        [
            Contender("nn.Linear", in_turn([call(m) for m in stocks]), bytes_moved=stocks[0].weight.nbytes),
            *(
                Contender(
                    name, in_turn([call(m) for m in modules]), bytes_moved=sum(b.nbytes for b in modules[0].buffers())
                )
                for name, modules in ours.items()
            ),
        ],
        check,
        ROUNDS,
    )


def linear(sizes: tuple[int, int], frozen: bool, device: str) -> Case:
    """Forward and backward of a batch in bf16."""
    tokens, width = sizes
    stock = _linear(width, width, device).requires_grad_(not frozen)
    xs = [_randn((tokens, width), torch.bfloat16, device, seed=n) for n in range(_sets(2 * tokens * width, device))]
    gradient = _randn((tokens, width), torch.bfloat16, device)
    storages = ("cached", "packed") if frozen else ("dynamic",)
    ours: dict[str, nn.Module] = {
        f"{storage} {fmt}": FakeQuantLinear.from_linear(stock, fmt, storage=storage)  # type: ignore[arg-type]
        for storage in storages
        for fmt in FOUR_BITS
    }
    if not frozen:
        for fmt in FOUR_BITS:
            ours[f"dynamic {fmt}, activations too"] = FakeQuantLinear.from_linear(stock, fmt, fmt, storage="dynamic")

    def both(module: nn.Module) -> Call:
        leaves = [x.clone().requires_grad_() for x in xs]
        trained = [p for p in module.parameters() if p.requires_grad]
        return in_turn([lambda x=x: torch.autograd.grad(module(x), [x, *trained], gradient) for x in leaves])

    def check() -> None:
        for name, module in ours.items():
            fmt, used = name.split()[1].strip(","), xs[0]
            if "activations" in name:
                amax = used.abs().amax(-1, keepdim=True).float() if QuantSpec(fmt).per_tensor_scale else None
                used = qnoise.fake_quantize(used, fmt, amax=amax)
            weight = qnoise.fake_quantize(stock.weight.detach(), fmt)
            _compare(stock.weight.detach(), QuantSpec(fmt), weight)
            torch.testing.assert_close(module(xs[0]), F.linear(used, weight), rtol=2e-2, atol=2e-2)

    return Case(
        "cuda_linear",
        {"dtype": "bfloat16", "tokens x in x out": [tokens, width, width], "weight": "frozen" if frozen else "trained"}
        | {"pass": "forward + backward"},
        [Contender("nn.Linear", both(stock)), *(Contender(name, both(module)) for name, module in ours.items())],
        check,
        ROUNDS,
    )


def norms(shape: tuple[int, int], training: bool, device: str) -> Case:
    """A noisy norm and the stock one, on a batch: the forward of a rollout, forward and backward of training."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    stock = Qwen2RMSNorm(shape[1], eps=1e-6).to(device, torch.bfloat16)
    silent, noise = norm.noisy(stock, 0.0), norm.noisy(stock, norm.SIGMA)
    xs = _tensors(shape, torch.bfloat16, device)
    time = norm.forward_backward if training else norm.forward
    contenders = {"Qwen2RMSNorm": stock, "noisy, sigma 0": silent, f"noisy, sigma {norm.SIGMA}": noise}
    return Case(
        "cuda_norm",
        {"dtype": "bfloat16", "shape": list(shape), "pass": time.__name__.replace("_", " + ")},
        [Contender(name, in_turn([time(module, x) for x in xs])) for name, module in contenders.items()],
        lambda: norm.check(stock, silent, noise, xs[0]),
        ROUNDS,
    )


def in_turn(calls: Sequence[Call]) -> Call:
    """The first call, the second, ..., the first again: one each time."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def _sets(nbytes: int, device: str) -> int:
    """How many sets of operands, of so many bytes each, are together four times the second-level cache."""
    if torch.device(device).type != "cuda":
        return 2
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def _tensors(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    count = _sets(shape[0] * shape[1] * dtype.itemsize, device)
    return [_randn(shape, dtype, device, seed=n) for n in range(count)]


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Of deviation 0.02, the size of language-model weights."""
    generator = torch.Generator(device).manual_seed(seed)
    return (0.02 * torch.randn(shape, generator=generator, device=device)).to(dtype)


def _linear(inputs: int, outputs: int, device: str, seed: int = 0) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(inputs, outputs, bias=False)
    made.weight = nn.Parameter(_randn((outputs, inputs), torch.bfloat16, device, seed), requires_grad=False)
    return made


def _rows(x: Tensor) -> slice:
    return slice(None, None, max(1, len(x) // SOME))


def _some(x: Tensor) -> Tensor:
    """Rows from all over the tensor, on the CPU."""
    return x[_rows(x)].cpu().contiguous()


def _amax(x: Tensor, spec: QuantSpec) -> Tensor | None:
    return x.abs().amax().float().cpu() if spec.per_tensor_scale else None


def _compare(x: Tensor, spec: QuantSpec, found: Tensor) -> None:
    expected = reference.fake_quantize(_some(x), spec, amax=_amax(x, spec))
    if not torch.equal(bits(_some(found)), bits(expected)):
        raise ValueError(f"{spec}: the values differ from the reference, which ran on the CPU")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
