"""Small configurations of every text model that the installed transformers names, with random weights.

`families` are read off transformers' own tables (causal language models, masked ones, classifiers, and base
models that take token ids), so that none is forgotten. `small_config` fills whatever fields a configuration
class has with small numbers, by the fields' names; what a family needs beside that is in `OPTIONS`. Nothing
here knows how a family computes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .models import CONTEXT, VOCAB_SIZE

_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "num_hidden_channels"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "ffn_hidden_size", "dim_ff", "d_ff"), 96),
    **dict.fromkeys(("n_inner", "dff", "shared_intermediate_size", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "dim_head", "d_kv"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), CONTEXT),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    "first_k_dense_replace": 1,
    "decoder_ffn_dim": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_topk": 64,
    "sliding_window": 12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DROPOUTS = ("dropout", "pdrop", "layerdrop")
_HYBRID: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_T5 = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 24}
_RECURRENT: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_THREE_AXES: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}

OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "esm": {"token_dropout": False, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "deepseek_v4": {"layer_types": None, "mlp_layer_types": None},
    "cohere_compass_text": {
        **_HYBRID,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 3, "expert_ffn_hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    **dict.fromkeys(("cosmos3_edge_text", "qwen2_5_vl_text", "qwen2_vl_text", "glm_ocr_text"), _THREE_AXES),
    **dict.fromkeys(("glm4v_text", "glm_image_text"), _THREE_AXES),
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.5, 0.0],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 8,
    },
    "gemma4_text (shared)": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    # As published: rotary embeddings that are scaled, and grow louder, with the length of the text.
    "phimoe (longrope)": {
        "rope_parameters": {
            "rope_type": "longrope",
            "factor": 16.0,
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [1.0 + 0.5 * i for i in range(8)],
            "short_mscale": 1.2,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 16,
        }
    },
    # As published: what queries and keys say of distances, not only of each other.
    "deberta (disentangled)": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2 (disentangled)": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    # The encoder alone, as sentence-t5 is published; and a decoder that was made an encoder.
    "t5 (encoder)": {"architectures": ["T5EncoderModel"], **_T5},
    "mt5 (encoder)": {"architectures": ["MT5EncoderModel"], **_T5},
    "umt5 (encoder)": {"architectures": ["UMT5EncoderModel"], **_T5},
    "gemma3_text (both ways)": {"use_bidirectional_attention": True, "architectures": ["Gemma3TextModel"]},
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
    "bert-generation": {"is_decoder": True},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "falcon (alibi)": {"alibi": True, "new_decoder_architecture": False},
    "falcon (new)": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "bailing_hybrid": _RECURRENT,
    "granitemoehybrid": _RECURRENT,
    "kimi_linear": _RECURRENT,
    # Blocks end within the texts that are compared.
    "minimax": {**_RECURRENT, "block_size": 16},
    "glm5_next_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "qk_rope_head_dim": 0,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
}
"""Fields by family, and by variant "family (what is special)", that make it small or interesting."""

_LARGE = "its parts for pictures or bytes stay gigabytes large, whatever is made small"
_DRAFTS = "it drafts for another model, whose hidden states, keys and values it takes instead of tokens"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("blt", "fuyu", "mllama", "ultravbert"), _LARGE),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    "dots3_note": "its class of language models takes the configuration of its text model alone",
}
"""Families that no small configuration of ours builds, and why."""


def _mappings() -> tuple[Any, ...]:
    from transformers.models.auto import modeling_auto as auto

    return (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )


@functools.cache
def families() -> list[str]:
    """Model types of transformers that are made for text, and the variants of `OPTIONS`, sorted."""
    named = {family for mapping in _mappings() for family in mapping} | set(_base_models())
    return sorted({*named, *OPTIONS})


def _base_models() -> list[str]:
    """Base models without a head of their own that take token ids alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

    found: list[str] = []
    for family in MODEL_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[family]
            kind: Any = MODEL_MAPPING[config]
            takes = inspect.signature((kind[0] if isinstance(kind, tuple) else kind).forward).parameters
        except (KeyError, ValueError, ImportError):  # its package is absent, or its class, in transformers
            continue
        fields = inspect.signature(config.__init__).parameters
        text = "vocab_size" in fields and not any(name.endswith("_config") for name in fields)
        if text and "input_ids" in takes and not {"pixel_values", "input_features"} & takes.keys():
            found.append(family)
    return found


def type_of(family: str) -> str:
    """ "falcon (alibi)" → "falcon"."""
    return family.partition(" (")[0]


def small_config(
    family: str,
    sizes: Mapping[str, Any] = MappingProxyType({}),
    changed: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The configuration of a family, made small; of `sizes` (values by the names of fields) those that the
    family has, and all of `changed`. Raises whatever transformers raises where that is none.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[type_of(family)]
    fields = inspect.signature(kind.__init__).parameters
    chosen = {name: value for name, value in {**_FIELDS, **sizes}.items() if name in fields}
    if "qk_rope_head_dim" in fields and "num_key_value_heads" in fields:
        chosen.pop("head_dim", None)  # it follows from the parts
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    chosen |= {name: 0.0 for name in fields if name.endswith(_DROPOUTS) and "classifier" not in name}
    if "use_sliding_window" in fields:
        chosen["use_sliding_window"] = True
    if "sliding_window" in fields and "layer_types" in fields:
        chosen |= _HYBRID
    chosen |= OPTIONS.get(type_of(family), {})
    chosen |= OPTIONS.get(family, {})
    return kind(**{**chosen, **changed})


_IDLE = (
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    *("is_encoder_decoder", "add_cross_attention", "is_decoder", "output_router_logits", "use_mambapy"),
    *("add_pooling_layer", "use_mamba_kernels", "use_bfloat16", "summary_use_proj"),
)
_ACTIVATIONS = ("gelu", "relu", "silu", "gelu_pytorch_tanh", "relu2")
_OTHERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"), _ACTIVATIONS
    ),
    "num_key_value_heads": (1, 4),
    "partial_rotary_factor": (0.5,),
    "n_shared_experts": (2,),
    "first_k_dense_replace": (0,),
    "q_lora_rank": (None,),
    "clip_qkv": (0.5,),
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "attention_multiplier"), (0.7,)
    ),
    **dict.fromkeys(("residual_multiplier", "final_logit_softcapping", "routed_scaling_factor"), (0.7,)),
}
"""Values that published models of a family may have in fields, beside its first one's."""


def changes(family: str) -> list[tuple[str, Any]]:
    """Fields of a family's configuration, each with another value that published models may have."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config, found = small_config(family), list[tuple[str, Any]]()
    for name in inspect.signature(CONFIG_MAPPING[type_of(family)].__init__).parameters:
        if name in _IDLE or name in ("self", "kwargs"):
            continue
        try:
            value = getattr(config, name, None)
        except (AttributeError, RuntimeError, ValueError):  # it is said of each layer
            continue
        if isinstance(value, bool):
            found.append((name, not value))
        found += [(name, other) for other in _OTHERS.get(name, ()) if other != value]
    return found


def random_model(config: Any, cls: Any) -> Any:
    """A float32 model of a class with seeded random weights: matrices of one scale, and vectors spread around
    what the class begins with.
    """
    import torch

    torch.manual_seed(0)
    model = cls(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter.shape[-1] ** 0.5)
            else:
                spread = 0.2 * parameter.abs().mean() if parameter.any() else 0.2
                parameter.add_(torch.randn_like(parameter) * spread)
    return model


def token_ids(length: int, seed: int = 0) -> list[int]:
    """Ids that are no special token of any configuration above."""
    return [10 + (seed * 7919 + i * 104729 + i * i * 31) % (VOCAB_SIZE - 10) for i in range(length)]
