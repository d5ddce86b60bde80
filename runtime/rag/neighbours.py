"""The part of the graph around one document or name, small enough for a picture.

Nodes are `d:DOCUMENT` and `e:NAME`; edges say that a document names an entity ("names"), another document
("link"), or that two entities were found related ("relation").
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .features.names import name_key
from .features.terms import entity_hash, hash_of
from .snapshot import Snapshot
from .store.base import StoreReader

_COMMON = 0.25  # an entity in a larger share of the passages says nothing about any


def neighbours(snapshot: Snapshot, reader: StoreReader, focus: str, limit: int) -> dict[str, Any]:
    """{"nodes": [{"id", "kind", "label", "document", "weight"}], "edges": [{"source", "target", "kind",
    "weight"}]}, the focus first. Without a focus the names that join most, and their documents; without nodes
    where there is nothing of this name. Of a snapshot that the store is ahead of, what stood in passages that
    are gone is left out.
    """
    graph = _Graph(snapshot, reader)
    if not focus:
        chosen = graph.overview(limit)
    elif (document := graph.document(reader, focus)) is not None:
        chosen = graph.around_document(document, limit)
    elif (entity := graph.entity(focus)) is not None:
        chosen = graph.around_entity(entity, limit)
    else:
        return {"nodes": [], "edges": []}
    chosen = graph.present(reader, chosen)
    return {"nodes": graph.nodes(reader, chosen), "edges": graph.edges(chosen)}


_Node = tuple[str, int]
"""("d", document) or ("e", entity), by their numbers in the snapshot."""


class _Graph:
    def __init__(self, snapshot: Snapshot, reader: StoreReader) -> None:
        self._snapshot = snapshot
        self._documents = list(snapshot.documents)
        self._there = np.ones(len(snapshot), bool)
        """[n] which passages of the snapshot the store still has."""
        if snapshot.generation != reader.generation:
            known = set(reader.chunk_ids())
            self._there[:] = [id in known for id in snapshot.ids]

    # Finding ------------------------------------------------------------------------------------------------

    def document(self, reader: StoreReader, focus: str) -> int | None:
        if focus.startswith("e:"):
            return None
        wanted = focus.removeprefix("d:")
        for name in (wanted, focus):
            if name in self._documents and reader.document(name) is not None:
                return self._documents.index(name)
        folded = name_key(wanted)
        titled = (one for one in reader.documents() if folded and name_key(one.title) == folded)
        found = None if focus.startswith("d:") else next(titled, None)
        return self._documents.index(found.id) if found is not None and found.id in self._documents else None

    def entity(self, focus: str) -> int | None:
        if focus.startswith("d:"):
            return None
        name = focus.removeprefix("e:")
        found = self._snapshot.entity_ids([hash_of(name), entity_hash(hash_of(name_key(name)))])
        return int(found[0]) if len(found) and self._is_named(int(found[0])) else None

    # Choosing -----------------------------------------------------------------------------------------------

    def overview(self, limit: int) -> list[_Node]:
        snapshot = self._snapshot
        frequency = snapshot.entity_frequency
        if not len(frequency):
            return [("d", one) for one in range(min(limit, len(self._documents)))]
        rare = frequency <= max(2.0, _COMMON * len(snapshot))
        joins = np.where(rare, np.maximum(frequency - 1, 0) * snapshot.entity_idf, 0.0)
        entities = _best(np.arange(len(joins)), joins, max(1, limit // 3))
        counts: dict[int, float] = {}
        for entity in entities:
            for document, count in self._documents_of(entity):
                counts[document] = counts.get(document, 0.0) + 1 + 0.01 * min(count, 9)
        ranked = sorted(counts, key=lambda one: (-counts[one], one))
        ranked += [one for one in range(len(self._documents)) if one not in counts][:limit]
        chosen: list[_Node] = [("e", one) for one in entities]
        return chosen + [("d", one) for one in ranked[: limit - len(chosen)]]

    def around_document(self, document: int, limit: int) -> list[_Node]:
        linked = sorted(self._linked(document).items(), key=lambda item: (-item[1], item[0]))
        entities = sorted(self._entities_of(document), key=lambda item: (-item[1], item[0]))
        documents: list[_Node] = [("d", one) for one, _ in linked]
        names: list[_Node] = [("e", one) for one, _ in entities]
        room = max(0, limit - 1)
        taken = documents[: max(room // 2, room - len(names))]
        return [("d", document), *taken, *names[: room - len(taken)]]

    def around_entity(self, entity: int, limit: int) -> list[_Node]:
        documents = sorted(self._documents_of(entity), key=lambda item: (-item[1], item[0]))
        related: list[_Node] = [("e", one) for one in self._related(entity)]
        room = max(0, limit - 1)
        taken = related[: room // 2]
        found: list[_Node] = [("d", one) for one, _ in documents]
        return [("e", entity), *taken, *found[: room - len(taken)]]

    # The graph ----------------------------------------------------------------------------------------------

    def _chunks(self, document: int) -> np.ndarray:
        return np.flatnonzero((self._snapshot.document_of == document) & self._there)

    def _naming(self, entity: int) -> tuple[np.ndarray, np.ndarray]:
        """Passages that name it, and how often."""
        row = self._snapshot.chunks_by_entity[entity]
        there = self._there[row.indices]
        return row.indices[there], row.data[there]

    def _is_named(self, entity: int) -> bool:
        return len(self._naming(entity)[0]) > 0

    def _documents_of(self, entity: int) -> list[tuple[int, float]]:
        """Documents that name it, and how often."""
        chunks, counts = self._naming(entity)
        return _summed(self._snapshot.document_of[chunks], counts)

    def _entities_of(self, document: int) -> list[tuple[int, float]]:
        """Entities that it names, weighed by how telling they are."""
        entities = [self._snapshot.entities_of(int(chunk)) for chunk in self._chunks(document)]
        found = np.concatenate(entities) if entities else np.zeros(0, np.int64)
        return _summed(found, self._snapshot.entity_idf[found])

    def _linked(self, document: int) -> dict[int, float]:
        """Documents that it names, or that name it."""
        snapshot = self._snapshot
        rows = snapshot.links[self._chunks(document)]
        found = dict(_summed(rows.indices, rows.data))
        column = snapshot.links[:, document].tocoo()
        there = self._there[column.row]
        for other, weight in _summed(snapshot.document_of[column.row[there]], column.data[there]):
            found[other] = max(found.get(other, 0.0), weight)
        found.pop(document, None)
        return found

    def _related(self, entity: int) -> list[int]:
        pairs = self._snapshot.arrays["relations"]
        near = pairs[(pairs == entity).any(axis=1)]
        found = [int(one) for one in dict.fromkeys(near.ravel().tolist()) if one != entity]
        # What relates two names them both: of two that a passage which is gone named, it may have said so.
        gone = self._gone(entity)
        return [one for one in found if not (gone and gone & self._gone(one))]

    def _gone(self, entity: int) -> set[int]:
        """Passages that named it and are gone."""
        row = self._snapshot.chunks_by_entity[entity].indices
        return set(row[~self._there[row]].tolist())

    def present(self, reader: StoreReader, chosen: list[_Node]) -> list[_Node]:
        """Without the documents that were deleted since the snapshot, and what only they name."""
        return [
            (kind, one)
            for kind, one in chosen
            if (self._is_named(one) if kind == "e" else reader.document(self._documents[one]) is not None)
        ]

    # Showing ------------------------------------------------------------------------------------------------

    def nodes(self, reader: StoreReader, chosen: list[_Node]) -> list[dict[str, Any]]:
        labels = self._labels(reader, [one for kind, one in chosen if kind == "e"])
        found: list[dict[str, Any]] = []
        for kind, one in chosen:
            if kind == "e":
                key = self._snapshot.entities[one]
                weight = float(len(self._naming(one)[0]))
                found.append(_node(f"e:{key}", "entity", labels.get(one, key), None, weight))
            else:
                id = self._documents[one]
                document = reader.document(id)
                label = (document.title if document is not None else "") or id
                found.append(_node(f"d:{id}", "document", label, id, float(len(self._chunks(one)))))
        return found

    def _labels(self, reader: StoreReader, entities: list[int]) -> dict[int, str]:
        """Names as they are written somewhere."""
        first: dict[int, str] = {}
        for entity in entities:
            chunks, _ = self._naming(entity)
            if len(chunks):
                first[entity] = self._snapshot.ids[int(chunks[0])]
        surfaces = {
            (chunk.id, mention.key): mention.surface
            for chunk in reader.chunks(list(dict.fromkeys(first.values())))
            for mention in chunk.features.mentions
        }
        return {
            entity: surfaces.get((chunk, self._snapshot.entities[entity]), self._snapshot.entities[entity])
            for entity, chunk in first.items()
        }

    def edges(self, chosen: list[_Node]) -> list[dict[str, Any]]:
        """All edges between chosen nodes."""
        documents = {one for kind, one in chosen if kind == "d"}
        entities = {one for kind, one in chosen if kind == "e"}
        found: list[dict[str, Any]] = []
        for entity in sorted(entities):
            name = f"e:{self._snapshot.entities[entity]}"
            for document, count in self._documents_of(entity):
                if document in documents:
                    found.append(_edge(f"d:{self._documents[document]}", name, "names", count))
            found += [
                _edge(name, f"e:{self._snapshot.entities[other]}", "relation", 1.0)
                for other in self._related(entity)
                if other in entities and other > entity
            ]
        for document in sorted(documents):
            rows = self._snapshot.links[self._chunks(document)]
            for other, weight in _summed(rows.indices, rows.data):
                if other in documents and other != document:
                    ends = (f"d:{self._documents[document]}", f"d:{self._documents[other]}")
                    found.append(_edge(*ends, "link", weight))
        return found


def _node(id: str, kind: str, label: str, document: str | None, weight: float) -> dict[str, Any]:
    return {"id": id, "kind": kind, "label": label, "document": document, "weight": weight}


def _edge(source: str, target: str, kind: str, weight: float) -> dict[str, Any]:
    return {"source": source, "target": target, "kind": kind, "weight": float(weight)}


def _summed(keys: np.ndarray, weights: np.ndarray) -> list[tuple[int, float]]:
    """Weights by key, in order of the keys."""
    distinct, place = np.unique(keys, return_inverse=True)
    sums = np.bincount(place, weights, len(distinct))
    return list(zip(distinct.tolist(), sums.tolist(), strict=True))


def _best(keys: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    """The keys with most weight, of equals the lower; none without any."""
    order = np.lexsort((keys, -weights))[:count]
    return [int(keys[one]) for one in order if weights[one] > 0]
