"""Every causal language model of transformers: patch, forward, backward, unpatch. See zoo.py."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
from transformers import AutoModelForCausalLM

from tests.there_and_back import there_and_back
from tests.zoo import MODEL_TYPES, STAND_INS, logits, tiny, tiny_config

PECULIAR = ("qwen2", "gpt2", "falcon", "mixtral", "llama4_text", "gpt_oss", "jamba", "zamba", "longcat_flash")


@pytest.mark.parametrize(
    "model_type", [name if name in PECULIAR else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]
)
def test_every_architecture(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny(model_type)
        if model_type == "reformer":  # its backward runs in train mode only
            model.train()
    there_and_back(model, logits)


@pytest.mark.parametrize("model_type", STAND_INS)
def test_what_is_built_otherwise_cannot_be_built_as_it_is(model_type: str) -> None:
    if model_type == "gemma3n" and importlib.util.find_spec("timm"):
        pytest.skip("timm is installed; the zoo goes without it")
    error, message = {"gemma3n": (ImportError, "timm")}.get(model_type, (ValueError, "layer types producing a cache"))
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_config(tiny_config(model_type))
