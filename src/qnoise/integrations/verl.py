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

from torch import nn

from qnoise import schedules
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.faults import Bias, Deadzone, Fault, GaussianError, Injection, inject
from qnoise.formats import QuantSpec, unknown_name
from qnoise.names import matches
from qnoise.nn.norm import is_rms_norm
from qnoise.noise_control import Multiplier, NoiseScheduler
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
FORMATS = ("mxfp4", "nvfp4")
FAULTS = ("relative_gaussian", "absolute_gaussian", "systematic_bias", "deadzone")
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
    if error["apply_during"] != "both":
        raise ValueError(
            f"hw_error_injection.apply_during={error['apply_during']!r}: a format acts in every phase here, so that "
            "the policy that is sampled is the policy that is trained; use 'both'"
        )
    if place == "output":
        raise ValueError(
            "hw_error_injection.injection_point='output' quantizes what a linear gives out; here its input is "
            "quantized: use 'input' or 'both'"
        )
    spec = QuantSpec(kind, rounding="stochastic" if error[f"{kind}_stochastic_rounding"] else "nearest")
    targets = _list(error["target_modules"])
    if any(target.lower() == "rmsnorm" for target in targets):
        raise ValueError(
            f"hw_error_injection.target_modules={targets}: {kind} is a format of matrices; use ['linear'] or names of "
            "linears"
        )
    filters: dict[str, Any] = {"exclude": tuple(_globs(_own_patterns(error["exclude_modules"])))}
    if targets != ["linear"]:
        filters["include"] = tuple(_globs(targets))
    if error["target_layers"] is not None:
        filters["layers"] = tuple(error["target_layers"])
    if "base_layer" in _list(error["exclude_modules"]):
        notes.append(
            "exclude_modules names 'base_layer': there it kept a second hook off PEFT's inner linear, whose weight was "
            "quantized all the same; here the base linear is quantized, once."
        )
    if kind == "nvfp4":
        notes.append("nvfp4 has its fp32 per-tensor scale here; the fork's had none and was coarser than mxfp4.")
    if kind == "mxfp4":
        notes.append("Blocks never cross a row here; the fork's ran over the flattened tensor.")
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
    layers = _filled("noise_injection.layer_sigma_config", noise["layer_sigma_config"], LAYER_DEFAULTS)
    if layers is None or not layers["enabled"]:
        return {}
    result: dict[str | int, Multiplier] = {"*": float(layers["default_multiplier"])}
    result |= {int(key): float(value) for key, value in layers["layer_multipliers"].items()}
    zone = _filled("noise_injection.layer_sigma_config.zone_schedule", layers["zone_schedule"], ZONE_DEFAULTS)
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
    return {**defaults, **block}


def _find(values: Any, name: str) -> Any:
    if not isinstance(values, Mapping):
        return None
    if name in values:
        return values[name]
    return next((found for value in values.values() if (found := _find(value, name)) is not None), None)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyYAML (pip install pyyaml); a mapping can be given instead"
        ) from error
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a configuration")
    return values
