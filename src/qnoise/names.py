"""One name for a module, whatever wraps the model.

Noise, plans, summaries, multipliers and exports all speak of a module by its *canonical name*: the name it has in the
stock model. PEFT, DDP, FSDP, activation checkpointing and `torch.compile` insert components of their own into
`named_modules()`; they are taken out here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

# Components that wrappers insert anywhere in a path.
_WRAPPER_COMPONENTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module"}
)


def canonical_name(name: str) -> str:
    """The stock name of a module, given its name in a wrapped model.

    Removes PEFT's `base_model.model.` prefix, `base_layer`, `original_module` and `modules_to_save.<adapter>`,
    DDP's leading `module.`, and the components of `torch.compile`, FSDP and checkpoint wrappers.

    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    'model.layers.0.self_attn.q_proj'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPER_COMPONENTS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    while "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)


def layer_index(name: str) -> int | None:
    """The index of the decoder or encoder layer a canonical name lies in, or None outside the layers.

    >>> layer_index("model.layers.12.mlp.experts.3.up_proj")
    12
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def check_layer(index: int, names: Iterable[str], model: object, argument: str = "layers") -> None:
    """Raises ValueError, naming the layers there are, if no canonical name lies in the layer `index` of `model`."""
    there = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    if index not in there:
        has = f"it has layers {there[0]} to {there[-1]}" if there else "it has none"
        raise ValueError(f"{argument} names {index!r}, and there is no such layer in {type(model).__name__}: {has}")


def matches(name: str, pattern: str) -> bool:
    """Whether a canonical name matches a glob, in full or from some component on.

    `q_proj`, `self_attn.q_proj`, `layers.3.*` and `model.layers.*.q_proj` all match
    `model.layers.3.self_attn.q_proj`, as PEFT's `target_modules` would lead one to expect.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)
