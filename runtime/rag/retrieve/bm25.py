"""BM25 over the snapshot's postings.

    score(d) = Σ_t idf(t) · tf·(k1 + 1) / (tf + k1·(1 − b + b·|d|/average))        idf(t) = ln(1 + (N − n +
    ½)/(n + ½))

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009); the idf that cannot
be negative is Lucene's. A word of the title counts as two of the text. k1 0.9 and b 0.4 are what
Lucene-based baselines for passages use (Anserini).
"""

from __future__ import annotations

import numpy as np

from ..snapshot import Snapshot

K1, B = 0.9, 0.4
TITLE_WEIGHT = 2


def saturation(
    snapshot: Snapshot, counts: np.ndarray, chunks: np.ndarray, k1: float = K1, b: float = B
) -> np.ndarray:
    """tf·(k1 + 1) / (tf + k1·(1 − b + b·length/average)): 1 for one occurrence in a passage of average
    length."""
    norm = k1 * (1 - b + b * snapshot.lengths[chunks] / snapshot.average_length)
    return counts * np.float32(k1 + 1) / (counts + norm)


def bm25(snapshot: Snapshot, terms: np.ndarray) -> np.ndarray:
    """Scores [n] float32 of all passages."""
    a = snapshot.arrays
    scores = np.zeros(len(snapshot), np.float32)
    bounds = a["posting_bounds"]
    for term in terms:
        start, end = int(bounds[term]), int(bounds[term + 1])
        chunks = a["posting_chunks"][start:end]
        counts = a["posting_texts"][start:end] + np.float32(TITLE_WEIGHT) * a["posting_titles"][start:end]
        scores[chunks] += snapshot.term_idf[term] * saturation(snapshot, counts, chunks)
    return scores


def term_matrix(snapshot: Snapshot, chunks: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """[chunks, terms] float32: the saturated counts of some terms in some passages."""
    a = snapshot.arrays
    matrix = np.zeros((len(chunks), len(terms)), np.float32)
    if not len(terms):
        return matrix
    rows, entries = spread(a["chunk_term_bounds"][chunks], a["chunk_term_bounds"][chunks + 1])
    column = np.full(len(a["vocabulary"]), -1, np.int32)
    column[terms] = np.arange(len(terms))
    at = column[a["chunk_terms"][entries]]
    hit = np.flatnonzero(at >= 0)
    entries, rows, at = entries[hit], rows[hit], at[hit]
    counts = a["chunk_term_texts"][entries] + np.float32(TITLE_WEIGHT) * a["chunk_term_titles"][entries]
    matrix[rows, at] = saturation(snapshot, counts, chunks[rows])
    return matrix


def spread(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of many stretches start … end: to which each element belongs, and the elements, one stretch after the
    other."""
    sizes = ends - starts
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return rows, np.arange(len(rows)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
