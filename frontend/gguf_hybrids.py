"""GGUF's named layouts of models whose layers mix tokens by a recurrence or a convolution, some beside
attention: part of the table in `gguf_architectures.py`.
"""

from __future__ import annotations

from typing import Any, Final

from ..ir.errors import InputError, UnsupportedError
from . import gguf_fields as its
from . import gguf_parts as parts
from .gguf_fields import EXPERT_SIZES, EXPERTS, ROUTED, Keys, Tensors
from .gguf_layout import Architecture

_DELTA: Final = frozenset(
    {
        "attention.key_length",
        "rope.freq_base",
        "rope.dimension_count",
        "ssm.conv_kernel",
        "ssm.state_size",
        "ssm.group_count",
        "ssm.time_step_rank",
        "ssm.inner_size",
    }
)
_MAY_DELTA: Final = frozenset(
    {"full_attention_interval", "nextn_predict_layers", "rope.dimension_sections", "feed_forward_length"}
)
_STATES: Final = frozenset(
    {"ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size"}
)

_FAR: Final = 1 << 20
"""A period of layers of a kind that a model has one of, or none."""


def _delta(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers of a gated delta rule, and every n-th of attention, whose heads turn a part."""
    heads, turned = int(keys["ssm.time_step_rank"]), int(keys["rope.dimension_count"])
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys["rope.freq_base"],
        "partial_rotary_factor": turned / int(keys["attention.key_length"]),
    }
    if "rope.dimension_sections" in keys:  # of text all axes are the same
        sections = [int(n) for n in keys["rope.dimension_sections"] if n]
        rope |= {"mrope_section": sections, "mrope_interleaved": True}
    interval = int(keys.get("full_attention_interval", 4))
    layers = int(keys["block_count"]) - int(keys.get("nextn_predict_layers", 0))
    found = {
        "num_hidden_layers": layers,
        "layer_types": [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        ],
        "rope_parameters": rope,
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": heads,
        "linear_value_head_dim": int(keys["ssm.inner_size"]) // heads,
        "attention_bias": False,
    }
    if "expert_count" in keys:
        found |= {**its.shared_expert_fields(keys, tensors), "norm_topk_prob": True, "decoder_sparse_step": 1}
    return found


def _convolved(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers of short convolutions where a layer has no heads of keys; experts after layers without."""
    heads = its.by_layer(keys, "attention.head_count_kv")
    found = {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if n else "conv" for n in heads],
        "conv_L_cache": keys["shortconv.l_cache"],
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in tensors),
        "block_auto_adjust_ff_dim": False,  # the file has the length that comes of it
    }
    if "expert_count" not in keys:
        return found
    return found | {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in tensors),
    }


def _states(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers of a state space where a layer has no heads of keys; attention without positions, unless the
    file says otherwise; a multilayer perceptron, or experts beside one that all tokens take.
    """
    kinds = its.by_layer(keys, "attention.head_count_kv")
    heads, inner = int(keys["ssm.time_step_rank"]), int(keys["ssm.inner_size"])
    experts = int(keys.get("expert_count", 0))
    shared = tensors.get("blk.0.ffn_gate_shexp.weight" if experts else "blk.0.ffn_gate.weight")
    return {
        **its.granite_fields(keys, tensors),
        "num_key_value_heads": max(kinds),
        "layer_types": ["full_attention" if n else "linear_attention" for n in kinds],
        "position_embedding_type": "rope" if keys.get("rope.scaling.finetuned", True) else "nope",
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": keys["ssm.group_count"],
        "mamba_d_state": keys["ssm.state_size"],
        "mamba_d_conv": keys["ssm.conv_kernel"],
        "mamba_expand": inner // int(keys["embedding_length"]),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in tensors),
        "shared_intermediate_size": shared.shape[0] if shared is not None else 0,
        "num_local_experts": experts,
        "num_experts_per_tok": keys.get("expert_used_count", 0),
    }


def _by_kind(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers that each are a state space, attention, or a multilayer perceptron or experts, by which of heads
    of keys and lengths the file has of them.
    """
    count = int(keys["block_count"])
    layers = count - int(keys.get("nextn_predict_layers", 0))
    heads, widths = (
        its.by_layer(keys, name)[:layers] for name in ("attention.head_count_kv", "feed_forward_length")
    )
    experts = "expert_count" in keys
    kinds = [
        "full_attention" if n else ("moe" if experts else "mlp") if width else "linear_attention"
        for n, width in zip(heads, widths, strict=True)
    ]
    inner, state_heads = int(keys["ssm.inner_size"]), int(keys["ssm.time_step_rank"])
    found = {
        "layers_block_type": kinds,
        "num_key_value_heads": max(heads),
        "intermediate_size": max(widths),
        "ssm_state_size": keys["ssm.state_size"],
        "mamba_num_heads": state_heads,
        "mamba_head_dim": inner // state_heads,
        "n_groups": keys["ssm.group_count"],
        "conv_kernel": keys["ssm.conv_kernel"],
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in tensors),
        "time_step_min": 1e-9,  # llama.cpp keeps steps that are smaller
        "sliding_window": None,
    }
    if not experts:
        return found
    routed = its.routed_fields({"expert_feed_forward_length": max(widths), **keys}, tensors)
    wide = keys.get("expert_shared_feed_forward_length", 0)
    return found | {**routed, "num_hidden_layers": layers, "moe_shared_expert_intermediate_size": wide}


def _parallel(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Attention beside a state space in every layer. The factors of the configuration are part of the file's
    tensors.
    """
    inner, heads = int(keys["ssm.inner_size"]), int(keys["ssm.time_step_rank"])
    return {
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": keys["ssm.group_count"],
        "mamba_d_state": keys["ssm.state_size"],
        "mamba_d_conv": keys["ssm.conv_kernel"],
        "mamba_conv_bias": "blk.0.ssm_conv1d.bias" in tensors,
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in tensors,
        "mamba_norm_before_gate": False,
    }


def _alone(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """State spaces alone, whose steps are not held to a range."""
    heads, inner = int(keys["ssm.time_step_rank"]), int(keys["ssm.inner_size"])
    width = int(keys["embedding_length"])
    groups = int(keys["ssm.group_count"])
    if min(heads, inner, groups, width) < 1 or inner % heads or inner % width or heads % groups:
        raise InputError(
            f"the file has {inner} numbers of a state space for {heads} heads in {groups} groups and a width "
            f"of {width}",
            remedy="download the file again",
        )
    return {
        "num_heads": heads,
        "head_dim": inner // heads,
        "n_groups": keys["ssm.group_count"],
        "state_size": keys["ssm.state_size"],
        "conv_kernel": keys["ssm.conv_kernel"],
        "expand": inner // width,
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in tensors,
        "use_bias": "blk.0.ssm_in.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _period(layers: list[int], count: int, what: str) -> tuple[int, int]:
    """(period, offset) of those of `count` layers that are of a kind, equally far apart to the end, the first
    in the first period.

    Raises UnsupportedError for others.
    """
    if not layers:
        return _FAR, _FAR - 1
    period = layers[1] - layers[0] if len(layers) > 1 else _FAR
    if layers != list(range(layers[0], count, period)) or layers[0] >= period:
        raise UnsupportedError(
            f"layers {layers[:8]} of {what} are not equally far apart",
            remedy="give the model as a Hugging Face folder",
        )
    return period, layers[0]


def _alternating(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """State spaces, and attention without positions where a layer has heads of keys; experts in some."""
    heads = its.by_layer(keys, "attention.head_count_kv")
    attention = _period([i for i, n in enumerate(heads) if n], len(heads), "attention")
    gates = (f"blk.{i}.ffn_gate_inp.weight" for i in range(len(heads)))
    experts = _period([i for i, name in enumerate(gates) if name in tensors], len(heads), "experts")
    return {
        "num_key_value_heads": max(heads),
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_experts": keys.get("expert_count", 0) or 1,
        "num_experts_per_tok": keys.get("expert_used_count", 0) or 1,
        "mamba_d_state": keys["ssm.state_size"],
        "mamba_d_conv": keys["ssm.conv_kernel"],
        "mamba_expand": int(keys["ssm.inner_size"]) // max(int(keys["embedding_length"]), 1),
        "mamba_dt_rank": keys["ssm.time_step_rank"],
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in tensors),
        "mamba_proj_bias": any(name.endswith("ssm_in.bias") for name in tensors),
    }


HYBRIDS: Final[dict[str, Architecture]] = {
    "qwen3_next": Architecture(
        "qwen3next",
        written=False,
        partial=True,
        norm_offset=1.0,
        merge=parts.delta_parts,
        mixer=parts.mixed,
        reads=_DELTA | EXPERTS,
        may=_MAY_DELTA,
        ignores=EXPERT_SIZES,
        unneeded=its.of_later_layers,
        fields=_delta,
    ),
    "qwen3_5_text": Architecture(
        "qwen35",
        written=False,
        partial=True,
        norm_offset=1.0,
        mixer=parts.in_turns,
        reads=_DELTA | {"feed_forward_length"},
        may=_MAY_DELTA - {"feed_forward_length"},
        lists=frozenset({"rope.dimension_sections"}),
        unneeded=its.of_later_layers,
        fields=_delta,
    ),
    "qwen3_5_moe_text": Architecture(
        "qwen35moe",
        written=False,
        partial=True,
        norm_offset=1.0,
        mixer=parts.in_turns,
        reads=_DELTA | EXPERTS,
        may=_MAY_DELTA,
        ignores=EXPERT_SIZES,
        lists=frozenset({"rope.dimension_sections"}),
        unneeded=its.of_later_layers,
        fields=_delta,
    ),
    "lfm2": Architecture(
        "lfm2",
        written=False,
        mixer=parts.mixed,
        norm_field="norm_eps",
        reads=frozenset({"shortconv.l_cache"}),
        lists=frozenset({"attention.head_count_kv"}),
        fields=_convolved,
    ),
    "lfm2_moe": Architecture(
        "lfm2moe",
        written=False,
        mixer=parts.mixed,
        norm_field="norm_eps",
        reads=EXPERTS | {"shortconv.l_cache", "expert_feed_forward_length"},
        may=frozenset({"leading_dense_block_count", "expert_gating_func"}),
        lists=frozenset({"attention.head_count_kv"}),
        when=its.scores_by_sigmoid,
        fields=_convolved,
    ),
    "granitemoehybrid": Architecture(
        "granitehybrid",
        permuted=True,
        written=False,
        merge=parts.shared_parts,
        mixer=parts.mixed,
        reads=_STATES | {"embedding_scale", "attention.scale", "residual_scale", "logit_scale"},
        may=EXPERTS | {"feed_forward_length"},
        ignores=EXPERT_SIZES,
        lists=frozenset({"attention.head_count_kv"}),
        fields=_states,
    ),
    "nemotron_h": Architecture(
        "nemotron_h",
        written=False,
        mixer=parts.mixed,
        partial=True,  # nothing turns: published files have the width by heads as rope.dimension_count
        norm_field="layer_norm_epsilon",
        reads=_STATES | {"attention.key_length"},
        ignores=frozenset({"attention.layer_norm_epsilon"}),
        lists=frozenset({"attention.head_count_kv", "feed_forward_length"}),
        fields=_by_kind,
    ),
    "nemotron_h (experts)": Architecture(
        "nemotron_h_moe",
        kind="nemotron_h",
        written=False,
        mixer=parts.mixed,
        partial=True,
        norm_field="layer_norm_epsilon",
        reads=_STATES | EXPERTS | {"attention.key_length"},
        may=ROUTED | EXPERT_SIZES | {"expert_gating_func"},
        ignores=frozenset({"attention.layer_norm_epsilon"}),
        lists=frozenset({"attention.head_count_kv", "feed_forward_length"}),
        unneeded=its.of_later_layers,
        fields=_by_kind,
    ),
    "mamba2": Architecture(
        "mamba2",
        turns=False,
        written=False,
        mixer=parts.mixed,
        norm_field="layer_norm_epsilon",
        reads=_STATES,
        fields=_alone,
    ),
    "jamba": Architecture(
        "jamba",
        written=False,
        mixer=parts.mixed,
        reads=_STATES - {"ssm.group_count"},
        may=EXPERTS,
        lists=frozenset({"attention.head_count_kv"}),
        parts={"pre_ff_layernorm": "ffn_norm"},
        fields=_alternating,
    ),
    "falcon_h1": Architecture(
        "falcon-h1",
        written=False,
        mixer=parts.mixed,
        reads=_STATES | {"attention.key_length", "rope.freq_base"},
        fields=_parallel,
    ),
}
"""transformers' `model_type` → what GGUF makes of it."""
