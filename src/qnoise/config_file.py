"""`PatchConfig` as a JSON file beside a checkpoint: `qnoise_config.json`.

`save_pretrained` of a patched transformers model writes the plain checkpoint, which loads without this package, and
this file, with which `patch_model(model, config=directory)` puts the same patch back.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from qnoise.config import NoiseConfig, PatchConfig
from qnoise.formats import QuantSpec, unknown_name

FILE_NAME = "qnoise_config.json"
SCHEMA = 1


def config_to_dict(config: PatchConfig) -> dict[str, Any]:
    """Plain values, fit for JSON; `config_from_dict` reads them back to an equal config."""
    noise = config.noise_config
    return {
        "schema": SCHEMA,
        "fmt": [[glob, None if spec is None else spec.to_dict()] for glob, spec in config.plan] or None,
        "act_fmt": None if config.act_spec is None else config.act_spec.to_dict(),
        "noise": None if noise is None else {key: _plain(value) for key, value in asdict(noise).items()},
        "act_amax": [list(pair) for pair in config.static_amaxes] or None,
    } | {name: _plain(getattr(config, name)) for name in ("include", "exclude", "layers", "storage", "share_scales")}


def config_from_dict(values: Mapping[str, Any]) -> PatchConfig:
    """The config that `config_to_dict` wrote; keys left out take their defaults.

    Raises:
        ValueError: another schema, or a key or value that does not exist.
    """
    values = dict(values)
    if (schema := values.pop("schema", SCHEMA)) != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        raise ValueError(
            f"this configuration has schema {schema!r}; this version of qnoise reads schema {SCHEMA}"
            + ("; a newer version wrote it: upgrade qnoise" if newer else "")
        )
    known = [each.name for each in fields(PatchConfig) if each.init]
    for key in values:
        if key not in known:
            raise unknown_name("key of a patch configuration", key, known)
    if (plan := values.get("fmt", "mxfp4")) is not None and not isinstance(plan, str):
        pairs = plan.items() if isinstance(plan, Mapping) else plan
        values["fmt"] = tuple((glob, _spec(spec)) for glob, spec in pairs)
    values["act_fmt"] = _spec(values.get("act_fmt"))
    if isinstance(noise := values.get("noise"), Mapping):
        allowed = [each.name for each in fields(NoiseConfig)]
        for key in noise:
            if key not in allowed:
                raise unknown_name("key of a noise configuration", key, allowed)
        values["noise"] = NoiseConfig(**{key: _tuples(value) for key, value in noise.items()})
    if isinstance(amax := values.get("act_amax"), list):
        values["act_amax"] = tuple((glob, value) for glob, value in amax)
    return PatchConfig(**{key: _tuples(value) for key, value in values.items()})


def write_config(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the patch configuration of a patched model to `directory`/qnoise_config.json.

    For a model whose own `save_pretrained` does it not: a PEFT model made of a patched one, a plain `nn.Module`.

    Returns:
        The path of the file. The directory is made if it does not exist.

    Raises:
        ValueError: the model is not patched.
    """
    config = _config_of(model)
    if config is None:
        raise ValueError("the model is not patched, so there is no configuration to write; call qnoise.patch_model")
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    beside.replace(path)
    return path


def read_config(path: str | os.PathLike[str]) -> PatchConfig:
    """The configuration in a file, or in a directory's qnoise_config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not JSON, or names what does not exist.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; save_pretrained of a patched model, or write_config, writes it into a directory"
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a configuration")
    try:
        return config_from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


class SavesConfig:
    """`save_pretrained` on the instance of a patched transformers or PEFT model: what the class does, and the file.

    An object that refers to the model, not a closure, so that copies and pickles of the model refer to themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        save = type(self.model).save_pretrained  # type: ignore[attr-defined]
        result = save(self.model, save_directory, *args, **kwargs)
        given = inspect.signature(save).bind(self.model, save_directory, *args, **kwargs).arguments
        if given.get("is_main_process", True) and _config_of(self.model) is not None:
            write_config(self.model, save_directory)
        return result


def save_with_config(model: nn.Module) -> None:
    """From now on `model.save_pretrained` writes the configuration too, where there is such a method."""
    if callable(getattr(type(model), "save_pretrained", None)):
        model.__dict__["save_pretrained"] = SavesConfig(model)


def save_as_before(module: nn.Module) -> None:
    """Undo `save_with_config`."""
    if isinstance(module.__dict__.get("save_pretrained"), SavesConfig):
        del module.__dict__["save_pretrained"]


def _config_of(model: nn.Module) -> PatchConfig | None:
    return next((m.__dict__["_qnoise_config"] for m in model.modules() if "_qnoise_config" in m.__dict__), None)


def _spec(value: Any) -> QuantSpec | str | None:
    return QuantSpec.from_dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
