"""The weights a rollout engine needs to be the policy: stock names, and what the model's forward uses now.

An engine that keeps its own copy of a model (vLLM, SGLang) knows nothing of fake quantization, noise or adapters. It
is given plain tensors under the names of the stock checkpoint: Q(W) where the model quantizes, the noisy weight where
noise acts, the adapter added where one is active. Modules are known by duck type (`effective_weight()`,
`noise_state()`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.names import canonical_name

from .adapters import (
    active_adapters,
    adapter_bias,
    check_mergeable,
    is_adapted,
    is_token_layer,
    merged_bias,
    merged_weight,
)


def rollout_weights(
    model: nn.Module,
    *,
    merge_adapters: bool = True,
    quantized: bool = True,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and effective tensor of every weight, to load into an engine that holds its own copy of the model.

        with qnoise.phase(model, "rollout"):
            engine.load_weights(rollout_weights(model))

    A stock model that loads them computes what ``model`` computes now: the same logits bit for bit without an
    adapter, up to the rounding of one addition with one. "Now" is the phase and the noise at the call; they
    must stay until the last tensor is taken. Nothing in the model changes, nothing carries a gradient, and one
    tensor at a time is computed. A tensor that needed no computation is the model's own: copy it before writing.

    Names are those of the stock model's ``state_dict``, in its order, persistent buffers included: without the
    components that PEFT, DDP, FSDP and ``torch.compile`` insert. Of tensors that are one parameter (tied
    embeddings) only the first name is given, as in a saved checkpoint, which is what engines expect; load
    into a model of transformers with ``strict=False``. Modules that PEFT trains whole (``modules_to_save``)
    come from their active copy.

    Inputs that ``model`` quantizes (``act_fmt``) are no matter of weights: a stock receiver does not quantize
    them, and a warning says so.

    Args:
        model: patched or not, wrapped by PEFT or not, with ``fully_shard`` or not (then every rank has to
            iterate, and each tensor is whole).
        merge_adapters: True adds the active LoRA adapters *as they are trained*: Q(W) + scaling · B A, not
            Q(W + B A); DoRA: (Q(W) + scaling · B A) · m / ‖W + scaling · B A‖, the norm over the raw W as in its
            forward. Computed in fp32, given in the dtype of the base weight. False gives the base alone and
            leaves adapters to the engine.
        quantized: True gives Q(W). False gives the raw W of quantized linears, for an engine that quantizes by
            itself: what it makes of a merged adapter is Q(W + scaling · B A), and a warning says so. Noise on
            norms is included either way.
        dtype: what the engine stores: floating-point tensors are cast to it; None = each in the model's own.
            Norm weights with noise come in fp32 whatever it says, because 16 bits round most of a small noise
            away; a warning names the share that a 16-bit receiver would lose.

    Returns:
        An iterator of (name, tensor), each on the device of its weight.

    Raises:
        ValueError: at the call: an adapter that cannot be merged as trained (module and kind are named), or one
            merged into the weights already while ``merge_adapters=False``; noise on a linear with
            ``quantized=False``; tied parameters that differ in effect; weights out of reach (offloaded,
            FSDP1) or stored by another quantization library.
        TypeError: ``dtype`` is no floating-point dtype.
        RuntimeError: while iterating: the noise is no longer what it was at the call.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    if getattr(model, "prompt_encoder", None):
        raise ValueError(
            f"{type(model).__name__} holds a learned prompt (prompt or prefix tuning), which is no weight of the stock "
            "model and cannot be given to an engine as one"
        )
    entries = _one_per_parameter(list(_walk(model, "", None, merge_adapters, quantized)))
    _warn_of_quantized_inputs(entries, quantized)
    _warn_of_requantization(entries, quantized)
    _warn_of_lost_noise(entries, dtype)
    return _tensors(entries, dtype)


@dataclass(frozen=True)
class _Entry:
    """One tensor to come."""

    name: str
    owner: nn.Module  # the module whose forward uses it
    source: Tensor  # the parameter or buffer of the stock model; its identity tells ties
    compute: Callable[[], Tensor]
    stored: bool  # `compute` gives a tensor of the model, not one made for the occasion
    noise: dict[str, Any] | None  # of the owner, at the call
    unit: Any  # the innermost module under `fully_shard` around it
    merged: bool = False

    @property
    def is_noisy_norm(self) -> bool:
        return self.source.dim() == 1 and not self.stored and self.noise is not None and self.noise["active"]


@torch.no_grad()
def _tensors(entries: list[_Entry], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for entry, tensor in _read(entries):
        state = _noise_state(entry.owner)
        if state != entry.noise:
            raise RuntimeError(
                f"{entry.name}: the noise of its module was {entry.noise} when rollout_weights was called and is "
                f"{state} now. Take all tensors within one phase and one step of the noise."
            )
        keep = dtype is None or entry.is_noisy_norm or not tensor.is_floating_point()
        yield entry.name, tensor if keep else tensor.to(dtype)


@torch.no_grad()
def _read(entries: Iterable[_Entry]) -> Iterator[tuple[_Entry, Tensor]]:
    """Each entry with its tensor, gathered from all ranks where the model is sharded, one unit at a time."""
    for unit, group in groupby(entries, key=lambda entry: entry.unit):
        if unit is not None:
            unit.unshard()
        try:
            for entry in group:
                tensor = entry.compute().detach()
                if hasattr(tensor, "full_tensor"):  # sharded, but not by `fully_shard`
                    tensor = tensor.full_tensor()
                # The memory of a gathered parameter is taken back when its unit is sharded again.
                yield entry, tensor.clone() if unit is not None and entry.stored else tensor
        finally:
            if unit is not None:
                unit.reshard()


def _walk(module: Any, path: str, unit: Any, merge: bool, quantized: bool) -> Iterator[_Entry]:
    """Entries of a module and of what is inside it, in the order of ``state_dict``."""
    if callable(getattr(module, "unshard", None)) and callable(getattr(module, "reshard", None)):
        unit = module
    name = canonical_name(path)
    children: dict[str, Any] = module._modules
    if "modules_to_save" in children:  # PEFT keeps the original beside the copies that are trained
        original = children["original_module"]
        active = () if module.disable_adapters else module.active_adapters
        stock = {f"{name}.{key}": parameter for key, parameter in original.named_parameters()}
        for entry in _walk(
            children["modules_to_save"][active[0]] if active else original, path, unit, merge, quantized
        ):
            yield dataclasses.replace(entry, source=stock.get(entry.name, entry.source))
    elif "token_adapter" in children:
        yield from _walk(children["token_adapter"], path, unit, merge, quantized)
    elif is_adapted(module):
        yield from _adapted(module, path, unit, merge, quantized)
    else:
        yield from _own(module, name, unit, quantized)
        for key, child in children.items():
            if child is not None:
                yield from _walk(child, f"{path}.{key}" if path else key, unit, merge, quantized)


def _own(module: nn.Module, name: str, unit: Any, quantized: bool) -> Iterator[_Entry]:
    """The parameters and persistent buffers of one module."""
    noise = _noise_state(module)
    effective = callable(getattr(module, "effective_weight", None))
    if noise is not None and not effective:
        raise ValueError(
            f"{name}: a {type(module).__name__} has noise_state() but no effective_weight() that tells what its "
            "forward uses"
        )
    tensors = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    buffers = {key: b for key, b in module._buffers.items() if b is not None}
    if effective and "weight" not in tensors and not hasattr(module, "effective_names"):
        # Packed: codes and scales in buffers. Any of them tells this weight from others.
        tensors = {"weight": next(iter(buffers.values())), **tensors}  # type: ignore[dict-item]
    else:
        tensors |= {key: b for key, b in buffers.items() if key not in module._non_persistent_buffers_set}  # type: ignore[misc]
    for key, tensor in tensors.items():
        full_name = f"{name}.{key}" if name else key
        _check_readable(full_name, key, tensor, module)
        acts = effective and key in getattr(module, "effective_names", ("weight",))
        if acts and not quantized and tensor.dim() > 1:
            _check_raw(full_name, module, noise)
            acts = False
        compute = _effective(module, key) if acts else _stored(module, key)
        yield _Entry(full_name, module, tensor, compute, stored=not acts, noise=noise, unit=unit)


def _effective(module: Any, key: str) -> Callable[[], Tensor]:
    several = (key,) if hasattr(module, "effective_names") else ()

    def compute() -> Tensor:
        # With grad on, the result for a weight in training is not kept beside it: the loop would otherwise leave a
        # second copy of the model in memory.
        with torch.enable_grad():
            return module.effective_weight(*several).detach()

    return compute


def _stored(module: nn.Module, key: str) -> Callable[[], Tensor]:
    # Read late: while a unit is gathered, other tensors stand there.
    return lambda: module._parameters[key] if key in module._parameters else module._buffers[key]  # type: ignore[return-value]


def _adapted(layer: Any, path: str, unit: Any, merge: bool, quantized: bool) -> Iterator[_Entry]:
    """Entries of a module inside a PEFT layer, with its active adapters added if ``merge``."""
    name = canonical_name(path)
    adapters = active_adapters(layer, name, merge)
    if not is_token_layer(layer):
        for adapter in adapters:
            check_mergeable(layer, adapter, name)
    for entry in _walk(layer.base_layer, path, unit, merge, quantized):
        compute = _with_adapters(layer, adapters, entry, entry.name.removeprefix(f"{name}."))
        yield entry if compute is None else dataclasses.replace(entry, compute=compute, stored=False, merged=True)


def _with_adapters(layer: Any, adapters: list[str], entry: _Entry, key: str) -> Callable[[], Tensor] | None:
    """What gives the entry's tensor with the adapters added; None where they add nothing."""
    if key == "weight" and adapters:
        if is_token_layer(layer):
            return lambda: layer.get_merged_weights(adapters)
        return lambda: merged_weight(layer, adapters, entry.compute())
    if key == "bias" and not is_token_layer(layer) and any(adapter_bias(layer, a) is not None for a in adapters):
        return lambda: merged_bias(layer, adapters, entry.compute())
    return None


def _check_readable(name: str, key: str, tensor: Tensor, module: nn.Module) -> None:
    if key == "_flat_param":
        raise ValueError(
            f"{name}: FSDP1 keeps the weights in flat pieces. Call rollout_weights and take its tensors inside "
            "FullyShardedDataParallel.summon_full_params(model), or shard with torch's fully_shard."
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"{name}: its values are not in memory (meta device: offloaded by accelerate, or never loaded). Load the "
            "model without offloading."
        )
    if tensor is module._parameters.get(key) and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"{name}: it is stored as {tensor.dtype} by another quantization library ({type(module).__name__}), which "
            "no stock model can load under this name. Load the model without that quantization."
        )


def _check_raw(name: str, module: nn.Module, noise: dict[str, Any] | None) -> None:
    if module._parameters.get("weight") is None:
        raise ValueError(
            f"{name}: quantized=False asks for the raw weight, but the module keeps the quantized one only; use "
            "quantized=True, or patch with another storage"
        )
    if noise is not None and noise["active"]:
        raise ValueError(
            f"{name}: noise acts on it before it is quantized, and quantized=False would lose that. Use "
            "quantized=True, or read the weights inside qnoise.quiet(model)."
        )


def _one_per_parameter(entries: list[_Entry]) -> list[_Entry]:
    """The entries without the later names of a parameter that has several; ValueError where these differ in effect."""
    first: dict[int, _Entry] = {}
    for entry in entries:
        twin = first.setdefault(id(entry.source), entry)
        if twin is not entry and not _same(twin, entry):
            raise ValueError(
                f"{twin.name} and {entry.name} are one parameter of the stock model, but act as different tensors here "
                "(one of them quantized, noisy, adapted or trained apart), and a stock engine cannot hold both. Treat "
                "them alike (exclude= both), or untie them before patching (tie_word_embeddings=False in the config)."
            )
    return list(first.values())


def _same(a: _Entry, b: _Entry) -> bool:
    if a.owner is b.owner or (a.stored and b.stored and a.compute() is b.compute()):
        return True
    return torch.equal(*(tensor for entry in (a, b) for _, tensor in _read([entry])))


def _noise_state(module: nn.Module) -> dict[str, Any] | None:
    report = getattr(module, "noise_state", None)
    return report() if callable(report) else None


def _warn_of_quantized_inputs(entries: list[_Entry], quantized: bool) -> None:
    names = {}
    for entry in entries:
        record: Any = entry.owner.__dict__.get("_qnoise")
        if getattr(record, "act_spec", None) is not None and not record.full_precision:
            names[id(entry.owner)] = entry.name.rpartition(".")[0]
    if names and quantized:
        warnings.warn(
            f"{len(names)} linears quantize their input (act_fmt), {next(iter(names.values()))} among them; a stock "
            "receiver does not, and is another policy. Weigh its samples (rollout_is_weights) or use generate_groups.",
            stacklevel=3,
        )


def _warn_of_requantization(entries: list[_Entry], quantized: bool) -> None:
    names = [entry.name for entry in entries if entry.merged and hasattr(entry.owner, "effective_weight")]
    if names and not quantized:
        warnings.warn(
            f"quantized=False with merged adapters gives W + BA ({len(names)} weights, {names[0]} among them). What an "
            "engine quantizes that to is Q(W + BA); Q(W) + BA is what is trained.",
            stacklevel=3,
        )


def _warn_of_lost_noise(entries: list[_Entry], dtype: torch.dtype | None) -> None:
    lost = total = 0
    receivers = set()
    for entry, noisy in _read([entry for entry in entries if entry.is_noisy_norm]):
        receiver = dtype or entry.source.dtype
        total += noisy.numel()
        if receiver.itemsize < 4:
            receivers.add(str(receiver).removeprefix("torch."))
            lost += int((noisy.to(receiver) == _stored(entry.owner, "weight")().to(receiver)).sum())
    if lost:
        warnings.warn(
            f"a receiver that stores norm weights in {' or '.join(sorted(receivers))} loses {lost / total:.1%} of the "
            f"noise: so many of the {total} noisy weights round back to the clean ones. Keep norms in float32 there.",
            stacklevel=3,
        )
