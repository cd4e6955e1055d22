"""Fake quantization as other libraries do it, for tables only: none is a dependency, and none was tuned for a CPU.

A peer that is not installed, that has no such format, or that fails on a small tensor, is listed with the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.micro.measure import Contender, optional

FakeQuantize = Callable[[Tensor], Tensor]
ROUNDS = 3


def contenders(fmt: str, x: Tensor, rounds: int | None = ROUNDS) -> list[Contender]:
    """The peers that run on the device of `x`, on the default scale mode of `fmt` or the one they have instead
    (compressed-tensors' MXFP4 rounds the maximum to a power of two, as our mode `even` does)."""

    def fake_quantize(make: Callable[[str], FakeQuantize]) -> Callable[[], object]:
        function = make(fmt)
        check_close(x[:128], function(x[:128]))
        return functools.partial(function, x)

    makers = MAKERS | (ON_A_GPU if x.device.type == "cuda" else {})
    return [optional(name, functools.partial(fake_quantize, make), rounds=rounds) for name, make in makers.items()]


def packing(fmt: str, x: Tensor) -> dict[str, list[Contender]]:
    """torchao's packed tensors: "quantize" and "dequantize" to its contenders, for the 4-bit formats."""
    if fmt not in ("mxfp4", "nvfp4"):
        return {"quantize": [], "dequantize": []}

    def quantize() -> Callable[[], object]:
        check_close(x[:64], _torchao_packed(fmt, x[:64]).dequantize(x.dtype))
        return functools.partial(_torchao_packed, fmt, x)

    def dequantize() -> Callable[[], object]:
        packed = _torchao_packed(fmt, x)
        return lambda: packed.dequantize(x.dtype)

    return {make.__name__: [optional("torchao", make, rounds=ROUNDS)] for make in (quantize, dequantize)}


def check_close(x: Tensor, result: Tensor) -> None:
    """A peer has to do the work it is timed for: an error between a half and one and a half of ours.

    Raises:
        ValueError: it does not.
    """
    error = ((result.float() - x.float()).norm() / x.float().norm()).item()
    if result.shape != x.shape or result.dtype != x.dtype or not 0.05 < error < 0.17:
        raise ValueError(f"relative error {error:.3f} in {result.dtype}; that is not a 4-bit format of {x.dtype}")


def _torchao(fmt: str) -> FakeQuantize:
    return lambda x: _torchao_packed(fmt, x).dequantize(x.dtype)


def _torchao_packed(fmt: str, x: Tensor) -> Any:
    mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    nv = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    if fmt == "nvfp4":
        scale = nv.per_tensor_amax_to_scale(x.abs().amax())
        return nv.NVFP4Tensor.to_nvfp4(x, 16, per_tensor_scale=scale)
    return mx.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)


def _compressed_tensors(fmt: str) -> FakeQuantize:
    scheme = importlib.import_module("compressed_tensors.quantization.quant_scheme")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")

    def mxfp4(x: Tensor) -> Tensor:
        arguments = scheme.MXFP4A16["weights"]
        scale, zero = helpers.compute_dynamic_scales_and_zp(x, arguments, None)
        return forward.fake_quantize(x, scale, zero, arguments)

    def nvfp4(x: Tensor) -> Tensor:
        arguments = scheme.NVFP4A16["weights"]
        divisor = helpers.generate_gparam(*torch.aminmax(x))
        scale, zero = helpers.compute_dynamic_scales_and_zp(x, arguments, None, divisor)
        return forward.fake_quantize(x, scale, zero, arguments, divisor)

    return _pick("compressed-tensors", fmt, mxfp4=mxfp4, nvfp4=nvfp4)


def _microxcaling(fmt: str) -> FakeQuantize:
    ops = importlib.import_module("mx.mx_ops")

    def mxfp4(x: Tensor) -> Tensor:
        return ops._quantize_mx(x, 8, "fp4_e2m1", axes=[-1], block_size=32, round="even")

    return _pick("microxcaling", fmt, mxfp4=mxfp4)


def _modelopt(fmt: str) -> FakeQuantize:
    kernels = importlib.import_module("modelopt.torch.quantization.triton")

    def nvfp4(x: Tensor) -> Tensor:
        done: Tensor = kernels.fp4_fake_quant_block(x, x.abs().amax().float())
        return done.to(x.dtype)

    return _pick("ModelOpt", fmt, nvfp4=nvfp4)


def _pick(library: str, fmt: str, **functions: FakeQuantize) -> FakeQuantize:
    if fmt not in functions:
        raise NotImplementedError(f"{library} has no {fmt}")
    return functions[fmt]


MAKERS: dict[str, Callable[[str], FakeQuantize]] = {
    "torchao": _torchao,
    "compressed-tensors": _compressed_tensors,
    "microxcaling": _microxcaling,
}

ON_A_GPU: dict[str, Callable[[str], FakeQuantize]] = {"ModelOpt": _modelopt}
"""Kernels that need one."""
