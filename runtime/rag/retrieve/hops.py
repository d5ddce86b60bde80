"""The second hop: what passages near a good one say about the part of the question that the good one leaves
open; and the third.

A question that joins two documents names the first, or describes it; the second shares no word with it but
what the first one says: "the performer of Brother" → a passage on the song names Pearl Jam → the passage on
Pearl Jam. So each of the best passages p (the anchors) is asked, of every candidate c:

    open(c | p)    what c covers of the question's words that p does not: Σ idf·coverage over the open words,
                   by its maximum
    bridge(c | p)  the best entity e of p that c names: share of e's words, by idf, that c holds, times
                   min(1, idf of e's rarest word / 8, or its most)
    link(c | p)    how surely p names c's document (title links); back(c | p), how surely c names p's
    two(c | p)     BM25 of the open words plus half that of the entities' words: the second of two searches

Words, not whole names, are compared, so that "Strauss" finds "Richard Strauss". Words of the question itself
bridge nothing. Each value is weighted by the anchor's own score, and the best anchor counts. An anchor is
not its own candidate; `partner` says of an anchor how good a candidate it leads to: what answers the rest
speaks for it.

The third hop begins where all of that led to. "the airport of the birth place of the director of The Girl
Who …" → the film → another film of its director, made in Stockholm → Stockholm's airport. Each of the best
candidates q by now is asked the same as an anchor was, but for the question's words that neither it nor the
anchor p that led to q covers:

    chain(c | q)   bridge(c | q)·open(c | p and q), weighted by q's score and by how strongly p leads to q

Searching again with what the first passage adds is the idea of GoldEn (Qi et al. 2019) and of
multi-hop dense retrieval (Xiong et al. 2021), here without a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..snapshot import Snapshot
from ..walk import entity_idf
from .bm25 import spread, term_matrix
from .question import Question

ANCHORS = 15
ANSWERED = 0.15
"""An anchor that leaves less than this share of the question open has little to hand on, in proportion: a
question that one passage answers is not to be led away from it."""
MAX_ENTITIES = 40
"""Of an anchor, the rarest: a table of names is not to cost more than a text."""
FULL = 1.3
"""The saturated count from which on a word counts as covered."""
OPEN_SLOPE = 1.5
"""A word that an anchor covers to two thirds is no longer open."""
ENTITY_WORDS = 0.5
"""Weight of the entities' words in the second of two searches."""
CHAINED = 12
"""Candidates from which a third hop is tried."""
RARE = 8.0
"""The idf (one passage in 3,000) from which on an entity's rarest word makes it a full bridge; among fewer
passages, that of a word which only one has."""


@dataclass(frozen=True)
class Pool:
    """Candidates: their places in the snapshot [p], what they cover of each of the question's words [p, q]
    in 0 … 1, and the same for the words of the anchors' entities."""

    chunks: np.ndarray
    coverage: np.ndarray


def pool_of(snapshot: Snapshot, question: Question, chunks: np.ndarray) -> Pool:
    return Pool(chunks, np.minimum(term_matrix(snapshot, chunks, question.terms) / FULL, 1))


@dataclass(frozen=True)
class Hop:
    """Where the second hop began, [a] places in the pool, and how strongly each anchor leads to each
    candidate, [p, a] in 0 … 1."""

    anchors: np.ndarray
    leads: np.ndarray


def hop_scores(
    snapshot: Snapshot, question: Question, pool: Pool, score: np.ndarray
) -> tuple[dict[str, np.ndarray], Hop]:
    """Features [p] of the candidates, by name; `score` [p] says how good each is by itself."""
    anchors = np.argsort(-score, kind="stable")[:ANCHORS]
    trust = score[anchors] / max(float(score[anchors[0]]), 1e-9)
    left = question.idf[:, None] * np.clip(1 - OPEN_SLOPE * pool.coverage[anchors].T, 0, 1)  # [q, a]
    gained = pool.coverage @ left  # [p, a]
    total = max(float(question.idf.sum()), 1e-9)
    share = np.minimum(left.sum(axis=0) / total, 1)  # of the question, open
    opened = gained / np.maximum(left.sum(axis=0), 1e-9)
    good = trust
    trust = trust * np.minimum(share / ANSWERED, 1)
    bridge, words = _bridges(snapshot, question, pool, pool.chunks[anchors])
    documents = snapshot.document_of[pool.chunks]
    link = np.minimum(snapshot.links[pool.chunks[anchors]][:, documents].toarray().T, 1)
    back = np.minimum(snapshot.links[pool.chunks][:, documents[anchors]].toarray(), 1)
    own = (anchors, np.arange(len(anchors)))
    for values in (bridge, words, link, back, gained):
        values[own] = 0
    two = gained + ENTITY_WORDS * words
    two /= np.maximum(two.max(axis=0), 1e-9)
    joined = np.maximum(np.maximum(bridge, link), back)
    partner = np.zeros(len(score), np.float32)
    partner[anchors] = (joined * opened * score[:, None]).max(axis=0) * np.sqrt(1 - share)
    features = {
        "bridge": (trust * bridge).max(axis=1),
        "bridge_open": (trust * bridge * opened).max(axis=1),
        "link": (trust * link).max(axis=1),
        "link_open": (trust * link * opened).max(axis=1),
        "back_open": (trust * back * opened).max(axis=1),
        "two_step": (trust * two).max(axis=1),
        "partner": partner,
    }
    return features, Hop(anchors, good * joined)


def chain_scores(
    snapshot: Snapshot, question: Question, pool: Pool, score: np.ndarray, hop: Hop
) -> np.ndarray:
    """The third hop's feature [p]; `score` [p] says how good each candidate is after the second."""
    middle = np.argsort(-score, kind="stable")[:CHAINED]
    trust = score[middle] / max(float(score[middle[0]]), 1e-9)
    leads = hop.leads[middle]
    before = hop.anchors[leads.argmax(axis=1)]  # what led to each
    covered = np.maximum(pool.coverage[middle], pool.coverage[before])
    left = question.idf[:, None] * np.clip(1 - OPEN_SLOPE * covered.T, 0, 1)  # [q, m]
    opened = (pool.coverage @ left) / np.maximum(left.sum(axis=0), 1e-9)
    share = np.minimum(left.sum(axis=0) / max(float(question.idf.sum()), 1e-9), 1)
    bridge, _ = _bridges(snapshot, question, pool, pool.chunks[middle])
    for places in (middle, before):
        bridge[places, np.arange(len(middle))] = 0
    weight = trust * leads.max(axis=1) * np.minimum(share / ANSWERED, 1)
    return (weight * bridge * opened).max(axis=1)


def _bridges(
    snapshot: Snapshot, question: Question, pool: Pool, anchors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([p, a] best entity, [p, a] BM25 of the entities' words)."""
    bridge = np.zeros((len(pool.chunks), len(anchors)), np.float32)
    words = np.zeros_like(bridge)
    anchor_of, entity_of, terms = _entity_terms(snapshot, question, anchors)
    if not len(terms):
        return bridge, words
    wanted, at = np.unique(terms, return_inverse=True)
    matrix = term_matrix(snapshot, pool.chunks, wanted)
    idf = snapshot.term_idf[wanted]
    rare = min(RARE, float(entity_idf(len(snapshot), np.ones(1))[0]))
    totals = np.bincount(entity_of, idf[at])
    rarest = np.zeros(len(totals), np.float32)
    np.maximum.at(rarest, entity_of, idf[at])
    shares = np.zeros((len(wanted), len(totals)), np.float32)
    shares[at, entity_of] = idf[at] / totals[entity_of]
    held = ((matrix > 0).astype(np.float32) @ shares) * np.minimum(rarest / rare, 1)
    starts = np.flatnonzero(np.diff(anchor_of, prepend=-1))  # entries are in order of their anchors
    bridge[:, anchor_of[starts]] = np.maximum.reduceat(held, entity_of[starts], axis=1)
    belongs = np.zeros((len(wanted), len(anchors)), np.float32)
    belongs[at, anchor_of] = idf[at]
    return bridge, matrix @ belongs


def _entity_terms(
    snapshot: Snapshot, question: Question, anchors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One entry for each word of each entity of each anchor, in this order, without the question's words:
    the anchor's place, the entity's number among those that have a word, the word's term."""
    bounds, known = snapshot.arrays["entity_term_bounds"], snapshot.arrays["entity_terms"]
    lists = [_rarest(snapshot, snapshot.entities_of(int(anchor))) for anchor in anchors]
    entities = np.concatenate(lists)
    anchor_of = np.repeat(np.arange(len(anchors)), [len(one) for one in lists])
    rows, entries = spread(bounds[entities], bounds[entities + 1])
    terms = known[entries]
    kept = ~np.isin(terms, question.terms)
    rows, terms = rows[kept], terms[kept]
    numbers = np.cumsum(np.diff(rows, prepend=-1) > 0) - 1
    return anchor_of[rows], numbers, terms


def _rarest(snapshot: Snapshot, entities: np.ndarray) -> np.ndarray:
    if len(entities) <= MAX_ENTITIES:
        return entities
    return entities[np.argsort(snapshot.entity_frequency[entities], kind="stable")[:MAX_ENTITIES]]
