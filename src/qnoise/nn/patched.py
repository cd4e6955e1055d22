"""What every converted module carries, and how a module is converted in place and restored.

Conversion assigns `module.__class__`, as `torch.nn.utils.parametrize` and FSDP2 do: the object stays the same, so
hooks, aliases, tied parameters, references held by others and `state_dict` keys survive, and undoing is exact.
"""

from __future__ import annotations

import itertools
import types
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from qnoise.nn.sharding import is_sharded
from qnoise.noise import Noise, unit_normal

PHASES = ("rollout", "training", "evaluation")


_NUMBERS = itertools.count()
_RECORDS: WeakValueDictionary[int, PatchRecord] = WeakValueDictionary()


@dataclass
class PatchRecord:
    """State of one converted module. The controllers of floors 4 and 5 write it; the module's forward reads it.

    Attributes:
        sigma: the sigma that acts in a forward done now: 0 outside the phases that are noisy. Follows the other fields.
        acts: sigma > 0. Compiled code is specialised on this and not on the value of sigma.
        shards: by name, the parameters of the module that `fully_shard` has taken apart (DTensor), if it has. What a
            forward sees in their place is gathered into memory that is used again, without torch telling.
        handle: int64 CPU tensor, 0-d: by which an operator called from compiled code finds the record (`record_of`).
            A tensor, because compiled code is specialised on numbers but takes tensors as inputs.
    """

    name: str
    stock_class: type[nn.Module]
    noise_during: tuple[str, ...] = ()
    noise: Noise = field(default_factory=Noise)
    phase: str = "training"
    quiet: bool = False
    full_precision: bool = False
    sigma: float = field(init=False, default=0.0)
    acts: bool = field(init=False, default=False)
    shards: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    handle: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._enter()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in ("noise_during", "noise", "phase", "quiet", "full_precision") and "handle" in self.__dict__:
            self._settle()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("handle", "_kept_z")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is a record of its own, not to be found by the handle of the original.
        self.__dict__.update(state)
        self._enter()

    def _enter(self) -> None:
        number = next(_NUMBERS)
        with torch.inference_mode(False):
            self.__dict__["handle"] = torch.full((), number, dtype=torch.int64, device="cpu")
        _RECORDS[number] = self
        self._settle()

    def _settle(self) -> None:
        silent = self.quiet or self.full_precision or self.phase not in self.noise_during
        self.__dict__["sigma"] = 0.0 if silent else self.noise.sigma
        self.__dict__["acts"] = self.__dict__["sigma"] > 0.0


def record_of(handle: Tensor) -> PatchRecord:
    """The record that has this handle."""
    return _RECORDS[int(handle)]


def noise_of(record: PatchRecord, weight: Tensor) -> Tensor:
    """sigma z that acts on the weight now, z standard normal: of its shape and device, in fp32 (fp64 for fp64)."""
    if torch.compiler.is_compiling():
        return cast(Tensor, torch.ops.qnoise.noise(weight.detach(), record.handle))
    return record.sigma * unit_noise_of(record, weight).to(_noise_dtype(weight))


def unit_noise_of(record: PatchRecord, weight: Tensor) -> Tensor:
    """z, fp32, of the weight's shape, on its device: made on the CPU, so that it is the same on every machine."""
    noise = record.noise
    key = (noise.seed, noise.step, weight.shape, weight.device)
    kept = record.__dict__.get("_kept_z")
    if kept is None or kept[0] != key:
        z = unit_normal(noise.seed, noise.step, record.name, tuple(weight.shape))
        with torch.inference_mode(False):
            kept = (key, torch.from_numpy(z).to(weight.device))
        # The noise of a norm is small. That of a matrix is as large as the weight, and used once in each step.
        if weight.dim() == 1:
            record.__dict__["_kept_z"] = kept
    return cast(Tensor, kept[1])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast computes in on that device now; None where it is off, or does not exist (meta)."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _noise_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


# What compiled code calls for the noise: it reads the record when it runs, so a new step needs no new code.
torch.library.define("qnoise::noise", "(Tensor weight, Tensor handle) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))


@torch.library.impl("qnoise::noise", "CompositeExplicitAutograd")
def _noise(weight: Tensor, handle: Tensor) -> Tensor:
    return noise_of(record_of(handle), weight)


@torch.library.register_fake("qnoise::noise")
def _noise_fake(weight: Tensor, handle: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=_noise_dtype(weight))


class Patched:
    """Mixin of the converted modules: `_qnoise` holds the record."""

    _qnoise: PatchRecord

    def __setattr__(self, name: str, value: Any) -> None:
        # `fully_shard` exchanges the gathered parameter and its shard in this way, before and after each forward, where
        # a class has such a method. (It would write to `_parameters` otherwise.)
        parameters = self.__dict__.get("_parameters", {})
        for parameter in (parameters.get(name), value):
            if is_sharded(parameter):
                self._qnoise.shards[name] = parameter
        if name == "weight" and type(value) is Tensor and name not in parameters:
            raise TypeError(
                f"{self._qnoise.name or type(self).__name__}.weight is set to a tensor that is no parameter, and would "
                "not be quantized or noisy. FullyShardedDataParallel (FSDP1) does so; shard with fully_shard instead "
                "(with accelerate, fsdp_version: 2)."
            )
        super().__setattr__(name, value)

    def noise_sigma(self) -> float:
        """The sigma that acts in a forward done now: 0 outside the phases that are noisy."""
        return self._qnoise.sigma

    def noise_state(self) -> dict[str, Any]:
        """Canonical name, sigma, seed and step of this module's noise, and whether it acts now."""
        record = self._qnoise
        return {
            "name": record.name,
            "sigma": record.noise.sigma,
            "seed": record.noise.seed,
            "step": record.noise.step,
            "active": self.noise_sigma() > 0.0,
        }


def check_forward(module: nn.Module, name: str) -> None:
    """Raise ValueError if a forward bound on the instance would hide the class's forward.

    accelerate's hooks (`device_map`, CPU offload) are known and allowed.
    """
    bound = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if bound is not None and getattr(bound, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"{name or type(module).__name__}: its forward was replaced on the instance by {_describe(bound)}, so a "
            "conversion would have no effect there. Patch with qnoise first and apply the other patcher afterwards, "
            "or leave this module out with exclude=."
        )


def convert(module: nn.Module, patched_class: type[nn.Module], record: PatchRecord) -> None:
    """Make `module` an instance of `patched_class`, in place."""
    check_forward(module, record.name)
    module.__dict__["_qnoise"] = record
    _set_class(module, patched_class)


def stand_in(module: Patched, **attributes: Tensor) -> nn.Module:
    """What compiled code runs the stock forward on: an object of the stock class with the module's own attributes, and
    these in place of its parameters. The module cannot take them for a while there: inside of activation checkpointing
    the compiler refuses a write to what is outside."""
    stock_class = module._qnoise.stock_class
    twin = stock_class.__new__(stock_class)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(attributes)
    return twin


def restore(module: nn.Module) -> None:
    """Undo `convert`: the stock class again, and nothing of ours left on the instance."""
    _set_class(module, module.__dict__["_qnoise"].stock_class)
    for attribute in [key for key in module.__dict__ if key.startswith("_qnoise")]:
        del module.__dict__[attribute]


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    old = type(module).forward
    module.__class__ = cls
    # accelerate keeps the forward it wraps, bound, on the instance; so does whatever took its hooks off again.
    for attribute in ("_old_forward", "forward"):
        if getattr(module.__dict__.get(attribute), "__func__", None) is old:
            module.__dict__[attribute] = types.MethodType(cls.forward, module)


def _describe(bound: object) -> str:
    function = getattr(bound, "__func__", bound)
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"
