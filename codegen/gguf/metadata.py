"""Key-values that describe a model to llama.cpp: copied from a GGUF source, or made of a Hugging Face
configuration (as convert_hf_to_gguf.py writes them).

What llama.cpp would silently compute in another way (a window pattern, a scale, a rotary rule of another
kind) is refused by name.
"""

from __future__ import annotations

import math
from typing import Any, Final

from ...frontend.gguf_architectures import ARCHITECTURES
from ...frontend.gguf_fields import rope_parameters
from ...frontend.gguf_layout import Architecture
from ...frontend.source import ModelSource
from ...ir.errors import UnsupportedError

_ELSE: Final = "use another target"


_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
                      "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
                      "BF16": 32, "MXFP4": 38, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24,
                      "IQ3_S": 26, "IQ2_S": 28, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37,
                      "NVFP4": 39}  # fmt: skip


def architecture(source: ModelSource) -> Architecture:
    """The architecture of a model. Raises UnsupportedError, naming it, where this target cannot write it."""
    kind = str(getattr(source.config, "model_type", None) or source.name)
    found = ARCHITECTURES.get(kind)
    if found is None or not found.written or source.does != "causal_lm":
        known = ", ".join(name for name, row in ARCHITECTURES.items() if row.written)
        raise UnsupportedError(
            f"target gguf does not write the architecture {kind!r}", remedy=f"it writes {known}; {_ELSE}"
        )
    refusal = None if source.gguf is not None else found.check(source.config)
    if refusal is not None:
        raise UnsupportedError(f"{source.name} has {refusal}: GGUF cannot say that", remedy=_ELSE)
    return found


def file_type(ggml_type: str) -> int:
    """`general.file_type` of a file whose matrices are mostly of a block type, as llama.cpp numbers it."""
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
        arch.norm_key: float(getattr(config, arch.norm_field)),
        "rope.dimension_count": int(head_dim * _partial(source, arch)),
        "vocab_size": config.vocab_size,
        **_rope(source),
        **arch.extra(config),
    }
    general = {"general.architecture": arch.name, "general.type": "model", "general.name": source.name}
    return general | {f"{arch.name}.{key}": value for key, value in keys.items()}


def _asked_scaling(source: ModelSource, arch: Architecture) -> dict[str, Any]:
    """What `--rope-scaling` changes of a GGUF source's own key-values."""
    if source.rope_scaling is None:
        return {}
    keys = {"context_length": source.config.max_position_embeddings, **_rope(source)}
    return {f"{arch.name}.{key}": value for key, value in keys.items()}


def _partial(source: ModelSource, arch: Architecture) -> float:
    """The part of a head that turns."""
    partial = rope_parameters(source.config).get("partial_rotary_factor") or 1.0
    if partial != 1.0 and not arch.partial:
        raise UnsupportedError(f"{source.name} has rotary embeddings over {partial} of a head", remedy=_ELSE)
    return float(partial)


def _rope(source: ModelSource) -> dict[str, Any]:
    if source.rope_scaling is not None and source.rope_scaling.needed:
        raise UnsupportedError(
            f"{source.name} is to be scaled for long sequences only: GGUF can say that of all or of none",
            remedy="leave when=needed away",
        )
    rope = rope_parameters(source.config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedError(f"{source.name} has rotary embeddings of kind {kind!r}", remedy=_ELSE)
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
