"""Patched models as compressed-tensors checkpoints, and back.

`export` writes the codes and scales of the effective weights byte for byte; nothing is quantized again by a library.
Decompressing them is what the forward used: the exporter decodes its own bytes by the loader's rule and compares before
it writes. transformers loads the result through the package compressed-tensors; `load_packed` loads it here, without
ever holding the full-precision weights.

Layout of a linear (out N, in K), as compressed-tensors 0.20 names it:

    MXFP4   weight_packed uint8 (N, K/2), low nibble first;  weight_scale uint8 (N, K/32), E8M0
    NVFP4   weight_packed uint8 (N, K/2);  weight_scale float8_e4m3fn (N, K/16);  weight_global_scale fp32 (1,)
    MXFP8   weight float8_e4m3fn (N, K);  weight_scale uint8 (N, K/32), E8M0

with value = code * scale for MX, code * (scale / global_scale) in fp32 for NVFP4, rounded to bfloat16 once.

Quantized inputs are computed by whoever loads the checkpoint. For MXFP4 that is this package's rule `even`. For NVFP4
it is `two_level` with a static scale, but compressed-tensors 0.20 divides the block's amax by 6 in the dtype of the
input, bfloat16, before it rounds the scale: in some blocks another scale comes out there than here, where it is fp32.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.integrations.merge import merged_codes
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear, LinearRecord
from qnoise.nn.matrices import FakeQuantMatrices
from qnoise.nn.packed import convert_packed
from qnoise.packing import BlockQuantized
from qnoise.patch import SIBLINGS, patch_config, quiet
from qnoise.rl.weights import rollout_weights
from qnoise.spelling import check_choice

# (weight format, input format) -> the preset's name and the format string of compressed-tensors.
PRESETS = {
    ("mxfp4", None): ("MXFP4A16", "mxfp4-pack-quantized"),
    ("mxfp4", "mxfp4"): ("MXFP4", "mxfp4-pack-quantized"),
    ("nvfp4", None): ("NVFP4A16", "nvfp4-pack-quantized"),
    ("nvfp4", "nvfp4"): ("NVFP4", "nvfp4-pack-quantized"),
    ("mxfp8_e4m3", None): ("MXFP8A16", "mxfp8-quantized"),
}
ADAPTER_DIRECTORY = "adapter"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the directory.
        preset: the scheme, by the name compressed-tensors has for it.
        quantized: names of the linears stored as codes.
        ignored: names of the linears stored as they are.
        nbytes: bytes of all tensors written for the model.
        adapter: directory of the adapter, or None.
        merge_error: with adapters="merged": name -> ||Q(W + BA) - (Q(W) + BA)|| / ||Q(W) + BA||, how far the exported
            weight is from the one that was trained.
    """

    path: Path
    preset: str
    quantized: tuple[str, ...]
    ignored: tuple[str, ...]
    nbytes: int
    adapter: Path | None
    merge_error: Mapping[str, float]


@torch.no_grad()
def export(model: nn.Module, path: str | os.PathLike[str], *, adapters: str = "separate") -> ExportReport:
    """Write a patched transformers model, PEFT-wrapped or not, as a compressed-tensors checkpoint.

    The exported weights are those of the forward without noise: the scales of every scale mode, pinned codes and packed
    codes as they are. The model is left as it is.

    Args:
        model: patched with one of mxfp4, nvfp4 and mxfp8_e4m3, in bfloat16, the dtype compressed-tensors decodes to.
        path: a directory that does not exist, or is empty.
        adapters: of a PEFT model. "separate" writes the base, and the adapter to `path`/adapter: on top of the base it
            computes what was trained. "merged" writes Q(W + BA), which is another model than the Q(W) + BA that was
            trained; `merge_error` of the report says by how much.

    Raises:
        ImportError: compressed-tensors is missing.
        FileExistsError: the directory has something in it.
        ValueError: not patched; several formats at once; a format, rotation, macro-block, residual or width that the
            layout cannot express; an activation format whose scales the loader computes differently, or that lacks the
            static scale it needs (`PatchConfig(act_amax=)`); another dtype than bfloat16; fused experts; siblings that
            engines fuse (q/k/v, gate/up) treated differently; a weight with NaN or Inf. Each is named; nothing is
            written.
    """
    try:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    except ImportError as error:
        raise ImportError(
            "export writes compressed-tensors checkpoints; install the package: pip install 'compressed-tensors>=0.20'"
        ) from error
    check_choice("adapters", adapters, ("separate", "merged"))
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and not empty; export writes into a new directory")
    if patch_config(model) is None:
        raise ValueError(f"{type(model).__name__} is not patched; call qnoise.patch_model(model) first")
    inner: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not callable(getattr(type(inner), "save_pretrained", None)):
        raise ValueError(f"{type(inner).__name__} has no save_pretrained: export writes transformers models")
    linears = {canonical_name(name): m for name, m in inner.named_modules() if isinstance(m, nn.Linear)}
    _refuse_experts(inner)
    chosen = {name: m for name, m in linears.items() if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec}
    preset, layout = _preset(chosen)
    _check(chosen, linears)

    merged = merged_codes(model, chosen) if adapters == "merged" else {}
    codes = {name: merged[name][0] if name in merged else m.quantized() for name, m in chosen.items()}
    tensors: dict[str, Tensor] = {}
    with quiet(model), warnings.catch_warnings():
        # It warns of quantized inputs: whoever loads this checkpoint is told of them by its configuration.
        warnings.filterwarnings("ignore", message=".*quantize their input")
        for name, tensor in rollout_weights(model, merge_adapters=adapters == "merged", quantized=True):
            owner = name.removesuffix(".weight")
            if owner not in codes:
                tensors[name] = tensor.detach().contiguous()
            else:
                stored = _stored(owner, codes[owner], chosen[owner]._qnoise)
                used = codes[owner].dequantize() if owner in merged else tensor
                _check_decoded(owner, stored, used)
                tensors |= {f"{owner}.{key}": value for key, value in stored.items()}
    adapter_names = tuple(name for name in linears if _is_adapter(name))
    ignored = tuple(name for name in linears if name not in chosen and name not in adapter_names)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = layout
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, quantization_status="compressed", ignore=list(ignored)
    )
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    type(inner).save_pretrained(inner, path, state_dict=tensors)
    ModelCompressor(quantization_config=config).update_config(path)
    adapter = None
    if adapters == "separate" and inner is not model:
        adapter = path / ADAPTER_DIRECTORY
        cast(Any, type(model)).save_pretrained(model, adapter)
    return ExportReport(
        path,
        preset,
        tuple(chosen),
        ignored,
        nbytes,
        adapter,
        {name: error for name, (_, error) in merged.items()},
    )


def load_packed(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A checkpoint that `export` wrote as a model of packed linears, frozen: for training an adapter on it.

    The full-precision model is never in memory: the model is built without weights, and codes and scales are read into
    it file by file.

    Args:
        path: the directory.
        kwargs: for `AutoModelForCausalLM.from_config`, such as `attn_implementation`.

    Returns:
        A patched model (storage="packed") in bfloat16, in eval mode.

    Raises:
        FileNotFoundError: no config.json, or a shard is missing.
        ValueError: the checkpoint has another layout; a tensor is missing.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path / 'config.json'} does not exist; load_packed reads what qnoise.export wrote")
    config = AutoConfig.from_pretrained(path)
    spec, act_spec, ignored = _read_scheme(path, getattr(config, "quantization_config", None))
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **kwargs).eval().requires_grad_(False)
    model.tie_weights()
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name not in ignored}
    parts: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, float] = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                owner, _, key = name.rpartition(".")
                if owner in linears and key.startswith("weight"):
                    parts.setdefault(owner, {})[key] = reader.get_tensor(name)
                elif owner in linears and key == "input_global_scale":
                    inputs[owner] = _amax_of(float(reader.get_tensor(name)))
                else:
                    _place(model, name, reader.get_tensor(name))
    for name, linear in linears.items():
        quantized = _unstored(name, parts.pop(name, {}), spec, linear)
        record = LinearRecord(
            name, nn.Linear, weight_spec=spec, act_spec=act_spec, act_amax=inputs.get(name), storage="packed"
        )
        convert_packed(linear, record, quantized)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{path} has no tensor {missing[0]!r} ({len(missing)} are missing)")
    patched = PatchConfig({"*": spec}, act_spec, exclude=ignored, storage="packed", act_amax=inputs or None)
    model.__dict__["_qnoise_config"] = patched
    return cast(nn.Module, model)


def _preset(chosen: Mapping[str, FakeQuantLinear]) -> tuple[str, str]:
    """The one scheme of all linears."""
    if not chosen:
        raise ValueError("no linear of the model has a quantized weight; there is nothing to export")
    schemes: dict[tuple[str, str | None], str] = {}
    for name, linear in chosen.items():
        record = linear._qnoise
        weight, act = cast(QuantSpec, record.weight_spec), record.act_spec
        for field in ("macro_block", "residual", "rotation"):
            if getattr(weight, field, None) is not None or getattr(act, field, None) is not None:
                raise ValueError(
                    f"{name}: its format is {weight}, and compressed-tensors has no place for {field}. qnoise.bake "
                    "writes the values as an ordinary checkpoint."
                )
        key = (weight.fmt, None if act is None else act.fmt)
        if key not in PRESETS:
            known = ", ".join(f"{w} with {a or '16-bit'} inputs" for w, a in PRESETS)
            raise ValueError(
                f"{name}: {weight} with {act or '16-bit'} inputs has no preset in compressed-tensors. "
                f"There are: {known}"
            )
        if act is not None and act.fmt == "mxfp4" and act.scale_mode != "even":
            raise ValueError(
                f"{name}: its input is quantized with scale_mode={act.scale_mode!r}, and compressed-tensors computes "
                "activation scales by the rule called 'even' here: loaded there, it would be another model than was "
                "trained. Train with act_fmt=QuantSpec('mxfp4', 'even')."
            )
        if act is not None and act.fmt == "nvfp4" and (record.act_amax is None or act.scale_mode != "two_level"):
            raise ValueError(
                f"{name}: an NVFP4 checkpoint with quantized inputs holds a static input scale, and this linear has "
                f"{'none' if record.act_amax is None else f'scale_mode={act.scale_mode!r}'}. Patch with "
                "PatchConfig(act_fmt='nvfp4', act_amax=...) from calibration data, or export weights only "
                "(act_fmt=None)."
            )
        schemes.setdefault(key, name)
    if len(schemes) > 1:
        (a, first), (b, second) = list(schemes.items())[:2]
        raise ValueError(
            f"{first} is {a[0]} and {second} is {b[0]} (inputs {a[1]}, {b[1]}): one scheme is written for all. Leave "
            "the others out with exclude=, or use one format."
        )
    return PRESETS[next(iter(schemes))]


def _check(chosen: Mapping[str, FakeQuantLinear], linears: Mapping[str, nn.Module]) -> None:
    for name, linear in chosen.items():
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
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        for siblings in SIBLINGS:
            if leaf not in siblings:
                continue
            names = [f"{parent}.{each}" if parent else each for each in siblings]
            apart = [each for each in names if each in linears and each not in chosen]
            if apart:
                raise ValueError(
                    f"{name} is quantized and {apart[0]} is not, but engines fuse them into one matrix and need one "
                    "scheme for both. Quantize both, or neither."
                )
            _check_same_scale([chosen[each] for each in names if each in chosen])


def _check_same_scale(siblings: list[FakeQuantLinear]) -> None:
    first = siblings[0].quantized().per_tensor_scale
    for other in siblings[1:]:
        scale = other.quantized().per_tensor_scale
        if scale is not None and first is not None and not torch.equal(scale, first):
            raise ValueError(
                f"{siblings[0]._qnoise.name} and {other._qnoise.name} have different per-tensor scales, and engines "
                "keep one for both. Patch with share_scales=True (the default)."
            )
        if siblings[0]._qnoise.act_amax != other._qnoise.act_amax:
            raise ValueError(
                f"{siblings[0]._qnoise.name} and {other._qnoise.name} read one input and have different act_amax"
            )


def _refuse_experts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantMatrices):
            raise ValueError(
                f"{name}: {type(module).__name__} holds matrices of its own, for which the layout has no names. Leave "
                f"it out with exclude={canonical_name(name)!r}."
            )


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _stored(name: str, quantized: BlockQuantized, record: LinearRecord) -> dict[str, Tensor]:
    """The tensors of one linear under their names in the checkpoint."""
    scales = quantized.scale_codes
    e4m3 = quantized.spec.block_format.scale == "e4m3"
    if bool((scales == 255).any() if not e4m3 else scales.view(torch.float8_e4m3fn).float().isnan().any()):
        raise ValueError(f"{name}.weight has NaN or Inf, which the layout cannot hold")
    if quantized.spec.block_format.element.bits == 8:
        stored = {"weight": quantized.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    else:
        stored = {"weight_packed": quantized.codes, "weight_scale": quantized.scales if e4m3 else scales}
    if quantized.per_tensor_scale is not None:
        stored["weight_global_scale"] = quantized.per_tensor_scale.reshape(1)
    if record.act_spec is not None and record.act_spec.per_tensor_scale:
        stored["input_global_scale"] = torch.tensor([448.0 * 6.0]) / torch.tensor([record.act_amax])
    return {key: value.contiguous().cpu() for key, value in stored.items()}


def _check_decoded(name: str, stored: Mapping[str, Tensor], used: Tensor) -> None:
    """Decode as the loader does, by code of its own, and compare with what the forward uses."""
    if "weight_packed" in stored:
        packed = stored["weight_packed"]
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        grid = torch.cat([grid, -grid])
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        values = grid[codes.long()]
    else:
        values = stored["weight"].float()
    scale = stored["weight_scale"]
    numbers = (scale if scale.is_floating_point() else scale.view(torch.float8_e8m0fnu)).float()
    if "weight_global_scale" in stored:
        numbers = numbers / stored["weight_global_scale"]
    blocks = values.unflatten(-1, (scale.shape[-1], -1)) * numbers[..., None]
    decoded = blocks.flatten(-2).to(torch.bfloat16)
    if not torch.equal(decoded, used.detach().cpu().to(torch.bfloat16)):
        wrong = int((decoded != used.detach().cpu()).sum())
        raise ValueError(
            f"{name}: {wrong} of {decoded.numel()} weights decoded from the checkpoint's bytes are not those of the "
            "forward. This is a fault of the exporter or of the weight's state (qnoise.refresh); nothing was written."
        )


def _amax_of(divisor: float) -> float:
    """The magnitude whose divisor 2688/amax is this one in fp32: the quotient, or a neighbour of it."""
    top, gs = torch.tensor(448.0 * 6.0), torch.tensor(divisor)
    near = top / gs
    for amax in (near, torch.nextafter(near, torch.zeros(())), torch.nextafter(near, 2 * near)):
        if torch.equal(top / amax, gs):
            return float(amax)
    raise ValueError(f"an input_global_scale of {divisor} is the quotient of 2688 by no fp32 number")


def _read_scheme(path: Path, config: Any) -> tuple[QuantSpec, QuantSpec | None, tuple[str, ...]]:
    values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    values = values.get("quantization_config", values) or values
    fmt = {layout: weight for (weight, _), (_, layout) in PRESETS.items()}.get(str(values.get("format")))
    if values.get("quant_method") != "compressed-tensors" or fmt is None:
        raise ValueError(
            f"{path}: its quantization_config has method {values.get('quant_method')!r} and format "
            f"{values.get('format')!r}; load_packed reads what qnoise.export wrote"
        )
    (group,) = values["config_groups"].values()
    act = None
    if group.get("input_activations"):
        act = QuantSpec("mxfp4", "even") if fmt == "mxfp4" else QuantSpec(fmt)
    return QuantSpec(fmt), act, tuple(values.get("ignore") or ())


def _files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist; the checkpoint is not complete")
    return [path / name for name in names]


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise ValueError(f"the checkpoint has {name!r}, for which {type(model).__name__} has no place") from None
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    elif key in module._buffers:
        module._buffers[key] = tensor
    else:
        raise ValueError(f"the checkpoint has {name!r}, for which {type(model).__name__} has no place")


def _unstored(name: str, stored: Mapping[str, Tensor], spec: QuantSpec, linear: nn.Linear) -> BlockQuantized:
    codes = stored.get("weight_packed", stored.get("weight"))
    scales, gs = stored.get("weight_scale"), stored.get("weight_global_scale")
    if codes is None or scales is None or (gs is None and spec.per_tensor_scale):
        raise ValueError(f"the checkpoint lacks codes or scales of {name} (it has: {', '.join(stored) or 'nothing'})")
    return BlockQuantized(
        codes.view(torch.uint8),
        scales.view(torch.uint8),
        None if gs is None else gs.reshape(()),
        torch.Size((linear.out_features, linear.in_features)),
        spec,
        1,
        torch.bfloat16,
    )
