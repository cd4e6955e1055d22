"""Patched modules against the stock ones: a linear, a small language model, and the time patching takes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qnoise
from benchmarks.micro.measure import Case, Contender, optional
from qnoise.nn import FakeQuantLinear

TITLE = "patched modules against the stock ones: forward and backward, decoding, patching"
FMTS = ("mxfp4", "nvfp4")
THREADS = 2
ROUNDS = 60
"""What is compared differs by a few percent: the interval has to be narrower than that."""


def cases(quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        shape = (128, 256, 512) if quick else (2048, 1024, 4096)
        yield linear(dtype, shape, frozen=True)
        yield linear(dtype, shape, frozen=False)
    for dtype, tokens in itertools.product((torch.bfloat16, torch.float32), (1, 8, 16)):
        yield decoding(dtype, (tokens, 256, 512) if quick else (tokens, 4096, 4096))
    # So small that what is timed is the Python around the product
    yield decoding(torch.float32, (1, 64, 64))
    yield model(quick, frozen=True)
    yield model(quick, frozen=False)
    yield patching(quick)


def linear(dtype: torch.dtype, shape: tuple[int, int, int], frozen: bool) -> Case:
    """Forward and backward of a batch. A frozen linear is cached or packed, a trained one is quantized each time."""
    tokens, inputs, outputs = shape
    stock = _stock(inputs, outputs, dtype, frozen)
    x, gradient = _randn(tokens, inputs, dtype=dtype), _randn(tokens, outputs, dtype=dtype)
    ours = {
        f"{storage} {fmt}": FakeQuantLinear.from_linear(stock, fmt, storage=storage)
        for fmt in FMTS
        for storage in (("cached", "packed") if frozen else ("dynamic",))
    }

    def both(module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        leaf = x.clone().requires_grad_()
        wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(module(leaf), wanted, gradient)

    def check() -> None:
        for name, module in ours.items():
            weight = qnoise.fake_quantize(stock.weight.detach(), name.split()[1])
            _equal(name, module(x), F.linear(x, weight, stock.bias))
            _equal(f"{name}, gradient of the input", both(module)()[0], gradient @ weight)

    return Case(
        "linear",
        {"dtype": _short(dtype), "tokens x in x out": list(shape), "weight": "frozen" if frozen else "trained"}
        | {"pass": "forward + backward", "threads": THREADS},
        [
            Contender("nn.Linear", both(stock)),
            *(Contender(name, both(module), figures=_figures(stock, module, x)) for name, module in ours.items()),
        ],
        check,
        ROUNDS,
    )


def decoding(dtype: torch.dtype, shape: tuple[int, int, int]) -> Case:
    """Forward of a few tokens, no gradient: what is read is the weight."""
    tokens, inputs, outputs = shape
    stock = _stock(inputs, outputs, dtype, frozen=True)
    x = _randn(tokens, inputs, dtype=dtype)
    ours = {
        f"{storage} {fmt}": FakeQuantLinear.from_linear(stock, fmt, storage=storage)
        for fmt in FMTS
        for storage in ("cached", "packed")
    }

    @torch.no_grad()
    def call(module: nn.Module) -> Tensor:
        out: Tensor = module(x)
        return out

    def check() -> None:
        for name, module in ours.items():
            weight = qnoise.fake_quantize(stock.weight, name.split()[1])
            _equal(name, call(module), F.linear(x, weight, stock.bias))

    return Case(
        "linear",
        {"dtype": _short(dtype), "tokens x in x out": list(shape), "weight": "frozen"}
        | {"pass": "forward", "threads": THREADS},
        [
            Contender("nn.Linear", lambda: call(stock)),
            *(Contender(name, lambda m=module: call(m)) for name, module in ours.items()),  # type: ignore[misc]
        ],
        check,
    )


def model(quick: bool, frozen: bool) -> Case:
    """Loss and gradients of a Qwen2, hidden size 512, 8 layers. What is frozen are its linears; the rest is trained."""
    layers, tokens = (1, (2, 16)) if quick else (8, (2, 256))
    stock = _qwen2(layers, 512, 1408, 8, 2, vocabulary=8192)
    ids = torch.randint(0, 8192, tokens, generator=torch.Generator().manual_seed(1))
    if frozen:
        for module in stock.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(False)
    ours = {
        f"{storage} {fmt}": qnoise.patch_model(copy.deepcopy(stock), fmt, storage=storage)
        for storage, fmt in ((("cached", "mxfp4"), ("packed", "mxfp4")) if frozen else (("dynamic", f) for f in FMTS))
    }

    def loss(network: Any, unused: bool = False) -> Callable[[], tuple[Tensor | None, ...]]:
        trained = [p for p in network.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(network(ids, labels=ids, use_cache=False).loss, trained, allow_unused=unused)

    def check() -> None:
        for name, network in ours.items():
            baked = qnoise.bake(copy.deepcopy(network))
            _equal(name, network(ids).logits, baked(ids).logits)

    def torchao() -> Callable[[], object]:
        from torchao.prototype.qat import MXFakeQuantizeConfig
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        network = copy.deepcopy(stock)
        config = MXFakeQuantizeConfig(dtype=torch.float4_e2m1fn_x2, block_size=32)
        quantize_(network, QATConfig(activation_config=config, weight_config=config, step="prepare"))
        return loss(network, unused=True)  # its quantized linear gives the bias no gradient

    peers = [] if frozen else [optional("torchao MXFP4 QAT (activations too)", torchao, rounds=3)]
    return Case(
        "model",
        {"layers": layers, "hidden": 512, "tokens": list(tokens), "linears": "frozen" if frozen else "trained"}
        | {"dtype": "float32", "threads": THREADS},
        [
            Contender("stock", loss(stock)),
            *(Contender(name, loss(network)) for name, network in ours.items()),
            *peers,
        ],
        check,
        ROUNDS,
    )


def patching(quick: bool) -> Case:
    """All linears of a 0.5 B Qwen2 in bf16: patching alone, and with every Q(W) made as the first forward would."""
    layers, hidden, inner = (1, 128, 256) if quick else (24, 896, 4864)
    # The embedding is no linear: a small one leaves the work as it is.
    with torch.device("meta"):
        network = _qwen2(layers, hidden, inner, 14 if hidden == 896 else 4, 2, vocabulary=1024, dtype=torch.bfloat16)
    network.to_empty(device="cpu").requires_grad_(False)
    linears = [m for m in network.model.layers.modules() if isinstance(m, nn.Linear)]
    # Drawing every weight anew would take longer than all that is timed.
    values = 0.02 * _randn(896 * 1024, dtype=torch.bfloat16)
    for module in linears:
        weight = module.weight.view(-1)
        weight.copy_(values.repeat(-(-weight.numel() // values.numel()))[: weight.numel()])

    def undo() -> None:
        qnoise.unpatch_model(network)

    def patch(fmt: str, fill: bool) -> Callable[[], object]:
        def call() -> object:
            qnoise.patch_model(network, fmt, storage="cached")
            return [m.effective_weight() for m in linears] if fill else None  # type: ignore[operator]

        return call

    def check() -> None:
        for fmt in FMTS:
            patch(fmt, True)()
            head = linears[0]
            _equal(f"{len(linears)} linears", head.effective_weight(), _joint(fmt, linears))  # type: ignore[operator]
            undo()

    return Case(
        "patching",
        {"layers": layers, "hidden": hidden, "linears": len(linears)}
        | {"weights": sum(m.weight.numel() for m in linears), "dtype": "bfloat16", "threads": THREADS},
        [
            Contender("cloning the weights", lambda: [m.weight.clone() for m in linears], before=undo),
            Contender("patching alone", patch("mxfp4", False), before=undo),
            *(Contender(f"patching and filling, {fmt}", patch(fmt, True), before=undo) for fmt in FMTS),
        ],
        check,
        rounds=10,
    )


def _joint(fmt: str, linears: list[nn.Linear]) -> Tensor:
    """Q(W) of the first of three siblings (queries, keys, values)."""
    amax = torch.stack([m._parameters["weight"].detach().abs().amax() for m in linears[:3]]).amax()  # type: ignore[union-attr]
    weight = linears[0]._parameters["weight"]
    return qnoise.fake_quantize(weight.detach(), fmt, amax=amax if fmt == "nvfp4" else None)  # type: ignore[union-attr]


def _stock(inputs: int, outputs: int, dtype: torch.dtype, frozen: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(not frozen)


def _qwen2(
    layers: int,
    hidden: int,
    inner: int,
    heads: int,
    groups: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _figures(stock: nn.Module, module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Operator calls of a forward beyond those of the stock one, and bytes held for the weight over those of bf16."""
    calls = [_operator_calls(each, x) for each in (stock, module)]
    figures: dict[str, Any] = {"extra operator calls": calls[1] - calls[0]}
    codes = [b.nbytes for name, b in module.named_buffers() if name.startswith("weight_")]
    if codes:
        figures["weight memory over bf16"] = round(sum(codes) / (2 * module.in_features * module.out_features), 4)  # type: ignore[operator]
    return figures


def _operator_calls(module: nn.Module, x: Tensor) -> int:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    module(x)  # a cached linear makes its Q(W) in its first forward
    with Count() as count:
        module(x)
    return count.calls


def _equal(name: str, got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got, expected):
        raise ValueError(f"{name}: differs from the stock operation on Q(W)")


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
