"""Tiny stock models, built from configs: nothing is downloaded."""

from __future__ import annotations

import torch

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")


def tiny_model(model_type: str = "qwen2", seed: int = 0, **overrides):
    """A causal LM of two layers, hidden size 64, vocabulary 99; deterministic from the seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type in ("gpt_neox", "qwen2", "phi3"):
        sizes.pop("head_dim")
    if model_type == "gpt_neox":
        sizes.pop("num_key_value_heads")
    config = AutoConfig.for_model(model_type, **{**sizes, **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def with_lora(model, **overrides):
    """PEFT LoRA on all linears, with a non-zero B so that the adapter does something."""
    from peft import LoraConfig, get_peft_model

    arguments = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(7)
    wrapped = get_peft_model(model, LoraConfig(**{**arguments, **overrides}))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    return wrapped.eval()
