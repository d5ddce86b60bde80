"""For each row of the table of GGUF's layouts: what a small model has otherwise than its family's default,
and the key-values that files have beyond those of all layouts, as llama.cpp's converter writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmc.frontend.gguf_architectures import ARCHITECTURES

FOUR: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": None}
FOURTH = {**FOUR, "sliding_window": 12, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}
CHANGES: dict[str, dict[str, Any]] = {
    "smollm3": {**FOUR, "no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4},
    "cohere2": FOURTH,
}
FULL: dict[str, Any] = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
CHUNKS = {
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
}
HALF = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}  # no configuration's own
CHANGES |= {
    "qwen2": FULL,
    "qwen3": {**FULL, "head_dim": 24},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {**FULL, "sliding_window": 256, "use_sliding_window": False, "norm_topk_prob": False},
    "qwen3_moe": {**FULL, "head_dim": 24, "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "phi3": {"sliding_window": None, "rope_parameters": HALF},
    "starcoder2": {"sliding_window": None, "rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "stablelm": {"rope_parameters": HALF, "use_qkv_bias": True},
}
KEYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "granitemoe": ARCHITECTURES["granite"].extra,
    "qwen2_moe": lambda c: {
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.shared_expert_intermediate_size,
    },
    "qwen3_moe": lambda c: {"expert_feed_forward_length": c.moe_intermediate_size},
    "gpt_oss": lambda c: {
        "attention.sliding_window": c.sliding_window,
        "expert_feed_forward_length": c.intermediate_size,
    },
    "stablelm": lambda c: {"use_parallel_residual": c.use_parallel_residual},
}


def _routed(config: Any) -> dict[str, Any]:
    return {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
    }


def _latent(config: Any) -> dict[str, Any]:
    """As llama.cpp's converter has written them since it takes the latent for one head."""
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    return {
        **_routed(config),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": key,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


KEYS |= {
    "glm4_moe": lambda c: {**_routed(c), "expert_gating_func": 2},
    "deepseek_v2": _latent,
    "deepseek_v3": lambda c: {**_latent(c), "expert_gating_func": 2},
}
KEYS |= {
    "ernie4_5_moe": lambda c: {
        "interleave_moe_layer_step": c.moe_layer_interval,
        "leading_dense_block_count": c.moe_layer_start_index,
        "expert_shared_count": c.moe_num_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.moe_num_shared_experts * c.moe_intermediate_size,
    },
    "hunyuan_v1_moe": lambda c: {
        "expert_shared_count": 1,
        "expert_feed_forward_length": c.intermediate_size,
        "expert_shared_feed_forward_length": c.intermediate_size,
    },
    "ministral3": lambda c: {
        "attention.temperature_scale": c.rope_parameters["llama_4_scaling_beta"],
        "rope.scaling.yarn_log_multiplier": c.rope_parameters["mscale_all_dim"],
    },
}
CHANGES |= {
    "ministral3": {
        "head_dim": 24,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "hunyuan_v1_dense": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "hunyuan_v1_moe": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm4_moe": {"rope_parameters": HALF, "routed_scaling_factor": 1.5},
    "deepseek_v2": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "deepseek_v3": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
}
CHANGES |= {
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "dots1": {
        **FULL,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
    },
    "exaone_moe": {**FOURTH, "mlp_layer_types": ["dense", *["sparse"] * 3], "routed_scaling_factor": 1.5},
    "jais2": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "afmoe": {**FOURTH, "mup_enabled": True, "route_scale": 1.5, "num_dense_layers": 1},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    },
    "glm": {"rope_parameters": HALF},
    "apertus": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "exaone": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "minicpm3": {"rope_parameters": {**HALF, "partial_rotary_factor": 1.0}},
    "llama4_text": {**FOUR, "layer_types": [*["chunked_attention"] * 3, "full_attention"], **CHUNKS},
    "olmo": {"clip_qkv": 0.4, "layer_norm_eps": 1e-5},
    "bitnet": {"tie_word_embeddings": True, "hidden_act": "silu"},
}
KEYS |= {
    "dots1": lambda c: {**_routed(c), "expert_gating_func": 2},
    "exaone_moe": lambda c: {
        "attention.sliding_window": c.sliding_window,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.moe_intermediate_size * c.num_shared_experts,
        "expert_shared_count": c.num_shared_experts,
        "leading_dense_block_count": 1,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "nextn_predict_layers": 0,
    },
    "afmoe": lambda c: {
        "attention.sliding_window": c.sliding_window,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.num_shared_experts,
        "leading_dense_block_count": c.num_dense_layers,
        "expert_weights_scale": c.route_scale,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    },
    "gpt_neox": lambda c: {"use_parallel_residual": c.use_parallel_residual},
    "minicpm3": lambda c: {
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length": c.v_head_dim,
        "rope.dimension_count": c.qk_rope_head_dim,
    },
    "llama4_text": lambda c: {
        "feed_forward_length": c.intermediate_size_mlp,
        "expert_feed_forward_length": c.intermediate_size,
        "interleave_moe_layer_step": 2,
    },
    "olmo": lambda c: {"attention.clamp_kqv": c.clip_qkv},
    "bitnet": lambda c: {
        "hidden_activation": c.hidden_act,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 1.0,
    },
}
