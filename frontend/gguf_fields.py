"""What the key-values of GGUF's named layouts mean in transformers' configurations, and what of these they
cannot say. `gguf_architectures.py` names for each layout which of these functions it takes:

    fields(key-values without their prefix, tensors)  → values of the configuration
    keys(configuration)                               → key-values beyond what all layouts have
    check(configuration)                              → what cannot be said, as a sentence, or None
    of_…(configuration, name of a tensor)             → whether the model has no place for it
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from .gguf import GGUFTensorInfo

Keys = Mapping[str, Any]
Tensors = Mapping[str, GGUFTensorInfo]
BLOCK: Final = re.compile(r"blk\.(\d{1,9})\.(.+)\.(?:weight|bias|scale)")
EXPERTS: Final = frozenset({"expert_count", "expert_used_count"})
ROUTED: Final = frozenset(
    {
        "expert_shared_count",
        "leading_dense_block_count",
        "expert_weights_scale",
        "expert_weights_norm",
        "expert_group_count",
        "expert_group_used_count",
        "nextn_predict_layers",
    }
)
EXPERT_SIZES: Final = frozenset({"expert_feed_forward_length", "expert_shared_feed_forward_length"})
SIGMOID: Final = 2
"""`expert_gating_func`; 1 is the softmax."""
_LARGEST: Final = {2: 46, 6: 62}
"""Layers of Gemma 2 27B and Gemma 3 27B, by which llama.cpp knows them: their queries are scaled by another
length.
"""


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of layers of one type."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(layer_type, found)


def window_short(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if used and window is not None and window < config.max_position_embeddings:
        return f"a sliding window of {window} tokens in all layers"
    return None


def full_layers(config: Any, every: int) -> str | None:
    """Gemma's layers: every n-th one sees everything; q is scaled by its head's length but in the largest."""
    for i, kind in enumerate(config.layer_types):
        wanted = "full_attention" if i % every == every - 1 else "sliding_attention"
        if kind != wanted:
            return f"layer {i} with {kind}, where llama.cpp takes {wanted}"
    large = config.num_hidden_layers == _LARGEST[every]
    head = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != head:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} beside heads of {config.head_dim}"
    return None


def gemma2_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 0.0),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }


def gemma3_keys(config: Any) -> dict[str, Any]:
    local = rope_parameters(config, "sliding_attention").get("rope_theta", 10000.0)
    return {"attention.sliding_window": config.sliding_window, "rope.freq_base_swa": float(local)}


def gemma3_check(config: Any) -> str | None:
    if rope_parameters(config, "sliding_attention").get("rope_type", "default") != "default":
        return "scaled rotary frequencies in sliding layers"
    return full_layers(config, 6)


def granite_keys(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def windows_of_the_largest(config: Any) -> str | None:
    """llama.cpp takes windows in models of 64 layers alone, in all but every fourth."""
    if config.num_hidden_layers == 64:
        return fourth_full(config)
    return "windows in some layers" if "sliding_attention" in (config.layer_types or []) else None


def window_key(config: Any) -> dict[str, Any]:
    windows = "sliding_attention" in (config.layer_types or [])
    return {"attention.sliding_window": config.sliding_window} if windows else {}


def fourth_without_rope(config: Any) -> str | None:
    """SmolLM3's layers: every fourth has no positions."""
    wanted = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    held = list(config.no_rope_layers)
    return (
        None if held == wanted else f"rotary embeddings in the layers {held}, where llama.cpp takes {wanted}"
    )


def fourth_full(config: Any) -> str | None:
    for i, kind in enumerate(config.layer_types):
        wanted = "sliding_attention" if (i + 1) % 4 else "full_attention"
        if kind != wanted:
            return f"layer {i} with {kind}, where llama.cpp takes {wanted}"
    return None


def partly_turned_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """A part of each head turns."""
    head_dim = int(keys["embedding_length"]) // max(int(keys["attention.head_count"]), 1)
    rope = {
        "rope_type": "default",
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": int(keys.get("rope.dimension_count", head_dim)) / head_dim,
    }
    return {
        "rope_parameters": rope,
        "use_parallel_residual": keys["use_parallel_residual"],
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
    }


def slopes_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Positions are slopes, of one steepness whatever a configuration says; queries, keys and values may be
    cut. Files may have the embeddings a second time, as their head.
    """
    slope = float(keys.get("attention.max_alibi_bias", 0.0))
    if slope != 8:
        raise UnsupportedError(
            f"the file's attention.max_alibi_bias is {slope:g}, where the model knows 8",
            remedy="run the file with llama.cpp",
        )
    return {
        "max_seq_len": keys["context_length"],
        "no_bias": "blk.0.attn_qkv.bias" not in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attn_config": {"clip_qkv": _clipped_at(keys)},
    }


def one_key_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """All heads share one key and value: with one for each, the model has them in turns, where llama.cpp has
    all queries first.
    """
    if keys.get("attention.head_count_kv") != 1:
        raise UnsupportedError(
            "the file's attention.head_count_kv is not 1",
            remedy="give the model as a Hugging Face folder",
        )
    return {
        "multi_query": True,
        "n_inner": keys["feed_forward_length"],
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def clipped_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Norms add 1e-5 to the variance, whatever a configuration says; queries, keys and values may be cut."""
    epsilon = float(keys["attention.layer_norm_epsilon"])
    if not math.isclose(epsilon, 1e-5, rel_tol=1e-3):
        raise UnsupportedError(
            f"the file's attention.layer_norm_epsilon is {epsilon:g}, where the model knows 1e-05",
            remedy="give the model as a Hugging Face folder",
        )
    return {"clip_qkv": _clipped_at(keys)}


def _clipped_at(keys: Keys) -> float | None:
    """The largest size of queries, keys and values, or None.

    Raises InputError for what is no size.
    """
    size = float(keys.get("attention.clamp_kqv", 0.0))
    if not 0 <= size < math.inf:
        raise InputError(f"the file's attention.clamp_kqv is {size:g}", remedy="download the file again")
    return size or None


def activated_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """An activation by its name, which files did not have at first."""
    return {"hidden_act": activation(keys, "silu", {"silu": "silu", "relu2": "relu2"})}


def activation(keys: Keys, usual: str, known: Mapping[str, str]) -> str:
    """`hidden_activation` as the configuration has it. Raises UnsupportedError for one that is not known."""
    act = keys.get("hidden_activation", usual)
    if act not in known:
        raise UnsupportedError(
            f"the file's hidden_activation is {str(act)[:40]!r}, which is not understood",
            remedy="give the model as a Hugging Face folder",
        )
    return known[act]


def scaled_by_depth_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Embeddings, residuals and logits are scaled; queries by the length of a head. Older files do not say by
    what: the first models' factors, as llama.cpp takes them, but that it multiplies the logits where these
    divide.
    """
    heads, width = max(int(keys["attention.head_count"]), 1), int(keys["embedding_length"])
    return {
        "embedding_multiplier": keys.get("embedding_scale", 12.0),
        "residual_multiplier": keys.get("residual_scale", 1.4 / max(int(keys["block_count"]), 1) ** 0.5),
        "logits_scaling": keys.get("logit_scale", width / 256.0),
        "attention_multiplier": int(keys.get("attention.key_length", width // heads)) ** -0.5,
    }


def both_ways_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """A window counts both sides, in GGUF and in the configuration, which halves it as it is made."""
    return {
        "architectures": ["Gemma3TextModel"],
        "use_bidirectional_attention": True,
        "sliding_window": keys["attention.sliding_window"],
        "query_pre_attn_scalar": keys["attention.key_length"],
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 10000.0),
    }


def token_types_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """llama.cpp adds the first row of the types of tokens, where a file has them; the configuration cannot
    say that there are none.
    """
    types = tensors.get("token_types.weight")
    if types is None:
        raise UnsupportedError(
            "the file has no token_types.weight", remedy="give the model as a Hugging Face folder"
        )
    return {"type_vocab_size": types.shape[0]}


def granite_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        "embedding_multiplier": keys["embedding_scale"],
        "attention_multiplier": keys["attention.scale"],
        "residual_multiplier": keys["residual_scale"],
        "logits_scaling": keys["logit_scale"],
    }


def gemma2_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {"sliding_window": keys["attention.sliding_window"], "query_pre_attn_scalar": _scaled(keys, 2)}


def gemma3_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        "sliding_window": keys["attention.sliding_window"],
        "query_pre_attn_scalar": _scaled(keys, 6),
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 10000.0),
    }


def _scaled(keys: Keys, every: int) -> int:
    """Of what length queries are scaled, in a model whose every n-th layer sees everything."""
    head = int(keys["embedding_length"]) // max(int(keys["attention.head_count"]), 1)
    return head if keys["block_count"] == _LARGEST[every] else int(keys.get("attention.key_length", head))


def experts_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": tensors["blk.0.ffn_gate_exps.weight"].shape[1],
        "norm_topk_prob": True,
    }


def shared_expert_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        **experts_fields(keys, tensors),
        "shared_expert_intermediate_size": tensors["blk.0.ffn_gate_shexp.weight"].shape[0],
        "norm_topk_prob": False,
    }


def local_experts_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {"num_local_experts": keys["expert_count"], "num_experts_per_tok": keys["expert_used_count"]}


def sinks_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """transformers' default has the published model's yarn, which is not cut to whole dimensions."""
    yarn = keys.get("rope.scaling.type") == "yarn"
    rope = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    return {
        **local_experts_fields(keys, tensors),
        "intermediate_size": tensors["blk.0.ffn_gate_exps.weight"].shape[1],
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": {**rope, "truncate": False} if yarn else rope,
    }


def phi3_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    original = keys.get("rope.scaling.original_context_length", keys["context_length"])
    window = keys.get("attention.sliding_window") or None
    return {"sliding_window": window, "original_max_position_embeddings": original}


def routed_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Experts after layers without, beside shared ones; layers that predict later tokens are left out.

    Raises InputError where no others are left.
    """
    layers, later = int(keys["block_count"]), int(keys.get("nextn_predict_layers", 0))
    if not 0 <= later < layers:
        raise InputError(
            f"the file's nextn_predict_layers is {later} of {layers} layers", remedy="download the file again"
        )
    return {
        "num_hidden_layers": layers - later,
        "n_routed_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "routed_scaling_factor": keys.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
    }


def latent_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Files from before llama.cpp took the latent for one head have `key_length` where others have
    `key_length_mla`.
    """
    turned = int(keys["rope.dimension_count"])
    key = int(keys.get("attention.key_length_mla", keys["attention.key_length"]))
    return {
        **routed_fields(keys, tensors),
        "num_key_value_heads": keys["attention.head_count"],
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": keys.get("attention.value_length_mla", keys["attention.value_length"]),
        "topk_method": "group_limited_greedy" if keys.get("expert_group_count", 1) > 1 else "greedy",
    }


def latent_by_depth_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Keys and values of a latent; llama.cpp knows the factors of embeddings, residuals and logits, which
    files do not say.
    """
    heads, turned = max(int(keys["attention.head_count"]), 1), int(keys["rope.dimension_count"])
    return {
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": int(keys["attention.key_length"]) - turned,
        "v_head_dim": keys.get("attention.value_length", int(keys["embedding_length"]) // heads),
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    }


def scores_by_sigmoid(keys: Keys, tensors: Tensors) -> bool:
    """Whether experts are scored by a sigmoid; where a file does not say, those with a bias are, which
    llama.cpp knows by the sizes of the only model of that kind.
    """
    said = keys.get("expert_gating_func", 0)
    return said == SIGMOID or (not said and any(name.endswith("exp_probs_b.bias") for name in tensors))


def of_later_layers(config: Any, name: str) -> bool:
    """Whether a tensor belongs to layers that predict tokens after the next one."""
    made = BLOCK.fullmatch(name)
    return made is not None and int(made[1]) >= config.num_hidden_layers


def tempered_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Yarn whose temperature the file has, and queries that grow with their position beyond the length that
    the model was trained on.
    """
    scaling = "rope.scaling."
    kind, attention = keys.get(scaling + "type", "linear"), keys.get(scaling + "attn_factor", 1.0)
    if kind != "yarn" or attention != 1.0:
        raise UnsupportedError(
            f"the file has the rope scaling {str(kind)[:40]!r} and the attn_factor {attention}, beside "
            "attention.temperature_scale",
            remedy="give the model as a Hugging Face folder",
        )
    return {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": keys["rope.freq_base"],
            "factor": keys[scaling + "factor"],
            "original_max_position_embeddings": keys[scaling + "original_context_length"],
            "beta_fast": keys.get(scaling + "yarn_beta_fast", 32.0),
            "beta_slow": keys.get(scaling + "yarn_beta_slow", 1.0),
            "mscale": 1.0,
            "mscale_all_dim": keys.get(scaling + "yarn_log_multiplier", 0.0),
            "llama_4_scaling_beta": keys["attention.temperature_scale"],
        },
    }


def stepped_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Experts in every n-th layer after layers without, beside shared ones."""
    experts = int(keys["expert_count"])
    gate = next(t for name, t in tensors.items() if name.endswith("ffn_gate_exps.weight"))
    return {
        "use_bias": "blk.0.attn_q.bias" in tensors,
        "moe_num_experts": experts,
        "moe_k": keys["expert_used_count"],
        "moe_layer_interval": keys["interleave_moe_layer_step"],
        "moe_layer_start_index": keys["leading_dense_block_count"],
        "moe_layer_end_index": int(keys["block_count"]) - 1,
        "moe_num_shared_experts": keys.get("expert_shared_count", 0),
        "moe_intermediate_size": gate.shape[1],
    }


def by_layer(keys: Keys, name: str) -> list[Any]:
    """A key-value of each layer, of a file that has one for all or an array.

    Raises InputError for an array of another length.
    """
    layers, value = int(keys["block_count"]), keys[name]
    if isinstance(value, int | float):
        return [value] * layers
    held = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(held, list) or len(held) != layers or not all(isinstance(n, int | float) for n in held):
        count = f"{len(held)} values" if isinstance(held, list) else f"{str(held)[:40]!r}"
        raise InputError(f"{name} has {count} for {layers} layers", remedy="download the file again")
    return held
