"""Configurations of the verl family: the blocks `hw_error_injection` and `noise_injection`, read and written.

    settings = from_config("grpo.yaml")
    model = qnoise.patch_model(model, config=settings.patch)
    noise = settings.scheduler(model, total_steps=29)
    faults = settings.inject(model)

Fields and accepted values are those of the fork of verl that the published runs used. What this package does otherwise
is listed in `notes`; what it cannot do is an error that names the field.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnoise import schedules
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.faults import Bias, Deadzone, Fault, GaussianError, Injection, inject
from qnoise.formats import QuantSpec, unknown_name
from qnoise.functional import fake_quantize
from qnoise.names import matches
from qnoise.nn.norm import is_rms_norm
from qnoise.nn.tokens import quantize_tokens
from qnoise.noise_control import Multiplier, NoiseScheduler
from qnoise.requirements import require
from qnoise.spelling import check_choice

ERROR_DEFAULTS: Mapping[str, Any] = {
    "enabled": False, "error_scale": 1e-5, "error_type": "relative_gaussian", "injection_point": "input",
    "target_modules": ["rmsnorm"], "target_layers": None, "apply_during": "both", "seed": 0,
    "deadzone_threshold": 0.01, "mxfp4_stochastic_rounding": False, "mxfp4_block_2d": False,
    "nvfp4_stochastic_rounding": False, "exclude_modules": ["lm_head", "embed_tokens"], "use_ste": True,
}  # fmt: skip
NOISE_DEFAULTS: Mapping[str, Any] = {
    "enabled": False, "sigma_start": 0.05, "sigma_end": 0.0005, "num_stages": 10, "layer_types": ["rmsnorm"],
    "target_modules": None, "exclude_patterns": [], "target_layers": None, "epoch_aware": False,
    "stages_per_epoch": 5, "steps_per_epoch": None, "layer_sigma_config": None,
}  # fmt: skip
LAYER_DEFAULTS: Mapping[str, Any] = {
    "enabled": False, "default_multiplier": 1.0, "layer_multipliers": {}, "zone_schedule": None,
}  # fmt: skip
ZONE_DEFAULTS: Mapping[str, Any] = {
    "enabled": False, "edge_layers": [], "middle_layers": [], "phase_boundary_ratio": 0.5,
    "early_middle_mult": 1.0, "late_middle_mult": 0.5,
}  # fmt: skip
# What a value must be, where its default does not show it; elsewhere it is of its default's kind.
KINDS: Mapping[str, type] = {
    "target_modules": list, "target_layers": int, "edge_layers": int, "middle_layers": int, "steps_per_epoch": int,
}  # fmt: skip
NESTED: Mapping[str, Mapping[str, Any]] = {"layer_sigma_config": LAYER_DEFAULTS, "zone_schedule": ZONE_DEFAULTS}
LISTS_OF_LAYERS = ("target_layers", "edge_layers", "middle_layers")
FORMATS = ("mxfp4", "nvfp4")
FAULTS = ("relative_gaussian", "absolute_gaussian", "systematic_bias", "deadzone")
_FORMAT_NOTES = {
    "nvfp4": "nvfp4 has its fp32 per-tensor scale here; the fork's had none and was coarser than mxfp4.",
    "mxfp4": "Blocks never cross a row here; the fork's ran over the flattened tensor.",
}
# Left alone by patch_model without being asked: heads, embeddings, adapters, and PEFT's name for the linear inside.
_LEFT_ALONE = ("lm_head", "embed_tokens", "lora_A", "lora_B", "lora_a", "lora_b", "base_layer")


@dataclass(frozen=True)
class VerlSettings:
    """What a configuration asks for, in this package's terms.

    Attributes:
        patch: for `patch_model(config=)`; None where neither a format nor noise is asked for.
        schedule: of sigma; None without noise. With `epoch_aware` it needs the number of epochs: see `scheduler`.
        multipliers: for `NoiseScheduler`.
        faults: (fault, place) pairs to inject.
        notes: what is done otherwise here, in sentences.
        error, noise: the two blocks as they were read, defaults filled in; None where there was none.
    """

    patch: PatchConfig | None
    schedule: Callable[[float], float] | None
    multipliers: Mapping[str | int, Multiplier]
    faults: tuple[tuple[Fault, str], ...]
    notes: tuple[str, ...]
    error: Mapping[str, Any] | None = field(repr=False, default=None)
    noise: Mapping[str, Any] | None = field(repr=False, default=None)

    def scheduler(self, model: nn.Module, total_steps: int, seed: int = 0) -> NoiseScheduler:
        """The noise of a patched model over `total_steps` generations.

        Raises:
            ValueError: no noise is configured; `epoch_aware` with a `steps_per_epoch` that is missing or does not
                divide `total_steps`.
        """
        if self.noise is None or not self.noise["enabled"]:
            raise ValueError("noise_injection is not enabled in this configuration; there is nothing to schedule")
        schedule = self.schedule
        if self.noise["epoch_aware"]:
            steps = self.noise["steps_per_epoch"]
            if not steps or total_steps % steps:
                raise ValueError(
                    f"noise_injection.steps_per_epoch is {steps!r}; with epoch_aware it must be given and divide the "
                    f"number of steps, {total_steps}"
                )
            schedule = schedules.PerEpoch(
                self.noise["sigma_start"], self.noise["sigma_end"], total_steps // steps, self.noise["stages_per_epoch"]
            )
        assert schedule is not None
        return NoiseScheduler(model, schedule, total_steps, seed, self.multipliers)

    def inject(self, model: nn.Module) -> ExitStack:
        """Put the configured faults into a model: a context manager that takes them out again (`.close()`).

        Raises:
            ValueError: see `qnoise.faults.inject`.
        """
        error = self.error or ERROR_DEFAULTS
        during = None if error["apply_during"] == "both" else (error["apply_during"],)
        with ExitStack() as stack:
            for fault, place in self.faults:
                chosen = _modules(error["target_modules"], _own_patterns(error["exclude_modules"]))
                injection: Injection = inject(
                    model, fault, chosen, layers=error["target_layers"], at=place, seed=error["seed"], during=during
                )
                stack.callback(injection.remove)
            return stack.pop_all()


def from_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> VerlSettings:
    """Read a configuration: a mapping, or the path of a YAML file. The blocks may stand at any depth.

    Raises:
        ImportError: a path, and PyYAML is missing.
        ValueError: a key that is not known (the nearest is named), a value that is not accepted, neither block is
            there, or something that this package does not do.
    """
    values = config if isinstance(config, Mapping) else _read_yaml(Path(config))
    blocks = {name: _find(values, name) for name in ("hw_error_injection", "noise_injection")}
    if not any(block is not None for block in blocks.values()):
        raise ValueError("the configuration has neither a hw_error_injection nor a noise_injection block")
    error = _filled("hw_error_injection", blocks["hw_error_injection"], ERROR_DEFAULTS)
    noise = _filled("noise_injection", blocks["noise_injection"], NOISE_DEFAULTS)
    notes: list[str] = []
    weight, act, faults, filters = _error(error, notes) if error and error["enabled"] else (None, None, (), {})
    noisy = _noise(noise, notes) if noise and noise["enabled"] else None
    schedule = multipliers = None
    if noise is not None and noisy is not None:
        multipliers = _multipliers(noise)
        if not noise["epoch_aware"]:
            schedule = schedules.StagedExponential(noise["sigma_start"], noise["sigma_end"], noise["num_stages"])
    patch = PatchConfig(weight, act, noise=noisy, **filters) if weight or act or noisy else None
    if patch is None and error is not None and faults and error["apply_during"] != "both":
        patch = PatchConfig(None, noise="rmsnorm")
        notes.append("The patch changes nothing: it tells the faults which phase it is.")
    return VerlSettings(patch, schedule, multipliers or {}, faults, tuple(notes), error, noise)


def to_config(settings: VerlSettings) -> dict[str, dict[str, Any]]:
    """The blocks that `from_config` read, every field written out: reading them again gives equal settings."""
    blocks = {"hw_error_injection": settings.error, "noise_injection": settings.noise}
    return {name: dict(block) for name, block in blocks.items() if block is not None}


def _error(
    error: Mapping[str, Any], notes: list[str]
) -> tuple[QuantSpec | None, QuantSpec | None, tuple[tuple[Fault, str], ...], dict[str, Any]]:
    """Weight format, input format, faults and the filters of a `hw_error_injection` block."""
    kind, place = error["error_type"], error["injection_point"]
    if kind == "fp8":
        raise ValueError(
            "hw_error_injection.error_type 'fp8' is a cast without block scales, which is no format here; the 8-bit "
            "block format is qnoise.patch_model(model, fmt='mxfp8_e4m3')"
        )
    check_choice("hw_error_injection.error_type", kind, (*FORMATS, *FAULTS))
    check_choice("hw_error_injection.injection_point", place, ("input", "output", "weight", "both"))
    check_choice("hw_error_injection.apply_during", error["apply_during"], ("rollout", "training", "both"))
    if kind in FAULTS:
        scale = error["error_scale"]
        fault: Fault
        if kind == "deadzone":
            fault = Deadzone(error["deadzone_threshold"])
        elif kind == "systematic_bias":
            fault = Bias(scale)
        else:
            fault = GaussianError(scale, relative=kind == "relative_gaussian")
        return None, None, tuple((fault, at) for at in (("weight", "input") if place == "both" else (place,))), {}
    for name, cure in (
        ("mxfp4_block_2d", "blocks lie along the contraction axis here"),
        ("use_ste", "gradients pass straight through here; without them nothing behind a quantized input would train"),
    ):
        if error[name] == (name == "mxfp4_block_2d"):
            raise ValueError(f"hw_error_injection.{name}={error[name]} has no counterpart: {cure}")
    spec = QuantSpec(kind, rounding="stochastic" if error[f"{kind}_stochastic_rounding"] else "nearest")
    targets = _list(error["target_modules"])
    if any(target.lower() == "rmsnorm" for target in targets):
        raise ValueError(
            f"hw_error_injection.target_modules={targets}: {kind} is a format of matrices; use ['linear'] or names of "
            "linears"
        )
    if "base_layer" in _list(error["exclude_modules"]):
        notes.append(
            "exclude_modules names 'base_layer': there it kept a second hook off PEFT's inner linear, whose weight was "
            "quantized all the same; here the base linear is quantized, once."
        )
    notes.append(_FORMAT_NOTES[kind])
    if place == "output" or error["apply_during"] != "both":
        places = ("weight", "input") if place == "both" else (place,)
        notes.append(
            f"injection_point={place!r} with apply_during={error['apply_during']!r}: patch_model quantizes weights and "
            "inputs in all phases; this goes in as a fault, with `inject`."
        )
        return None, None, tuple((RoundedTo(spec, per_token=at != "weight"), at) for at in places), {}
    filters: dict[str, Any] = {"exclude": tuple(_globs(_own_patterns(error["exclude_modules"])))}
    if targets != ["linear"]:
        filters["include"] = tuple(_globs(targets))
    if error["target_layers"] is not None:
        filters["layers"] = tuple(error["target_layers"])
    weight = spec if place in ("weight", "both") else None
    return weight, spec if place in ("input", "both") else None, (), filters


def _noise(noise: Mapping[str, Any], notes: list[str]) -> NoiseConfig:
    kinds = _list(noise["layer_types"])
    for kind in kinds:
        check_choice("noise_injection.layer_types", kind, ("rmsnorm", "linear"))
    if len(set(kinds)) != 1:
        raise ValueError(f"noise_injection.layer_types={kinds}: one kind at a time here, 'rmsnorm' or 'linear'")
    if kinds == ["linear"]:
        notes.append("Noise on linears is relative to the weight here, W (1 + sigma z); the fork's was absolute.")
    notes.append("Noise is replaced at each step and off in evaluation; the fork's accumulated and stayed on.")
    targets = noise["target_modules"]
    return NoiseConfig(
        target=kinds[0],
        include=None if targets is None else tuple(_globs(_list(targets))),
        exclude=tuple(_globs(_own_patterns(noise["exclude_patterns"]))),
        layers=None if noise["target_layers"] is None else tuple(noise["target_layers"]),
    )


def _multipliers(noise: Mapping[str, Any]) -> dict[str | int, Multiplier]:
    layers = noise["layer_sigma_config"]
    if layers is None or not layers["enabled"]:
        return {}
    result: dict[str | int, Multiplier] = {"*": float(layers["default_multiplier"])}
    name = "key of noise_injection.layer_sigma_config.layer_multipliers"
    result |= {_number(name, key, int): value for key, value in layers["layer_multipliers"].items()}
    zone = layers["zone_schedule"]
    if zone is not None and zone["enabled"]:
        result |= {int(layer): 1.0 for layer in zone["edge_layers"]}
        result |= {
            int(layer): _Zone(zone["phase_boundary_ratio"], zone["early_middle_mult"], zone["late_middle_mult"])
            for layer in zone["middle_layers"]
        }
    return result


@dataclass(frozen=True)
class _Zone:
    """One factor until a share of the run is done, another one after that."""

    boundary: float
    early: float
    late: float

    def __call__(self, progress: float) -> float:
        return self.early if progress < self.boundary else self.late


@dataclass(frozen=True)
class RoundedTo:
    """A fault: the values of a format, for what `patch_model` does not do (outputs, single phases).

    Args:
        spec: the format.
        per_token: with a per-tensor scale, that of each vector along the last axis; else that of the tensor.
    """

    spec: QuantSpec
    per_token: bool = True

    def apply(self, x: Tensor, key: int = 0) -> Tensor:
        if self.spec.rounding != "stochastic":
            return quantize_tokens(x, self.spec, None) if self.per_token else fake_quantize(x, self.spec)
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        amax = x.abs().amax(dim=-1, keepdim=True) if self.per_token and self.spec.per_tensor_scale else None
        return fake_quantize(x, self.spec, generator=generator, amax=amax)


def _modules(targets: Any, exclude: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """Whether a module is a target: by kind ("rmsnorm", "linear") or by name."""
    kinds = {target.lower() for target in _list(targets)}
    names = list(_globs([target for target in _list(targets) if target.lower() not in ("rmsnorm", "linear")]))
    without = list(_globs(exclude))

    def chosen(name: str, module: nn.Module) -> bool:
        parts = name.split(".")
        if parts[-1] in ("lm_head", "embed_tokens") or any(part.startswith("lora_") for part in parts):
            return False
        if any(matches(name, glob) for glob in without):
            return False
        norm, linear = "rmsnorm" in kinds and is_rms_norm(module), "linear" in kinds and isinstance(module, nn.Linear)
        return norm or linear or any(matches(name, glob) for glob in names)

    return chosen


def _own_patterns(patterns: Any) -> list[str]:
    """Without those that name what is left alone anyway."""
    return [pattern for pattern in _list(patterns) if pattern not in _LEFT_ALONE]


def _globs(patterns: Iterable[str]) -> Iterable[str]:
    """The fork looks for a pattern anywhere in a name, between dots."""
    for pattern in patterns:
        yield f"*{pattern}.*" if pattern.rpartition(".")[2].isdigit() else f"*{pattern}*"


def _list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(each) for each in value]


def _filled(name: str, block: Any, defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    if block is None:
        return None
    if not isinstance(block, Mapping):
        raise ValueError(f"{name} is {block!r}; it must be a mapping")
    for key in block:
        if key not in defaults:
            raise unknown_name(f"key of {name}", key, defaults)
    return {key: _checked(f"{name}.{key}", key, block.get(key, default), default) for key, default in defaults.items()}


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """A value of the kind its field has. Numbers may be strings, as YAML 1.1 reads `1e-4`."""
    kind = KINDS.get(key, type(default))
    if value is None and default is None:
        return None
    if key in NESTED:
        return _filled(name, value, NESTED[key])
    if key in LISTS_OF_LAYERS:
        if _is_list(value, int | str):
            return [_number(f"{name}[{at}]", each, int) for at, each in enumerate(value)]
    elif key == "layer_multipliers" and isinstance(value, Mapping):
        return {str(layer): _number(f"{name}[{layer}]", factor, float) for layer, factor in value.items()}
    elif kind in (int, float):
        return _number(name, value, kind)
    elif kind is list and _is_list(value, str):
        return list(value)
    elif isinstance(value, str if kind is list else kind):
        return value
    raise ValueError(f"{name} is {value!r}; it must be {_KIND_NAMES['layers' if key in LISTS_OF_LAYERS else kind]}")


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        if not isinstance(value, bool) and kind(value) == float(value):
            return kind(value)
    except (TypeError, ValueError):
        pass
    hint = " (a reference to another value: resolve it before)" if "${" in str(value) else ""
    raise ValueError(f"{name} is {value!r}{hint}; it must be {_KIND_NAMES[kind]}")


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, kind) for each in value)


_KIND_NAMES: Mapping[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping",
    list: "a string or a list of strings", "layers": "a list of layer indices",
}  # fmt: skip


def _find(values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        return None
    if name in values:
        return values[name]
    return next((found for value in values.values() if (found := _find(value, name)) is not None), None)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    require("pyyaml", f"reading {path}")
    import yaml

    values = yaml.safe_load(path.read_text())
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a configuration")
    return values
