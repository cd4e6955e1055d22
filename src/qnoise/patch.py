"""`patch_model` and what goes with it: convert a model's modules in place, look at it, switch it, undo it.

    model = qnoise.patch_model(model, fmt="mxfp4", noise="rmsnorm")
    print(qnoise.summary(model))
    with qnoise.phase(model, "evaluation"):
        ...
    qnoise.unpatch_model(model)

The order with other tools: patch -> PEFT (or PEFT -> patch: the same logits), then `fully_shard`, then `torch.compile`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from qnoise.config import NoiseConfig, PatchConfig, differences, rotation_warning
from qnoise.config_file import read_config, save_as_before, save_with_config
from qnoise.formats import QuantSpec
from qnoise.nn import weight_cache
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.linear_record import LinearRecord
from qnoise.nn.matrices import FakeQuantMatrices, MatricesRecord, matrices_class, matrix_axes
from qnoise.nn.norm import noisy_class
from qnoise.nn.packed import PackedLinear, check_packed, convert_packed, pack, restore_packed
from qnoise.nn.patched import PHASES, Patched, PatchRecord, check_forward, convert, restore
from qnoise.nn.readers import ReaderRecord, reader_class
from qnoise.nn.sharding import check_whole, check_whole_model, local_part
from qnoise.nn.shared_scale import kept_amax, weight_amax
from qnoise.packing import BlockQuantized
from qnoise.spelling import check_choice, nearest
from qnoise.targets import CONVERTIBLE_LINEARS, Decision, check_layers, decide, matrix_specs, unmatched_patterns

Model = TypeVar("Model", bound=nn.Module)

# Linears that serving engines fuse into one matrix, hence keep one per-tensor scale for: attention's inputs, the gated
# MLP's inputs (in two namings), and the two down-projections of multi-head latent attention.
SIBLINGS = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
)


def patch_model(
    model: Model,
    fmt: Any = "mxfp4",
    *,
    act_fmt: str | QuantSpec | None = None,
    noise: str | NoiseConfig | None = None,
    include: Any = None,
    exclude: Any = None,
    layers: Any = None,
    storage: str = "auto",
    config: PatchConfig | str | os.PathLike[str] | None = None,
) -> Model:
    """Convert a model's linears (and norms) in place, so that its forward sees quantized weights, and noise.

    Args:
        model: any `nn.Module`; a transformers model, PEFT-wrapped or not.
        fmt, act_fmt, noise, include, exclude, layers, storage: see `PatchConfig`.
        config: a `PatchConfig` instead of the arguments above; or the path of a qnoise_config.json, or of a directory
            that holds one, as `save_pretrained` of a patched model leaves it.

    Returns:
        The same object. Output head, embeddings, adapter matrices, MoE routers and gates, and the per-head norms of
        queries and keys are left alone; `summary` lists every module with the reason. Patching again with
        the same config does nothing to what is converted already.

    Raises:
        ValueError: unknown format, storage, phase or noise target; a pattern or layer that matches nothing; nothing to
            convert; noise asked of a model without RMSNorms; a module whose forward another patcher replaced; a model
            patched with another config; a sharded weight; storage="packed" of a weight that needs gradient, is shared
            with another module or is offloaded. The model is then as it was.
        TypeError: `model` is not a module, or an argument is of the wrong type.

    Warns:
        UserWarning: a rotation in NVFP4 without searched scales, which loses accuracy on heavy tails.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; patch_model takes a torch.nn.Module")
    given = {"act_fmt": act_fmt, "noise": noise, "include": include, "exclude": exclude, "layers": layers}
    if config is None:
        config = PatchConfig(
            fmt, act_fmt, noise=noise, include=include, exclude=exclude or (), layers=layers, storage=storage
        )
    elif fmt != "mxfp4" or storage != "auto" or any(value is not None for value in given.values()):
        raise ValueError("patch_model was given config= and other arguments beside it; put them into the PatchConfig")
    elif not isinstance(config, PatchConfig):
        config = read_config(config)
    present = patch_config(model)
    if present is not None and present != config:
        raise ValueError(
            f"the model is patched already, with another config ({differences(present, config)}). "
            "Call qnoise.unpatch_model(model) first."
        )
    check_whole_model(model)
    decisions = decide(model, config)
    _check(model, config, decisions)
    if present is None and (hurts := rotation_warning(config)):
        warnings.warn(hurts, UserWarning, stacklevel=2)
    _apply(decisions, config)
    if present is None:
        model.__dict__["_qnoise_config"] = config
        save_with_config(model)
    return model


def unpatch_model(model: Model, dequantize: bool = False) -> Model:
    """Restore the stock classes. Parameters were never written to, so logits are the stock ones, bit for bit.

    A model that is not patched is returned as it is.

    Args:
        model: a patched model.
        dequantize: with storage="packed" the weights before quantization are gone. True: restore stock linears that
            hold Q(W), frozen, as `bake` does.

    Raises:
        ValueError: there are packed linears and `dequantize` is false. The model is then as it was.
    """
    if not dequantize:
        _refuse_packed(model, "unpatch_model(model, dequantize=True) restores stock linears that hold Q(W)")
    for module in model.modules():
        _forget(module)
        if isinstance(module, PackedLinear):
            restore_packed(module)
        elif isinstance(module, Patched):
            restore(module)
        module.__dict__.pop("_qnoise_config", None)
        save_as_before(module)
    return model


@torch.no_grad()
def bake(model: Model) -> Model:
    """Write Q(W) into the weights and restore the stock classes: stock linears that compute what the patched did.

    Activation quantization and noise go away. Not reversible.

    Raises:
        ValueError: a quantized weight is shared with a module that is not quantized (a tied embedding).
    """
    # Packed linears hold nothing but Q(W): unpatching writes it out.
    quantized: list[tuple[Any, str]] = [(m, key) for m in model.modules() for key in _quantized_names(m)]
    tied = {id(m._parameters[key]) for m, key in quantized}
    for name, module in model.named_modules():
        if not isinstance(module, FakeQuantLinear | FakeQuantMatrices):
            shared = [key for key, p in module._parameters.items() if id(p) in tied]
            if shared:
                raise ValueError(
                    f"{name}.{shared[0]} shares its parameter with a quantized linear: baking would quantize it too. "
                    "Leave that linear out with exclude=, or untie the weights first."
                )
    baked: dict[int, tuple[Any, str, Tensor]] = {}
    with quiet(model):
        for m, key in quantized:
            weight = effective_weight_of(m, key)
            first, _, other = baked.setdefault(id(m._parameters[key]), (m, key, weight.clone()))
            if first is not m and not torch.equal(weight, other):
                raise ValueError(
                    f"{first._qnoise.name} and {m._qnoise.name} share one parameter and use different quantized "
                    "weights, which one parameter cannot hold. Treat them alike (format, pinned codes), or untie them."
                )
    for module, key, weight in baked.values():
        parameter = module._parameters[key]
        if parameter is not None:
            parameter.copy_(weight)
    return unpatch_model(model, dequantize=True)


def pack_model(model: Model) -> Model:
    """Switch a patched model to storage="packed" in place: it keeps the codes it uses now, pinned ones as they are, and
    lets go of the weights.

    Returns:
        The same object. A forward gives what it gave, bit for bit. Pins are gone, as their codes are all there is.

    Raises:
        ValueError: the model is not patched; a weight needs gradient, is shared with another module, is offloaded or
            rounded stochastically, or has noise. The model is then as it was.
    """
    config = patch_config(model)
    if config is None:
        raise ValueError(f"{type(model).__name__} is not patched; call qnoise.patch_model(model) first")
    config = replace(config, storage="packed")
    linears = [
        m
        for m in model.modules()
        if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec is not None and not isinstance(m, PackedLinear)
    ]
    _check_packable(model, [Decision("", m._qnoise.name, m, "linear") for m in linears])
    for m in linears:
        check_packed(m, m._qnoise.name)
        check_forward(m, m._qnoise.name)
    codes = [m.quantized() for m in linears]
    for m, quantized in zip(linears, codes, strict=True):
        m._qnoise.pin, m._qnoise.storage = None, "packed"
        convert_packed(m, m._qnoise, quantized)
    for module in model.modules():
        if "_qnoise_config" in module.__dict__:
            module.__dict__["_qnoise_config"] = config
    return model


def refresh(model: nn.Module) -> None:
    """Forget every kept Q(W): for after a write to a weight's `.data` that torch cannot see."""
    for module in model.modules():
        _forget(module)


def state(model: nn.Module) -> dict[str, Any]:
    """What is on right now.

    Returns:
        "patched" (bool), "formats" and "act_formats" (spec -> number of linears, and of stacks of experts), "pinned"
        (number of linears whose codes are pinned), "full_precision" (bool), "phase", and
        "noise": None, or "sigma" (the largest), "seed", "step", "active" and "modules" (canonical name -> sigma).
    """
    linears = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
    others: list[Any] = [m for m in model.modules() if isinstance(m, FakeQuantMatrices)]
    patched = list(patched_modules(model))
    noisy = [m for m in patched if m._qnoise.noise_during]
    phases = sorted({m._qnoise.phase for m in patched})
    noise = None
    if noisy:
        states = [m.noise_state() for m in noisy]
        loudest = max(states, key=lambda s: s["sigma"])
        noise = {key: loudest[key] for key in ("sigma", "seed", "step")}
        noise["active"] = any(s["active"] for s in states)
        noise["modules"] = {s["name"]: s["sigma"] for s in states}
    return {
        "patched": bool(patched),
        "formats": _count(chain((m._qnoise.weight_spec for m in linears), *(m._qnoise.specs.values() for m in others))),
        "act_formats": _count(m._qnoise.act_spec for m in [*linears, *others]),
        "pinned": sum(m._qnoise.pin is not None for m in linears),
        "full_precision": any(m._qnoise.full_precision for m in patched),
        "phase": phases[0] if len(phases) == 1 else phases or None,
        "noise": noise,
    }


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The stock model for a while: no quantization, no noise.

    Raises:
        ValueError: storage="packed" has let go of the full-precision weights.
    """
    _refuse_packed(model, "keep a stock model beside it, or patch with another storage")
    with _switched(model, "full_precision", True):
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No noise for a while; quantization stays on."""
    with _switched(model, "quiet", True):
        yield


@contextmanager
def phase(model: nn.Module, name: str) -> Iterator[None]:
    """Say where training is: "rollout", "training" (also outside any phase) or "evaluation".

    Noise acts in the phases its `NoiseConfig` names, never in evaluation; quantization acts in all of them.
    `module.training` plays no part.
    """
    check_choice("phase", name, PHASES)
    with _switched(model, "phase", name):
        yield


def patched_modules(model: nn.Module) -> Iterator[Patched]:
    """The converted modules, in the order of `modules()`."""
    return (module for module in model.modules() if isinstance(module, Patched))


def patch_config(model: nn.Module) -> PatchConfig | None:
    """The config the model, or the model inside its wrappers, was patched with."""
    return next((m.__dict__["_qnoise_config"] for m in model.modules() if "_qnoise_config" in m.__dict__), None)


def _check(model: nn.Module, config: PatchConfig, decisions: list[Decision]) -> None:
    check_layers(model, decisions, config)
    wrong = unmatched_patterns(decisions, config)
    if wrong:
        argument, value = wrong[0]
        raise ValueError(
            f"{argument} names {value!r}, which matches no linear or norm of the model.{_nearest(value, decisions)} "
            f"{_existing(decisions)}"
        )
    converted = [d for d in decisions if not d.reason]
    if (config.plan or config.act_spec) and not any(d.weight_spec or d.act_spec for d in converted):
        reasons = "; ".join(f"{d.name}: {d.reason}" for d in decisions[:4] if d.kind == "linear")
        raise ValueError(f"no linear of {type(model).__name__} would be quantized. {reasons or _existing(decisions)}")
    noise = config.noise_config
    if noise is not None and not any(d.noise_during for d in converted):
        kinds = sorted({type(d.module).__name__ for d in decisions if d.kind == "norm"}) or ["none"]
        raise ValueError(
            f"noise on {noise.target!r} was asked for, but no such module of {type(model).__name__} qualifies "
            f"(its norms: {', '.join(kinds)}). noise='linear' puts it on the linear weights; noise=None leaves it out."
        )
    if config.storage == "packed":
        _check_packable(model, [d for d in converted if not isinstance(d.module, Patched)])
    for d in converted:
        if not isinstance(d.module, Patched):
            check_forward(d.module, d.name)
            for key, parameter in d.module._parameters.items():
                check_whole(parameter, f"{d.name}.{key}")


def _check_packable(model: nn.Module, converted: list[Decision]) -> None:
    """Packing one of the holders of a tied parameter would untie it."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    for d in converted:
        weight = d.module._parameters.get("weight")
        shared = (
            holders.get(id(weight), [])
            if weight is not None and d.kind == "linear" and not matrix_axes(d.module)
            else []
        )
        if len(shared) > 1:
            raise ValueError(
                f"{' and '.join(shared)} are one parameter, and storage='packed' would untie them. Leave "
                f"{d.name} out with exclude=, or use storage='cached'."
            )


def _nearest(value: str, decisions: list[Decision]) -> str:
    leaves = sorted({d.name.rpartition(".")[2] for d in decisions})
    near = nearest(value.rpartition(".")[2], leaves, cutoff=0.5)
    return f" Did you mean {near!r}?" if near else ""


def _existing(decisions: list[Decision]) -> str:
    names = [d.name for d in decisions if d.reason != "adapter matrix"]
    return "It has, among others: " + ", ".join(names[:6]) if names else "It has no linears and no norms."


def _apply(decisions: list[Decision], config: PatchConfig) -> None:
    todo = [d for d in decisions if not d.reason and not isinstance(d.module, Patched)]
    groups = _fused_groups(decisions) if config.share_scales else []
    # What may fail is done before the first module is touched. It takes the memory of the codes beside the weights.
    packed = _pack(todo, groups) if config.storage == "packed" else {}
    done: list[tuple[nn.Module, nn.Parameter | None]] = []
    try:
        for d in todo:
            weight = d.module._parameters.get("weight")
            patched_class, record = _conversion(d, config)
            if d.module in packed:
                convert_packed(d.module, cast(LinearRecord, record), packed[d.module])
            else:
                convert(d.module, patched_class, record)
            done.append((d.module, weight))
        _share_scales(groups)
    except BaseException:
        for module, weight in done:
            if isinstance(module, PackedLinear):
                restore_packed(module, weight)
            else:
                restore(module)
        raise


def _pack(todo: list[Decision], groups: list[list[nn.Module]]) -> dict[nn.Module, BlockQuantized]:
    """Codes and scales of every linear that is to be packed, siblings under their joint amax."""
    linears = {d.module: d for d in todo if d.kind == "linear" and not matrix_axes(d.module)}
    amaxes: dict[nn.Module, Tensor] = {}
    for group in groups:
        # A sibling that is packed already keeps the scale it has.
        weights = [(module._parameters.get("weight"), linears[module]) for module in group if module in linears]
        peaks = [weight_amax(weight, d.weight_spec) for weight, d in weights if weight is not None]
        for module in group:
            if module in linears and peaks:
                amaxes[module] = torch.stack([peak.to(peaks[0].device) for peak in peaks]).amax()
    return {
        module: pack(cast(nn.Linear, module), d.weight_spec, amaxes.get(module), d.name)
        for module, d in linears.items()
    }


def _conversion(d: Decision, config: PatchConfig) -> tuple[type[nn.Module], PatchRecord]:
    stock = type(d.module)
    if d.reads:
        return reader_class(stock), ReaderRecord(d.name, stock, children=d.reads)
    if d.kind == "norm":
        return noisy_class(stock), PatchRecord(d.name, stock, d.noise_during)
    if axes := matrix_axes(d.module):
        one = d.kind == "linear"
        specs = (
            matrix_specs(d.name, d.module, config) if not one else {"weight": d.weight_spec} if d.weight_spec else {}
        )
        matrices = MatricesRecord(
            d.name,
            stock,
            axes=axes,
            specs=specs,
            act_spec=d.act_spec,
            act_amax=config.static_amax(d.name) if d.act_spec is not None else None,
            storage="auto" if config.storage == "packed" else config.storage,
        )
        return matrices_class(stock, tuple(axes)), matrices
    record = LinearRecord(
        d.name,
        stock,
        d.noise_during,
        weight_spec=d.weight_spec,
        act_spec=d.act_spec,
        act_amax=config.static_amax(d.name) if d.act_spec is not None else None,
        storage=config.storage,
    )
    return CONVERTIBLE_LINEARS[stock], record


def _fused_groups(decisions: list[Decision]) -> list[list[nn.Module]]:
    """The linears that share a per-tensor scale: siblings that engines fuse, of one format that has such a scale."""
    groups: dict[Any, list[nn.Module]] = {}
    for d in decisions:
        spec = d.weight_spec
        if d.reason or spec is None or not spec.per_tensor_scale:
            continue
        parent, _, leaf = d.name.rpartition(".")
        for siblings in SIBLINGS:
            if leaf in siblings:
                groups.setdefault((parent, siblings, spec), []).append(d.module)
    return [group for group in groups.values() if len(group) > 1]


def _share_scales(groups: list[list[nn.Module]]) -> None:
    """Tell the siblings of each fused group of each other, and note their amax while the weights are at hand."""
    for group in groups:
        for module in group:
            if isinstance(module, FakeQuantLinear):
                module._qnoise.scale_group = tuple(cast(list[FakeQuantLinear], group))
                weight = None if isinstance(module, PackedLinear) else _materialised(module)
                module._qnoise.patched_amax = None if weight is None else kept_amax(weight, module._qnoise.weight_spec)


def _materialised(module: nn.Module) -> Tensor | None:
    """The weight, or what accelerate will load in its place while it is offloaded; None if neither is at hand."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.device.type != "meta":
        return weight
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None and "weight" in weights:
            return torch.as_tensor(weights["weight"])
    return None


def _refuse_packed(model: nn.Module, cure: str) -> None:
    packed = [m._qnoise.name for m in model.modules() if isinstance(m, PackedLinear)]
    if packed:
        raise ValueError(
            f"{len(packed)} linears are packed ({', '.join(packed[:3])}{', ...' if len(packed) > 3 else ''}): their "
            f"full-precision weights are gone; {cure}"
        )


@contextmanager
def _switched(model: nn.Module, field: str, value: Any) -> Iterator[None]:
    """Set one field of every record for a while."""
    before = [(module._qnoise, getattr(module._qnoise, field)) for module in patched_modules(model)]
    for record, _ in before:
        setattr(record, field, value)
    try:
        yield
    finally:
        for record, old in before:
            setattr(record, field, old)


def effective_weight_of(module: Any, name: str) -> Tensor:
    """What the forward of a converted module uses for that parameter."""
    return cast(
        Tensor, module.effective_weight(name) if isinstance(module, FakeQuantMatrices) else module.effective_weight()
    )


def _quantized_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that its forward sees quantized; what is packed is no parameter."""
    if isinstance(module, FakeQuantMatrices):
        return module.effective_names
    if not isinstance(module, FakeQuantLinear) or isinstance(module, PackedLinear):
        return ()
    return () if module._qnoise.weight_spec is None else ("weight",)


def _forget(module: nn.Module) -> None:
    names = ("weight",) if isinstance(module, FakeQuantLinear) else getattr(module, "effective_names", ())
    for name in names:
        weight = module._parameters.get(name)
        if weight is not None:
            weight_cache.forget(weight)
    for shard in module._qnoise.shards.values() if isinstance(module, Patched) else ():
        weight_cache.forget(local_part(shard))


def _count(specs: Iterator[QuantSpec | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for spec in specs:
        if spec is not None:
            counts[str(spec)] = counts.get(str(spec), 0) + 1
    return counts
