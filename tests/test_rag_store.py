"""What every store does, the same for SQLite and PostgreSQL: content and searching."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.features.terms import hash_of
from llmc.runtime.rag.store import Record, Store
from llmc.runtime.rag.store.base import BEGINNING
from llmc.runtime.rag.store.records import feature_row, mention_hashes, mention_keys, mention_starts
from llmc.runtime.rag.types import Mention, Triple

from .rag_records import DIMENSIONS, SETTINGS, check_whole, record, triples_of

if TYPE_CHECKING:
    from .rag_stores import Places

pytest_plugins = ("tests.rag_stores",)


def equal(one: Any, other: Any) -> bool:
    """Whether two dataclasses are the same, arrays with their dtype."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            equal(vars(one)[name], vars(other)[name]) for name in vars(one)
        )
    return one == other


# Content ---------------------------------------------------------------------------------------------------


def test_every_field_comes_back(store: Store) -> None:
    records = [record(number) for number in range(12)]
    store.put(records)
    assert [one.document for one in records] == list(store.documents())
    for one in records:
        chunks = list(store.chunks(document=one.document.id))
        assert len(chunks) == len(one.chunks)
        assert all(equal(found, given) for found, given in zip(chunks, one.chunks, strict=True))
    assert store.settings() == SETTINGS
    assert store.document("folder/0003.txt") == records[3].document
    assert store.document("nobody") is None and list(store.chunks(document="nobody")) == []
    counts = store.counts()
    chunks = [chunk for one in records for chunk in one.chunks]
    assert counts["documents"] == 12 and counts["chunks"] == len(chunks)
    assert counts["mentions"] == 2 * len(chunks) and counts["triples"] == counts["quarantined"] == 0
    assert counts["vectors"] == sum(chunk.vector is not None for chunk in chunks)


def test_order_is_by_id(store: Store) -> None:
    numbers = list(range(700))  # more than one batch
    random.Random(1).shuffle(numbers)
    store.put(record(number, chunks=1) for number in numbers)
    documents = [one.id for one in store.documents()]
    assert documents == sorted(documents) and len(documents) == 700
    assert [one.id for one in store.documents(after=documents[9], limit=3)] == documents[10:13]
    assert [one.id for one in store.documents(after=documents[-2])] == documents[-1:]
    assert list(store.documents(limit=0)) == []
    chunks = [chunk.id for chunk in store.chunks()]
    assert chunks == sorted(chunks) and len(chunks) == 700
    ids, matrix = store.vectors()
    with_vector = {chunk.id: chunk.vector for chunk in store.chunks() if chunk.vector is not None}
    assert ids == sorted(with_vector) and matrix.dtype == np.float16
    assert all((matrix[place] == with_vector[id]).all() for place, id in enumerate(ids))
    asked = [chunks[650], "unknown", chunks[2], chunks[650], "\0", "\ud800"]
    assert [chunk.id for chunk in store.chunks(asked)] == [chunks[650], chunks[2], chunks[650]]
    assert len(list(store.chunks(chunks[::-1]))) == 700 and list(store.chunks([])) == []


def test_put_replaces_and_delete_takes_all(store: Store, places: Places) -> None:
    store.put(record(number, 1) for number in range(20))
    store.put([record(4, 2, chunks=1), record(5, 3, chunks=6), record(5, 2, chunks=2)])
    assert [chunk.id for chunk in store.chunks(document="folder/0004.txt")] == [
        chunk.id for chunk in record(4, 2, chunks=1).chunks
    ]
    assert len(list(store.chunks(document="folder/0005.txt"))) == 2  # the last of the same id
    assert store.delete([f"folder/{number:04d}.txt" for number in range(5, 30)] + ["\0", "\ud800"]) == 15
    assert store.delete(["folder/0005.txt"]) == 0
    assert check_whole(store) == 5
    assert all(word != "version3" for word, _ in store.keyword("version3", 5))
    store.delete([document.id for document in store.documents()])
    assert set(store.counts().values()) == {0}
    assert store.keyword("river", 5) == [] and store.nearest(np.ones(DIMENSIONS, np.float32), 3) == []
    fresh = places.make()
    assert list(store.dump()) == list(fresh.dump())
    fresh.close()


def test_documents_of_a_path(store: Store) -> None:
    rows = [
        dataclasses.replace(record(number).document, id=f"rows.jsonl#{number}", path="rows.jsonl")
        for number in (2, 1)
    ]
    store.put(Record(document, ()) for document in rows)
    assert store.documents_of_path("rows.jsonl") == rows[::-1] and store.documents_of_path("rows") == []


def test_touch_renews_size_and_time_alone(store: Store) -> None:
    store.put([record(1)])
    before, dump = store.generation, list(store.dump())
    document = record(1).document
    store.touch([dataclasses.replace(document, size=7, modified_ns=8, title="other", digest="other")])
    assert store.document(document.id) == dataclasses.replace(document, size=7, modified_ns=8)
    assert list(store.dump()) == dump and store.generation == before


def test_generation_grows_with_what_changes(store: Store) -> None:
    seen = [store.generation]
    chunk = record(1).chunks[0]
    store.put([record(1)])
    seen.append(store.generation)
    store.put_triples(chunk.id, triples_of(chunk))
    seen.append(store.generation)
    store.set_vectors({chunk.id: np.eye(DIMENSIONS, dtype=np.float16)[0]})
    seen.append(store.generation)
    store.drop_vectors()
    seen.append(store.generation)
    store.set_settings(dataclasses.replace(SETTINGS, dimensions=8))
    seen.append(store.generation)
    store.delete([record(1).document.id])
    seen.append(store.generation)
    assert seen == sorted(set(seen))
    store.delete(["nobody"])
    store.put([])
    store.vacuum()
    assert store.generation == seen[-1]


def test_vectors_are_replaced_and_dropped(store: Store) -> None:
    store.put(record(number) for number in range(6))
    ids = [chunk.id for chunk in store.chunks()]
    new = np.random.default_rng(0).normal(size=(len(ids), DIMENSIONS)).astype(np.float16)
    store.set_vectors({**dict(zip(ids, new, strict=True)), "gone meanwhile": new[0]})
    found, matrix = store.vectors()
    assert found == ids and (matrix == new).all()
    with pytest.raises(InputError, match="drop the vectors first"):
        store.set_settings(dataclasses.replace(SETTINGS, dimensions=8))
    with pytest.raises(InputError, match=r"of shape \[8\]"):
        store.set_vectors({ids[0]: new[0][:8]})
    store.drop_vectors()
    store.set_settings(dataclasses.replace(SETTINGS, dimensions=8))
    assert store.vectors()[0] == [] and store.vectors()[1].shape == (0, 8)
    assert store.counts()["vectors"] == 0 and next(store.chunks()).vector is None


def test_triples_and_quarantine(store: Store) -> None:
    store.put(record(number, chunks=2) for number in range(3))
    first, second = (chunk for chunk in record(1, chunks=2).chunks)
    store.put_triples(first.id, [*triples_of(first), *triples_of(first)])
    store.put_triples(first.id, triples_of(first, "file:extra"))
    store.put_triples(second.id, [], quarantine="no JSON")
    expected = [*sorted(triples_of(first, "file:extra"), key=str), *sorted(triples_of(first), key=str)]
    assert list(store.triples()) == expected
    assert store.extracted() == {first.id, second.id} and store.quarantined() == {second.id: "no JSON"}
    assert store.counts()["triples"] == 4 and store.counts()["quarantined"] == 1
    long = Triple(first.id, "a" * 20_000, "b", "ü" * 20_000, "llm:1")
    store.put_triples(first.id, [long])
    assert list(store.triples()) == [*expected[:2], long]
    store.put_triples(second.id, [])
    assert store.quarantined() == {} and store.extracted() == {first.id, second.id}
    # A new version of the document leaves its first chunk as it was: what was extracted of it stays.
    store.put([record(1, 2, chunks=2)])
    assert [one.origin for one in store.triples()] == ["file:extra", "file:extra", "llm:1"]
    assert store.extracted() == {first.id}
    with pytest.raises(InputError, match="has no chunk"):
        store.put_triples(second.id, [])
    with pytest.raises(InputError, match="one is of chunk"):
        store.put_triples(first.id, [dataclasses.replace(long, chunk="other")])
    store.delete([record(1).document.id])
    assert list(store.triples()) == [] and store.extracted() == set()


def test_what_was_extracted_says_by_what(store: Store) -> None:
    store.put([record(1, chunks=3)])
    first, second, third = record(1, chunks=3).chunks
    store.put_triples(first.id, triples_of(first, "file:extra"))
    store.put_triples(second.id, [], origin="llm:a", quarantine="no JSON")
    store.put_triples(second.id, triples_of(second, "file:extra"))
    store.put_triples(third.id, triples_of(third, "llm:a"))
    assert store.extracted() == {first.id, second.id, third.id}
    assert store.extracted("file:") == {first.id, second.id}
    assert store.extracted("llm:") == {second.id, third.id} and store.extracted("llm:b") == set()
    assert store.quarantined() == {second.id: "no JSON"}, "a file's triples are no success of a model's"
    assert list(store.extractions()) == sorted(
        [
            (first.id, "file:extra", None),
            (second.id, "file:extra", None),
            (second.id, "llm:a", "no JSON"),
            (third.id, "llm:a", None),
        ]
    )
    store.put_triples(second.id, triples_of(second, "llm:b"))
    assert store.quarantined() == {} and store.extracted("llm:b") == {second.id}
    assert store.counts()["extracted"] == 3 and store.counts()["quarantined"] == 0
    store.put_triples(third.id, [], origin="llm:a")
    assert not [one for one in store.triples() if one.chunk == third.id], "an empty answer replaces too"


def test_columns_are_the_chunks(store: Store) -> None:
    store.put(record(number) for number in range(30))
    store.put([Record(record(40).document, ())])
    chunks = list(store.chunks())
    found = [row for part in store.columns() for row in zip(*vars(part).values(), strict=True)]
    assert found == [
        (c.id, c.document, c.ordinal, c.title, c.text[:BEGINNING], *feature_row(c.features)) for c in chunks
    ]
    assert store.chunk_ids() == [chunk.id for chunk in chunks]
    for row, chunk in zip(found, chunks, strict=True):
        keys = [one.key for one in chunk.features.mentions]
        assert mention_keys(row[-1]) == keys
        assert mention_starts(row[-1]) == [one.start for one in chunk.features.mentions]
        assert mention_hashes(row[-1]) == np.array([hash_of(key) for key in keys], np.uint64).tobytes()


def test_a_mention_is_what_stands_at_its_place(store: Store) -> None:
    made = record(1, chunks=1)
    (chunk,) = made.chunks
    for mentions in ((), (Mention("é ü", chunk.text[3:9], 3, 9),) * 3, (Mention("x", "", 0, 0),)):
        features = dataclasses.replace(chunk.features, mentions=mentions)
        store.put([Record(made.document, (dataclasses.replace(chunk, features=features),))])
        assert next(store.chunks()).features.mentions == mentions
    for bad in (Mention("x", "elsewhere", 0, 9), Mention("a\0b", chunk.text[:2], 0, 2)):
        features = dataclasses.replace(chunk.features, mentions=(bad,))
        with pytest.raises(InputError, match=r"stands at its place|NUL"):
            store.put([Record(made.document, (dataclasses.replace(chunk, features=features),))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "a\0b"}, "NUL"),
        ({"text": "a\ud800b"}, "surrogate"),
        ({"vector": np.ones(3, np.float16)}, "of shape"),
        ({"vector": np.full(DIMENSIONS, np.inf, np.float16)}, "infinite"),
        ({"ordinal": 1}, "ordinal"),
        ({"document": "other"}, "document"),
        ({"id": ""}, "id"),
    ],
)
def test_what_cannot_be_kept_is_refused_whole(store: Store, change: dict[str, Any], message: str) -> None:
    bad = record(2, chunks=1)
    bad = Record(bad.document, (dataclasses.replace(bad.chunks[0], **change),))
    with pytest.raises(InputError, match=message) as caught:
        store.put([record(1), bad])
    assert "folder/0002.txt" in str(caught.value)
    assert store.counts()["documents"] == 0
    store.put([record(1)])
    assert check_whole(store) == 1


def test_documents_that_cannot_be_kept_are_refused(store: Store) -> None:
    good = record(1).document
    bad: list[dict[str, Any]] = [
        {"id": "x" * 3000},
        {"path": ""},
        {"title": "\0"},
        {"size": 2**63},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": object()}},
    ]
    for change in bad:
        with pytest.raises(InputError, match="document"):
            store.put([Record(dataclasses.replace(good, **change), ())])
    nested: list[Any] = []
    for level in range(5000):
        nested = [nested]
        if level == 500:  # which every Python writes, and not every one reads
            with pytest.raises(InputError, match="not JSON: they have more than 400 levels"):
                store.put([Record(dataclasses.replace(good, metadata={"a": nested}), ())])
    with pytest.raises(InputError, match="not JSON"):
        store.put([Record(dataclasses.replace(good, metadata={"a": nested}), ())])
    assert store.counts()["documents"] == 0


def test_one_chunk_of_two_documents_is_refused(store: Store) -> None:
    store.put([record(1)])
    other = record(2, chunks=1)
    stolen = dataclasses.replace(other.chunks[0], id=record(1).chunks[0].id)
    with pytest.raises(InputError, match="id of its own"):
        store.put([Record(other.document, (stolen,))])
    assert list(store.documents()) == [record(1).document]


def test_an_error_of_the_caller_undoes_the_write(store: Store) -> None:
    def records() -> Iterator[Record]:
        yield record(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.put(records())
    assert store.counts()["documents"] == 0
    store.put([record(2)])
    assert check_whole(store) == 1


# Searching -------------------------------------------------------------------------------------------------


def _texts(store: Store, texts: list[tuple[str, str]]) -> dict[str, str]:
    """Put documents of (title, text); → chunk id to title."""
    names: dict[str, str] = {}
    for number, (title, text) in enumerate(texts):
        made = record(number, chunks=1)
        features = dataclasses.replace(made.chunks[0].features, mentions=())
        chunk = dataclasses.replace(made.chunks[0], title=title, text=text, features=features)
        store.put([Record(made.document, (chunk,))])
        names[chunk.id] = title
    return names


def test_keyword_finds_words_and_phrases(store: Store) -> None:
    names = _texts(
        store,
        [
            ("Harbours", "The old lighthouse of the state of the art guides ships."),
            ("Ships", "A state without art, and the lighthouse keeper."),
            ("Lighthouse", "Nothing else is said here, and it is said at some length."),
            ("Umlaute", "Die Größe der Café-Häuser in Zürich; C3PO, 42 и ёлка"),
        ],
    )

    def found(query: str) -> list[str]:
        return [names[id] for id, _ in store.keyword(query, 10)]

    assert found("lighthouses")[0] == "Lighthouse", "stemmed, and the title weighs more"
    assert set(found("lighthouse")) == {"Harbours", "Ships", "Lighthouse"}
    assert found('"state of the art"') == ["Harbours"], "common words count in a phrase"
    assert found('"state of the art" keeper') == ["Harbours"], "a phrase must be there"
    assert (
        found('"old lighthouse" "guides ships"') == ["Harbours"] and found('"old lighthouse" "art and"') == []
    )
    assert found("zurich") == found("ZÜRICH") == found("zu\u0308rich") == found("cafe") == ["Umlaute"]
    assert found("c3po") == found("42") == found("ёлка") == ["Umlaute"]
    assert found("nowhere") == [] and found("the keeper")[0] == "Ships"
    assert len(store.keyword("lighthouse", 2)) == 2 and store.keyword("lighthouse", 0) == []
    scores = [score for _, score in store.keyword("lighthouse state", 10)]
    assert scores == sorted(scores, reverse=True) and scores[-1] > 0


HOSTILE = [
    "",
    " ",
    '"',
    '""',
    '"""',
    '" "',
    "'",
    "river\0stone",
    "\0",
    "\ud800 river",
    "river AND",
    "NOT",
    "OR OR",
    "NEAR(river stone, 2)",
    "title:river",
    "{title text}: river",
    "- river",
    "^river",
    "river*",
    "river + stone",
    "(river",
    "river)",
    "river | stone & ! <-> :*",
    "'; DROP TABLE chunks; --",
    "%s %(name)s ?",
    "🦀 river 🏳️‍🌈",
    "👩‍👩‍👧",
    "\U0001e900\U0001e922",
    "á̀̂ ́",
    "x" * 100_000,
    "river " * 20_000,
    '"' * 100_000,
    '"river" ' * 20_000,
    " ".join(f"w{number}" for number in range(20_000)),
    "\\ \\' \x01\x02\x7f\x80",
    "日本語 한국어 ไทย हिन्दी العربية",
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_no_query_is_an_operator(places: Places, query: str, searched: dict[str, Store]) -> None:
    kind = type(places.__dict__["_url"]).__name__
    if kind not in searched:
        searched[kind] = places.make()
        searched[kind].put(record(number, chunks=1) for number in range(30))
    found = searched[kind].keyword(query, 5)
    assert len(found) <= 5 and all(np.isfinite(score) for _, score in found)
    assert bool(found) == ("river" in query.lower() or "stone" in query), query[:50]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    stores: dict[str, Store] = {}
    yield stores
    for one in stores.values():
        one.close()


def test_equal_scores_go_by_id(store: Store) -> None:
    names = _texts(store, [("Same", "the same river text")] * 150)
    assert [id for id, _ in store.keyword("river", 9)] == sorted(names)[:9]
    vector = np.eye(DIMENSIONS, dtype=np.float16)[3]
    store.set_vectors({id: vector if number % 2 else -vector for number, id in enumerate(sorted(names))})
    assert [id for id, _ in store.nearest(vector.astype(np.float32), 9)] == sorted(names)[1:19:2]


def test_nearest_is_exact(store: Store) -> None:
    store.put(record(number) for number in range(400))
    ids, matrix = store.vectors()
    rng = np.random.default_rng(3)
    for _ in range(5):
        vector = rng.normal(size=DIMENSIONS)
        vector = (vector / np.linalg.norm(vector)).astype(np.float32)
        scores = matrix.astype(np.float64) @ vector
        found = store.nearest(vector, 20)
        assert np.allclose([score for _, score in found], np.sort(scores)[::-1][:20], atol=1e-6)
        assert all(abs(scores[ids.index(id)] - score) < 1e-6 for id, score in found)
    assert len(store.nearest(vector, 10_000)) == len(ids) and store.nearest(vector, 0) == []
    with pytest.raises(InputError, match="of shape"):
        store.nearest(vector[:5], 3)
    store.delete(record(number).document.id for number in range(0, 400, 2))
    assert {id for id, _ in store.nearest(vector, 10_000)} == set(store.vectors()[0]) != set(ids)
