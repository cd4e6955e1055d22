"""The first argument of `scan`, `repair` and `export`: a path, or ORG/NAME of a model on the hub.

Nothing but safetensors, JSON and the files of tokenizers is fetched, no code of a model is run, and what is local is
never looked for elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qnoise.requirements import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MODEL = (*WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja")


def add_model(parser: argparse.ArgumentParser, what: str) -> None:
    """The argument, and `--revision`."""
    parser.add_argument("model", metavar="PATH_OR_HUB_ID", help=f"{what}, or ORG/NAME of a model on the hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a model on the hub")


def checkpoint_path(where: str, revision: str | None = None, patterns: Sequence[str] = WEIGHTS) -> Path:
    """A local path as it is; what is none, and could be ORG/NAME, downloaded from the hub.

    Args:
        where: path or name.
        revision: branch, tag or commit on the hub.
        patterns: the files to fetch.

    Raises:
        FileNotFoundError: neither a path nor a name; or not to be had: the hub's reason stands in the text.
        ImportError: a name, and huggingface_hub is not installed.
    """
    path = Path(where)
    if path.exists():
        return path
    parts = where.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or where.endswith(".safetensors"):
        raise FileNotFoundError(f"{where} does not exist, and is no ORG/NAME of a model on the hub either")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{where} does not exist here, and huggingface_hub, which could fetch it, is missing"
        ) from None
    try:
        return Path(snapshot_download(where, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of many kinds: no connection, no such model, no access
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"{where} does not exist here and cannot be had from the hub ({type(error).__name__}: {reason}). Check "
            "name and connection, or give the path of a model that is here already: that needs no connection"
        ) from None


def model_folder(where: str, revision: str | None = None) -> Path:
    """The folder of a whole transformers model, or of a PEFT adapter.

    Raises:
        FileNotFoundError, ImportError: as `checkpoint_path`; or a folder without config.json and adapter_config.json.
    """
    folder = checkpoint_path(where, revision, MODEL)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{folder} has no config.json: this takes the folder of a transformers model, as save_pretrained writes it "
            "(`qnoise scan` takes bare safetensors files)"
        )
    return folder


def load_model(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """A causal language model in the dtype of its files, complete and without code of its own.

    Args:
        folder: of a model, as `model_folder` found it.
        kwargs: for `from_pretrained`.

    Raises:
        ImportError: transformers is missing.
        ValueError: a model with code of its own or of another kind; no safetensors; a file is damaged, or lacks a
            parameter.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "transformers is not installed, and loads the model; pip install transformers. `qnoise scan` of local "
            "files, `qnoise env` and `qnoise formats` work without it"
        ) from None
    require("transformers", "qnoise")
    show_bars_on_terminals_only()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            **{"dtype": "auto", "use_safetensors": True} | kwargs,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds: no such architecture, a damaged file, other shapes
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{folder} cannot be loaded by transformers ({type(error).__name__}: {reason})") from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}")
    return cast("PreTrainedModel", model.eval())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder, or None if it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def show_bars_on_terminals_only() -> None:
    """transformers draws its bars into files as well."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def device(text: str) -> torch.device:
    """A device that is there.

    Raises:
        argparse.ArgumentTypeError: it is not, or is none.
    """
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; such are cpu, cuda, cuda:1") from None
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if kind is None else torch.accelerator.device_count()
    if found.type != "cpu" and (kind is None or kind.type != found.type or (found.index or 0) >= count):
        there = ", ".join(["cpu", *(f"{kind}:{index}" for index in range(count))])
        raise argparse.ArgumentTypeError(f"{text!r} is not there; this machine has: {there}. `qnoise env` says more")
    return found
