"""Every causal language model of transformers, built tiny from a shrunken configuration. Nothing is downloaded."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What an integer of a configuration is lowered to, by its name; the first rule that fits.
RULES = [
    (r".*vocab.*size.*|encoder_hash_byte_group_vocab", 128),
    (r"(pad|bos|eos|sep|cls|mask|unk|decoder_start|image|audio|video|boi|eoi|boa|eoa)\w*_(token_)?(id|index)", 1),
    (r".*experts_per_tok(en)?|moe_top_?k|top_?k_experts|moe_k|router_top_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"(.*_)?(num|n)_(routed_|local_)?experts", 4),
    (r".*shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r".*_lora_(rank|dim)", 32),
    (r".*head_dim|attention_head_size|d_kv|kv_channels", 16),
    (r".*kv_heads.*|num_key_value_heads|multi_query_group_num", 2),
    (r".*(attention_heads|n_heads?|num_heads|_heads)", 4),
    (r".*(moe|expert|shared)_.*(intermediate|ffn|hidden|inner)\w*(size|dim)", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|ff_dim|d_inner|feed_forward_size|d_mlp).*", 128),
    (r".*(layers?|num_blocks)", 2),
    (r".*(hidden_size|d_model|n_embd|n_embed|embed_dim|hidden_dim|embedding_size|emb_dim|word_embed_proj_dim).*", 64),
    (r".*(max_position|n_positions|context_length|n_ctx|max_seq).*", 128),
]
NOT_LAYERS = re.compile(r".*(first|every|per|shared|window|nextn|cross|skip|dense|exit|add)_.*layers?")

FULL, LINEAR = "full_attention", "linear_attention"
MLA = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
KIMI = {**MLA, "layer_types": [LINEAR, FULL], "mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 4}
ZAMBA = {
    "num_hidden_layers": 3, "layers_block_type": [LINEAR, "hybrid", "hybrid"], "num_key_value_heads": 4,
    "attention_hidden_size": 128, "attention_head_dim": 32, "use_mamba_kernels": False,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What the rules do not get right: by model type, also where it is part of another.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), MLA),
    **{name: {"layer_types": [LINEAR, FULL]} for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    **{name: {**KIMI, "linear_head_dim": 16} for name in ("bailing_hybrid", "kimi_linear")},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # what it would switch to by itself for a short text
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"layer_types": [FULL, FULL], "rope_parameters": {FULL: ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", FULL] * 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128, "laurel_rank": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": [LINEAR, FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 32, "use_mamba_kernels": False},
    "longcat_flash": {**MLA, "qk_head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", FULL, "sliding_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 16},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 16},
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16, "use_mamba_kernels": False,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    },
    "qwen4_exp_text": {
        "layer_types": [LINEAR, "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16},
    "reformer": {
        "is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 4), "num_buckets": 4,
        "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16, "attn_layers": ["local", "lsh"], "hash_seed": 42,
        "hidden_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "mamba_dt_rank": 32, "n_mamba_heads": 2},
    "zamba2": {
        **ZAMBA, "n_mamba_heads": 4, "mamba_headdim": 32, "mamba_d_state": 16, "num_query_groups": 4,
        "kv_channels": 16, "adapter_rank": 8, "hybrid_layer_ids": [1, 2],
    },
}  # fmt: skip
NO_CACHE = ("blt", "rwkv")

# Not to be built here, and why.
LEFT_OUT = {
    "dots3_note": "its vision tower cannot be shrunk by values",
    "gemma3n": "its vision tower needs timm; gemma3n_text is here",
    "gemma4_assistant": "takes the keys and values of another model, no text",
    "gemma4_unified_assistant": "takes the keys and values of another model, no text",
}
MODEL_TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]


def tiny(model_type: str) -> nn.Module:
    """A causal language model of this type, fp32, in eval mode, deterministic."""
    kind = CONFIG_MAPPING[model_type]
    config = kind(**{**shrunken(kind()), **EXCEPTIONS.get(model_type, {})})
    torch.manual_seed(0)
    if model_type.startswith("musicgen"):
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config.decoder).eval()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def shrunken(config: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = {**shrunken(value), **EXCEPTIONS.get(value.model_type, {})}
        elif isinstance(value, int) and not isinstance(value, bool):
            low = next((low for rule, low in RULES if re.fullmatch(rule, name)), value)
            if low < value and not NOT_LAYERS.fullmatch(name):
                values[name] = low
    return values


def logits(model: nn.Module) -> Tensor:
    """Of a short text."""
    config = model.config
    ids = torch.arange(3, 19).repeat(getattr(config, "num_codebooks", 1), 1)
    out = model(ids, **({"use_cache": False} if config.model_type in NO_CACHE else {}))
    return out.logits if hasattr(out, "logits") else out[0]
