"""What a manifest says of a model: its `model` entry."""

from __future__ import annotations

from typing import Any

from ..frontend.rope import rope_facts
from ..frontend.source import ModelSource, context_length, describe
from ..ir.core import Graph
from ..passes.cache.rotary import rotary_facts


def rope_scaling_facts(source: ModelSource) -> dict[str, Any] | None:
    """`model.rope_scaling` of a manifest (docs/architecture.md)."""
    facts = rope_facts(source.config, source.length, context_length(source.config))
    if facts is not None and source.rope_scaling is not None and source.rope_scaling.needed:
        facts |= {"when": "needed", "offset": source.length}
    return facts


def held_length(graph: Graph, context: int | None) -> int | None:
    """The longest sequence that was asked for, or as long a one as the graph holds for."""
    held = graph.facts.get("positions")
    return min(context, held) if context is not None and held is not None else context


def model_facts(source: ModelSource, graph: Graph, context: int | None) -> dict[str, Any]:
    """`model` of a manifest; `context` as in `held_length`."""
    facts = describe(source) if source.config is not None else {}
    context = held_length(graph, context)
    width = graph.outputs[0].shape[-1] if graph.outputs[0].type.rank else None
    known = ("token_types", "state", "alone", "scored", "pooling")
    types = {name: graph.facts[name] for name in known if name in graph.facts}
    rope = rope_scaling_facts(source)
    return {
        **source.use,
        **types,
        **({} if rope is None else {"rope_scaling": rope}),
        **({"rotary": rotary_facts(graph)} if graph.facts["kind"] == "causal_lm" else {}),
        "name": source.name,
        "architecture": facts.get("architecture") or source.name,
        "num_layers": facts.get("num_layers") if "state" in types else len(graph.facts.get("kv", [])),
        "vocab_size": width if graph.facts["kind"] == "causal_lm" else facts.get("vocab_size"),
        "hidden_size": width if graph.facts["kind"] == "encoder" else facts.get("hidden_size"),
        "context_length": context,
        "eos_token_ids": source.generation.eos_token_ids,
        "bos_token_id": source.generation.bos_token_id,
        "kv": graph.facts.get("kv", []),
        "generation": source.generation.sampling,
    }
