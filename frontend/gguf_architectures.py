"""What families are called and how they are stored in GGUF (`general.architecture`), to read and to write it.

transformers reads some architectures itself; those with `fields` here are read by this table, with the names
of tensors from the package gguf. A key-value that is not understood is an error: llama.cpp may go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from ..ir.weights import LazyTensor
from .gguf import GGUFFile, GGUFTensorInfo
from .weights import transformed

Keys = Mapping[str, Any]
Tensors = Mapping[str, GGUFTensorInfo]
_FOLDER: Final = "give the model as a Hugging Face folder"


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
        norm_key, norm_field: what is added to a norm's variance, in GGUF and in the configuration.
        check: what of a configuration cannot be said in GGUF, as a sentence, or None.
        extra: further key-values without their prefix.
        written: whether target gguf writes it.
        reads: further key-values that `fields` understands, all of which a file has.
        may: those that it understands where they are there.
        ignores: those that say no more than the tensors do.
        fields: of a file's key-values without their prefix, and the names of its tensors, what the
            configuration has beyond what all have; None where transformers reads the file itself.
    """

    name: str
    kind: str = ""
    turns: bool = True
    permuted: bool = False
    norm_offset: float = 0.0
    partial: bool = False
    norm_key: str = "attention.layer_norm_rms_epsilon"
    norm_field: str = "rms_norm_eps"
    check: Callable[[Any], str | None] = lambda config: None
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}
    written: bool = True
    reads: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
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


_LAYER_NORM: Final = "attention.layer_norm_epsilon"


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True, check=_window_short),
    "qwen2": Architecture("qwen2", check=_window_short),
    "qwen3": Architecture("qwen3", check=_window_short),
    "gemma2": Architecture("gemma2", norm_offset=1.0, check=lambda c: _full_layers(c, 2), extra=_gemma2_keys),
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


_COMMON: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_BESIDE: Final = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
        "pooling_type",
        "attention.causal",
    }
)
_LATER: Final = "rope.scaling."  # gguf_model.py reads it, of every architecture


def readable(name: str) -> tuple[str, Architecture] | None:
    """transformers' `model_type` and the table's row of a `general.architecture`; None where transformers
    reads such files, or nobody.
    """
    rows = ((kind, row) for kind, row in ARCHITECTURES.items() if row.name == name)
    return next(((row.kind or kind, row) for kind, row in rows if row.fields is not None), None)


def configuration(file: GGUFFile, arch: Architecture) -> dict[str, Any]:
    """The configuration's values that a file's metadata gives.

    Raises InputError for metadata that is missing or of another kind, UnsupportedError for a key-value that
    is not understood.
    """
    assert arch.fields is not None
    keys = {
        k.removeprefix(f"{arch.name}."): v for k, v in file.metadata.items() if k.startswith(f"{arch.name}.")
    }
    known = {*_COMMON, *_BESIDE, *arch.reads, *arch.may, *arch.ignores, arch.norm_key}
    odd = sorted(k for k in keys if k not in known and not k.startswith(_LATER))
    if odd:
        raise UnsupportedError(
            f"{file.path.name} sets {arch.name}.{odd[0]}, which is not understood", remedy=_FOLDER
        )
    numbers = [k for k, v in keys.items() if not isinstance(v, int | float | str)]
    missing = [k for k in (*_COMMON, arch.norm_key, *arch.reads) if k not in keys]
    if numbers or missing:
        what, which = ("lacks", missing) if missing else ("has an array of", numbers)
        raise InputError(f"{file.path.name} {what} {arch.name}.{which[0]}", remedy="download the file again")
    heads = max(int(keys["attention.head_count"]), 1)
    head_dim = int(keys.get("attention.key_length", int(keys["embedding_length"]) // heads))
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{file.path.name} has heads of two lengths", remedy=_FOLDER)
    turned = int(keys.get("rope.dimension_count", head_dim))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    values: dict[str, Any] = {field: keys[key] for key, field in _COMMON.items()}
    values[arch.norm_field] = keys[arch.norm_key]
    if arch.turns:
        values |= {
            "num_key_value_heads": keys.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rope_theta": keys.get("rope.freq_base", 10000.0),
            "partial_rotary_factor": turned / head_dim,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    values["vocab_size"] = keys.get("vocab_size", len(tokens) if isinstance(tokens, list) else None)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return values | arch.fields(keys, file.tensors)


def named(arch: Architecture, layers: int) -> Callable[[str], str | None]:
    """A model's parameter → its name in GGUF, or None."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch.name], layers)
    return lambda parameter: table.get_name(parameter, try_suffixes=(".weight", ".bias"))


def weights(
    file: GGUFFile, arch: Architecture, model: Any, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Lazy tensors by the model's parameter names, and the names of tensors without a place."""
    config, name_of = model.config, named(arch, model.config.num_hidden_layers)
    names = {name_of(parameter): parameter for parameter, _ in model.named_parameters()}
    found: dict[str, LazyTensor] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        parameter = names.get(name)
        if parameter is None:
            unused.append(name)
            continue
        part = name.split(".")[-2]
        if arch.permuted and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            found[parameter] = transformed(tensor, lambda x, heads=heads: _unpaired(x, heads))
        elif arch.norm_offset and name.endswith("norm.weight"):
            found[parameter] = transformed(tensor, lambda x: x - np.float32(arch.norm_offset))
        else:
            found[parameter] = tensor
    return found, unused


def paired_rows(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Which row of transformers' q or k stands where in GGUF: of each head, row i of the first half, then row
    i of the second half.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _unpaired(x: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    if len(x) % (2 * heads):
        return x  # of another shape than the model's, which is refused later
    return x[np.argsort(paired_rows(len(x), heads))]
