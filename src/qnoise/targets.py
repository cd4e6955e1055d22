"""Which modules of a model are converted, and why the others are not.

One walk over the model makes one `Decision` per linear, per norm and per module with matrices of its own (fused
experts, routers); `patch_model` carries the decisions out and
`summary` prints them, so what is reported is what was done.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from torch import nn

from qnoise.config import NoiseConfig, PatchConfig
from qnoise.formats import QuantSpec
from qnoise.names import canonical_name, check_layer, layer_index, matches
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.matrices import FakeQuantMatrices, matrix_axes
from qnoise.nn.norm import NoisyRMSNorm, is_rms_norm

Kind = Literal["linear", "norm", "experts", "other"]

# Stock class -> the class it becomes. Exact types: a subclass has a forward of its own. What is no nn.Linear and keeps
# its own forward is `nn.matrices`'s: `matrix_axes` is the table of those.
CONVERTIBLE_LINEARS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FakeQuantLinear}

# Libraries whose linears hold weights that are quantized already.
_QUANTIZING_LIBRARIES = {
    "bitsandbytes", "gptqmodel", "auto_gptq", "awq", "aqlm", "hqq", "eetq", "torchao", "optimum", "compressed_tensors",
}  # fmt: skip

# Deciding which expert gets a token is not a matter of a small error: routing changes.
_ROUTER = re.compile(r"^(gate|shared_expert_gate|wg|(\w+_)?router)$")
_INSIDE_ROUTER = re.compile(r"^(gate|(\w+_)?router|router_\w+)$")
# Classes that compute with no linear's weight themselves, and whose sources are long.
_GENERAL = ("peft.", "qnoise.", "transformers.modeling_utils", "transformers.generation", "transformers.integrations")
_VALUE_HEAD = re.compile(r"^(v_head|value_head)$")
_QK_NORM = re.compile(r"^(q|k|query|key)_?(layer_?)?norm$")


@dataclass(frozen=True)
class Decision:
    """What is to become of one module: it is converted if `reason` is empty.

    `reads` names the linears in it whose weights it computes with itself; it is converted to see them quantized.
    """

    path: str
    name: str
    module: nn.Module
    kind: Kind
    reason: str = ""
    weight_spec: QuantSpec | None = None
    act_spec: QuantSpec | None = None
    noise_during: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


def decide(model: nn.Module, config: PatchConfig) -> list[Decision]:
    """One decision per linear, norm and other holder of matrices, in the order of `named_modules`; after them one for
    each module that reads the weight of a converted linear past its forward."""
    heads = {id(module) for module in _heads(model)}
    adapters = _adapter_prefixes(model)
    decisions = []
    readers: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        name = canonical_name(path)
        if path.startswith(adapters):
            if _looks_linear(module):
                decisions.append(Decision(path, name, module, "linear", "adapter matrix"))
        elif _looks_linear(module):
            parent, child = _holder(model, path)
            past = _reads_weight_of(cast(Any, type(model.get_submodule(parent))), child)
            decision = _decide_linear(path, name, module, config, id(module) in heads, past == "writes")
            if past == "reads" and not decision.reason and isinstance(decision.module, nn.Linear):
                readers.setdefault(parent, []).append(child)
            decisions.append(decision)
        elif isinstance(module, NoisyRMSNorm) or "norm" in type(module).__name__.lower():
            if any(True for _ in module.children()):
                continue
            decisions.append(_decide_norm(path, name, module, config))
        elif isinstance(module, FakeQuantMatrices) or matrix_axes(module):
            decisions.append(_decide_experts(path, name, module, config))
        elif matrices := _own_matrices(module):
            reason = f"matrices of its own ({', '.join(matrices)}) that no linear holds ({type(module).__name__})"
            decisions.append(Decision(path, name, module, "other", reason))
    for path, children in readers.items():
        module = model.get_submodule(path)
        decisions.append(Decision(path, canonical_name(path), module, "other", reads=tuple(children)))
    return decisions


def _holder(model: nn.Module, path: str) -> tuple[str, str]:
    """The path of the module that holds a linear, and the name the linear has there; past the layer of PEFT or the
    wrapper that may stand between them."""
    child = canonical_name(path).rpartition(".")[2]
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] != child:
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]


def _own_matrices(module: nn.Module) -> list[str]:
    """Names of parameters used as matrices: two or more dimensions, and no embedding table or convolution."""
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd) or hasattr(module, "base_layer"):
        return []
    return [name for name, p in module._parameters.items() if p is not None and p.dim() >= 2]


def unmatched_patterns(decisions: list[Decision], config: PatchConfig) -> list[tuple[str, str]]:
    """(argument, pattern) pairs that no linear or norm of the model matches: misspelt, most likely."""
    names = [d.name for d in decisions if d.reason != "adapter matrix"]
    names += [f"{d.name}.{key}" for d in decisions if d.kind == "experts" for key in _matrix_names(d.module)]
    filters: list[tuple[str, PatchConfig | NoiseConfig]] = [("", config)]
    if config.noise_config is not None:
        filters.append(("noise ", config.noise_config))
    mappings = [("fmt", glob) for glob, _ in config.plan] + [("act_amax", glob) for glob, _ in config.static_amaxes]
    wrong = [(argument, glob) for argument, glob in mappings if not any(matches(n, glob) for n in names)]
    for prefix, each in filters:
        for argument, globs in (("include", each.include or ()), ("exclude", each.exclude)):
            wrong += [(prefix + argument, glob) for glob in globs if not any(matches(n, glob) for n in names)]
    return wrong


def check_layers(model: nn.Module, decisions: list[Decision], config: PatchConfig) -> None:
    """Raises ValueError for a layer that the config names and the model has not."""
    names = [d.name for d in decisions if d.reason != "adapter matrix"]
    for argument, each in (("layers", config), ("noise layers", config.noise_config)):
        for layer in (each.layers if each is not None else None) or ():
            check_layer(layer, names, model, argument)


def _decide_linear(
    path: str, name: str, module: nn.Module, config: PatchConfig, is_head: bool, written_past_forward: bool
) -> Decision:
    reason = _unconvertible(module)
    if not reason and written_past_forward:
        reason = "its weight is read and written past its forward"
    if reason:
        return Decision(path, name, module, "linear", reason)
    default = ""
    if is_head:
        default = "output head"
    elif is_router(name):
        default = "router or gate"
    not_quantized = _filtered(name, config, default)
    spec = None
    if not not_quantized:
        for glob, candidate in config.plan:
            if matches(name, glob):
                spec = candidate
    # An entry of the plan that says None leaves the linear alone, its input too.
    act_spec = config.act_spec if not not_quantized and (spec is not None or not config.plan) else None
    during: tuple[str, ...] = ()
    noise = config.noise_config
    if (
        noise is not None
        and noise.target == "linear"
        and not _filtered(name, noise, default)
        and not _own_forward(module)
    ):
        during = noise.during
    if spec is None and act_spec is None and not during:
        if not not_quantized:
            not_quantized = "no entry of the plan gives it a format" if config.plan else "fmt is None"
        return Decision(path, name, module, "linear", not_quantized)
    return Decision(path, name, module, "linear", "", spec, act_spec, during)


def _decide_experts(path: str, name: str, module: nn.Module, config: PatchConfig) -> Decision:
    """Fused experts. Their weights are quantized; the input of the second matrix is inside their forward, so inputs are
    not, and noise is not added."""
    specs = matrix_specs(name, module, config)
    reason = _filtered(name, config, "")
    if not reason and not specs:
        reason = "no entry of the plan gives it a format" if config.plan else "fmt is None"
    return Decision(path, name, module, "experts", reason, next(iter(specs.values()), None))


def matrix_specs(name: str, module: nn.Module, config: PatchConfig) -> dict[str, QuantSpec]:
    """The format of each matrix of a module with several: the plan's last entry that names the module or the matrix."""
    specs = {}
    for key in _matrix_names(module):
        spec = None
        for glob, candidate in config.plan:
            if matches(name, glob) or matches(f"{name}.{key}", glob):
                spec = candidate
        if spec is not None:
            specs[key] = spec
    return specs


def _decide_norm(path: str, name: str, module: nn.Module, config: PatchConfig) -> Decision:
    noise = config.noise_config
    if not isinstance(module, NoisyRMSNorm) and not is_rms_norm(module):
        weightless = "rmsnorm" in type(module).__name__.lower()
        reason = "no one-dimensional weight" if weightless else f"not an RMSNorm ({type(module).__name__})"
    elif noise is None or noise.target != "rmsnorm":
        reason = "no norm noise requested"
    else:
        default = "per-head norm of queries or keys" if _QK_NORM.match(name.rpartition(".")[2]) else ""
        reason = _filtered(name, noise, default)
    during = noise.during if noise is not None and not reason else ()
    return Decision(path, name, module, "norm", reason, noise_during=during)


def _filtered(name: str, filters: PatchConfig | NoiseConfig, default_reason: str) -> str:
    """Why include, exclude, layers or a default leave `name` out; empty if they do not."""
    if any(matches(name, glob) for glob in filters.exclude):
        return "excluded"
    if filters.layers is not None and layer_index(name) not in filters.layers:
        return "not in the requested layers"
    if filters.include is not None:
        hits = [glob for glob in filters.include if matches(name, glob)]
        if not hits:
            return "not included"
        # Naming a module overrides what is left out by default; a wildcard that happens to cover it does not.
        if any(glob.rpartition(".")[2] == name.rpartition(".")[2] for glob in hits):
            return ""
    return default_reason


def _looks_linear(module: nn.Module) -> bool:
    if hasattr(module, "base_layer") or any(True for _ in module.children()):
        return False
    if isinstance(module, nn.Linear):
        return True
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    # GPT-2's Conv1D is a linear with a transposed weight; torch's Conv1d is a convolution. The names of a model called
    # Kimi Linear say nothing.
    named = "linear" in kind.lower().removeprefix("kimilinear") or kind == "Conv1D"
    return named and (weight is not None or hasattr(module, "qweight"))


def _matrix_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(module._qnoise.axes if isinstance(module, FakeQuantMatrices) else matrix_axes(module))


def _own_forward(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantMatrices) or bool(matrix_axes(module))


@cache
def _reads_weight_of(parent: Any, child: str) -> Literal["", "reads", "writes"]:
    """Whether a class computes with the weight of one of its children itself, as mamba's mixers do with dt_proj:
    converting the child alone would have no effect there. Read from the sources of the class and its bases; what only
    asks for dtype, device or shape, or assigns, does not count. "writes": through `.data`, into what it reads."""
    weight = rf"self\.{re.escape(child)}\.weight\b"
    asks = r"(?!\s*=[^=]|\.(dtype|device|shape|size|ndim|dim|numel|requires_grad|data_ptr|is_)\b)"
    found: Literal["", "reads", "writes"] = ""
    for cls in parent.__mro__:
        source = _source(cls)
        if re.search(weight + r"\.data\b", source):
            return "writes"
        if re.search(weight + asks, source):
            found = "reads"
    return found


@cache
def _source(cls: Any) -> str:
    """Of a class that may compute with weights; empty for general bases, and where there is none (made at run time)."""
    if cls in (nn.Module, object) or cls.__module__.startswith(_GENERAL):
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def is_router(name: str) -> bool:
    """Whether a linear of this canonical name is a router or a gate of experts, or lies inside of one."""
    *above, leaf = name.split(".")
    return _ROUTER.match(leaf) is not None or any(_INSIDE_ROUTER.match(part) for part in above)


def _unconvertible(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, FakeQuantLinear | FakeQuantMatrices):
        return ""
    library = kind.__module__.partition(".")[0]
    weight = module._parameters.get("weight")
    if library in _QUANTIZING_LIBRARIES or hasattr(module, "qweight"):
        return f"already quantized by {library} ({kind.__name__})"
    if weight is not None and not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}: quantized already ({kind.__name__})"
    if kind not in CONVERTIBLE_LINEARS and not matrix_axes(module):
        return f"{kind.__module__}.{kind.__name__} is no exact nn.Linear: its forward is its own"
    return ""


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """The output embeddings: what `get_output_embeddings()` of the model or of any model inside it returns; where that
    is nothing, the linears outside the base model that give one number per label, or one (reward models, classifiers),
    and per entry of the vocabulary; TRL's value heads."""
    for path, module in model.named_modules():
        get: Any = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            yield from head.modules()
        elif callable(get):
            yield from _task_heads(module)
        if _VALUE_HEAD.match(path.rpartition(".")[2]):
            yield from module.modules()


def _task_heads(model: nn.Module) -> Iterator[nn.Module]:
    config, base = getattr(model, "config", None), getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return
    inside = {id(module) for module in base.modules()}
    sizes = {1, getattr(config, "num_labels", 1), getattr(config, "vocab_size", 1)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in inside and module.out_features in sizes:
            yield module


def _adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Paths under which PEFT keeps adapter matrices. `modules_to_save` holds copies of stock modules instead."""
    prefixes = []
    for path, module in model.named_modules():
        for layer_name in getattr(type(module), "adapter_layer_names", ()):
            if layer_name != "modules_to_save":
                prefixes.append(f"{path}.{layer_name}.")
    return tuple(prefixes)
