"""`patch_model` and what goes with it: convert a model's modules in place, look at it, switch it, undo it.

    model = qnoise.patch_model(model, fmt="mxfp4", noise="rmsnorm")
    print(qnoise.summary(model))
    with qnoise.phase(model, "evaluation"):
        ...
    qnoise.unpatch_model(model)

The order with other tools: patch -> PEFT (or PEFT -> patch: the same logits), then `fully_shard`, then `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qnoise.config import NoiseConfig, PatchConfig, differences
from qnoise.formats import QuantSpec
from qnoise.nn import weight_cache
from qnoise.nn.linear import FakeQuantLinear, LinearRecord, weight_amax
from qnoise.nn.norm import noisy_class
from qnoise.nn.patched import PHASES, Patched, PatchRecord, check_forward, convert, restore
from qnoise.spelling import check_choice, nearest
from qnoise.targets import CONVERTIBLE_LINEARS, Decision, decide, unmatched_patterns

Model = TypeVar("Model", bound=nn.Module)

# Linears that serving engines fuse into one matrix, hence keep one per-tensor scale for: attention's inputs, the gated
# MLP's inputs (in two namings), and the two down-projections of multi-head latent attention.
_SIBLINGS = (
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
    config: PatchConfig | None = None,
) -> Model:
    """Convert a model's linears (and norms) in place, so that its forward sees quantized weights, and noise.

    Args:
        model: any `nn.Module`; a transformers model, PEFT-wrapped or not.
        fmt, act_fmt, noise, include, exclude, layers, storage: see `PatchConfig`.
        config: a `PatchConfig` instead of the arguments above.

    Returns:
        The same object. Output head, embeddings, adapter matrices, MoE routers and gates, and the per-head norms of
        queries and keys are left alone; `summary` lists every module with the reason. Patching again with
        the same config does nothing to what is converted already.

    Raises:
        ValueError: unknown format, storage, phase or noise target; a pattern or layer that matches nothing; nothing to
            convert; noise asked of a model without RMSNorms; a module whose forward another patcher replaced; a model
            patched with another config; a sharded weight. The model is then as it was.
        TypeError: `model` is not a module, or an argument is of the wrong type.
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
    present = patch_config(model)
    if present is not None and present != config:
        raise ValueError(
            f"the model is patched already, with another config ({differences(present, config)}). "
            "Call qnoise.unpatch_model(model) first."
        )
    decisions = decide(model, config)
    _check(model, config, decisions)
    _apply(decisions, config)
    if present is None:
        model.__dict__["_qnoise_config"] = config
    return model


def unpatch_model(model: Model) -> Model:
    """Restore the stock classes. Parameters were never written to, so logits are the stock ones, bit for bit.

    A model that is not patched is returned as it is.
    """
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            _forget(module)
        if isinstance(module, Patched):
            restore(module)
        module.__dict__.pop("_qnoise_config", None)
    return model


@torch.no_grad()
def bake(model: Model) -> Model:
    """Write Q(W) into the weights and restore the stock classes: stock linears that compute what the patched did.

    Activation quantization and noise go away. Not reversible.

    Raises:
        ValueError: a quantized weight is shared with a module that is not quantized (a tied embedding).
    """
    quantized = [m for m in model.modules() if isinstance(m, FakeQuantLinear) and m._qnoise.weight_spec is not None]
    tied = {id(m._parameters["weight"]) for m in quantized}
    for name, module in model.named_modules():
        if not isinstance(module, FakeQuantLinear):
            shared = [key for key, p in module._parameters.items() if id(p) in tied]
            if shared:
                raise ValueError(
                    f"{name}.{shared[0]} shares its parameter with a quantized linear: baking would quantize it too. "
                    "Leave that linear out with exclude=, or untie the weights first."
                )
    with quiet(model):
        baked = {id(m._parameters["weight"]): (m, m.effective_weight().clone()) for m in quantized}
    for module, weight in baked.values():
        parameter = module._parameters["weight"]
        if parameter is not None:
            parameter.copy_(weight)
    return unpatch_model(model)


def refresh(model: nn.Module) -> None:
    """Forget every kept Q(W): for after a write to a weight's `.data` that torch cannot see."""
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            _forget(module)


def state(model: nn.Module) -> dict[str, Any]:
    """What is on right now.

    Returns:
        "patched" (bool), "formats" and "act_formats" (spec -> number of linears), "full_precision" (bool), "phase", and
        "noise": None, or "sigma" (the largest), "seed", "step", "active" and "modules" (canonical name -> sigma).
    """
    linears = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
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
        "formats": _count(m._qnoise.weight_spec for m in linears),
        "act_formats": _count(m._qnoise.act_spec for m in linears),
        "full_precision": any(m._qnoise.full_precision for m in patched),
        "phase": phases[0] if len(phases) == 1 else phases or None,
        "noise": noise,
    }


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """The stock model for a while: no quantization, no noise."""
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
    for d in converted:
        if not isinstance(d.module, Patched):
            check_forward(d.module, d.name)
        for key, parameter in d.module._parameters.items():
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"{d.name}.{key} is sharded already (DTensor). Patch first, then shard: patch_model -> PEFT -> "
                    "fully_shard. Tensor parallelism is not supported."
                )


def _nearest(value: str, decisions: list[Decision]) -> str:
    leaves = sorted({d.name.rpartition(".")[2] for d in decisions})
    near = nearest(value.rpartition(".")[2], leaves, cutoff=0.5)
    return f" Did you mean {near!r}?" if near else ""


def _existing(decisions: list[Decision]) -> str:
    names = [d.name for d in decisions if d.reason != "adapter matrix"]
    return "It has, among others: " + ", ".join(names[:6]) if names else "It has no linears and no norms."


def _apply(decisions: list[Decision], config: PatchConfig) -> None:
    done: list[nn.Module] = []
    try:
        for d in decisions:
            if not d.reason and not isinstance(d.module, Patched):
                convert(d.module, *_conversion(d, config))
                done.append(d.module)
        _share_scales(decisions, config)
    except BaseException:
        for module in done:
            restore(module)
        raise


def _conversion(d: Decision, config: PatchConfig) -> tuple[type[nn.Module], PatchRecord]:
    stock = type(d.module)
    if d.kind == "norm":
        return noisy_class(stock), PatchRecord(d.name, stock, d.noise_during)
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


def _share_scales(decisions: list[Decision], config: PatchConfig) -> None:
    """Tell the siblings of each fused group of each other, and note their amax while the weights are at hand."""
    if not config.share_scales:
        return
    groups: dict[Any, list[FakeQuantLinear]] = {}
    for d in decisions:
        spec = d.weight_spec
        if spec is None or not spec.per_tensor_scale or not isinstance(d.module, FakeQuantLinear):
            continue
        parent, _, leaf = d.name.rpartition(".")
        for siblings in _SIBLINGS:
            if leaf in siblings:
                groups.setdefault((parent, siblings, spec), []).append(d.module)
    for group in groups.values():
        for module in group if len(group) > 1 else ():
            module._qnoise.scale_group = tuple(group)
            weight = _materialised(module)
            module._qnoise.patched_amax = None if weight is None else weight_amax(weight)


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


def _forget(module: FakeQuantLinear) -> None:
    weight = module._parameters.get("weight")
    if weight is not None:
        weight_cache.forget(weight)


def _count(specs: Iterator[QuantSpec | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for spec in specs:
        if spec is not None:
            counts[str(spec)] = counts.get(str(spec), 0) + 1
    return counts
