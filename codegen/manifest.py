"""What an artifact's manifest says of a graph, whoever compiles it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..frontend.tokenizer import TokenizerFacts
from ..ir.core import Graph
from ..ir.types import DimExpr, TensorType

PAGE_SIZE = 16


def begin_manifest(
    graph: Graph, model: Mapping[str, Any], *, kv_dtype: str, tokenizer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What is known before targets have written. `model`: the entry of that name."""
    outputs = [(n, v.type) for n, v in zip(graph.output_names, graph.outputs, strict=True)]
    manifest: dict[str, Any] = {
        "kind": graph.facts["kind"],
        "model": dict(model),
        "inputs": _arrays([(v.name, v.type) for v in graph.inputs]),
        "outputs": _arrays(outputs),
    }
    if graph.facts["kind"] != "function":
        manifest |= {"page_size": PAGE_SIZE, "kv_dtype": kv_dtype, "tokenizer": tokenizer}
    return manifest


def tokenizer_entry(facts: TokenizerFacts | None) -> dict[str, Any] | None:
    """What it says of a tokenizer; None where there is none."""
    if facts is None:
        return None
    return {
        "path": facts.path,
        "chat_template": facts.chat_template,
        "kind": facts.kind,
        "special_tokens": facts.special_tokens,
        "special_token_ids": facts.special_token_ids,
        "adds_bos": facts.adds_bos,
        "adds_eos": facts.adds_eos,
        "checked_strings": facts.checked_strings,
        "refused_shapes": facts.refused_shapes,
        **({} if facts.tool_calls is None else {"tool_calls": facts.tool_calls}),
    }


def _arrays(found: Sequence[tuple[str, TensorType]]) -> list[dict[str, Any]]:
    return [{"name": name, "dtype": t.dtype, "shape": list(map(_dim, t.shape))} for name, t in found]


def _dim(d: Any) -> int | str:
    return str(d) if isinstance(d, DimExpr) else d
