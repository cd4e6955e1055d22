"""`summary(model)`: what is patched, what is not and why, and what it weighs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.nn import weight_cache
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.matrices import FakeQuantMatrices
from qnoise.nn.packed import PackedLinear
from qnoise.nn.patched import Patched
from qnoise.nn.readers import WeightReader
from qnoise.patch import patch_config
from qnoise.targets import decide

# The names under which the field ships a weight format with 16-bit activations, and with activations of its own.
_PRESETS = {
    ("mxfp4", None): "MXFP4A16",
    ("nvfp4", None): "NVFP4A16",
    ("mxfp8_e4m3", None): "MXFP8A16",
    ("mxfp4", "mxfp4"): "MXFP4",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("mxfp8_e4m3", "mxfp8_e4m3"): "MXFP8",
}


@dataclass(frozen=True)
class PatchSummary:
    """Prints as a table.

    Attributes:
        patched: canonical name -> what the module is now.
        skipped: canonical name -> why it is left alone.
        bits_per_weight: mean over the quantized weights, scales included; None if none is quantized.
        nbytes: bytes of all parameters as they were (before), and now (after): with the kept Q(W) beside them, or with
            packed weights in their place.
        nbytes_deployed: what the quantized weights would take in their formats, and the rest as it is.
        trainable, parameters: number of trainable and of all parameters, packed weights included.
        preset: the field's name for this scheme (compressed-tensors, vLLM), or None if it has none.
    """

    patched: dict[str, str]
    skipped: dict[str, str]
    bits_per_weight: float | None
    nbytes: tuple[int, int]
    nbytes_deployed: int
    trainable: int
    parameters: int
    preset: str | None
    kinds: dict[str, str] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} modules patched, {len(self.skipped)} left alone"]
        for title, entries in (("patched", self.patched), ("left alone", self.skipped)):
            lines += [f"  {title}:"] if entries else []
            for (kind, pattern, what), count in _grouped(entries, self.kinds).items():
                lines.append(f"    {count:4d} x {pattern:<44} {kind:<6} {what}")
        if self.bits_per_weight is not None:
            scheme = f" ({self.preset})" if self.preset else ""
            lines.append(f"  bits per quantized weight: {self.bits_per_weight:.4g}{scheme}")
        before, after = self.nbytes
        why = (
            "quantized weights are kept beside the weights" if after > before else "packed weights replace the weights"
        )
        more = "" if after == before else f", {after / before:.2f}x: {why}"
        lines.append(f"  memory of the parameters: {_size(before)} before, {_size(after)} now{more}")
        lines.append(f"  stored in these formats they would take {_size(self.nbytes_deployed)}")
        share = 100 * self.trainable / max(1, self.parameters)
        lines.append(f"  trainable parameters: {self.trainable:,} of {self.parameters:,} ({share:.3g} %)")
        return "\n".join(lines)


def summary(model: nn.Module) -> PatchSummary:
    """List every linear and norm of the model: patched, or left alone and why.

    Raises:
        ValueError: the model is not patched.
    """
    config = patch_config(model)
    if config is None:
        raise ValueError(f"{type(model).__name__} is not patched; call qnoise.patch_model(model) first")
    patched: dict[str, str] = {}
    skipped: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for d in decide(model, config):
        kinds[d.name] = d.kind
        if isinstance(d.module, WeightReader) == bool(d.reads) and isinstance(d.module, Patched):
            patched[d.name] = _describe(d.module, config)
        else:
            skipped[d.name] = d.reason or "added after patching; patch_model with the same config converts it"
    quantized: dict[int, tuple[int, int, QuantSpec]] = {}
    packed_before = packed_after = packed_count = pinned = 0
    for module in model.modules():
        if isinstance(module, FakeQuantMatrices):
            for name, spec in module._qnoise.specs.items():
                matrices = module._parameters[name]
                if matrices is not None:
                    quantized[id(matrices)] = (matrices.numel(), matrices.nbytes, spec)
        if not isinstance(module, FakeQuantLinear) or module._qnoise.weight_spec is None:
            continue
        if isinstance(module, PackedLinear):
            weight = module.quantized_weight
            dense = weight.shape.numel() * weight.dtype.itemsize
            quantized[id(module)] = (weight.shape.numel(), dense, weight.spec)
            packed_before += dense
            packed_after += weight.nbytes
            packed_count += weight.shape.numel()
        elif (parameter := module._parameters["weight"]) is not None:
            quantized[id(parameter)] = (parameter.numel(), parameter.nbytes, module._qnoise.weight_spec)
            if module._qnoise.pin is not None:
                pinned += module._qnoise.pin.quantized.nbytes
    parameters = {id(p): p for p in model.parameters()}
    held = sum(p.nbytes for p in parameters.values())
    kept = sum(weight_cache.cached_nbytes(p) for p in parameters.values())
    before = held + packed_before
    bits = sum(count * spec.bits_per_element for count, _, spec in quantized.values())
    weights = sum(count for count, _, _ in quantized.values())
    return PatchSummary(
        patched=patched,
        skipped=skipped,
        bits_per_weight=bits / weights if weights else None,
        nbytes=(before, held + kept + pinned + packed_after),
        nbytes_deployed=before - sum(dense for _, dense, _ in quantized.values()) + round(bits / 8),
        trainable=sum(p.numel() for p in parameters.values() if p.requires_grad),
        parameters=sum(p.numel() for p in parameters.values()) + packed_count,
        preset=_preset(model),
        kinds=kinds,
    )


def _describe(module: Patched, config: PatchConfig) -> str:
    record = module._qnoise
    parts = []
    if isinstance(module, FakeQuantLinear):
        linear = module._qnoise
        parts.append(str(linear.weight_spec) if linear.weight_spec else "full-precision weight")
        if isinstance(module, PackedLinear):
            parts.append("packed")
        if linear.pin is not None:
            parts.append("pinned codes")
        if linear.act_spec is not None:
            static = "" if linear.act_amax is None else f", static scale for {linear.act_amax:g}"
            parts.append(f"input {linear.act_spec}{static}")
        if len(linear.scale_group) > 1:
            parts.append(f"per-tensor scale shared by {len(linear.scale_group)}")
    if isinstance(module, FakeQuantMatrices):
        specs = module._qnoise.specs
        same = len(set(map(str, specs.values()))) == 1 and len(specs) == len(module._qnoise.axes)
        parts.append(str(next(iter(specs.values()))) if same else ", ".join(f"{k}: {v}" for k, v in specs.items()))
        parts.append("in " + ", ".join(module._qnoise.axes)) if len(module._qnoise.axes) > 1 and same else None
        if module._qnoise.act_spec is not None:
            parts.append(f"input {module._qnoise.act_spec}")
        elif config.act_spec is not None:
            parts.append("inputs in full precision")
    if isinstance(module, WeightReader):
        parts.append(f"reads the quantized weights of {', '.join(module._qnoise.children)}")
        if config.act_spec is not None:
            parts.append("inputs there in full precision")
    if record.noise_during:
        parts.append("noise in " + ", ".join(record.noise_during))
    return "; ".join(parts)


def _preset(model: nn.Module) -> str | None:
    schemes = {
        (m._qnoise.weight_spec.fmt, m._qnoise.act_spec.fmt if m._qnoise.act_spec else None)
        for m in model.modules()
        if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec is not None
    }
    return _PRESETS.get(schemes.pop()) if len(schemes) == 1 else None


def _grouped(entries: dict[str, str], kinds: dict[str, str]) -> Counter[tuple[str, str, str]]:
    """Names that differ in their indices only are one row."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for name, what in entries.items():
        rows[kinds.get(name, ""), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), what] += 1
    return rows


def _size(nbytes: int) -> str:
    exponent = min(3, max(0, (nbytes.bit_length() - 1) // 10))
    return f"{nbytes / 1024**exponent:.4g} {('B', 'KiB', 'MiB', 'GiB')[exponent]}"
