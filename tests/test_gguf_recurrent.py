"""GGUF files of layers that mix tokens by a recurrence or a convolution: llama.cpp computes of them what
transformers' model does, and so do we. Written as llama.cpp's converter does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_tabled import named, paired_rows
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError
from llmc.passes.quantize.keep import KeepQuantized

from .gguf_files import STRING, U32, array, byte_vocabulary, entry, write_gguf
from .graphs import logits_of, lowered, worst
from .llama_cpp import LlamaCpp
from .models import ids_of
from .test_gguf_architectures import _KINDS, _parts, tiny

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
}
STATES: dict[str, Any] = {
    "head_dim": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "sliding_window": None,
    "time_step_min": 1e-9,
}
CONVOLVED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    "lfm2": {**CONVOLVED, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLVED,
    "granitemoeshared": {"shared_intermediate_size": 40, "residual_multiplier": 0.5},
    "nemotron_h": {**STATES, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "nemotron_h (experts)": {
        **STATES,
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 1.5,
    },
    "falcon_h1": {
        "head_dim": 24,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "position_embedding_type": "nope",
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
        "logits_scaling": 1.5,
    },
}


def in_turns(x: Array, config: Any, width: int, axis: int = 0) -> Array:
    """Value heads by key heads → the first of each key head, then the second of each."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    moved = np.moveaxis(x, axis, 0)
    heads = moved.reshape(keys, values // keys, width, -1).swapaxes(0, 1).reshape(moved.shape)
    return np.moveaxis(heads, 0, axis)


def delta(part: str, x: Array, config: Any, turned: bool) -> Tensors:
    width, before = config.linear_value_head_dim, 2 * config.linear_num_key_heads * config.linear_key_head_dim

    def values(y: Array, size: int = width, axis: int = 0) -> Array:
        return in_turns(y, config, size, axis) if turned else y

    def tail(y: Array) -> Array:
        return np.concatenate([y[:before], values(y[before:])])

    if part == "in_proj_qkvz.weight":
        heads, key = config.linear_num_key_heads, config.linear_key_head_dim
        rows = x.reshape(heads, -1, x.shape[1])
        cuts = [key, 2 * key, (rows.shape[1] - 2 * key) // 2 + 2 * key]
        q, k, v, z = (p.reshape(-1, x.shape[1]) for p in np.split(rows, cuts, axis=1))
        return {"attn_qkv.weight": np.concatenate([q, k, v]), "attn_gate.weight": z}
    return {
        "in_proj_qkv.weight": lambda: {"attn_qkv.weight": tail(x)},
        "in_proj_z.weight": lambda: {"attn_gate.weight": values(x)},
        "in_proj_a.weight": lambda: {"ssm_alpha.weight": values(x, 1)},
        "in_proj_b.weight": lambda: {"ssm_beta.weight": values(x, 1)},
        "in_proj_ba.weight": lambda: {"ssm_ba.weight": x},
        "A_log": lambda: {"ssm_a": values(-np.exp(x), 1)},
        "dt_bias": lambda: {"ssm_dt.bias": values(x, 1)},
        "conv1d.weight": lambda: {"ssm_conv1d.weight": tail(x[:, 0])},
        "norm.weight": lambda: {"ssm_norm.weight": x},
        "out_proj.weight": lambda: {"ssm_out.weight": values(x, width, 1)},
    }[part]()


def state_space(part: str, x: Array, config: Any) -> Tensors:
    groups = getattr(config, "mamba_n_groups", None) or config.n_groups
    return {
        "A_log": lambda: {"ssm_a": -np.exp(x)[:, None]},
        "D": lambda: {"ssm_d": x[:, None]},
        "dt_bias": lambda: {"ssm_dt.bias": x},
        "conv1d.weight": lambda: {"ssm_conv1d.weight": x[:, 0]},
        "conv1d.bias": lambda: {"ssm_conv1d.bias": x},
        "in_proj.weight": lambda: {"ssm_in.weight": x},
        "out_proj.weight": lambda: {"ssm_out.weight": x},
        "norm.weight": lambda: {"ssm_norm.weight": x.reshape(groups, -1)},
    }[part]()


def stored(kind: str, parameter: str, x: Array, config: Any) -> Tensors:
    """What a file has of a parameter."""
    arch = ARCHITECTURES[kind]
    layer = parameter.partition(".layers.")[2].partition(".")[0]
    made: Tensors | None = None
    if ".linear_attn." in parameter:
        made = delta(parameter.split(".linear_attn.")[1], x, config, kind != "qwen3_next")
    elif ".mamba." in parameter:
        made = state_space(parameter.split(".mamba.")[1], x, config)
    elif ".mixer." in parameter and config.layers_block_type[int(layer)] == "linear_attention":
        made = state_space(parameter.split(".mixer.")[1], x, config)
    elif ".mixer.experts." in parameter:
        made = {f"ffn_{parameter.rsplit('.', 1)[1].removesuffix('_proj')}_exps.weight": x}
    elif parameter.endswith("mixer.gate.e_score_correction_bias"):
        made = {"exp_probs_b.bias": x}
    elif parameter.endswith("conv.conv.weight"):
        made = {"shortconv.conv.weight": x[:, 0]}
    elif parameter.endswith("expert_bias"):
        made = {"exp_probs_b.bias": x}
    elif parameter.endswith("shared_mlp.input_linear.weight"):
        suffix = "_shexp" if config.num_local_experts else ""
        gate, up = np.split(x, 2)
        made = {f"ffn_gate{suffix}.weight": gate, f"ffn_up{suffix}.weight": up}
    elif parameter.endswith("shared_mlp.output_linear.weight"):
        made = {f"ffn_down{'_shexp' if config.num_local_experts else ''}.weight": x}
    if made is not None:
        return {f"blk.{layer}.{name}": np.ascontiguousarray(y) for name, y in made.items()}
    if (parts := _parts(parameter, x, arch, config)) is not None:
        return parts
    name = named(arch, config.num_hidden_layers)(parameter)
    assert name is not None, parameter
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if arch.permuted and name.split(".")[-2] in heads:
        x = x[paired_rows(len(x), heads[name.split(".")[-2]])]
    if name.endswith("ffn_gate_inp_shexp.weight"):
        x = x[0]
    return {name: x + arch.norm_offset if name.endswith("norm.weight") else x}


def delta_keys(c: Any) -> dict[str, Any]:
    keys = {
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim // 2,
        "rope.freq_base": 5e4,
        "ssm.conv_kernel": c.linear_conv_kernel_dim,
        "ssm.state_size": c.linear_key_head_dim,
        "ssm.group_count": c.linear_num_key_heads,
        "ssm.time_step_rank": c.linear_num_value_heads,
        "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads,
        "full_attention_interval": 4,
    }
    if getattr(c, "num_experts", 0):
        keys |= {
            "expert_count": c.num_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": c.moe_intermediate_size,
            "expert_shared_feed_forward_length": c.shared_expert_intermediate_size,
        }
    return keys


def convolved_keys(c: Any) -> dict[str, Any]:
    keys = {
        "attention.head_count_kv": [2 if t == "full_attention" else 0 for t in c.layer_types],
        "rope.freq_base": 5e4,
        "shortconv.l_cache": c.conv_L_cache,
    }
    if not hasattr(c, "num_experts"):
        return keys
    return keys | {
        "leading_dense_block_count": c.num_dense_layers,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_gating_func": 2,
    }


def state_keys(c: Any) -> dict[str, Any]:
    keys = {
        "attention.head_count_kv": [2 if t == "full_attention" else 0 for t in c.layer_types],
        "embedding_scale": c.embedding_multiplier,
        "attention.scale": c.attention_multiplier,
        "residual_scale": c.residual_multiplier,
        "logit_scale": c.logits_scaling,
        "ssm.conv_kernel": c.mamba_d_conv,
        "ssm.state_size": c.mamba_d_state,
        "ssm.group_count": c.mamba_n_groups,
        "ssm.time_step_rank": c.mamba_n_heads,
        "ssm.inner_size": c.mamba_n_heads * c.mamba_d_head,
        "rope.scaling.finetuned": c.position_embedding_type == "rope",
        "rope.dimension_count": c.hidden_size // c.num_attention_heads,
    }
    if c.num_local_experts:
        keys |= {
            "expert_count": c.num_local_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_shared_feed_forward_length": c.shared_intermediate_size,
        }
    return keys


def by_kind_keys(c: Any) -> dict[str, Any]:
    experts = "moe" in c.layers_block_type
    width = c.moe_intermediate_size if experts else c.intermediate_size
    keys = {
        "attention.head_count_kv": [2 if t == "full_attention" else 0 for t in c.layers_block_type],
        "feed_forward_length": [width if t in ("moe", "mlp") else 0 for t in c.layers_block_type],
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.hidden_size // c.num_attention_heads,
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.state_size": c.ssm_state_size,
        "ssm.group_count": c.n_groups,
        "ssm.time_step_rank": c.mamba_num_heads,
        "ssm.inner_size": c.mamba_num_heads * c.mamba_head_dim,
        "attention.layer_norm_epsilon": 1e-5,
    }
    if experts:
        keys |= {
            "expert_count": c.n_routed_experts,
            "expert_used_count": c.num_experts_per_tok,
            "expert_feed_forward_length": width,
            "expert_shared_feed_forward_length": c.moe_shared_expert_intermediate_size,
            "expert_shared_count": c.n_shared_experts,
            "expert_weights_norm": c.norm_topk_prob,
            "expert_weights_scale": c.routed_scaling_factor,
            "expert_group_count": 1,
        }
    return keys


def parallel_keys(c: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.freq_base": 5e4,
        "ssm.conv_kernel": c.mamba_d_conv,
        "ssm.state_size": c.mamba_d_state,
        "ssm.group_count": c.mamba_n_groups,
        "ssm.time_step_rank": c.mamba_n_heads,
        "ssm.inner_size": c.mamba_d_ssm,
    }


def shared_keys(c: Any) -> dict[str, Any]:
    return {
        **ARCHITECTURES["granite"].extra(c),
        "attention.head_count_kv": c.num_key_value_heads,
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_feed_forward_length": c.shared_intermediate_size,
    }


KEYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "qwen3_next": delta_keys,
    "qwen3_5_text": delta_keys,
    "qwen3_5_moe_text": delta_keys,
    "nemotron_h": by_kind_keys,
    "nemotron_h (experts)": by_kind_keys,
    "falcon_h1": parallel_keys,
    "lfm2": convolved_keys,
    "lfm2_moe": convolved_keys,
    "granitemoeshared": shared_keys,
    "granitemoehybrid": state_keys,
}


def written(
    model: Any,
    kind: str,
    path: Path,
    *further: bytes,
    quantize: str | Callable[[str], str] = "F32",
    tensors: Tensors | None = None,
    over: Tensors | None = None,
    without: Collection[str] = (),
    **more: Any,
) -> Path:
    """A file of a model, with further entries, tensors and key-values; `over` stands for the model's own
    tensors, and key-values of `without` are left away.
    """
    arch, config = ARCHITECTURES[kind], model.config
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        arch.norm_key: float(getattr(config, arch.norm_field)),
        "vocab_size": config.vocab_size,
        **KEYS[kind](config),
        **more,
    }
    if kind != "qwen3_5_moe_text" and "feed_forward_length" not in keys:
        keys["feed_forward_length"] = (
            config.shared_intermediate_size if kind == "granitemoehybrid" else config.intermediate_size
        )
    entries = [entry("general.architecture", STRING, arch.name)]
    for key, value in keys.items():
        if key in without:
            continue
        name = f"{arch.name}.{key}"
        is_list = isinstance(value, list)
        entries.append(array(name, U32, value) if is_list else entry(name, _KINDS[type(value)], value))
    tensors = dict(tensors or {})
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensors |= stored(kind, parameter, value.detach().numpy().copy(), config)
    vocabulary = byte_vocabulary([f"<x{i}>" for i in range(config.vocab_size - 256)])
    ends = [entry(f"tokenizer.ggml.{name}_token_id", U32, i) for name, i in (("bos", 1), ("eos", 2))]
    return write_gguf(path, [*entries, *vocabulary, *ends, *further], tensors | (over or {}), quantize)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


CASES = {
    **{kind: (kind, {}) for kind in CHANGES},
    "qwen3_next, as many heads": ("qwen3_next", {"linear_num_value_heads": 2}),
    "qwen3_5_text, as many heads": ("qwen3_5_text", {"linear_num_value_heads": 2}),
    "granitemoehybrid, dense": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granitemoehybrid, turned": ("granitemoehybrid", {"position_embedding_type": "rope"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_means_what_llama_cpp_computes(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    family = kind.partition(" ")[0]
    model, ids = tiny(family, **{**CHANGES[kind], **changes}), ids_of(40)
    wanted = logits(model, ids)
    sections = ARCHITECTURES[kind].name.startswith("qwen35")
    name = f"{ARCHITECTURES[kind].name}.rope.dimension_sections"
    path = written(model, kind, tmp_path / "m.gguf", *([array(name, U32, [2, 2, 2, 0])] if sections else []))
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    source = open_source(path)
    assert source.task == "causal_lm" and source.config.model_type == family
    assert worst(logits_of(trace_source(source), ids), wanted) <= 5e-5


def test_layers_that_predict_later_tokens_are_left_out(tmp_path: Path) -> None:
    """Qwen3.5's block behind the last one, which llama.cpp's converter counts as a layer."""
    model, ids = tiny("qwen3_5_text", **DELTA), ids_of(40)
    layers = model.config.num_hidden_layers
    further = {
        f"blk.{layers}.{name}": np.zeros(shape, np.float32)
        for name, shape in (("nextn.eh_proj.weight", (64, 128)), ("attn_norm.weight", (64,)))
    }
    more = {"block_count": layers + 1, "nextn_predict_layers": 1}
    path = written(model, "qwen3_5_text", tmp_path / "m.gguf", tensors=further, **more)
    source = open_source(path)
    assert source.config.num_hidden_layers == layers
    assert worst(logits_of(trace_source(source), ids), logits(model, ids)) <= 5e-5


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "granitemoehybrid"])
def test_blocks_stay_with_rows_and_columns_that_are_moved(kind: str, tmp_path: Path) -> None:
    """All matrices in blocks are kept: those whose value heads were in turns, by rows or by columns, those
    that stand in two tensors, and those of a state space.
    """

    def blocks(name: str) -> str:
        small = ("_inp", "conv", "ssm_a", "ssm_d", "ssm_ba", "ssm_alpha", "ssm_beta", "ssm_norm", "exp")
        return "F32" if any(part in name for part in small) else "Q8_0"

    path = written(tiny(kind, **CHANGES[kind]), kind, tmp_path / "m.gguf", quantize=blocks)
    plain, _ = lowered(trace_source(open_source(path)), "fused")
    graph, _ = lowered(trace_source(open_source(path)), "fused", [KeepQuantized()])
    ids = ids_of(40)
    assert worst(logits_of(graph, ids), logits_of(plain, ids)) <= 5e-5
    floats = {
        name: value.weight.shape
        for name, value in graph.weights.items()
        if re.search(r"(linear_attn|mamba)\.(in_proj|out_proj)", name)
        and not name.endswith((".q", ".scale", ".columns"))
    }
    # What is left are the rows of a number for each value head.
    assert sum(rows for rows, _ in floats.values()) == (0 if kind == "granitemoehybrid" else 3 * 8), floats
    assert any(name.endswith(".columns") for name in graph.weights) == (kind == "qwen3_5_text")


def test_attention_has_positions_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    """As llama.cpp takes Granite's hybrids."""
    kind = "granitemoehybrid"
    model, ids = tiny(kind, **{**CHANGES[kind], "position_embedding_type": "rope"}), ids_of(40)
    path = written(model, kind, tmp_path / "m.gguf", without={"rope.scaling.finetuned"})
    wanted = logits(model, ids)
    with LlamaCpp(path) as opened:
        assert worst(opened.logits(ids), wanted) <= 0.01
    assert worst(logits_of(trace_source(open_source(path)), ids), wanted) <= 5e-5


DAMAGED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "groups": ({"ssm.group_count": 0}, {}, r"ssm_conv1d\.weight has the shape \[256, 1, 4\]"),
    "rank": ({}, {"blk.0.ssm_out.weight": np.zeros(64, np.float32)}, r"ssm_out\.weight has the shape \[64\]"),
    "growth": (
        {},
        {"blk.0.ssm_a": np.ones(8, np.float32)},
        r"blk\.0\.ssm_a has values that are not below zero",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_told(what: str, tmp_path: Path) -> None:
    keys, tensors, said = DAMAGED[what]
    model = tiny("qwen3_5_text", **DELTA)
    path = written(model, "qwen3_5_text", tmp_path / "m.gguf", over=tensors, **keys)
    with pytest.raises(InputError, match=said):
        trace_source(open_source(path))
