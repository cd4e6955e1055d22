"""What every converted module carries, and how a module is converted in place and restored.

Conversion assigns `module.__class__`, as `torch.nn.utils.parametrize` and FSDP2 do: the object stays the same, so
hooks, aliases, tied parameters, references held by others and `state_dict` keys survive, and undoing is exact.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qnoise.noise import Noise

PHASES = ("rollout", "training", "evaluation")


@dataclass
class PatchRecord:
    """State of one converted module. The controllers of floors 4 and 5 write it; the module's forward reads it."""

    name: str
    stock_class: type[nn.Module]
    noise_during: tuple[str, ...] = ()
    noise: Noise = field(default_factory=Noise)
    phase: str = "training"
    quiet: bool = False
    full_precision: bool = False


class Patched:
    """Mixin of the converted modules: `_qnoise` holds the record."""

    _qnoise: PatchRecord

    def noise_sigma(self) -> float:
        """The sigma that acts in a forward done now: 0 outside the phases that are noisy."""
        record = self._qnoise
        silent = record.quiet or record.full_precision or record.phase not in record.noise_during
        return 0.0 if silent else record.noise.sigma

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
