"""What the key-values of GGUF's named layouts mean of layers with a window between layers without: a part of
`gguf_fields.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from .gguf_fields import BLOCK, Keys, Tensors, activation, by_layer, routed_fields

_GATES: Final = {"gelu": "gelu", "geglu": "gelu", "silu": "silu", "swish": "silu", "swiglu": "silu"}
"""`hidden_activation`, as llama.cpp understands it → the configuration's."""


def windows_turn_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window, and without, which turn nothing then; where there is no window all turn."""
    window = keys.get("attention.sliding_window") or None
    sliding = windows(keys, 4) if window else [False] * int(keys["block_count"])
    return {"sliding_window": window, "layer_types": layer_types(sliding)}


def unscaled_windows_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window, whose rotary embedding stays as it was trained at first, and without; where the
    file does not say which, every fourth sees everything.
    """
    sliding = windows(keys, 4)
    rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    return {
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": layer_types(sliding),
        "rope_parameters": {kind: dict(rope) for kind in ("sliding_attention", "full_attention")},
    }


def gated_windows_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window, and without, which turn nothing; experts after layers without, beside shared
    ones. llama.cpp scales the embeddings, as published models do.
    """
    if not keys["expert_weights_norm"]:
        raise UnsupportedError(
            "the file has expert_weights_norm false, which the model does not know",
            remedy="give the model as a Hugging Face folder",
        )
    return {
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": layer_types(windows(keys, 4)),
        "mup_enabled": True,
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_shared_experts": keys.get("expert_shared_count", 0),
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "route_scale": keys.get("expert_weights_scale") or 1.0,
    }


def routed_windows_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window, and without, which turn nothing; experts after layers without, beside shared
    ones; layers that predict later tokens are left out.
    """
    routed = routed_fields(keys, tensors)
    layers, dense = routed["num_hidden_layers"], int(routed["first_k_dense_replace"])
    said = keys.get("attention.sliding_window_pattern")
    if isinstance(said, np.ndarray | list) and len(said) == layers:  # without those of later tokens
        keys = {**keys, "block_count": layers}
    return {
        **routed,
        "sliding_window": keys["attention.sliding_window"],
        "layer_types": layer_types(windows(keys, 4)[:layers]),
        "mlp_layer_types": ["dense" if i < dense else "sparse" for i in range(layers)],
        "num_experts": keys["expert_count"],
        "num_shared_experts": routed["n_shared_experts"],
    }


def chunked_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers that see the chunk of positions they are in, and every fourth, which sees all and turns nothing:
    what llama.cpp knows is what configurations have by themselves. Experts in every n-th layer; it knows the
    model without norms of queries and keys by its 128 experts.
    """
    return {
        "num_local_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "intermediate_size": keys["expert_feed_forward_length"],
        "intermediate_size_mlp": keys["feed_forward_length"],
        "interleave_moe_layer_step": keys["interleave_moe_layer_step"],
        "use_qk_norm": keys["expert_count"] != 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)},
    }


def in_turns_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window, which counts both sides, and without: by a list, or every n-th without, the first
    one among them. Without a window there are none with one.
    """
    window = int(keys.get("attention.sliding_window", 0))
    sliding = [one and window > 0 for one in windows(keys, 3, first=True)]
    bases = {
        "full_attention": keys.get("rope.freq_base", 10000.0),
        "sliding_attention": keys.get("rope.freq_base_swa", 10000.0),
    }
    return {
        "layer_types": layer_types(sliding),
        "local_attention": window,
        "hidden_activation": activation(keys, "gelu", _GATES),
        "rope_parameters": {k: {"rope_type": "default", "rope_theta": base} for k, base in bases.items()},
    }


def gemma4_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window and without differ in the length of heads, and some in the heads of keys. Where a
    layer without has no values of its own, its keys are the values too.
    """
    layers = range(int(keys["block_count"]))
    sliding, widths, heads = (
        by_layer(keys, name)
        for name in ("attention.sliding_window_pattern", "feed_forward_length", "attention.head_count_kv")
    )
    full = [i for i in layers if not sliding[i]]
    shared = int(keys.get("attention.shared_kv_layers", 0))
    experts = int(keys.get("expert_count", 0))
    embeddings = tensors.get("per_layer_token_embd.weight")
    turns = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {
        "layer_types": layer_types(sliding),
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
        "vocab_size_per_layer_input": embeddings.shape[0] if embeddings is not None else 0,
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


def alternating_fields(keys: Keys, tensors: Tensors) -> dict[str, Any]:
    """Layers with a window and without; some inputs that are predicted from one; sparse gates in the first
    layers, as the share of a normal distribution that the file's number of deviations leaves out.
    """
    sliding, sparse = windows(keys, 5), by_layer(keys, "activation_sparsity_scale")
    turns = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return {
        "layer_types": layer_types(sliding),
        "sliding_window": keys["attention.sliding_window"],
        "intermediate_size": by_layer(keys, "feed_forward_length"),
        "num_kv_shared_layers": keys["attention.shared_kv_layers"],
        "hidden_size_per_layer_input": keys["embedding_length_per_layer_input"],
        "vocab_size_per_layer_input": tensors["per_layer_token_embd.weight"].shape[0],
        "altup_num_inputs": keys["altup.num_inputs"],
        "altup_active_idx": keys["altup.active_idx"],
        "laurel_rank": tensors["blk.0.laurel_l.weight"].shape[0],
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "activation_sparsity_pattern": [
            round(NormalDist().cdf(float(n)), 6) if 0 < n < 6 else 0.0 for n in sparse
        ],
        "rope_parameters": {
            "sliding_attention": turns,
            "full_attention": {"rope_type": "default", "rope_theta": keys["rope.freq_base"]},
        },
    }


def windows(keys: Keys, period: int, *, first: bool = False) -> list[Any]:
    """Which layers have a window: by an array, or all but the last (or the first) of each `period`, a number
    that the file may have instead.

    Raises UnsupportedError for a number below 1.
    """
    name = "attention.sliding_window_pattern"
    said = keys.get(name, period)
    if isinstance(said, float):
        raise InputError(f"the file's {name} is {said}, no whole number", remedy="download the file again")
    if not isinstance(said, int):
        return by_layer(keys, name)
    if said < 1:  # a window in all layers, which llama.cpp does not run of all
        raise UnsupportedError(
            f"the file's {name} is {said}", remedy="give the model as a Hugging Face folder"
        )
    full = 0 if first else said - 1
    return [i % said != full for i in range(int(keys["block_count"]))]


def layer_types(sliding: Sequence[Any]) -> list[str]:
    """The configuration's name of each layer, by whether it has a window."""
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def of_shared_layers(config: Any, name: str) -> bool:
    """Whether a tensor makes keys or values of a layer that takes another's."""
    made = BLOCK.fullmatch(name)
    own = config.num_hidden_layers - config.num_kv_shared_layers
    return made is not None and made[2] in ("attn_k", "attn_v", "attn_k_norm") and int(made[1]) >= own
