"""The graph that the random walk goes over: passages and entities, as the column-normalised matrix P.

Passage–entity edges weigh (1 + ln tf)·√idf, passage–passage title links twice their certainty (both ways),
relations between entities 1 + ln(how often).
"""

from __future__ import annotations

from typing import Any

import numpy as np

LINK_WEIGHT = 2.0
"""A title link counts as two shared entities of middling rarity."""
MAX_LINKED_CHUNKS = 8
"""Of a document of more chunks, a link leads to the first one only."""


def entity_idf(passages: int, frequency: np.ndarray) -> np.ndarray:
    """The rarity of an entity that `frequency` of so many passages name: ln(1 + (N − n + ½)/(n + ½)), as
    BM25's."""
    return np.log1p((passages - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)


def walk_matrix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """P in compressed rows: passages first, then entities."""
    from scipy.sparse import bmat, csr_matrix

    chunks = len(arrays["chunk_entity_bounds"]) - 1
    entities = len(arrays["entity_hashes"])
    named = arrays["chunk_entities"]
    frequency = np.bincount(named, minlength=entities)
    weights = (1 + np.log(np.maximum(arrays["chunk_entity_counts"], 1))) * np.sqrt(
        entity_idf(chunks, frequency)
    )[named]
    passage_entity = csr_matrix(
        (weights.astype(np.float32), named, arrays["chunk_entity_bounds"]), shape=(chunks, entities)
    )
    links = _chunk_links(arrays, chunks)
    pairs = arrays["relations"]
    strength = 1 + np.log(np.maximum(arrays["relation_counts"], 1))
    related = csr_matrix((strength, (pairs[:, 0], pairs[:, 1])), shape=(entities, entities), dtype=np.float32)
    graph: Any = bmat(
        [[LINK_WEIGHT * (links + links.T), passage_entity], [passage_entity.T, related + related.T]],
        format="csr",
    )
    totals = np.asarray(graph.sum(axis=0)).ravel()
    shares = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    graph.data = (graph.data * shares[graph.indices]).astype(np.float32)
    return {
        "walk_bounds": graph.indptr.astype(np.int64),
        "walk_nodes": graph.indices.astype(np.int32),
        "walk_shares": graph.data,
    }


def _chunk_links(arrays: dict[str, np.ndarray], chunks: int) -> Any:
    """chunk → chunk: to all chunks of a short document, to the first one of a long one."""
    from scipy.sparse import csr_matrix

    document_of, ordinals = arrays["document_of"], arrays["ordinals"]
    documents = len(arrays["documents_bounds"]) - 1
    lengths = np.bincount(document_of, minlength=documents)
    reached = np.flatnonzero((lengths[document_of] <= MAX_LINKED_CHUNKS) | (ordinals == 0))
    members = csr_matrix(
        (np.ones(len(reached), np.float32), (document_of[reached], reached)), shape=(documents, chunks)
    )
    links = csr_matrix(
        (arrays["link_weights"], arrays["link_documents"], arrays["link_bounds"]), shape=(chunks, documents)
    )
    return links @ members
