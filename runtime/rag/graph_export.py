"""The graph of a store for other programs: documents, passages, entities and what connects them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any
from xml.sax.saxutils import escape, quoteattr

from .features.names import name_key
from .store.base import Store

_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
"""
_NODE = ("kind", "label", "document", "start", "end", "page")
_EDGE = ("kind", "label", "chunk", "weight", "origin")
_NUMBERS = ("start", "end", "page", "weight")


def graph_of(store: Store) -> dict[str, Any]:
    """{"nodes": [{"id", "kind", "label", …}], "edges": [{"source", "target", "kind", …}]}, in order of ids.

    Each passage has its document and span, and each edge the passage that it comes from.
    """
    nodes: dict[str, dict[str, Any]] = {}
    edges: list[dict[str, Any]] = []
    with store.reading() as reader:
        for document in reader.documents():
            label = document.title or document.id
            nodes[f"d:{document.id}"] = {"kind": "document", "label": label, "document": document.id}
        for chunk in reader.chunks():
            here = f"c:{chunk.id}"
            nodes[here] = {
                "kind": "passage",
                "label": chunk.heading or chunk.title or chunk.text[:60],
                "document": chunk.document,
                "start": chunk.start,
                "end": chunk.end,
                "page": chunk.page,
            }
            edges.append(_edge(f"d:{chunk.document}", here, "holds", chunk.id))
            counts: dict[str, int] = {}
            for mention in chunk.features.mentions:
                counts[mention.key] = counts.get(mention.key, 0) + 1
                nodes.setdefault(f"e:{mention.key}", {"kind": "entity", "label": mention.surface})
            for key, count in sorted(counts.items()):
                edges.append(_edge(here, f"e:{key}", "names", chunk.id, weight=count))
        for triple in reader.triples():
            subject, object = (_entity(nodes, name) for name in (triple.subject, triple.object))
            more = {"label": triple.predicate, "origin": triple.origin}
            edges.append(_edge(subject, object, "relation", triple.chunk, **more))
    return {"nodes": [{"id": id, **facts} for id, facts in sorted(nodes.items())], "edges": edges}


def _entity(nodes: dict[str, dict[str, Any]], name: str) -> str:
    key = f"e:{name_key(name) or name.casefold()}"
    nodes.setdefault(key, {"kind": "entity", "label": name})
    return key


def _edge(source: str, target: str, kind: str, chunk: str, **more: Any) -> dict[str, Any]:
    return {"source": source, "target": target, "kind": kind, "chunk": chunk, **more}


def write_graphml(graph: Mapping[str, Any], file: IO[str]) -> None:
    """http://graphml.graphdrawing.org: what is declared first is what nodes and edges may carry."""
    file.write(_HEAD)
    for kind, names in (("node", _NODE), ("edge", _EDGE)):
        for name in names:
            of_type = "double" if name in _NUMBERS else "string"
            file.write(f'  <key id="{kind}-{name}" for="{kind}" attr.name="{name}" attr.type="{of_type}"/>\n')
    file.write('  <graph edgedefault="directed">\n')
    for node in graph["nodes"]:
        _write(file, "node", f"id={quoteattr(_xml(node['id']))}", node, _NODE)
    for edge in graph["edges"]:
        ends = f"source={quoteattr(_xml(edge['source']))} target={quoteattr(_xml(edge['target']))}"
        _write(file, "edge", ends, edge, _EDGE)
    file.write("  </graph>\n</graphml>\n")


def _write(file: IO[str], kind: str, head: str, facts: Mapping[str, Any], names: tuple[str, ...]) -> None:
    data = "".join(
        f'<data key="{kind}-{name}">{escape(_xml(str(facts[name])))}</data>'
        for name in names
        if facts.get(name) is not None
    )
    file.write(f"    <{kind} {head}>{data}</{kind}>\n")


def _xml(text: str) -> str:
    """Without what XML 1.0 cannot hold."""
    return "".join(
        letter if letter in "\t\n\r" or (letter >= " " and letter not in "\ufffe\uffff") else "\ufffd"
        for letter in text
    )
