"""Schemes of compressed-tensors: which one a patched linear is, and what has none.

Codes and scales of weights are data, so any rule that chose them will do. Quantized inputs are computed anew by whoever
loads the checkpoint, by the one rule that the package has for the preset. Compared here with compressed-tensors 0.20 in
bfloat16:

    MXFP4   `even`: the same, bit for bit.
    MXFP8   `rceil`: the same, but for blocks whose amax is 1.75 * 2**k exactly. Theirs have twice the scale, and
            elements below amax / 14336 a coarser grid, which moves them by less than amax / 2e5.
    NVFP4   `two_level` with a static scale, but theirs divides the block's amax by 6 in the dtype of the input,
            bfloat16, before it rounds the scale, where it is fp32 here: some blocks get the neighbouring scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from qnoise.formats import QuantSpec
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.matrices import FakeQuantMatrices
from qnoise.packing import BlockQuantized
from qnoise.patch import SIBLINGS


@dataclass(frozen=True)
class Scheme:
    """A preset of compressed-tensors.

    Attributes:
        preset: its name there.
        layout: the format string of its tensors.
        weight: name of the weight's format here.
        inputs: what computes its inputs here; None: they stay as they are.
    """

    preset: str
    layout: str
    weight: str
    inputs: QuantSpec | None = None


SCHEMES = (
    Scheme("MXFP4A16", "mxfp4-pack-quantized", "mxfp4"),
    Scheme("MXFP4", "mxfp4-pack-quantized", "mxfp4", QuantSpec("mxfp4", "even")),
    Scheme("NVFP4A16", "nvfp4-pack-quantized", "nvfp4"),
    Scheme("NVFP4", "nvfp4-pack-quantized", "nvfp4", QuantSpec("nvfp4", "two_level")),
    Scheme("MXFP8A16", "mxfp8-quantized", "mxfp8_e4m3"),
    Scheme("MXFP8", "mxfp8-quantized", "mxfp8_e4m3", QuantSpec("mxfp8_e4m3", "rceil")),
)


def schemes_of(chosen: Mapping[str, FakeQuantLinear]) -> dict[str, Scheme]:
    """The scheme of each linear with a quantized weight.

    Raises:
        ValueError: there is none; a linear has no scheme. It is named, with what it lacks.
    """
    if not chosen:
        raise ValueError("no linear of the model has a quantized weight; there is nothing to export")
    return {name: _scheme_of(name, linear) for name, linear in chosen.items()}


def _scheme_of(name: str, linear: FakeQuantLinear) -> Scheme:
    record = linear._qnoise
    weight, act = cast(QuantSpec, record.weight_spec), record.act_spec
    for field in ("macro_block", "residual", "rotation"):
        if getattr(weight, field) is not None or getattr(act, field, None) is not None:
            raise ValueError(
                f"{name}: its weight is in {weight} and its input in {act or '16 bits'}, and compressed-tensors has no "
                f"place for {field}. qnoise.bake writes the values as an ordinary checkpoint."
            )
    asked = (weight.fmt, None if act is None else act.fmt)
    scheme = next((s for s in SCHEMES if (s.weight, s.inputs and s.inputs.fmt) == asked), None)
    if scheme is None:
        known = ", ".join(f"{s.weight} with {s.inputs or '16-bit'} inputs" for s in SCHEMES)
        raise ValueError(
            f"{name}: {weight} with {act or '16-bit'} inputs has no preset in compressed-tensors. There are: {known}"
        )
    if act != scheme.inputs:
        wanted = cast(QuantSpec, scheme.inputs)
        raise ValueError(
            f"{name}: its input is quantized as {act}, and compressed-tensors computes inputs of {wanted.fmt} by the "
            f"rule called {wanted.scale_mode!r} here, rounded to nearest: loaded there, it would be another model than "
            f"was trained. Train with act_fmt=QuantSpec({wanted.fmt!r}, {wanted.scale_mode!r})."
        )
    if act is not None and act.per_tensor_scale and record.act_amax is None:
        raise ValueError(
            f"{name}: an {scheme.preset} checkpoint with quantized inputs holds a static input scale, and this linear "
            "has none. Patch with PatchConfig(act_fmt='nvfp4', act_amax=qnoise.calibrate_activations(model, inputs)), "
            "or export weights only (act_fmt=None)."
        )
    return scheme


def check_expressible(chosen: Mapping[str, FakeQuantLinear]) -> None:
    """Raise ValueError of the first linear whose dtype or width the layout has no room for, or that is out of reach."""
    for name, linear in chosen.items():
        if linear.weight.device.type == "meta":
            raise ValueError(
                f"{name}.weight is not in memory (meta device: offloaded by accelerate, or never loaded). Load the "
                "model without offloading."
            )
        dtype = linear.weight.dtype
        if dtype != torch.bfloat16:
            raise ValueError(
                f"{name}.weight is {dtype}, and compressed-tensors decodes to bfloat16: the loaded weights would not "
                "be these. Convert the model before training or calibration (model.to(torch.bfloat16))."
            )
        size = cast(QuantSpec, linear._qnoise.weight_spec).block_format.block_size
        if linear.in_features % size:
            raise ValueError(
                f"{name}: in_features={linear.in_features} is no multiple of the block size {size}, and the layout has "
                "no short blocks. Leave it out with exclude=."
            )


def check_siblings(schemes: Mapping[str, Scheme], linears: Collection[str]) -> None:
    """Raise ValueError unless the linears that engines fuse into one matrix have one scheme, or none.

    Args:
        schemes: of the linears that are quantized.
        linears: names of all linears.
    """
    for names in _fused(schemes):
        name, *others = [each for each in names if each in schemes]
        for other in others:
            if schemes[other] != schemes[name]:
                raise ValueError(
                    f"{name} is {schemes[name].preset} and {other} is {schemes[other].preset}, but engines fuse them "
                    "into one matrix and need one scheme for both. Give them one format."
                )
        apart = [each for each in names if each in linears and each not in schemes]
        if apart:
            raise ValueError(
                f"{name} is quantized and {apart[0]} is not, but engines fuse them into one matrix and need one "
                "scheme for both. Quantize both, or neither."
            )


def check_shared_scales(codes: Mapping[str, BlockQuantized], chosen: Mapping[str, FakeQuantLinear]) -> None:
    """Raise ValueError unless the linears that engines fuse have one per-tensor scale and one static input scale."""
    for names in _fused(codes):
        name, *others = [each for each in names if each in codes]
        for other in others:
            scale, first = codes[other].per_tensor_scale, codes[name].per_tensor_scale
            if scale is not None and first is not None and not torch.equal(scale, first):
                raise ValueError(
                    f"{name} and {other} have different per-tensor scales, and engines keep one for both. Patch with "
                    "share_scales=True (the default)."
                )
            amax, other_amax = chosen[name]._qnoise.act_amax, chosen[other]._qnoise.act_amax
            if amax != other_amax:
                raise ValueError(
                    f"{name} and {other} have different act_amax ({amax}, {other_amax}), and engines fuse them into "
                    "one matrix with one input scale. Give them the larger one."
                )


def refuse_matrices(model: nn.Module) -> None:
    """Raise ValueError of the first module that holds quantized matrices and is no linear."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantMatrices):
            raise ValueError(
                f"{name}: {type(module).__name__} holds matrices of its own, for which the layout has no names. "
                "qnoise.bake writes the values as an ordinary checkpoint; "
                f"exclude={canonical_name(name)!r} leaves it out."
            )


def _fused(names: Collection[str]) -> list[list[str]]:
    """The sets of names that engines fuse of which there is one in `names`."""
    groups: dict[tuple[str, ...], None] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for siblings in SIBLINGS:
            if leaf in siblings:
                groups[tuple(f"{parent}.{each}" if parent else each for each in sorted(siblings))] = None
    return [list(group) for group in groups]
