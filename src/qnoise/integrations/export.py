"""Patched models as compressed-tensors checkpoints.

`export` writes the codes and scales of the effective weights byte for byte; nothing is quantized again by a library.
Decompressing them is what the forward used: the exporter decodes its own bytes by the loader's rule and compares before
it writes. transformers loads the result through the package compressed-tensors; `load_packed` loads it here.

`qnoise.integrations.schemes` says what can be expressed, `qnoise.integrations.layout` what the bytes are.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.integrations.layout import check_decoded, stored
from qnoise.integrations.merge import merged_codes
from qnoise.integrations.schemes import (
    Scheme,
    check_expressible,
    check_shared_scales,
    check_siblings,
    refuse_matrices,
    schemes_of,
)
from qnoise.names import canonical_name
from qnoise.nn.linear import FakeQuantLinear
from qnoise.patch import patch_config, quiet
from qnoise.requirements import require
from qnoise.rl.weights import rollout_weights
from qnoise.spelling import check_choice

ADAPTER_DIRECTORY = "adapter"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the directory.
        preset: the scheme, by the name compressed-tensors has for it; of several, joined by " + ".
        quantized: names of the linears stored as codes.
        ignored: names of the linears, and of other holders of matrices than embeddings, that are stored as they are.
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
    codes as they are. The model is left as it is. A tokenizer is saved beside it by
    `tokenizer.save_pretrained(path)`, afterwards.

    Args:
        model: patched with mxfp4, nvfp4 and mxfp8_e4m3, one for all linears or a plan of several, in bfloat16, the
            dtype compressed-tensors decodes to.
        path: a directory that does not exist, or is empty.
        adapters: of a PEFT model. "separate" writes the base, and the adapter to `path`/adapter: on top of the base it
            computes what was trained. "merged" writes Q(W + BA), which is another model than the Q(W) + BA that was
            trained; `merge_error` of the report says by how much.

    Raises:
        ImportError: transformers or compressed-tensors is missing, or too old.
        FileExistsError: the directory has something in it.
        ValueError: not patched; a format, rotation, macro-block, residual or width that the layout cannot express; an
            activation format whose scales the loader computes differently, or that lacks the static scale it needs
            (`PatchConfig(act_amax=)`); another dtype than bfloat16; a weight that is rounded stochastically or out of
            reach (offloaded); fused experts; a model that transformers stores under other names; siblings that engines
            fuse (q/k/v, gate/up) treated differently; a weight with NaN or Inf. Each is named; nothing is written.
    """
    check_choice("adapters", adapters, ("separate", "merged"))
    require("transformers", "qnoise.export")
    require("compressed-tensors", "qnoise.export")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and not empty; export writes into a new directory")
    if patch_config(model) is None:
        raise ValueError(f"{type(model).__name__} is not patched; call qnoise.patch_model(model) first")
    inner: Any = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not callable(getattr(type(inner), "save_pretrained", None)):
        raise ValueError(f"{type(inner).__name__} has no save_pretrained: export writes transformers models")
    linears = {canonical_name(name): m for name, m in inner.named_modules() if isinstance(m, nn.Linear)}
    refuse_matrices(inner)
    chosen = {name: m for name, m in linears.items() if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec}
    schemes = schemes_of(chosen)
    check_expressible(chosen)
    check_siblings(schemes, linears)

    merged = merged_codes(model, chosen) if adapters == "merged" else {}
    codes = {name: merged[name][0] if name in merged else m.quantized() for name, m in chosen.items()}
    check_shared_scales(codes, chosen)
    tensors: dict[str, Tensor] = {}
    with quiet(model), warnings.catch_warnings():
        # It warns of quantized inputs: whoever loads this checkpoint is told of them by its configuration.
        warnings.filterwarnings("ignore", message=".*quantize their input")
        for name, tensor in rollout_weights(model, merge_adapters=adapters == "merged", quantized=True):
            owner = name.removesuffix(".weight")
            if owner not in codes:
                tensors[name] = tensor.detach().contiguous()
            else:
                parts = stored(owner, codes[owner], chosen[owner]._qnoise.act_amax)
                check_decoded(owner, parts, codes[owner].dequantize() if owner in merged else tensor)
                tensors |= {f"{owner}.{key}": value for key, value in parts.items()}
    ignored = tuple(name for name in _with_matrices(inner) if name not in chosen)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    _save(inner, path, tensors)
    _write_config(path, schemes, ignored)
    adapter = None
    if adapters == "separate" and inner is not model:
        adapter = path / ADAPTER_DIRECTORY
        cast(Any, type(model)).save_pretrained(model, adapter)
    return ExportReport(
        path,
        " + ".join(dict.fromkeys(scheme.preset for scheme in schemes.values())),
        tuple(chosen),
        ignored,
        nbytes,
        adapter,
        {name: error for name, (_, error) in merged.items()},
    )


def _save(model: Any, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save the model with these tensors, under these names and no others.

    transformers stores some models under other names than their modules have: it splits fused experts, for one. What
    reads a compressed checkpoint then takes them for quantized, since neither targets nor exceptions name them.
    """
    from safetensors import safe_open

    existed = path.exists()
    type(model).save_pretrained(model, path, state_dict=dict(tensors))
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            renamed = [name for name in reader.keys() if name not in tensors]  # noqa: SIM118 (no mapping)
        if renamed:
            for each in path.iterdir():
                each.unlink()
            if not existed:
                path.rmdir()
            raise ValueError(
                f"{type(model).__name__}: transformers stores it under other names than its modules have, such as "
                f"{renamed[0]}, and reads what is stored so as quantized in a compressed checkpoint. qnoise.bake "
                "writes the values as an ordinary checkpoint."
            )


def _write_config(path: Path, schemes: Mapping[str, Scheme], ignored: tuple[str, ...]) -> None:
    """Put the schemes into the checkpoint's config.json.

    One scheme is written for the class of linears, less the names to ignore. Of several, each has the names of its own.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    different = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, scheme in enumerate(different):
        names = [name for name, other in schemes.items() if other == scheme]
        group = preset_name_to_scheme(scheme.preset, names if len(different) > 1 else ["Linear"])
        group.format = cast(Any, scheme.layout)
        groups[f"group_{number}"] = group
    layouts = {scheme.layout for scheme in different}
    config = QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status=cast(Any, "compressed"),
        ignore=list(ignored),
    )
    ModelCompressor(quantization_config=config).update_config(path)


def _with_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a matrix of their own, by canonical name: what an engine may take for quantized. No adapters."""
    apart = nn.Embedding, nn.modules.conv._ConvNd, nn.ParameterDict, nn.ParameterList
    found = {}
    for path, module in model.named_modules():
        name = canonical_name(path)
        adapter = any(part.startswith("lora_") for part in name.split("."))
        matrices = isinstance(module, nn.Linear) or any(
            p is not None and p.dim() > 1 for p in module._parameters.values()
        )
        if matrices and not adapter and not isinstance(module, apart):
            found[name] = module
    return found
