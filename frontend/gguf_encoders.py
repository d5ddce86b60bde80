"""GGUF's named layouts of encoders: part of the table in `gguf_architectures.py`."""

from __future__ import annotations

from typing import Final

from . import gguf_fields as its
from . import gguf_windows as windowed
from .gguf_layout import LAYER_NORM, Architecture

_AFTER_NORMS: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "post_attention_layernorm": "attn_output_norm",
    "post_mlp_layernorm": "layer_output_norm",
}
"""Of layers whose norms are behind attention and MLP."""

ENCODERS: Final[dict[str, Architecture]] = {
    "bert": Architecture(
        "bert",
        turns=False,
        written=False,
        fields=its.token_types_fields,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
    ),
    "nomic_bert": Architecture(
        "nomic-bert",
        written=False,
        fields=its.token_types_fields,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
        pad=0,
        parts=_AFTER_NORMS,
    ),
    "jina_embeddings_v3": Architecture(
        "jina-bert-v3",
        written=False,
        fields=its.token_types_fields,
        norm_key=LAYER_NORM,
        norm_field="layer_norm_eps",
        parts={**_AFTER_NORMS, "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    ),
    "eurobert": Architecture("eurobert", written=False, fields=lambda k, t: {}),
    "modernbert": Architecture(
        "modern-bert",
        written=False,
        may=frozenset(
            {
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "rope.freq_base_swa",
                "hidden_activation",
            }
        ),
        lists=frozenset({"attention.sliding_window_pattern"}),
        fields=windowed.in_turns_fields,
        norm_key=LAYER_NORM,
        norm_field="norm_eps",
    ),
    "gemma3_text (encoder)": Architecture(
        "gemma-embedding",
        kind="gemma3_text",
        norm_offset=1.0,
        written=False,
        reads=frozenset({"attention.sliding_window", "attention.key_length"}),
        ignores=frozenset({"dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"}),
        may=frozenset({"rope.freq_base_swa"}),
        fields=its.both_ways_fields,
    ),
}
"""transformers' `model_type` → what GGUF makes of it."""
