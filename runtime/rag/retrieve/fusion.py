"""Many orders into one.

Weighted sums: every feature lies in 0 … 1 (`scaled`: the best passage has 1, the worst 0), and a passage's
score is their sum by fixed weights. Reciprocal rank fusion (Cormack et al. 2009), Σ 1/(k + rank), needs no
scales and is mode `rrf`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

HYBRID = {"dense": 0.7, "bm25": 0.3}
"""Weights of the plain hybrid of vectors and words."""

GRAPH = {
    "dense": 3.0,
    "pagerank": 3.0,
    "named": 2.0,
    "bridge": 2.5,
    "bridge_open": 3.0,
    "link": 1.25,
    "link_open": 2.0,
    "back_open": 0.75,
    "two_step": 2.0,
    "partner": 1.25,
    "chain": 3.0,
}
"""Weights of everything, the same for all documents. A softmax over the candidates of a question (a linear
ranker without negative weights) on three sets of questions, each with and without titles, gave their sizes;
they are rounded, and no set changes by more than its own uncertainty when one of them is changed by a
third. docs/rag.md says what was measured, also on sets that had no part in it."""


def scaled(values: np.ndarray) -> np.ndarray:
    """Into 0 … 1; all zero where all are equal."""
    if not len(values):
        return values
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.zeros_like(values)
    return (values - low) / (high - low)


def weighted(features: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Σ weight · feature over the features that are there, divided by the sum of their weights."""
    used = {name: weight for name, weight in weights.items() if name in features}
    total = sum(used.values())
    parts = [np.float32(weight / total) * features[name] for name, weight in used.items()]
    return np.asarray(np.sum(parts, axis=0, dtype=np.float32))


def reciprocal_ranks(features: Mapping[str, np.ndarray], k: float = 10.0) -> np.ndarray:
    """Σ over the features of 1/(k + rank), ranks from 1: [n] for features of [n] each. Of equal values the
    first in order of ids ranks first; what a feature gives nothing (0) has no rank by it.
    """
    total = np.zeros(len(next(iter(features.values()))), np.float32)
    for values in features.values():
        order = np.argsort(-values, kind="stable")
        order = order[values[order] > 0]
        total[order] += 1 / (k + np.arange(1, len(order) + 1, dtype=np.float32))
    return total


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the highest scores, the best first; of equal ones, the first in order of ids."""
    count = min(count, len(scores))
    if count <= 0:
        return np.zeros(0, np.int64)
    if count < len(scores):
        edge = np.partition(scores, len(scores) - count)[len(scores) - count]
        places = np.flatnonzero(scores >= edge)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:count]
