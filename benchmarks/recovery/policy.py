"""Policies: loaded from a folder or the hub, or it is said at once what is missing."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
HUB_TIMEOUT_S = 5.0


def model_path(model: str, checkpoint: int = 0) -> str:
    """The folder of a shipped checkpoint, or the name as it is (a folder of the caller's, or a hub name)."""
    name = model.format(checkpoint=checkpoint)
    shipped = HERE / name
    return str(shipped) if name.startswith("checkpoints/") else name


def load_policy(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in `dtype`, and its tokenizer, which pads on the left.

    Raises:
        FileNotFoundError: `path` is no folder, not in the hub's local cache, and the hub cannot be reached.
        ValueError: the files are there but cannot be read (cut off, damaged); the folder and the fault are named.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    check_model(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        # Not AutoTokenizer: for a Qwen2 model it builds Qwen2's own pre-tokenizer and decoder around any vocabulary.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:  # the libraries raise what their parsers raise; the folder is what the reader needs
        raise ValueError(
            f"{path}: this checkpoint cannot be loaded ({type(error).__name__}: {error}). It needs config.json, "
            "model.safetensors and tokenizer.json, none of them cut off."
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def check_model(path: str) -> None:
    """Raises FileNotFoundError if `path` is neither a folder nor a model within reach, saying what would be."""
    if path.startswith(str(HERE)) and not Path(path).is_dir():
        raise FileNotFoundError(
            f"{path}: this shipped checkpoint is missing. Restore it, or make it again: "
            "python -m benchmarks.recovery pretrain"
        )
    if not Path(path).is_dir():
        check_hub(path, "--model DIR", "a local folder with the model's config.json, safetensors and tokenizer files")


def check_hub(name: str, option: str, wanted: str, kind: str = "models") -> None:
    """Return if `name` is in the hub's local cache or the hub answers within seconds, else raise.

    Raises:
        FileNotFoundError: neither; the message names the option that takes a local copy.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        if any(repo.repo_id == name for repo in scan_cache_dir().repos):
            return
    except CacheNotFound:
        pass
    reason = "offline mode is on"
    if not constants.HF_HUB_OFFLINE:
        request = urllib.request.Request(f"{constants.ENDPOINT}/api/{kind}/{name}", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
            return
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = str(error)
    raise FileNotFoundError(
        f"{name!r} is no local folder, not in the hub's local cache, and the hub does not serve it ({reason}). "
        f"Pass {option}: {wanted}."
    )


def quiet_transformers() -> None:
    """No progress bars for models that load in a blink, no advice on generation settings, a line a call."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def weights_hash(path: str) -> str:
    """Hash of the safetensors of a local folder; "" for a hub name. Part of a run's identity."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(Path(path).glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest() if files else ""
