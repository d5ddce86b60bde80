"""What families are called and how they are stored in GGUF (`general.architecture`), to read and to write it.

transformers reads some architectures itself; those with `fields` here are read by this table, with the names
of tensors from the package gguf. A key-value that is not understood is an error: llama.cpp may go by it.
"""

from __future__ import annotations

from typing import Final

from . import gguf_fields as its
from . import gguf_parts as parts
from . import gguf_windows as windowed
from .gguf_encoders import ENCODERS
from .gguf_fields import EXPERT_SIZES, EXPERTS, ROUTED
from .gguf_hybrids import HYBRIDS
from .gguf_layout import LAYER_NORM, Architecture

_LATENT: Final = EXPERTS | {"expert_feed_forward_length", "attention.kv_lora_rank", "rope.dimension_count"}
_MAY_LATENT: Final = ROUTED | {
    "attention.q_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "expert_gating_func",
}
_PATTERN: Final = frozenset({"attention.sliding_window_pattern"})
_SHARED: Final = frozenset({"expert_shared_count", "leading_dense_block_count", "expert_weights_scale"})
"""Of experts that are not chosen in groups, beside shared ones, after layers without."""
_WITH_SLOPES: Final = 40
"""Layers of the one model of its family whose positions are slopes, by which llama.cpp knows it."""
_WINDOWS: Final = _PATTERN | {"attention.sliding_window"}
_SEEN: Final = frozenset({"rope.dimension_sections", "n_deepstack_layers"})
"""What says how tokens of pictures are placed and taken up."""


ARCHITECTURES: Final[dict[str, Architecture]] = {
    **HYBRIDS,
    **ENCODERS,
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True, check=its.window_short),
    "qwen2": Architecture("qwen2", check=its.window_short),
    "qwen3": Architecture("qwen3", check=its.window_short, fields=lambda k, t: {}),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        check=lambda c: its.full_layers(c, 2),
        extra=its.gemma2_keys,
        reads=frozenset({"attention.sliding_window"}),
        may=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        fields=its.gemma2_fields,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        check=its.gemma3_check,
        extra=its.gemma3_keys,
        reads=frozenset({"attention.sliding_window"}),
        may=frozenset({"rope.freq_base_swa", "final_logit_softcapping"}),
        fields=its.gemma3_fields,
    ),
    "olmo": Architecture(
        "olmo",
        permuted=True,
        written=False,
        may=frozenset({"attention.clamp_kqv"}),
        fields=its.clipped_fields,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "olmo2": Architecture(
        "olmo2", when=lambda k, t: not k.get("attention.sliding_window"), fields=lambda k, t: {}
    ),
    "olmo3": Architecture(
        "olmo2",
        written=False,
        reads=frozenset({"attention.sliding_window"}),
        may=_PATTERN,
        lists=_PATTERN,
        fields=windowed.unscaled_windows_fields,
    ),
    "granite": Architecture(
        "granite",
        permuted=True,
        extra=its.granite_keys,
        reads=frozenset({"embedding_scale", "attention.scale", "residual_scale", "logit_scale"}),
        fields=its.granite_fields,
    ),
    "smollm3": Architecture("smollm3", permuted=True, check=its.fourth_without_rope, fields=lambda k, t: {}),
    # Named by whom they come from: they compute what Llama does, or Granite.
    "llama (of internlm2)": Architecture(
        "internlm2", kind="llama", permuted=True, written=False, fields=lambda k, t: {}
    ),
    "llama (of xverse)": Architecture(
        "xverse", kind="llama", permuted=True, written=False, fields=lambda k, t: {}
    ),
    "llama (of baichuan)": Architecture(
        "baichuan",
        kind="llama",
        permuted=True,
        written=False,
        when=lambda k, t: k.get("block_count") != _WITH_SLOPES,
        fields=lambda k, t: {},
    ),
    "granite (of minicpm)": Architecture(
        "minicpm",
        kind="granite",
        permuted=True,
        written=False,
        may=frozenset({"embedding_scale", "residual_scale", "logit_scale"}),
        fields=its.scaled_by_depth_fields,
    ),
    "minicpm3": Architecture(
        "minicpm3",
        written=False,
        latent=True,
        reads=frozenset({"attention.kv_lora_rank", "attention.key_length", "rope.dimension_count"}),
        may=frozenset({"attention.q_lora_rank"}),
        fields=its.latent_by_depth_fields,
    ),
    "arcee": Architecture("arcee", permuted=True, fields=lambda k, t: {}),
    "gemma": Architecture("gemma", norm_offset=1.0, fields=lambda k, t: {}),
    "glm4": Architecture("glm4", partial=True, fields=lambda k, t: {}),
    "ernie4_5": Architecture("ernie4_5", fields=lambda k, t: {"use_bias": "blk.0.attn_q.bias" in t}),
    "seed_oss": Architecture(
        "seed_oss", fields=lambda k, t: {"attention_out_bias": "blk.0.attn_output.bias" in t}
    ),
    "exaone": Architecture("exaone", written=False, ignores=frozenset({LAYER_NORM}), fields=lambda k, t: {}),
    "exaone4": Architecture(
        "exaone4",
        check=its.windows_of_the_largest,
        extra=its.window_key,
        may=_WINDOWS,
        lists=_PATTERN,
        fields=windowed.windows_turn_fields,
    ),
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
        may=EXPERTS
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
        unneeded=windowed.of_shared_layers,
        fields=windowed.gemma4_fields,
    ),
    "exaone_moe": Architecture(
        "exaone-moe",
        written=False,
        reads=EXPERTS | {"expert_feed_forward_length", "attention.sliding_window"},
        may=ROUTED | _PATTERN | {"expert_gating_func"},
        ignores=EXPERT_SIZES - {"expert_feed_forward_length"},
        lists=_PATTERN,
        when=lambda k, t: k.get("expert_gating_func", its.SIGMOID) == its.SIGMOID,
        unneeded=its.of_later_layers,
        fields=windowed.routed_windows_fields,
    ),
    "jais2": Architecture(
        "jais2",
        written=False,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
        fields=lambda k, t: {},
    ),
    "gpt_bigcode": Architecture(
        "starcoder",
        turns=False,
        written=False,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_epsilon",
        fields=its.one_key_fields,
    ),
    "mpt": Architecture(
        "mpt",
        turns=False,
        written=False,
        may=frozenset({"attention.clamp_kqv", "attention.max_alibi_bias"}),
        norm_key=LAYER_NORM,
        norm_field="layer_norm_epsilon",
        fields=its.slopes_fields,
    ),
    "mixtral": Architecture(
        "llama",
        permuted=True,
        written=False,
        reads=EXPERTS,
        when=lambda k, t: k.get("expert_count", 0) != 0,
        fields=its.local_experts_fields,
    ),
    "qwen2_moe": Architecture(
        "qwen2moe",
        written=False,
        reads=EXPERTS,
        ignores=EXPERT_SIZES,
        fields=its.shared_expert_fields,
    ),
    "qwen3_moe": Architecture(
        "qwen3moe", written=False, reads=EXPERTS, ignores=EXPERT_SIZES, fields=its.experts_fields
    ),
    "olmoe": Architecture(
        "olmoe",
        written=False,
        reads=EXPERTS,
        fields=lambda k, t: {
            "num_experts": k["expert_count"],
            "num_experts_per_tok": k["expert_used_count"],
            "norm_topk_prob": False,
        },
    ),
    "granitemoe": Architecture(
        "granitemoe",
        permuted=True,
        written=False,
        reads=EXPERTS | {"embedding_scale", "attention.scale", "residual_scale", "logit_scale"},
        when=lambda k, t: k.get("expert_shared_feed_forward_length", 0) == 0,
        fields=lambda k, t: {**its.granite_fields(k, t), **its.local_experts_fields(k, t)},
    ),
    "granitemoeshared": Architecture(
        "granitemoe",
        permuted=True,
        written=False,
        merge=parts.shared_parts,
        reads=EXPERTS
        | {"embedding_scale", "attention.scale", "residual_scale", "logit_scale"}
        | {"expert_shared_feed_forward_length"},
        when=lambda k, t: k.get("expert_shared_feed_forward_length", 0) != 0,
        fields=lambda k, t: {
            **its.granite_fields(k, t),
            **its.local_experts_fields(k, t),
            "shared_intermediate_size": k["expert_shared_feed_forward_length"],
        },
    ),
    "glm4_moe": Architecture(
        "glm4moe",
        written=False,
        partial=True,
        reads=EXPERTS | {"expert_feed_forward_length"},
        may=ROUTED | {"expert_gating_func"},
        when=lambda k, t: k.get("expert_gating_func", its.SIGMOID) == its.SIGMOID,
        unneeded=its.of_later_layers,
        fields=lambda k, t: {**its.routed_fields(k, t), "use_qk_norm": "blk.0.attn_q_norm.weight" in t},
    ),
    "llama4_text": Architecture(
        "llama4",
        written=False,
        experts_turned=True,
        reads=EXPERTS | {"expert_feed_forward_length", "interleave_moe_layer_step"},
        fields=windowed.chunked_fields,
    ),
    "deepseek_v2": Architecture(
        "deepseek2",
        written=False,
        latent=True,
        merge=parts.latent_parts,
        reads=_LATENT,
        may=_MAY_LATENT,
        when=lambda k, t: not its.scores_by_sigmoid(k, t),
        fields=its.latent_fields,
    ),
    "deepseek_v3": Architecture(
        "deepseek2",
        written=False,
        latent=True,
        merge=parts.latent_parts,
        reads=_LATENT,
        may=_MAY_LATENT,
        unneeded=its.of_later_layers,
        fields=its.latent_fields,
    ),
    "dots1": Architecture(
        "dots1",
        written=False,
        reads=EXPERTS | {"expert_feed_forward_length"},
        may=ROUTED - {"nextn_predict_layers"} | {"expert_gating_func"},
        ignores=EXPERT_SIZES - {"expert_feed_forward_length"},
        when=lambda k, t: k.get("expert_gating_func", its.SIGMOID) == its.SIGMOID,
        fields=lambda k, t: {
            **its.routed_fields(k, t),
            "layer_types": ["full_attention"] * int(k["block_count"]),
            "sliding_window": None,
        },
    ),
    "afmoe": Architecture(
        "afmoe",
        written=False,
        check=its.fourth_full,
        reads=EXPERTS | {"expert_feed_forward_length", "attention.sliding_window", "expert_weights_norm"},
        may=_SHARED | _PATTERN | {"expert_gating_func"},
        lists=_PATTERN,
        when=lambda k, t: k.get("expert_gating_func", its.SIGMOID) == its.SIGMOID,
        parts={"self_attn.gate_proj": "attn_gate"},
        fields=windowed.gated_windows_fields,
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        written=False,
        experts_turned=True,
        experts_in_turns=True,
        reads=EXPERTS | {"attention.sliding_window", "rope.freq_base"},
        ignores=EXPERT_SIZES,
        fields=its.sinks_fields,
    ),
    "phi3": Architecture(
        "phi3",
        written=False,
        partial=True,
        may=frozenset({"attention.sliding_window"}),
        fields=its.phi3_fields,
    ),
    "gpt_neox": Architecture(
        "gptneox",
        written=False,
        partial=True,
        reads=frozenset({"use_parallel_residual"}),
        mixer=parts.joined_by_head,
        fields=its.partly_turned_fields,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "glm": Architecture("chatglm", written=False, partial=True, fields=lambda k, t: {}),
    "apertus": Architecture(
        "apertus",
        written=False,
        by_layer=("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"),
        merge=parts.numbers_of_layers,
        fields=lambda k, t: {  # by default a configuration has the published model's scaling
            "rope_parameters": {"rope_type": "default", "rope_theta": k.get("rope.freq_base", 10000.0)}
        },
    ),
    "bitnet": Architecture(
        "bitnet",
        written=False,
        may=frozenset({"hidden_activation"}),
        parts={"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"},
        fields=its.activated_fields,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        written=False,
        fields=lambda k, t: {"use_bias": "blk.0.attn_q.bias" in t, "sliding_window": None},
        norm_key=LAYER_NORM,
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
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "gemma3n_text": Architecture(
        "gemma3n",
        written=False,
        merge=parts.projected_parts,
        reads=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "altup.active_idx",
                "altup.num_inputs",
                "embedding_length_per_layer_input",
                "rope.freq_base",
                "activation_sparsity_scale",
                "attention.shared_kv_layers",
            }
        ),
        may=frozenset({"final_logit_softcapping", "rope.freq_base_swa"}),
        lists=frozenset(
            {"attention.sliding_window_pattern", "activation_sparsity_scale", "feed_forward_length"}
        ),
        unneeded=windowed.of_shared_layers,
        fields=windowed.alternating_fields,
    ),
    "ministral3": Architecture(
        "mistral3",
        permuted=True,
        written=False,
        reads=frozenset({"attention.temperature_scale", "rope.freq_base"}),
        when=lambda k, t: k.get("attention.temperature_scale", 0) != 0,
        fields=its.tempered_fields,
    ),
    "mistral (of mistral3)": Architecture(
        "mistral3",
        kind="mistral",
        permuted=True,
        written=False,
        when=lambda k, t: k.get("attention.temperature_scale", 0) == 0 and k.get("expert_count", 0) == 0,
        fields=lambda k, t: {"sliding_window": None},
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        written=False,
        reads=EXPERTS | {"interleave_moe_layer_step", "leading_dense_block_count"},
        may=frozenset({"expert_shared_count"}),
        ignores=EXPERT_SIZES,
        fields=its.stepped_fields,
    ),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", written=False, fields=lambda k, t: {}),
    "hunyuan_v1_moe": Architecture(
        "hunyuan-moe",
        written=False,
        reads=EXPERTS,
        may=frozenset({"expert_shared_count"}),
        ignores=EXPERT_SIZES,
        fields=lambda k, t: {"num_experts": k["expert_count"], "moe_topk": k["expert_used_count"]},
    ),
    "phi": Architecture(
        "phi2",
        written=False,
        partial=True,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
        fields=lambda k, t: {"tie_word_embeddings": False, "qk_layernorm": False},
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
        reads=EXPERTS,
        ignores=EXPERT_SIZES | _SEEN,
        fields=its.experts_fields,
    ),
    "qwen2 (of qwen2vl)": Architecture(
        "qwen2vl",
        kind="qwen2",
        written=False,
        ignores=_SEEN,
        fields=lambda k, t: {},
    ),
    # Queries, keys, values and the gate are one matrix in our graphs, whose name does not say all of them.
    "cohere": Architecture(
        "command-r",
        written=False,
        check=lambda c: "norms of queries and keys" if c.use_qk_norm else None,
        extra=lambda c: {"logit_scale": float(c.logit_scale)},
        reads=frozenset({"logit_scale"}),
        fields=lambda k, t: {"logit_scale": k["logit_scale"]},
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "cohere2": Architecture(
        "cohere2",
        written=False,
        check=its.fourth_full,
        extra=lambda c: {
            "logit_scale": float(c.logit_scale),
            "attention.sliding_window": c.sliding_window,
        },
        reads=frozenset({"logit_scale", "attention.sliding_window"}),
        fields=lambda k, t: {
            "logit_scale": k["logit_scale"],
            "sliding_window": k["attention.sliding_window"],
        },
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
}
"""transformers' `model_type` → what GGUF makes of it."""
