"""The part of the documents' graph around one node, as a picture needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ApiError
from .rag_wire import finite

if TYPE_CHECKING:
    from ..rag.knowledge import KnowledgeBase

_LABEL = 200  # characters


def graph_body(
    name: str, base: KnowledgeBase, focus: str, limit: int, goes_on: Callable[[], bool]
) -> dict[str, Any]:
    """Nodes and edges; an edge whose ends are not both there is left out."""
    found = base.graph_neighbours(focus, limit)
    nodes = [_node(one) for one in found["nodes"]]
    if focus and not nodes:
        message = f"there is nothing called {focus[:200]!r} in the graph"
        raise ApiError(404, message, param="focus", code="node_not_found")
    known = {node["id"] for node in nodes}
    edges = [_edge(one) for one in found["edges"]]
    edges = [edge for edge in edges if edge["source"] in known and edge["target"] in known]
    return {"object": "rag.graph", "knowledge": name, "focus": focus, "nodes": nodes, "edges": edges}


def _node(one: Mapping[str, Any]) -> dict[str, Any]:
    label = str(one["label"] or one["id"])[:_LABEL]
    facts = {"id": one["id"], "kind": one["kind"], "label": label, "document": one.get("document")}
    return facts | {"weight": finite(one.get("weight", 1.0))}


def _edge(one: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"source": one["source"], "target": one["target"], "kind": one["kind"]}
    return ends | {"weight": finite(one.get("weight", 1.0))}
