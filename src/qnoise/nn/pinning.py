"""Codes that were chosen by more than the weight alone, pinned to the linear they stand for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qnoise.formats import QuantSpec
from qnoise.nn import weight_cache
from qnoise.nn.linear_record import LinearRecord, Pin, named
from qnoise.packing import BlockQuantized

PINNED_IS_FROZEN = (
    "and its quantized codes are pinned: they would not follow it. Freeze it (requires_grad_(False)) and train an "
    "adapter, or take the pin off with linear.pin(None)"
)


def make_pin(record: LinearRecord, weight: Tensor | None, quantized: BlockQuantized, asymmetric: bool = False) -> Pin:
    """The pin of these codes, checked against the weight as it is now."""
    name, spec = named(record), record.weight_spec
    if not isinstance(quantized, BlockQuantized):
        raise TypeError(
            f"{name}: pin takes a BlockQuantized (of qnoise.quantize) or None, not {type(quantized).__name__}"
        )
    if spec is None:
        raise ValueError(f"{name}: its weight is not quantized (fmt=None), so no codes can be pinned to it")
    if weight is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        where = "no parameter of its own" if weight is None else f"a {type(weight).__name__} on {weight.device}"
        raise ValueError(f"{name}.weight is out of reach ({where}); pin its codes before offloading or sharding")
    if weight.requires_grad:
        raise ValueError(f"{name}.weight needs gradient, {PINNED_IS_FROZEN}")
    if record.noise_during:
        raise ValueError(
            f"{name}: noise acts on its weight before it is quantized, and pinned codes leave no place for that. Patch "
            "with noise='rmsnorm', or without noise on this linear."
        )
    if quantized.shape != weight.shape or quantized.axis != 1:
        raise ValueError(
            f"{name}: the codes are of a tensor of shape {tuple(quantized.shape)} with blocks along axis "
            f"{quantized.axis}; the weight has shape {tuple(weight.shape)} and blocks along axis 1"
        )
    if _layout(quantized.spec) != _layout(spec):
        raise ValueError(f"{name}: the codes are in {quantized.spec}, and the linear was patched with {spec}")
    narrower = [d for d in (torch.bfloat16, torch.float16) if d.itemsize < weight.dtype.itemsize]
    fingerprints = {d: weight_cache.fingerprint(weight.detach().to(d)) for d in (weight.dtype, *narrower)}
    return Pin(quantized.to(weight.device), weight.dtype, fingerprints, asymmetric)


def _layout(spec: QuantSpec) -> QuantSpec:
    """The spec without what only says how scales and codes were chosen."""
    return replace(spec, scale_mode=None, rounding="nearest")


def check_pinned(record: LinearRecord, weight: Tensor) -> None:
    """Raise if the weight is not the one the pinned codes were made of."""
    pin = record.pin
    if pin is None or weight.is_meta or torch.compiler.is_compiling():
        return
    # A weight that was only stored wider since still is what it was.
    dtype = weight.dtype if weight.dtype in pin.fingerprints else pin.dtype
    if not weight_cache.same_bits(weight.detach().to(dtype), pin.fingerprints[dtype]):
        raise ValueError(
            f"{named(record)}.weight was written to after quantized codes were pinned to it (an adapter merged or "
            "unmerged, a checkpoint loaded, a step taken), so they are not its own any more. Take the pin off with "
            "linear.pin(None), or pin codes made of the weight as it is now."
        )
