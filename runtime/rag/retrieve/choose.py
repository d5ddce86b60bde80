"""Which passages a question gets, of a ranked list: together they should answer it.

Passages are chosen one after the other. What a passage covers of the question's words counts less the more
the ones before it have covered the same words; two passages that cover a word settle it:

    net(c) = score(c) − ρ · Σ_t idf(t)·coverage(c, t)·min(1, Σ_chosen coverage(·, t) / (2·max coverage(t)))
    / Σ_t idf(t)

It is maximal marginal relevance (Carbonell and Goldstein 1998) with the question's words in place of
similarity: ten passages on the weather of ten cities are one piece of evidence, and the passage that says
which city is another. That a word must be covered twice leaves room for a second document that the question
describes in the same words. A document comes at most `per_document` times until every other document has
come.
"""

from __future__ import annotations

import numpy as np

REDUNDANCY = 0.2
"""ρ, in units of the fused score (0 … 1)."""
SETTLED = 2.0
"""How many times a word must have been covered before covering it again is worth nothing."""


def choose(
    order: np.ndarray,
    scores: np.ndarray,
    coverage: np.ndarray,
    idf: np.ndarray,
    documents: np.ndarray,
    top: int,
    per_document: int,
    redundancy: float = REDUNDANCY,
) -> list[int]:
    """Places in the pool, the best first.

    order [m]: the candidates, best first; scores [p]; coverage [p, q]: what each covers of each of the
    question's words; documents [p]: whose passage each is. `per_document` 0: as many of a document as there
    are.
    """
    total = max(float(idf.sum()), 1e-9)
    weighted = coverage[order] * (idf / total)  # [m, q]
    value = scores[order].astype(np.float64)
    settled = SETTLED * np.maximum(coverage[order].max(axis=0, initial=0), 1e-9)
    covered = np.zeros(coverage.shape[1], np.float32)
    left = np.ones(len(order), bool)
    counts: dict[int, int] = {}
    chosen: list[int] = []
    while len(chosen) < top and left.any():
        again = weighted @ np.minimum(covered / settled, 1)
        net = np.where(left, value - redundancy * again, -np.inf)
        place = int(np.argmax(net))
        candidate = int(order[place])
        left[place] = False
        chosen.append(candidate)
        covered += coverage[candidate]
        document = int(documents[candidate])
        counts[document] = counts.get(document, 0) + 1
        if per_document and counts[document] >= per_document:
            same = left & (documents[order] == document)
            value[same] -= 10.0  # behind every other document, in the same order
    return chosen
