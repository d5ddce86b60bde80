"""What families are called and how they are stored in GGUF (`general.architecture`), to read and to write it.

transformers reads some architectures itself; those with `fields` here are read by this table, with the names
of tensors from the package gguf. A key-value that is not understood is an error: llama.cpp may go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .gguf import GGUFTensorInfo

Keys = Mapping[str, Any]
Tensors = Mapping[str, GGUFTensorInfo]


@dataclass(frozen=True)
class Architecture:
    """How a family of transformers is called and stored in GGUF.

    Attributes:
        name: `general.architecture`, also the name of its tensor table in the package gguf.
        kind: transformers' `model_type`, where it is not the row's key.
        turns: positions are rotary.
        permuted: q and k rows are stored with rotary pairs side by side.
        norm_offset: norms are stored with this added.
        partial: rotary embeddings may turn a part of a head only.
        experts_in_turns: transformers has an expert's gate and up in turns, and its matrices transposed.
        norm_key, norm_field: what is added to a norm's variance, in GGUF and in the configuration.
        check: what of a configuration cannot be said in GGUF, as a sentence, or None.
        extra: further key-values without their prefix.
        written: whether target gguf writes it.
        reads: further key-values that `fields` understands, all of which a file has.
        may: those that it understands where they are there.
        ignores: those that say no more than the tensors do.
        lists: those that may have a value a layer.
        unneeded: whether a model of this configuration has no place for a tensor that files have.
        when: of the key-values without their prefix, whether a file of that name is of this row.
        fields: of a file's key-values without their prefix, and the names of its tensors, what the
            configuration has beyond what all have; None where transformers reads the file itself.
    """

    name: str
    kind: str = ""
    turns: bool = True
    permuted: bool = False
    norm_offset: float = 0.0
    partial: bool = False
    experts_in_turns: bool = False
    norm_key: str = "attention.layer_norm_rms_epsilon"
    norm_field: str = "rms_norm_eps"
    check: Callable[[Any], str | None] = lambda config: None
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    written: bool = True
    reads: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    unneeded: Callable[[Any, str], bool] = lambda config, name: False
    when: Callable[[Keys], bool] = lambda keys: True
    fields: Callable[[Keys, Tensors], dict[str, Any]] | None = None


def _window_short(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if used and window is not None and window < config.max_position_embeddings:
        return f"a sliding window of {window} tokens in all layers"
    return None


def _full_layers(config: Any, every: int) -> str | None:
    """Gemma's layers: every n-th one sees everything, and q is scaled by its head's length."""
    for i, kind in enumerate(config.layer_types):
        wanted = "full_attention" if i % every == every - 1 else "sliding_attention"
        if kind != wanted:
            return f"layer {i} with {kind}, where llama.cpp takes {wanted}"
    if config.query_pre_attn_scalar != config.head_dim:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} beside heads of {config.head_dim}"
    return None


def _gemma2_keys(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping or 0.0),
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
    }


def _gemma3_keys(config: Any) -> dict[str, Any]:
    local = rope_parameters(config, "sliding_attention").get("rope_theta", 10000.0)
    return {"attention.sliding_window": config.sliding_window, "rope.freq_base_swa": float(local)}


def _gemma3_check(config: Any) -> str | None:
    if rope_parameters(config, "sliding_attention").get("rope_type", "default") != "default":
        return "scaled rotary frequencies in sliding layers"
    return _full_layers(config, 6)


def _granite_keys(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "attention.scale": float(config.attention_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _no_windows(config: Any) -> str | None:
    return "windows in some layers" if "sliding_attention" in (config.layer_types or []) else None


def _fourth_without_rope(config: Any) -> str | None:
    """SmolLM3's layers: every fourth has no positions."""
    wanted = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    held = list(config.no_rope_layers)
    return (
        None if held == wanted else f"rotary embeddings in the layers {held}, where llama.cpp takes {wanted}"
    )


def _fourth_full(config: Any) -> str | None:
    for i, kind in enumerate(config.layer_types):
        wanted = "sliding_attention" if (i + 1) % 4 else "full_attention"
        if kind != wanted:
            return f"layer {i} with {kind}, where llama.cpp takes {wanted}"
    return None


def _exaone4_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {"sliding_window": None, "layer_types": ["full_attention"] * int(keys["block_count"])}


def _both_ways_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """A window counts both sides, in GGUF and in the configuration, which halves it as it is made."""
    return {
        "architectures": ["Gemma3TextModel"],
        "use_bidirectional_attention": True,
        "sliding_window": keys["attention.sliding_window"],
        "query_pre_attn_scalar": keys["attention.key_length"],
        "rope_local_base_freq": keys.get("rope.freq_base_swa", 10000.0),
    }


def _granite_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        "embedding_multiplier": keys["embedding_scale"],
        "attention_multiplier": keys["attention.scale"],
        "residual_multiplier": keys["residual_scale"],
        "logits_scaling": keys["logit_scale"],
    }


def _gemma2_check(config: Any) -> str | None:
    heads = config.hidden_size // config.num_attention_heads
    if config.num_hidden_layers == _GEMMA2_27B and config.query_pre_attn_scalar == heads:
        return None
    return _full_layers(config, 2)


def _gemma2_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """llama.cpp tells the 27B model, whose queries are scaled by another length, by its layers."""
    large = keys["block_count"] == _GEMMA2_27B
    heads = int(keys["embedding_length"]) // max(int(keys["attention.head_count"]), 1)
    return {
        "sliding_window": keys["attention.sliding_window"],
        "query_pre_attn_scalar": heads if large else keys.get("attention.key_length", heads),
    }


def _experts_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": tensors["blk.0.ffn_gate_exps.weight"].shape[1],
        "norm_topk_prob": True,
    }


def _shared_expert_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {
        **_experts_fields(keys, tensors),
        "shared_expert_intermediate_size": tensors["blk.0.ffn_gate_shexp.weight"].shape[0],
        "norm_topk_prob": False,
    }


def _local_experts_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    return {"num_local_experts": keys["expert_count"], "num_experts_per_tok": keys["expert_used_count"]}


def _sinks_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """transformers' default has the published model's yarn, which is not cut to whole dimensions."""
    yarn = keys.get("rope.scaling.type") == "yarn"
    rope = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    return {
        **_local_experts_fields(keys, tensors),
        "intermediate_size": tensors["blk.0.ffn_gate_exps.weight"].shape[1],
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": {**rope, "truncate": False} if yarn else rope,
    }


def _phi3_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    original = keys.get("rope.scaling.original_context_length", keys["context_length"])
    window = keys.get("attention.sliding_window") or None
    return {"sliding_window": window, "original_max_position_embeddings": original}


def _gemma4_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window and without differ in the length of heads, and some in the heads of keys. Where a
    layer without has no values of its own, its keys are the values too.
    """
    layers = range(int(keys["block_count"]))
    sliding, widths, heads = (
        _by_layer(keys[name], len(layers))
        for name in ("attention.sliding_window_pattern", "feed_forward_length", "attention.head_count_kv")
    )
    full = [i for i in layers if not sliding[i]]
    shared = int(keys.get("attention.shared_kv_layers", 0))
    experts = int(keys.get("expert_count", 0))
    by_layer = tensors.get("per_layer_token_embd.weight")
    turns = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
        "sliding_window": keys["attention.sliding_window"],
        "head_dim": keys["attention.key_length_swa"],
        "global_head_dim": keys["attention.key_length"],
        "num_key_value_heads": next((heads[i] for i in layers if sliding[i]), heads[0]),
        "num_global_key_value_heads": next((heads[i] for i in full), None),
        "attention_k_eq_v": any(
            f"blk.{i}.attn_v.weight" not in tensors for i in full if i < len(layers) - shared
        ),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": len(set(widths)) > 1,
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": by_layer.shape[0] if by_layer is not None else 0,
        "rope_parameters": {
            "sliding_attention": turns,
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": keys["rope.freq_base"],
            },
        },
        "enable_moe_block": experts > 0,
        "num_experts": experts or None,
        "top_k_experts": keys.get("expert_used_count"),
        "moe_intermediate_size": keys.get("expert_feed_forward_length"),
    }


def _by_layer(value: Any, layers: int) -> list[Any]:
    return [value] * layers if isinstance(value, int | float) else np.asarray(value).tolist()[:layers]


def _of_shared_layers(config: Any, name: str) -> bool:
    """Whether a tensor makes keys or values of a layer that takes another's."""
    parts = name.split(".")
    made = parts[0] == "blk" and parts[2] in ("attn_k", "attn_v", "attn_k_norm")
    return made and int(parts[1]) >= config.num_hidden_layers - config.num_kv_shared_layers


_LAYER_NORM: Final = "attention.layer_norm_epsilon"
_EXPERTS: Final = frozenset({"expert_count", "expert_used_count"})
_EXPERT_SIZES: Final = frozenset({"expert_feed_forward_length", "expert_shared_feed_forward_length"})
_SEEN: Final = frozenset({"rope.dimension_sections", "n_deepstack_layers"})
"""What says how tokens of pictures are placed and taken up."""
_GEMMA2_27B: Final = 46
"""Layers of it."""


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True, check=_window_short),
    "qwen2": Architecture("qwen2", check=_window_short),
    "qwen3": Architecture("qwen3", check=_window_short, fields=lambda k, t: {}),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        check=_gemma2_check,
        extra=_gemma2_keys,
        reads=frozenset({"attention.sliding_window"}),
        may=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        fields=_gemma2_fields,
    ),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, check=_gemma3_check, extra=_gemma3_keys),
    "olmo2": Architecture("olmo2", fields=lambda k, t: {}),
    "granite": Architecture(
        "granite",
        permuted=True,
        extra=_granite_keys,
        reads=frozenset({"embedding_scale", "attention.scale", "residual_scale", "logit_scale"}),
        fields=_granite_fields,
    ),
    "smollm3": Architecture("smollm3", permuted=True, check=_fourth_without_rope, fields=lambda k, t: {}),
    "arcee": Architecture("arcee", permuted=True, fields=lambda k, t: {}),
    "gemma": Architecture("gemma", norm_offset=1.0, fields=lambda k, t: {}),
    "glm4": Architecture("glm4", partial=True, fields=lambda k, t: {}),
    "ernie4_5": Architecture("ernie4_5", fields=lambda k, t: {"use_bias": "blk.0.attn_q.bias" in t}),
    "seed_oss": Architecture(
        "seed_oss", fields=lambda k, t: {"attention_out_bias": "blk.0.attn_output.bias" in t}
    ),
    "exaone4": Architecture("exaone4", check=_no_windows, fields=_exaone4_fields),
    "gemma4_text": Architecture(
        "gemma4",
        written=False,
        reads=frozenset(
            {
                "attention.key_length",
                "attention.key_length_swa",
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "rope.freq_base",
            }
        ),
        may=_EXPERTS
        | {
            "attention.shared_kv_layers",
            "embedding_length_per_layer_input",
            "final_logit_softcapping",
            "expert_feed_forward_length",
            "rope.freq_base_swa",
        },
        ignores=frozenset({"attention.value_length_swa", "rope.dimension_count_swa"}),
        lists=frozenset(
            {"attention.sliding_window_pattern", "feed_forward_length", "attention.head_count_kv"}
        ),
        unneeded=_of_shared_layers,
        fields=_gemma4_fields,
    ),
    "mixtral": Architecture(
        "llama",
        permuted=True,
        written=False,
        reads=_EXPERTS,
        when=lambda k: k.get("expert_count", 0) != 0,
        fields=_local_experts_fields,
    ),
    "qwen2_moe": Architecture(
        "qwen2moe",
        written=False,
        reads=_EXPERTS,
        ignores=_EXPERT_SIZES,
        fields=_shared_expert_fields,
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", written=False, reads=_EXPERTS, ignores=_EXPERT_SIZES, fields=_experts_fields
    ),
    "olmoe": Architecture(
        "olmoe",
        written=False,
        reads=_EXPERTS,
        fields=lambda k, t: {
            "num_experts": k["expert_count"],
            "num_experts_per_tok": k["expert_used_count"],
            "norm_topk_prob": False,
        },
    ),
    "granitemoe": Architecture(
        "granitemoe",
        kind="granitemoe",
        permuted=True,
        written=False,
        reads=_EXPERTS | {"embedding_scale", "attention.scale", "residual_scale", "logit_scale"},
        fields=lambda k, t: {**_granite_fields(k, t), **_local_experts_fields(k, t)},
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        written=False,
        experts_in_turns=True,
        reads=_EXPERTS | {"attention.sliding_window", "rope.freq_base"},
        ignores=_EXPERT_SIZES,
        fields=_sinks_fields,
    ),
    "phi3": Architecture(
        "phi3",
        written=False,
        partial=True,
        may=frozenset({"attention.sliding_window"}),
        fields=_phi3_fields,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        written=False,
        fields=lambda k, t: {"use_bias": "blk.0.attn_q.bias" in t, "sliding_window": None},
        norm_key=_LAYER_NORM,
        norm_field="norm_epsilon",
    ),
    "stablelm": Architecture(
        "stablelm",
        written=False,
        partial=True,
        reads=frozenset({"use_parallel_residual"}),
        fields=lambda k, t: {
            "use_parallel_residual": k["use_parallel_residual"],
            "use_qkv_bias": "blk.0.attn_q.bias" in t,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in t,
        },
        norm_key=_LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    # What a model that sees has for text is the model without eyes: positions of text are the same on all
    # axes.
    "qwen3 (of qwen3vl)": Architecture(
        "qwen3vl",
        kind="qwen3",
        written=False,
        ignores=_SEEN,
        fields=lambda k, t: {},
    ),
    "qwen3_moe (of qwen3vlmoe)": Architecture(
        "qwen3vlmoe",
        kind="qwen3_moe",
        written=False,
        reads=_EXPERTS,
        ignores=_EXPERT_SIZES | _SEEN,
        fields=_experts_fields,
    ),
    "qwen2 (of qwen2vl)": Architecture(
        "qwen2vl",
        kind="qwen2",
        written=False,
        ignores=_SEEN,
        fields=lambda k, t: {},
    ),
    "bert": Architecture(
        "bert",
        turns=False,
        written=False,
        fields=lambda k, t: {"type_vocab_size": t["token_types.weight"].shape[0]},
        norm_key=_LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "gemma3_text (encoder)": Architecture(
        "gemma-embedding",
        kind="gemma3_text",
        norm_offset=1.0,
        written=False,
        reads=frozenset({"attention.sliding_window", "attention.key_length"}),
        ignores=frozenset({"dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"}),
        may=frozenset({"rope.freq_base_swa"}),
        fields=_both_ways_fields,
    ),
    # Queries, keys, values and the gate are one matrix in our graphs, whose name does not say all of them.
    "cohere": Architecture(
        "command-r",
        written=False,
        check=lambda c: "norms of queries and keys" if c.use_qk_norm else None,
        extra=lambda c: {"logit_scale": float(c.logit_scale)},
        reads=frozenset({"logit_scale"}),
        fields=lambda k, t: {"logit_scale": k["logit_scale"]},
        norm_key=_LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "cohere2": Architecture(
        "cohere2",
        written=False,
        check=_fourth_full,
        extra=lambda c: {
            "logit_scale": float(c.logit_scale),
            "attention.sliding_window": c.sliding_window,
        },
        reads=frozenset({"logit_scale", "attention.sliding_window"}),
        fields=lambda k, t: {
            "logit_scale": k["logit_scale"],
            "sliding_window": k["attention.sliding_window"],
        },
        norm_key=_LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
}
"""transformers' `model_type` → what GGUF makes of it."""


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of layers of one type."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(layer_type, found)
