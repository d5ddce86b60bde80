"""Weights that a model shares between places ("tied"), of which an adapter changes one.

    linear(x, W), embedding(ids, W)  →  linear(x, W), embedding(ids, W + B A)

PEFT gives the place that it was asked for the change, and leaves the other as it is. Which names one weight
of the traced graph has, and whether each is read by ids, the frontend says: facts["tied"]
(`frontend/trace.py`).
"""

from __future__ import annotations

from ...ir.core import Graph, Value
from ...ir.errors import UnsupportedError
from ...ir.ops.nn import Embedding


def find_weight(graph: Graph, name: str) -> Value | None:
    """The weight of a parameter's name, tied or not; None where there is none."""
    entry = graph.facts.get("tied", {}).get(name)
    return graph.weights.get(name if entry is None else entry["of"])


def own_weight(graph: Graph, name: str) -> Value | None:
    """The same, for no other place: what reads a tied weight otherwise gets a weight of its own.

    Raises UnsupportedError where another place reads it in the same way (blocks that are used twice): which
    op is which place's is not known.
    """
    tied = {n: dict(entry) for n, entry in graph.facts.get("tied", {}).items()}
    value = find_weight(graph, name)
    if value is None or name not in tied:
        return value
    by_ids, holder = tied[name]["embedding"], tied[name]["of"]
    like = next((n for n, e in tied.items() if n != name and e == tied[name]), None)
    if like is not None:
        raise UnsupportedError(
            f"an adapter changes {name}, which {graph.name} shares with {like}",
            remedy="merge it with PEFT (merge_and_unload) and give the merged model",
        )
    uses = [(op, i) for op, i in value.uses if isinstance(op, Embedding) is by_ids]
    if len(uses) == len(value.uses):
        return value
    names = [n for n, entry in tied.items() if entry["of"] == holder]
    moved = [n for n in names if tied[n]["embedding"] is not tied[holder]["embedding"]]
    if not uses or not moved:
        return None
    if by_ids is tied[holder]["embedding"]:
        uses = [use for use in value.uses if use not in uses]
    assert value.weight is not None
    other = graph.add_weight(moved[0], value.weight)
    for op, i in uses:
        graph.set_operand(op, i, other)
    for n in moved:
        tied[n]["of"] = moved[0]
    graph.facts["tied"] = tied
    return find_weight(graph, name)
