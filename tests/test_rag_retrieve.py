"""Search: BM25, PageRank, fusion, the choice of passages, and all of it together."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.features.terms import term_of
from llmc.runtime.rag.retrieve import Retriever
from llmc.runtime.rag.retrieve.bm25 import bm25, saturation, term_matrix
from llmc.runtime.rag.retrieve.choose import choose
from llmc.runtime.rag.retrieve.dense import cosines
from llmc.runtime.rag.retrieve.fusion import best, reciprocal_ranks, scaled, weighted
from llmc.runtime.rag.retrieve.pagerank import personalised_pagerank
from llmc.runtime.rag.retrieve.question import MAX_QUESTION, parse
from llmc.runtime.rag.snapshot import Snapshot
from llmc.runtime.rag.store import Store
from llmc.runtime.rag.types import Triple

from .conftest import LONG
from .rag_searches import SONGS, WordEmbedder, filled, record, song_store, titles, vector_of


@pytest.fixture
def songs(tmp_path: Path) -> Store:
    return song_store(tmp_path)


# BM25 and cosines ------------------------------------------------------------------------------------------


def made_up_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [f"w{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(60)]
    return [" ".join(rng.choices(words[: rng.randint(5, 60)], k=rng.randint(1, 60))) for _ in range(count)]


def test_bm25_is_its_formula(tmp_path: Path) -> None:
    texts = made_up_texts(120, 1)
    records = [record(f"{i:03d}", text.split()[0], [text]) for i, text in enumerate(texts)]
    snapshot = Snapshot.of(filled(tmp_path / "b.kb", records))
    places = [int(snapshot.documents[int(d)]) for d in snapshot.document_of]
    query = ["waa", "wab", "wbc", "wef", "nowhere"]
    counts = [{w: text.split().count(w) + 2 * (text.split()[0] == w) for w in query} for text in texts]
    lengths = [len(text.split()) + 2 for text in texts]
    average = sum(lengths) / len(lengths)
    expected = np.zeros(len(texts))
    for word in query:
        holders = sum(1 for one in counts if one[word])
        idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        for i, one in enumerate(counts):
            expected[i] += idf * one[word] * 1.9 / (one[word] + 0.9 * (0.6 + 0.4 * lengths[i] / average))
    terms = snapshot.term_ids([term_of(word) for word in query])
    assert len(terms) == 4
    assert np.allclose(bm25(snapshot, terms), expected[places], rtol=1e-5)
    matrix = term_matrix(snapshot, np.arange(len(snapshot)), terms)
    assert np.allclose(matrix @ snapshot.term_idf[terms], expected[places], rtol=1e-5)


def test_bm25_agrees_with_sqlite(tmp_path: Path) -> None:
    """FTS5 has k1 1.2, b 0.75, and an idf without the 1 + in it. Titles are empty: it weighs only what it
    counts."""
    texts = made_up_texts(150, 2)
    snapshot = Snapshot.of(
        filled(tmp_path / "s.kb", [record(f"{i:03d}", "", [t]) for i, t in enumerate(texts)])
    )
    places = [int(snapshot.documents[int(d)]) for d in snapshot.document_of]
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE t USING fts5(text)")
    database.executemany("INSERT INTO t(rowid, text) VALUES (?, ?)", list(enumerate(texts)))
    for word in ("waa", "wbb", "wdc"):
        (term,) = snapshot.term_ids([term_of(word)])
        start, end = snapshot.arrays["posting_bounds"][term : term + 2]
        chunks = snapshot.arrays["posting_chunks"][start:end]
        counts = snapshot.arrays["posting_texts"][start:end].astype(np.float64)
        holders = len(chunks)
        idf = max(math.log((len(texts) - holders + 0.5) / (holders + 0.5)), 1e-6)
        ours = dict(
            zip(
                (places[c] for c in chunks),
                idf * saturation(snapshot, counts, chunks, 1.2, 0.75),
                strict=True,
            )
        )
        rows = database.execute("SELECT rowid, -bm25(t) FROM t WHERE t MATCH ?", (word,)).fetchall()
        assert dict(rows).keys() == ours.keys() and holders > 5
        assert all(math.isclose(score, ours[row], rel_tol=1e-4) for row, score in rows)


def test_cosines_of_many_vectors_are_near_the_exact_ones(
    songs: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = vector_of("snowfall in Seattle")
    exact = cosines(Snapshot.of(songs), vector)
    monkeypatch.setattr("llmc.runtime.rag.snapshot._EXACT_ELEMENTS", 0)
    snapshot = Snapshot.of(songs)
    assert snapshot.exact is None
    assert np.abs(cosines(snapshot, vector) - exact).max() < 0.01
    assert np.abs(snapshot.vectors_of(np.arange(len(snapshot))) @ vector - exact).max() < 1e-5


# PageRank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_pagerank_is_igraphs(seed: int) -> None:
    igraph = pytest.importorskip("igraph")
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(seed)
    size = 60
    upper = np.triu(rng.random((size, size)) < 0.05, 1) * rng.random((size, size))
    if seed % 2:
        upper[:, -1] = upper[-1] = 0  # a node without edges
    weights = upper + upper.T
    totals = weights.sum(axis=0)
    matrix = csr_matrix(weights / np.where(totals > 0, totals, 1))
    seeds = rng.random(size) * (rng.random(size) < 0.2)
    seeds[0] = 1.0
    seeds[-1] = 0.5
    seeds /= seeds.sum()
    ours = personalised_pagerank(matrix, seeds, damping=0.7, steps=100, restart=True)
    pairs = np.argwhere(upper > 0)
    graph = igraph.Graph(n=size, edges=pairs.tolist())
    theirs = np.array(
        graph.personalized_pagerank(
            damping=0.7, reset=seeds.tolist(), weights=[upper[i, j] for i, j in pairs], directed=False
        )
    )
    assert ours.sum() == pytest.approx(1)
    assert np.allclose(ours, theirs, atol=1e-8)
    # What a search computes is as near as twelve steps of the power method come.
    few = personalised_pagerank(matrix, seeds, damping=0.7, restart=True)
    assert few.min() >= 0
    assert np.abs(few - theirs).max() < 0.7**12


def test_the_walks_columns_are_shares(songs: Store) -> None:
    walk = Snapshot.of(songs).walk
    totals = np.asarray(walk.sum(axis=0)).ravel()
    assert np.all(np.isclose(totals, 1, atol=1e-5) | (totals == 0)) and (totals > 0).sum() > 10
    assert walk.data.min() > 0


def test_triples_become_edges(songs: Store) -> None:
    snapshot = Snapshot.of(songs)
    (chunk,) = [c.id for c in songs.chunks(document="Boston.txt")]
    songs.put_triples(chunk, [Triple(chunk, "Boston", "is north of", "Quincy Market", "llm:1")])
    related = Snapshot.of(songs)
    assert len(snapshot.arrays["relations"]) == 0 and len(related.arrays["relations"]) == 1
    assert "quincy market" not in list(snapshot.entities) and "quincy market" in list(related.entities)
    one, other = (len(related) + related.arrays["relations"][0]).tolist()
    assert related.walk[one, other] > 0 and related.walk[other, one] > 0
    assert titles(Retriever(songs), "Where is Quincy Market?", top=1) == ["Boston"]


# Fusion and choice -----------------------------------------------------------------------------------------


def test_fusion_by_hand() -> None:
    assert scaled(np.array([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert scaled(np.array([3.0, 3.0])).tolist() == [0.0, 0.0] and scaled(np.zeros(0)).tolist() == []
    features = {"a": np.array([1.0, 0.0], np.float32), "b": np.array([0.5, 1.0], np.float32)}
    assert weighted(features, {"a": 3, "b": 1, "absent": 9}).tolist() == [0.875, 0.25]
    ranked = {"a": np.array([3.0, 2.0, 1.0, 0.0]), "b": np.array([1.0, 0.0, 2.0, 0.0])}
    fused = reciprocal_ranks(ranked, k=10)  # the last has no rank by either
    assert np.allclose(fused, [1 / 11 + 1 / 12, 1 / 12, 1 / 13 + 1 / 11, 0.0])
    assert best(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert best(np.array([1.0, 1.0, 1.0]), 2).tolist() == [0, 1] and best(np.zeros(0), 3).tolist() == []


def chosen(
    scores: list[float], coverage: list[list[float]], documents: list[int], top: int, **options: Any
) -> list[int]:
    values = np.array(scores)
    covered = np.array(coverage, np.float32).reshape(len(scores), len(coverage[0]) if coverage else 0)
    idf = np.ones(covered.shape[1], np.float32)
    per_document = options.pop("per_document", 1)
    return choose(best(values, 50), values, covered, idf, np.array(documents), top, per_document, **options)


def test_a_passage_that_covers_the_same_again_waits() -> None:
    same, other = [1.0, 0.0], [0.0, 1.0]
    assert chosen([1.0, 0.95, 0.9], [same, same, other], [0, 1, 2], 3, redundancy=0.2) == [0, 2, 1]
    assert chosen([1.0, 0.95, 0.9], [same, same, other], [0, 1, 2], 3, redundancy=0.0) == [0, 1, 2]
    assert chosen([1.0, 0.95, 0.5], [same, same, other], [0, 1, 2], 3, redundancy=0.2) == [0, 1, 2]


def test_a_document_comes_once_before_the_others_have() -> None:
    nothing = [[0.0]] * 4
    assert chosen([1.0, 0.9, 0.8, 0.1], nothing, [0, 0, 0, 1], 4) == [0, 3, 1, 2]
    assert chosen([1.0, 0.9, 0.8, 0.1], nothing, [0, 0, 0, 1], 4, per_document=2) == [0, 1, 3, 2]
    assert chosen([1.0, 0.9, 0.8, 0.1], nothing, [0, 0, 0, 1], 2, per_document=0) == [0, 1]
    assert chosen([], [], [], 3) == []


# All together ----------------------------------------------------------------------------------------------

QUESTION = "What is the usual average snowfall in the city where the performers of Brother were formed?"


@pytest.mark.parametrize("embedder", [None, WordEmbedder()])
def test_a_chain_of_three_documents(songs: Store, embedder: WordEmbedder | None) -> None:
    retriever = Retriever(songs, embedder)
    top = 4 if embedder is None else 5  # these vectors know nothing but words
    found = titles(retriever, QUESTION, top=top)
    assert {"Brother (Pearl Jam song)", "Pearl Jam", "Seattle"} <= set(found)
    assert "Pearl Jam" not in titles(retriever, QUESTION, top=4, mode="keyword")
    assert titles(retriever, QUESTION, top=top, mode="auto") == found


FILMS = {
    "The Girl at the Nest": "The Girl at the Nest is a thriller film by Daniel Alder.",
    "Tic Tac": "Tic Tac is a film by Daniel Alder, made in Quimper, where he was born.",
    "Quimper Cornouaille": "Quimper Cornouaille is the main airport near Quimper.",
    "Lannion": "Lannion has the main airport of the north.",
    "Rouen": "Rouen has a main airport by the river.",
    "Ghent": "Ghent is a town with a market.",
}


def test_a_third_hop_goes_on_from_where_the_second_led(tmp_path: Path) -> None:
    store = filled(tmp_path / "films.kb", [record(f"{t}.txt", t, [x]) for t, x in FILMS.items()])
    asked = "What is the main airport in the birth place of the director of The Girl at the Nest?"
    found = Retriever(store).search(asked, top=6, mode="graph", explain=True)
    chain = {one.title: one.scores["chain"] for one in found}
    assert max(chain, key=lambda title: chain[title]) == "Quimper Cornouaille"
    assert chain["Lannion"] == chain["Rouen"] == chain["Ghent"] == 0
    alone = Retriever(store).search("What is a market?", top=6, mode="graph", explain=True)
    assert all(0 <= one.scores["chain"] <= 1 for one in alone)


@pytest.mark.parametrize("mode", ["graph", "hybrid", "keyword", "dense"])
def test_modes_and_explanations(songs: Store, mode: str) -> None:
    retriever = Retriever(songs, WordEmbedder())
    found = retriever.search("Metallica, the heavy metal band", top=3, mode=mode, explain=True)
    assert len(found) == 3 and (found[0].title == "Metallica" or mode == "dense")
    assert (found[0].scores and "bm25" in found[0].scores) or mode == "dense"
    assert retriever.search("Metallica", top=1, mode=mode)[0].scores == {}


def test_questions_typed_without_capitals(songs: Store) -> None:
    snapshot = Snapshot.of(songs)
    for text in ("where was Pearl Jam formed?", "where was pearl jam formed?"):
        named = parse(text, snapshot).named
        assert [snapshot.documents[int(one)] for one in named][:1] == [
            "Pearl Jam.txt"
        ] or "Pearl Jam.txt" in [snapshot.documents[int(one)] for one in named]


def test_a_document_of_many_chunks_does_not_crowd(tmp_path: Path) -> None:
    long = record(
        "long.txt", "Snow", [f"Snow falls on hill number {i}, snow and more snow." for i in range(8)]
    )
    others = [record(f"{i}.txt", f"Hill {i}", [f"Hill {i} has little snow."]) for i in range(6)]
    retriever = Retriever(filled(tmp_path / "long.kb", [long, *others]), WordEmbedder())
    for mode in ("graph", "hybrid", "keyword"):
        documents = [p.document for p in retriever.search("Where does snow fall?", mode=mode)]
        assert len(set(documents)) == 5
        crowded = [p.document for p in retriever.search("Where does snow fall?", mode=mode, per_document=0)]
        assert crowded.count("long.txt") > 1


def test_the_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    records = [record(f"{t}.txt", t, [x]) for t, x in SONGS.items()]
    records += [record(f"twin{i}.txt", "Twin", ["The same words in each."]) for i in range(4)]
    one = Retriever(filled(tmp_path / "one.kb", records), WordEmbedder())
    other = Retriever(filled(tmp_path / "other.kb", records[::-1]), WordEmbedder())
    for question in (QUESTION, "the same words", "Twin", "band"):
        assert one.search(question, top=12) == other.search(question, top=12)


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_stores(tmp_path: Path, count: int) -> None:
    records = [record("one.txt", "", ["Nothing but one passage."])][:count]
    retriever = Retriever(filled(tmp_path / "tiny.kb", records), WordEmbedder())
    for mode in ("graph", "hybrid", "keyword", "dense"):
        assert len(retriever.search("one passage about Ed Wood", mode=mode)) == count
    # A passage without a word in it, and a question without one.
    retriever.store.put([record("blank.txt", "", ["… — !"])])
    assert len(retriever.search("?!", mode="graph")) == count + 1


def test_without_vectors(tmp_path: Path) -> None:
    store = filled(tmp_path / "w.kb", [record("a", "Seattle", ["Rain."], vectors=False)], vectors=False)
    retriever = Retriever(store, WordEmbedder())
    assert [p.title for p in retriever.search("rain in Seattle")] == ["Seattle"]
    with pytest.raises(InputError, match="no vectors"):
        retriever.search("rain", mode="dense")


def test_changes_are_seen(songs: Store) -> None:
    retriever = Retriever(songs)
    assert titles(retriever, "heavy metal", top=1, mode="keyword") == ["Metallica"]
    songs.delete(["Metallica.txt"])
    assert "Metallica" not in titles(retriever, "heavy metal", top=8)


def test_questions_that_are_refused(songs: Store) -> None:
    retriever = Retriever(songs)
    for question in ("", " \n\t "):
        with pytest.raises(InputError, match="empty"):
            retriever.search(question)
    with pytest.raises(InputError, match="characters"):
        retriever.search("x" * (MAX_QUESTION + 1))
    assert retriever.search("Pearl Jam " * (MAX_QUESTION // 10), top=1)[0].title == "Pearl Jam"
    with pytest.raises(InputError, match="no mode"):
        retriever.search("x", mode="psychic")
    with pytest.raises(InputError, match="0 passages"):
        retriever.search("x", top=0)


def test_a_reranker_has_the_last_word(songs: Store) -> None:
    class Shortest:
        share = 1.0

        def scores(self, question: str, passages: list[str]) -> np.ndarray:
            assert question == QUESTION and all("\n" in one for one in passages)
            return np.array([-float(len(one)) for one in passages])

    found = titles(Retriever(songs, None, Shortest()), QUESTION, top=8)
    lengths = [len(title) + len(SONGS[title]) for title in found]
    assert lengths == sorted(lengths) and set(found) == set(SONGS)


def test_a_reranker_that_knows_little_is_mixed_with_the_search(songs: Store) -> None:
    class Flat:
        """Prefers one passage, and has nothing to say of the others."""

        share = 0.5

        def __init__(self, best: str) -> None:
            self.best = best

        def scores(self, question: str, passages: list[str]) -> np.ndarray:
            return np.array([float(one.startswith(self.best)) for one in passages])

    plain = titles(Retriever(songs, None, Flat("nothing")), QUESTION, top=8)
    # Half of the reranker's whole range brings the last one no further than to the first.
    mixed = titles(Retriever(songs, None, Flat(plain[-1])), QUESTION, top=8)
    assert set(mixed[:2]) == {plain[0], plain[-1]}
    assert [one for one in mixed if one != plain[-1]] == plain[:-1]


# Real questions --------------------------------------------------------------------------------------------


def _hotpotqa(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, set[int]]]]:
    rows = [json.loads(line) for line in (folder / "hotpotqa500" / "corpus.jsonl").read_text().splitlines()]
    asked = [
        json.loads(line) for line in (folder / "hotpotqa500" / "questions.jsonl").read_text().splitlines()
    ]
    place = {row["title"]: i for i, row in enumerate(rows)}
    passages = [(row["title"], row["text"]) for row in rows]
    return passages, [(row["question"], {place[title] for title in row["gold_titles"]}) for row in asked]


def _twowiki(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, set[int]]]]:
    asked = json.loads((folder / "twowiki_train" / "wikihop_train_preprocess.json").read_text())
    texts: dict[str, str] = {}
    for row in asked:
        for title, sentences in row["context"]:
            texts.setdefault(title, " ".join(sentences))
    place = {title: i for i, title in enumerate(texts)}
    return list(texts.items()), [(r["question"], {place[t] for t, _ in r["supporting_facts"]}) for r in asked]


def _musique(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, set[int]]]]:
    rows = json.loads((folder / "musique_train" / "musique_train_corpus.json").read_text())
    passages = [(row["title"], row["text"]) for row in rows]
    place = {passage: i for i, passage in enumerate(passages)}
    questions: list[tuple[str, set[int]]] = []
    for row in json.loads((folder / "musique_train" / "musique_train.json").read_text()):
        gold = [p for p in row["paragraphs"] if p["is_supporting"]]
        questions.append((row["question"], {place[p["title"], p["paragraph_text"]] for p in gold}))
    return passages, questions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("read", "titled", "bar"),
    [
        (_hotpotqa, True, 0.955),
        (_twowiki, True, 0.98),
        (_musique, True, 0.77),
        *([(_hotpotqa, False, 0.905), (_twowiki, False, 0.91), (_musique, False, 0.70)] if LONG else []),
    ],
)
def test_recall_without_a_model(
    tmp_path: Path, shared_data: Path, read: Callable[..., Any], titled: bool, bar: float
) -> None:
    """Recall@5 by words and names alone, a little under what it is (benchmarks/rag.py has vectors too)."""
    passages, questions = read(shared_data)
    records = [
        record(f"{i:06d}", title if titled else "", [text], vectors=False)
        for i, (title, text) in enumerate(passages)
    ]
    retriever = Retriever(filled(tmp_path / "real.kb", records, vectors=False))
    total = 0.0
    for question, gold in questions:
        found = {int(passage.document) for passage in retriever.search(question)}
        total += len(found & gold) / len(gold)
    assert total / len(questions) >= bar
