"""From a question to passages: `Retriever(store, embedder).search(question)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ....ir.errors import InputError
from ..newest import Newest
from ..snapshot import Snapshot
from ..store.base import Store
from ..types import Chunk, Passage
from .bm25 import bm25
from .choose import choose
from .dense import cosines
from .fusion import GRAPH, HYBRID, best, reciprocal_ranks, scaled, weighted
from .hops import chain_scores, hop_scores, pool_of
from .pagerank import personalised_pagerank
from .question import Question, check_question, parse

Mode = Literal["auto", "graph", "hybrid", "rrf", "keyword", "dense"]
MODES: tuple[Mode, ...] = ("auto", "graph", "hybrid", "rrf", "keyword", "dense")

POOL = 300
"""Candidates of each of the two first orders, hybrid and PageRank."""
CHOSEN_FROM = 50
"""Best candidates among which those that answer together are chosen; more where more are asked for."""
RERANKED = 50
ALONE = {"hybrid": 0.5, "pagerank": 0.5, "named": 0.3}
"""How good a passage is by itself, before the second hop."""
SEED_PASSAGES = 5
SEED_ENTITIES = 0.7
"""Share of the walk's seeds that the question's entities get, where it names any; the best passages get the
rest."""


class QueryEmbedder(Protocol):
    @property
    def hash(self) -> str:
        """Tells its vectors from those of others."""
        ...

    def embed_query(self, text: str) -> np.ndarray: ...


class PassageReranker(Protocol):
    @property
    def share(self) -> float: ...

    def scores(self, question: str, passages: list[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Ranking:
    """The candidates of a question: chunks [p] (places in the snapshot), their fused scores [p], the
    features [p] that they were made of, and what each covers of the question's words [p, q]."""

    question: Question
    chunks: np.ndarray
    scores: np.ndarray
    features: Mapping[str, np.ndarray]
    coverage: np.ndarray


class Retriever:
    """Searches the newest state of a store. Safe to use from several threads."""

    def __init__(
        self,
        store: Store,
        embedder: QueryEmbedder | None = None,
        reranker: PassageReranker | None = None,
        patience: float | None = None,
    ) -> None:
        """`patience`: seconds that a search waits for what is derived of a write; then it searches the state
        before. None: as long as it takes."""
        self.store, self.embedder, self.reranker = store, embedder, reranker
        self.patience = patience
        self.newest = Newest(store)

    def snapshot(self) -> Snapshot:
        """Of the store's newest state, or of the one before where that is not at hand."""
        return self.newest.get(self.patience)

    def close(self) -> None:
        """Ends what is derived in the background."""
        self.newest.close()

    def search(
        self, question: str, *, top: int = 5, mode: str = "auto", explain: bool = False, per_document: int = 1
    ) -> list[Passage]:
        """The passages for a question, the best first.

        `per_document` bounds the passages of one document as long as others are left; 0: no bound. With
        `explain` each passage carries the parts of its score.
        """
        question = check_question(question)
        if mode not in MODES:
            raise InputError(f"{mode!r} is no mode of search", remedy=f"choose one of {', '.join(MODES)}")
        if top < 1:
            raise InputError(f"{top} passages were asked for", remedy="ask for one or more")
        snapshot, newest = self.newest.latest(self.patience)
        if not len(snapshot):
            return []
        # Some of what an older snapshot finds may have been deleted since.
        wanted = top if newest else 2 * top
        ranking = self.rank(snapshot, question, "graph" if mode == "auto" else mode, wanted)
        chosen = self._chosen(snapshot, ranking, wanted, per_document, together=mode in ("auto", "graph"))
        return self._passages(snapshot, ranking, chosen, explain)[:top]

    def rank(self, snapshot: Snapshot, text: str, mode: str, top: int = 5) -> Ranking:
        """All candidates with their scores: what `search` chooses from."""
        question = parse(text, snapshot)
        vector = None
        if self.embedder is not None and snapshot.has_vectors and mode != "keyword":
            if snapshot.facts["embedder"] != self.embedder.hash:
                raise InputError(
                    f"{self.store.location} was embedded again, with another embedder, while it was searched",
                    remedy="open it again",
                )
            vector = np.asarray(self.embedder.embed_query(text), np.float32)
        if mode == "dense" and vector is None:
            raise InputError(
                "this store has no vectors, and searching by meaning needs them",
                remedy="search with --mode keyword or graph, or make vectors with `llmc rag embed`",
            )
        return rank(snapshot, question, vector, mode, top)

    def _chosen(
        self, snapshot: Snapshot, ranking: Ranking, top: int, per_document: int, together: bool
    ) -> list[int]:
        order = best(ranking.scores, max(CHOSEN_FROM, 4 * top))
        documents = snapshot.document_of[ranking.chunks]
        scores = ranking.scores
        if self.reranker is not None:
            order, scores = self._reranked(snapshot, ranking, order[: max(RERANKED, top)])
            together = False
        return choose(
            order,
            scores,
            ranking.coverage,
            ranking.question.idf,
            documents,
            top,
            per_document,
            **({} if together else {"redundancy": 0.0}),
        )

    def _reranked(
        self, snapshot: Snapshot, ranking: Ranking, order: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.reranker is not None
        ids = [snapshot.ids[int(ranking.chunks[place])] for place in order]
        with self.store.reading() as reader:
            texts = {chunk.id: f"{chunk.title}\n{chunk.text}".strip() for chunk in reader.chunks(ids)}
        found = np.asarray(self.reranker.scores(ranking.question.text, [texts.get(one, "") for one in ids]))
        scores = np.zeros(len(ranking.scores), np.float32)
        share = self.reranker.share
        before = scaled(ranking.scores[order])
        scores[order] = share * scaled(found.astype(np.float32)) + (1 - share) * before
        return order[np.argsort(-scores[order], kind="stable")], scores

    def _passages(
        self, snapshot: Snapshot, ranking: Ranking, chosen: list[int], explain: bool
    ) -> list[Passage]:
        places = {snapshot.ids[int(ranking.chunks[place])]: place for place in chosen}
        with self.store.reading() as reader:
            return [
                _passage(chunk, ranking, places[chunk.id], explain) for chunk in reader.chunks(list(places))
            ]


def _passage(chunk: Chunk, ranking: Ranking, place: int, explain: bool) -> Passage:
    return Passage(
        chunk.id,
        chunk.document,
        chunk.title,
        chunk.heading,
        chunk.text,
        chunk.start,
        chunk.end,
        chunk.page,
        float(ranking.scores[place]),
        {name: float(values[place]) for name, values in ranking.features.items()} if explain else {},
    )


def rank(
    snapshot: Snapshot, question: Question, vector: np.ndarray | None, mode: str, top: int = 5
) -> Ranking:
    """Candidates and scores of a question whose vector is known."""
    words = bm25(snapshot, question.terms)
    first: dict[str, np.ndarray] = {"bm25": scaled(words)}
    if vector is not None:
        first["dense"] = scaled(cosines(snapshot, vector))
    if mode == "keyword":
        first = {"bm25": words}
    elif mode == "dense":
        first = {"dense": first["dense"]}
    if mode == "rrf":
        base = reciprocal_ranks(first)
    else:
        base = first["bm25"] if mode == "keyword" else weighted(first, HYBRID)
    size = max(POOL, 4 * top)
    if mode != "graph":
        chunks = best(base, size)
        return _ranking(
            snapshot, question, chunks, base[chunks], {name: v[chunks] for name, v in first.items()}
        )
    named = np.zeros(len(snapshot.documents), np.float32)
    named[question.named] = question.certainty
    first["named"] = named[snapshot.document_of]
    first["pagerank"] = scaled(np.sqrt(walk_scores(snapshot, question, base)))
    chunks = np.union1d(best(base, size), best(first["pagerank"], size))
    features = {name: values[chunks] for name, values in first.items()}
    pool = pool_of(snapshot, question, chunks)
    alone = sum(weight * ({"hybrid": base[chunks]} | features)[name] for name, weight in ALONE.items())
    second, hop = hop_scores(snapshot, question, pool, np.asarray(alone))
    features |= second
    features["chain"] = chain_scores(snapshot, question, pool, weighted(features, GRAPH), hop)
    return Ranking(question, chunks, weighted(features, GRAPH), features, pool.coverage)


def _ranking(
    snapshot: Snapshot,
    question: Question,
    chunks: np.ndarray,
    scores: np.ndarray,
    features: dict[str, np.ndarray],
) -> Ranking:
    return Ranking(
        question, chunks, scores, features, np.zeros((len(chunks), len(question.terms)), np.float32)
    )


def walk_scores(snapshot: Snapshot, question: Question, base: np.ndarray) -> np.ndarray:
    """Personalised PageRank [n] of the passages.

    Seeds: 70% on the question's entities, by idf/√(passages that name them), 30% on the five best passages,
    by the square of what sets them above the sixth; all on passages where the question names no known entity.
    """
    count = len(snapshot)
    seeds = np.zeros(snapshot.walk.shape[0], np.float32)
    order = best(base, SEED_PASSAGES + 1)
    sixth = float(base[order[-1]]) if len(order) > SEED_PASSAGES else 0.0
    passages = order[:SEED_PASSAGES]
    weights = np.maximum(base[passages] - sixth, 1e-6) ** 2
    share = SEED_ENTITIES if len(question.entities) else 0.0
    seeds[passages] = (1 - share) * weights / weights.sum()
    if share:
        rare = snapshot.entity_idf[question.entities] / np.sqrt(
            np.maximum(snapshot.entity_frequency[question.entities], 1)
        )
        seeds[count + question.entities] = share * rare / rare.sum()
    return personalised_pagerank(snapshot.walk, seeds)[:count]
