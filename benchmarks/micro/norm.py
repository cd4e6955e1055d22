"""A noisy RMSNorm against the stock one: forward and backward of a training batch, forward of one token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

import qnoise
from benchmarks.micro.measure import Case, Contender

TITLE = "a noisy RMSNorm against the stock one"
SIGMA = 0.01


def cases(quick: bool) -> Iterator[Case]:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    width = 896
    for stock_class in (Qwen2RMSNorm, nn.RMSNorm):
        for dtype in (torch.bfloat16, torch.float32):
            stock = stock_class(width, eps=1e-6).to(dtype)
            silent, noise = noisy(stock, 0.0), noisy(stock, SIGMA)
            contenders = {stock_class.__name__: stock, "noisy, sigma 0": silent, f"noisy, sigma {SIGMA}": noise}
            for rows in (1, 256 if quick else 2048):
                x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
                time = forward if rows == 1 else forward_backward
                yield Case(
                    "norm",
                    {
                        "stock": stock_class.__name__,
                        "dtype": str(dtype).removeprefix("torch."),
                        "shape": [rows, width],
                        "pass": time.__name__.replace("_", " + "),
                    },
                    [Contender(name, time(norm, x)) for name, norm in contenders.items()],
                    lambda stock=stock, silent=silent, noise=noise, x=x: check(stock, silent, noise, x),
                )


def noisy(stock: nn.Module, sigma: float) -> qnoise.NoisyRMSNorm:
    """A copy of `stock` with noise of that sigma on its weight."""
    model = qnoise.patch_model(nn.Sequential(copy.deepcopy(stock)), fmt=None, noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(sigma), total_steps=1).step()
    return cast(qnoise.NoisyRMSNorm, model[0])


def forward(norm: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return norm(x)

    return call


def forward_backward(norm: nn.Module, x: Tensor) -> Callable[[], object]:
    """Gradients of input and weight."""
    x = x.clone().requires_grad_()
    gradient = torch.ones_like(x)
    weight = cast(Tensor, norm._parameters["weight"])
    return lambda: torch.autograd.grad(norm(x), (x, weight), gradient)


def check(stock: nn.Module, silent: nn.Module, noise: qnoise.NoisyRMSNorm, x: Tensor) -> None:
    """Without noise the stock forward, bit for bit; with noise the stock forward on a weight that differs."""
    if not torch.equal(silent(x), stock(x)):
        raise ValueError("at sigma 0 the noisy norm differs from the stock one")
    weight = noise.effective_weight()
    if torch.equal(weight, cast(Tensor, stock.weight)):
        raise ValueError("the noisy norm has no noise")
    expected = torch.func.functional_call(stock, {"weight": weight}, (x,)).to(x.dtype)
    if not torch.equal(noise(x), expected):
        raise ValueError("the noisy norm is not the stock forward on the noisy weight")
