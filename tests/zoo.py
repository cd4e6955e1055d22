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
ASSISTANT = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", FULL] * 2, "global_head_dim": 16,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
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
    "dots3_note_audio_encoder": {
        "num_key_value_heads": 4, "feature_size": 16, "downsample_hidden_size": 16, "adapter_input_size": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "adapter_in_dim": 64, "adapter_out_dim": 64,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", FULL] * 2,
        "intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128, "laurel_rank": 16,
    },
    **{name: {"backbone_hidden_size": 64} for name in ("gemma4_assistant", "gemma4_unified_assistant")},
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

# Those that are not wholly what their configuration says, and why; test_zoo.py sees that the reason still holds.
STAND_INS = {
    "gemma3n": "its vision tower is one of timm's; SigLIP's is in its place",
    "gemma4_assistant": "its configuration asks that all layers share their keys, and its layers refuse that; half do",
    "gemma4_unified_assistant": "as gemma4_assistant",
}
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str) -> nn.Module:
    """A causal language model of this type, fp32, in eval mode, deterministic."""
    config = tiny_config(model_type)
    if model_type == "gemma3n":
        vision = CONFIG_MAPPING["siglip_vision_model"]
        tower = vision(**shrunken(vision()), vocab_size=128, vocab_offset=128, rms_norm_eps=1e-6)
        object.__setattr__(config, "vision_config", tower)  # past the check of its type
    elif model_type in STAND_INS:
        config.text_config.num_kv_shared_layers = 2
    torch.manual_seed(0)
    if model_type.startswith("musicgen"):
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config.decoder).eval()
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The shrunken configuration as it is."""
    kind = CONFIG_MAPPING[model_type]
    if model_type.endswith("assistant"):
        text = CONFIG_MAPPING[model_type.replace("assistant", "text")]
        return kind(text_config=text(**{**shrunken(text()), **ASSISTANT}), **EXCEPTIONS[model_type])
    return kind(**{**shrunken(kind()), **EXCEPTIONS.get(model_type, {})})


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
    """Of a short text; of an assistant, which drafts from another model's states, for states drawn at random."""
    config = model.config
    if config.model_type.endswith("assistant"):
        generator = torch.Generator().manual_seed(0)
        states = {kind: torch.randn(2, 4, 2, 16, 16, generator=generator) for kind in (FULL, "sliding_attention")}
        one_token = torch.randn(4, 1, 2 * config.backbone_hidden_size, generator=generator)
        places = torch.full((4, 1), 16)
        return model(inputs_embeds=one_token, shared_kv_states=states, position_ids=places).logits
    ids = torch.arange(3, 19).repeat(getattr(config, "num_codebooks", 1), 1)
    out = model(ids, **({"use_cache": False} if config.model_type in NO_CACHE else {}))
    return out.logits if hasattr(out, "logits") else out[0]
