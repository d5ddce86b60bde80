"""Which weight gets which block type: llama.cpp's mixtures (`llama_tensor_get_type` in llama-quant.cpp).

    scheme    linear layers    more bits
    q4_k_m    Q4_K             Q6_K: value and down projections of the first eighth, the last eighth and every
                               third layer between; Q5_K: fused query-key-value projections; Q6_K: the head
    q5_k_m    Q5_K             the same layers in Q6_K
    q4_0      Q4_0             Q6_K: the head
    q6_k      Q6_K             -
    q8_0      Q8_0             -

An embedding that is the head as well counts as the head. Where rows are not divisible by 256 the K types
become Q5_0, Q5_1 and Q8_0; where they are not by 32 either, the weight stays in floats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ....ir.ggml import BLOCK_TYPES

SCHEMES: Final = ("q4_0", "q4_k_m", "q5_k_m", "q6_k", "q8_0")

_BASE: Final = {"q4_0": "Q4_0", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K", "q8_0": "Q8_0"}
_FALLBACK: Final = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_VALUE: Final = re.compile(r"\b(v_proj|value|wv|v_lin)\b")
_DOWN: Final = re.compile(
    r"\b(down_proj|w2|fc2|fc_out|dense_4h_to_h|lin2)\b|\bmlp\.c_proj\b|\boutput\.dense\b"
)
_FUSED: Final = re.compile(r"\b(c_attn|qkv_proj|query_key_value|Wqkv)\b")
_POSITIONS: Final = re.compile(r"\b(wpe|position_embeddings|embed_positions|token_type_embeddings)\b")


@dataclass(frozen=True)
class Role:
    """What a weight is for.

    Attributes:
        name: the parameter's ("model.layers.3.mlp.down_proj.weight").
        columns: length of its rows.
        head: whether it makes the logits.
    """

    name: str
    columns: int
    head: bool = False

    @property
    def layer(self) -> int | None:
        """Number of the layer that it stands in: the first one in the name."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found.group(1)) if found else None


def more_bits(layer: int, layers: int) -> bool:
    """Whether the value and down projections of a layer are worth Q6_K."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def block_type(scheme: str, role: Role, layers: int) -> str | None:
    """The block type of a weight; None where it stays in floats (position tables, rows that fit no block)."""
    if _POSITIONS.search(role.name):
        return None
    chosen = _BASE[scheme]
    if role.head and scheme != "q8_0":
        chosen = "Q6_K"
    elif scheme in ("q4_k_m", "q5_k_m") and role.layer is not None:
        if _VALUE.search(role.name) or _DOWN.search(role.name):
            chosen = "Q6_K" if more_bits(role.layer, layers) else chosen
        elif _FUSED.search(role.name):
            chosen = "Q5_K" if scheme == "q4_k_m" else "Q6_K"
    if role.columns % BLOCK_TYPES[chosen].block_size:
        chosen = _FALLBACK.get(chosen, chosen)
    return None if role.columns % BLOCK_TYPES[chosen].block_size else chosen
