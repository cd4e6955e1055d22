"""A compressed-tensors checkpoint as a model of packed linears, without ever holding the full-precision weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.integrations.layout import amax_of, unstored
from qnoise.integrations.schemes import SCHEMES, Scheme
from qnoise.nn.linear_record import LinearRecord
from qnoise.nn.packed import convert_packed
from qnoise.requirements import require


def load_packed(path: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """A checkpoint that `export` wrote as a model of packed linears, frozen: for training an adapter on it.

    The full-precision model is never in memory: the model is built without weights, and codes and scales are read into
    it file by file.

    Args:
        path: the directory.
        kwargs: for building the model from its configuration, such as `attn_implementation`.

    Returns:
        A patched model (storage="packed") in bfloat16, in eval mode, of the class that was exported.

    Raises:
        ImportError: transformers or accelerate is missing, or too old.
        FileNotFoundError: no config.json, or a shard is missing.
        ValueError: the checkpoint has another layout, or is of a class that transformers does not have; a tensor is
            missing, has another shape or has no place.
    """
    require("transformers", "qnoise.load_packed")
    require("accelerate", "qnoise.load_packed")
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path / 'config.json'} does not exist; load_packed reads what qnoise.export wrote")
    config = AutoConfig.from_pretrained(path)
    groups, ignored = _read_groups(path, getattr(config, "quantization_config", None))
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = _model_class(config)._from_config(config, dtype=torch.bfloat16, **kwargs).eval().requires_grad_(False)
    model.tie_weights()
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name not in ignored}
    schemes = {name: scheme for name in linears if (scheme := _scheme_of(name, groups)) is not None}
    parts: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, float] = {}
    for file in _files(path):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                owner, _, key = name.rpartition(".")
                if owner in schemes and key.startswith("weight"):
                    parts.setdefault(owner, {})[key] = reader.get_tensor(name)
                elif owner in schemes and key == "input_global_scale":
                    inputs[owner] = amax_of(float(reader.get_tensor(name)))
                else:
                    _place(model, name, reader.get_tensor(name))
    for name, scheme in schemes.items():
        linear, spec = linears[name], QuantSpec(scheme.weight)
        record = LinearRecord(
            name,
            nn.Linear,
            weight_spec=spec,
            act_spec=scheme.inputs,
            act_amax=inputs.get(name),
            storage="packed",
        )
        convert_packed(linear, record, unstored(name, parts.pop(name, {}), spec, linear))
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{path} has no tensor {missing[0]!r} ({len(missing)} are missing)")
    model.__dict__["_qnoise_config"] = _config(schemes, ignored, inputs)
    return cast(nn.Module, model)


def _config(schemes: Mapping[str, Scheme], ignored: tuple[str, ...], inputs: Mapping[str, float]) -> PatchConfig:
    """What the model would have been patched with."""
    first, *others = dict.fromkeys(schemes.values())
    plan = {"*": QuantSpec(first.weight)}
    plan |= {name: QuantSpec(scheme.weight) for name, scheme in schemes.items() if scheme in others}
    act = next((scheme.inputs for scheme in schemes.values() if scheme.inputs is not None), None)
    return PatchConfig(plan, act, exclude=ignored, storage="packed", act_amax=inputs or None)


def _model_class(config: Any) -> Any:
    """The class of transformers that the checkpoint was saved from."""
    import transformers

    names = list(getattr(config, "architectures", None) or ())
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ValueError(
            f"the checkpoint is of {names[0] if names else 'no architecture'}, which transformers "
            f"{transformers.__version__} does not have; load_packed runs no code from a checkpoint"
        )
    return found


def _read_groups(path: Path, config: Any) -> tuple[list[tuple[tuple[str, ...], Scheme]], tuple[str, ...]]:
    """(targets, scheme) of each group, and the names to leave alone."""
    values = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    values = values.get("quantization_config", values) or values
    groups = []
    for group in (values.get("config_groups") or {}).values():
        layout, quantizes = group.get("format") or values.get("format"), bool(group.get("input_activations"))
        scheme = next((s for s in SCHEMES if s.layout == layout and bool(s.inputs) == quantizes), None)
        groups.append((tuple(group.get("targets") or ()), scheme))
    known = [(targets, scheme) for targets, scheme in groups if scheme is not None]
    if values.get("quant_method") != "compressed-tensors" or not groups or len(known) < len(groups):
        raise ValueError(
            f"{path}: its quantization_config has method {values.get('quant_method')!r} and format "
            f"{values.get('format')!r}; load_packed reads what qnoise.export wrote"
        )
    return known, tuple(values.get("ignore") or ())


def _scheme_of(name: str, groups: list[tuple[tuple[str, ...], Scheme]]) -> Scheme | None:
    return next((scheme for targets, scheme in groups if name in targets or "Linear" in targets), None)


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
        module = None
    if module is not None and key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    elif module is not None and key in module._buffers:
        module._buffers[key] = tensor
    else:
        raise ValueError(f"the checkpoint has {name!r}, for which {type(model).__name__} has no place")
