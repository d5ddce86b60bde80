"""Key-values that describe a model to llama.cpp: copied from a GGUF source, or made of a Hugging Face
configuration (as convert_hf_to_gguf.py writes them).

What llama.cpp would silently compute in another way (a window pattern, a scale, a rotary rule of another
kind) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ...frontend.source import ModelSource
from ...ir.errors import UnsupportedError

_ELSE: Final = "use another target"


@dataclass(frozen=True)
class Architecture:
    """How a family of transformers is called and stored in GGUF.

    Attributes:
        name: `general.architecture`, also the name of its tensor table in the package gguf.
        permuted: q and k rows are stored with rotary pairs side by side.
        norm_offset: norms are stored with this added.
        check: what of a configuration cannot be said in GGUF, as a sentence, or None.
        extra: further key-values without their prefix.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    check: Callable[[Any], str | None] = lambda config: None
    extra: Callable[[Any], dict[str, Any]] = lambda config: {}


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


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True, check=_window_short),
    "qwen2": Architecture("qwen2", check=_window_short),
    "qwen3": Architecture("qwen3", check=_window_short),
    "gemma2": Architecture("gemma2", norm_offset=1.0, check=lambda c: _full_layers(c, 2), extra=_gemma2_keys),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, check=_gemma3_check, extra=_gemma3_keys),
    "olmo2": Architecture("olmo2"),
    "granite": Architecture("granite", permuted=True, extra=_granite_keys),
}
"""transformers' `model_type` → what GGUF makes of it."""

_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
                      "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
                      "BF16": 32}  # fmt: skip


def architecture(source: ModelSource) -> Architecture:
    """The architecture of a model. Raises UnsupportedError, naming it, where this target cannot write it."""
    kind = str(getattr(source.config, "model_type", None) or source.name)
    found = ARCHITECTURES.get(kind)
    if found is None or source.task != "causal_lm":
        raise UnsupportedError(
            f"target gguf does not write the architecture {kind!r}",
            remedy=f"it writes {', '.join(ARCHITECTURES)}; {_ELSE}",
        )
    refusal = None if source.gguf is not None else found.check(source.config)
    if refusal is not None:
        raise UnsupportedError(f"{source.name} has {refusal}: GGUF cannot say that", remedy=_ELSE)
    return found


def file_type(ggml_type: str) -> int:
    """`general.file_type` of a file whose matrices are mostly of a block type (`LLAMA_FTYPE_MOSTLY_*`)."""
    return _FILE_TYPES[ggml_type]


def model_metadata(source: ModelSource, arch: Architecture) -> dict[str, Any]:
    """Key-values of the model without those of its tokenizer; a GGUF source's own where there is one."""
    if source.gguf is not None:
        left_out = ("tokenizer.", "split.", "general.alignment", "general.file_type")
        kept = {k: v for k, v in source.gguf.metadata.items() if not k.startswith(left_out)}
        return kept | _asked_scaling(source, arch)
    config = source.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
        **_rope(source),
        **arch.extra(config),
    }
    general = {"general.architecture": arch.name, "general.type": "model", "general.name": source.name}
    return general | {f"{arch.name}.{key}": value for key, value in keys.items()}


def rope_parameters(config: Any, layer_type: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of layers of one type."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get(layer_type, found)


def _asked_scaling(source: ModelSource, arch: Architecture) -> dict[str, Any]:
    """What `--rope-scaling` changes of a GGUF source's own key-values."""
    if source.rope_scaling is None:
        return {}
    keys = {"context_length": source.config.max_position_embeddings, **_rope(source)}
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def _rope(source: ModelSource) -> dict[str, Any]:
    if source.rope_scaling is not None and source.rope_scaling.needed:
        raise UnsupportedError(
            f"{source.name} is to be scaled for long sequences only: GGUF can say that of all or of none",
            remedy="leave when=needed away",
        )
    rope = rope_parameters(source.config)
    kind = rope.get("rope_type", "default")
    partial = rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "yarn", "llama3") or (partial or 1.0) != 1.0:
        raise UnsupportedError(
            f"{source.name} has rotary embeddings of kind {kind!r}"
            + (f" over {partial} of a head" if partial != 1.0 else ""),
            remedy=_ELSE,
        )
    keys: dict[str, Any] = {"rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings", source.config.max_position_embeddings)
        keys["rope.scaling.original_context_length"] = int(original)
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key):
                keys[f"rope.scaling.yarn_{key}"] = float(rope[key])
        if rope.get("truncate") is False:
            raise UnsupportedError(
                f"{source.name} has a yarn scaling that is not truncated: GGUF cannot say that", remedy=_ELSE
            )
        factor = rope.get("attention_factor")
        if factor is not None and not math.isclose(factor, 0.1 * math.log(rope["factor"]) + 1.0):
            raise UnsupportedError(
                f"{source.name} has the attention factor {factor} in its yarn scaling: GGUF cannot say that",
                remedy=_ELSE,
            )
    return keys
