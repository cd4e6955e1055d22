"""The tensors of one linear in a compressed-tensors checkpoint: written, checked and read.

Layout of a linear (out N, in K), as compressed-tensors 0.20 names it:

    MXFP4   weight_packed uint8 (N, K/2), low nibble first;  weight_scale uint8 (N, K/32), E8M0
    NVFP4   weight_packed uint8 (N, K/2);  weight_scale float8_e4m3fn (N, K/16);  weight_global_scale fp32 (1,);
            with quantized inputs input_global_scale fp32 (1,), 448 * 6 / amax of the input
    MXFP8   weight float8_e4m3fn (N, K);  weight_scale uint8 (N, K/32), E8M0

with value = code * scale for MX, code * (scale / global_scale) in fp32 for NVFP4, rounded to bfloat16 once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.packing import BlockQuantized


def stored(name: str, quantized: BlockQuantized, act_amax: float | None) -> dict[str, Tensor]:
    """The tensors of one linear under their names in the checkpoint, on the CPU.

    Args:
        name: of the linear, for the message.
        quantized: its codes and scales.
        act_amax: what fixes the static scale of its input; None: it has none.

    Raises:
        ValueError: the weight has NaN or Inf, which the loader decodes to something else.
    """
    scales = quantized.scale_codes
    e4m3 = quantized.spec.block_format.scale == "e4m3"
    if bool((scales == 255).any() if not e4m3 else scales.view(torch.float8_e4m3fn).float().isnan().any()):
        raise ValueError(f"{name}.weight has NaN or Inf, which the layout cannot hold")
    if quantized.spec.block_format.element.bits == 8:
        tensors = {"weight": quantized.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    else:
        tensors = {"weight_packed": quantized.codes, "weight_scale": quantized.scales if e4m3 else scales}
    if quantized.per_tensor_scale is not None:
        tensors["weight_global_scale"] = quantized.per_tensor_scale.reshape(1)
    if act_amax is not None:
        tensors["input_global_scale"] = torch.tensor([448.0 * 6.0]) / torch.tensor([act_amax])
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def check_decoded(name: str, tensors: Mapping[str, Tensor], used: Tensor) -> None:
    """Decode as the loader does, by code of its own, and compare with what the forward uses.

    Raises:
        ValueError: a weight differs in any bit but the sign of a zero.
    """
    if "weight_packed" in tensors:
        packed = tensors["weight_packed"]
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        grid = torch.cat([grid, -grid])
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        values = grid[codes.long()]
    else:
        values = tensors["weight"].float()
    scale = tensors["weight_scale"]
    numbers = (scale if scale.is_floating_point() else scale.view(torch.float8_e8m0fnu)).float()
    if "weight_global_scale" in tensors:
        numbers = numbers / tensors["weight_global_scale"]
    blocks = values.unflatten(-1, (scale.shape[-1], -1)) * numbers[..., None]
    decoded = blocks.flatten(-2).to(torch.bfloat16)
    if not torch.equal(decoded, used.detach().cpu().to(torch.bfloat16)):
        wrong = int((decoded != used.detach().cpu()).sum())
        raise ValueError(
            f"{name}: {wrong} of {decoded.numel()} weights decoded from the checkpoint's bytes are not those of the "
            "forward. This is a fault of the exporter or of the weight's state (qnoise.refresh); nothing was written."
        )


def unstored(name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, linear: nn.Linear) -> BlockQuantized:
    """The codes and scales of a linear, on the memory of what `stored` gave for its weight.

    Raises:
        ValueError: a tensor is missing, or has another shape than the linear's weight needs.
    """
    codes = tensors.get("weight_packed", tensors.get("weight"))
    scales, gs = tensors.get("weight_scale"), tensors.get("weight_global_scale")
    if codes is None or scales is None or (gs is None and spec.per_tensor_scale):
        raise ValueError(f"the checkpoint lacks codes or scales of {name} (it has: {', '.join(tensors) or 'nothing'})")
    rows, width, block = linear.out_features, linear.in_features, spec.block_format
    wanted = (rows, width * block.element.bits // 8), (rows, width // block.block_size)
    if (tuple(codes.shape), tuple(scales.shape)) != wanted:
        raise ValueError(
            f"{name}: the checkpoint has codes of shape {tuple(codes.shape)} and scales of {tuple(scales.shape)}, and "
            f"a {spec.fmt} weight of shape ({rows}, {width}) takes {wanted[0]} and {wanted[1]}"
        )
    return BlockQuantized(
        codes.view(torch.uint8),
        scales.view(torch.uint8),
        None if gs is None else gs.reshape(()),
        torch.Size((rows, width)),
        spec,
        1,
        torch.bfloat16,
    )


def amax_of(divisor: float) -> float:
    """The magnitude whose divisor 2688/amax is this one in fp32: the quotient, or a neighbour of it.

    Raises:
        ValueError: there is none.
    """
    top, gs = torch.tensor(448.0 * 6.0), torch.tensor(divisor)
    near = top / gs
    for amax in (near, torch.nextafter(near, torch.zeros(())), torch.nextafter(near, 2 * near)):
        if torch.equal(top / amax, gs):
            return float(amax)
    raise ValueError(f"an input_global_scale of {divisor} is the quotient of 2688 by no fp32 number")
