"""`PatchConfig` and `NoiseConfig`: what `patch_model` is asked to do, as values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from qnoise.formats import QuantSpec, as_spec
from qnoise.names import matches
from qnoise.nn.linear_record import STORAGES
from qnoise.spelling import check_choice

NOISE_TARGETS = ("rmsnorm", "linear")
NOISY_PHASES = ("rollout", "training")

Plan = tuple[tuple[str, QuantSpec | None], ...]


@dataclass(frozen=True)
class NoiseConfig:
    """Which modules are noisy, and when.

    Args:
        target: "rmsnorm" adds sigma z to the weights of RMSNorms (AQN); "linear" multiplies the weights of linears by
            1 + sigma z before they are quantized.
        during: phases in which the noise acts. Both (default): the policy that is sampled is the policy that is
            trained. ("rollout",) is QeRL's behaviour. In evaluation noise never acts.
        include, exclude, layers: globs on canonical names and layer indices that select among the target's modules.
            The per-head norms of queries and keys are left out unless `include` names them.
    """

    target: str = "rmsnorm"
    during: tuple[str, ...] = NOISY_PHASES
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("noise target", self.target, NOISE_TARGETS)
        object.__setattr__(self, "during", _strings("during", self.during))
        if not self.during:
            raise ValueError(f"during is empty; name at least one of {', '.join(NOISY_PHASES)}, or use noise=None")
        for phase in self.during:
            check_choice("phase in during", phase, NOISY_PHASES)
        _normalise_filters(self)


@dataclass(frozen=True)
class PatchConfig:
    """Everything `patch_model` needs; two equal configs make the same model.

    Args:
        fmt: format of the weights: a name, a `QuantSpec`, a plan (mapping of globs on canonical names to a format or
            None; the last match wins, what matches nothing stays in full precision), or None (no quantization).
        act_fmt: format of the linears' inputs, or None for weight-only.
        noise: None, "rmsnorm", "linear" or a `NoiseConfig`.
        include, exclude: globs on canonical names; which linears are quantized.
        layers: indices of the layers whose linears are quantized.
        storage: see `FakeQuantLinear`. "packed" lets go of the weights and needs them frozen.
        share_scales: give the linears that serving engines fuse (q/k/v, gate/up) one per-tensor scale, from their joint
            amax. Concerns formats with a per-tensor scale only.
        act_amax: for an `act_fmt` with a per-tensor scale: the magnitude that fixes it, a number or a mapping of globs
            to numbers (the last match wins), such as the largest |input| of each linear on calibration data. Without
            it, and where nothing matches, every token has the scale of its own amax.
    """

    fmt: str | QuantSpec | Mapping[str, str | QuantSpec | None] | Plan | None = "mxfp4"
    act_fmt: str | QuantSpec | None = None
    noise: str | NoiseConfig | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    storage: str = "auto"
    share_scales: bool = True
    act_amax: float | Mapping[str, float] | tuple[tuple[str, float], ...] | None = None
    plan: Plan = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", _plan(self.fmt))
        # Compared by what it does: a name, its spec and the plan {"*": spec} are the same request.
        object.__setattr__(self, "fmt", self.plan or None)
        object.__setattr__(self, "act_fmt", None if self.act_fmt is None else as_spec(self.act_fmt))
        object.__setattr__(self, "act_amax", _static_amax(self.act_amax, self.act_spec))
        if isinstance(self.noise, str):
            object.__setattr__(self, "noise", NoiseConfig(target=self.noise))
        elif not isinstance(self.noise, NoiseConfig | None):
            raise TypeError(f"noise is {self.noise!r}; it must be None, 'rmsnorm', 'linear' or a NoiseConfig")
        check_choice("storage", self.storage, STORAGES)
        _normalise_filters(self)
        if not self.plan and self.act_fmt is None and self.noise is None:
            raise ValueError("fmt, act_fmt and noise are all None: there is nothing to patch")
        if self.storage == "packed":
            if not self.plan:
                raise ValueError("storage='packed' stores quantized weights, but fmt is None; give fmt a format")
            if self.noise_config is not None and self.noise_config.target == "linear":
                raise ValueError(
                    "noise on linear weights is relative to the full-precision weight, which storage='packed' does not "
                    "keep; use another storage, or noise='rmsnorm'"
                )

    @property
    def noise_config(self) -> NoiseConfig | None:
        return self.noise  # type: ignore[return-value]

    def static_amax(self, name: str) -> float | None:
        """The `act_amax` of the linear of that canonical name, or None: per token."""
        return next((amax for glob, amax in reversed(self.static_amaxes) if matches(name, glob)), None)

    @property
    def static_amaxes(self) -> tuple[tuple[str, float], ...]:
        return cast(tuple[tuple[str, float], ...], self.act_amax)

    @property
    def act_spec(self) -> QuantSpec | None:
        return self.act_fmt  # type: ignore[return-value]


def _static_amax(value: Any, spec: QuantSpec | None) -> tuple[tuple[str, float], ...]:
    if value is None or value == ():
        return ()
    if spec is None or not spec.per_tensor_scale:
        raise ValueError(
            f"act_amax is {value!r}, but act_fmt={spec} has no per-tensor scale to fix; leave act_amax out, or use "
            "act_fmt='nvfp4'"
        )
    pairs = (
        value if isinstance(value, tuple) else tuple(value.items()) if isinstance(value, Mapping) else (("*", value),)
    )
    for glob, amax in pairs:
        if not (isinstance(amax, int | float) and 0 < amax < math.inf):
            raise ValueError(f"act_amax of {glob!r} is {amax!r}; it must be a positive number")
    return tuple((str(glob), float(amax)) for glob, amax in pairs)


def rotation_warning(config: PatchConfig) -> str | None:
    """What to tell a user whose config rotates in a format that a rotation hurts; None if there is nothing to tell.

    An E4M3 scale with a mantissa for each 16 elements isolates an outlier by itself. A rotation spreads it over its
    block, which costs accuracy on heavy-tailed tensors unless the scales are searched.
    """
    specs = [spec for _, spec in config.plan] + [config.act_spec]
    for spec in specs:
        if spec is not None and spec.rotation and spec.scale_mode in ("two_level", "single_level"):
            return (
                f"{spec}: with scale_mode={spec.scale_mode!r} a rotation lowers the accuracy of heavy-tailed tensors "
                "and gains nothing on others, because the fine scales of this format isolate outliers by themselves. "
                "Leave the rotation out, or use scale_mode='mse' with it."
            )
    return None


def differences(present: PatchConfig, asked: PatchConfig) -> str:
    """The fields in which two configs differ, for an error message."""

    def shown(config: PatchConfig, name: str) -> str:
        if name != "fmt":
            return str(getattr(config, name))
        return "{" + ", ".join(f"{glob}: {spec}" for glob, spec in config.plan) + "}"

    return "; ".join(
        f"{each.name} is {shown(present, each.name)}, asked for {shown(asked, each.name)}"
        for each in fields(PatchConfig)
        if each.compare and getattr(present, each.name) != getattr(asked, each.name)
    )


def _plan(fmt: Any) -> Plan:
    if fmt is None:
        return ()
    if isinstance(fmt, str | QuantSpec):
        return (("*", as_spec(fmt)),)
    if isinstance(fmt, Mapping):
        fmt = tuple(fmt.items())
    if not isinstance(fmt, tuple):
        raise TypeError(f"fmt is {fmt!r}; it must be a format name, a QuantSpec, a mapping of globs to these, or None")
    if not fmt:
        raise ValueError("fmt is an empty plan; map at least one glob to a format, or pass fmt=None")
    return tuple((str(glob), None if spec is None else as_spec(spec)) for glob, spec in fmt)


def _normalise_filters(config: NoiseConfig | PatchConfig) -> None:
    if config.include is not None:
        object.__setattr__(config, "include", _strings("include", config.include))
    object.__setattr__(config, "exclude", _strings("exclude", config.exclude))
    if config.layers is not None:
        layers = (config.layers,) if isinstance(config.layers, int) else tuple(config.layers)
        if not all(isinstance(layer, int) and layer >= 0 for layer in layers):
            raise ValueError(f"layers is {config.layers!r}; it must hold layer indices (whole numbers >= 0)")
        object.__setattr__(config, "layers", layers)


def _strings(name: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    values = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) for item in values):
        raise TypeError(f"{name} is {value!r}; it must be a string or a sequence of strings")
    return values
