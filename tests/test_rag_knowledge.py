"""A knowledge base as the server and tools use it: modes of search, the graph, changes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.global_answer import global_summaries
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.neighbours import neighbours
from llmc.runtime.rag.types import Triple

from .rag_documents import FakeEmbedder, faked, write

DOCS = {
    "engine": "Analytical Engine\n\nThe Analytical Engine was designed by Charles Babbage in London.",
    "babbage": "Charles Babbage\n\nCharles Babbage was born in London. He worked with Ada Lovelace.",
    "ada": "Ada Lovelace\n\nAda Lovelace wrote the first program. Her father was Lord Byron.",
    "byron": "Lord Byron\n\nLord Byron was a poet who died at Missolonghi.",
}


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    return faked(monkeypatch)


@pytest.fixture(name="kb")
def _kb(tmp_path: Path, fake: FakeEmbedder) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True) as kb:
        kb.sync(write(tmp_path / "docs", **DOCS))
        yield kb


def test_modes(kb: KnowledgeBase) -> None:
    question = "Where did the father of Ada Lovelace die?"
    for mode in ("auto", "graph"):
        found = kb.search(question, top=2, mode=mode)
        assert {one.document for one in found} == {"ada.txt", "byron.txt"}
    for mode in ("hybrid", "keyword", "dense"):
        assert kb.search("poet Missolonghi", top=1, mode=mode)[0].document == "byron.txt"
    whole = kb.search("What are these documents about?", top=3)
    assert whole == kb.search("What are these documents about?", top=3, mode="global")
    assert len(whole) == 3
    for one in whole:
        chunk = next(kb.store.chunks([one.chunk]))
        assert one.text in chunk.text
    for question, mode in (("", "auto"), ("   ", "global"), ("a", "best"), ("a" * 100_001, "auto")):
        with pytest.raises(InputError):
            kb.search(question, mode=mode)


def test_without_a_graph(tmp_path: Path, fake: FakeEmbedder) -> None:
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True, graph="none") as kb:
        kb.sync(write(tmp_path / "docs", **DOCS))
        found = kb.search("Who designed the engine?", explain=True)
        assert found == kb.search("Who designed the engine?", explain=True, mode="hybrid")
        assert "pagerank" not in found[0].scores


def test_an_empty_store_finds_nothing(tmp_path: Path, fake: FakeEmbedder) -> None:
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True) as kb:
        assert kb.search("Who?") == []
        assert kb.graph_neighbours("", 10) == {"nodes": [], "edges": []}
        assert kb.vacuum() is None


def test_what_was_deleted_is_found_no_more(kb: KnowledgeBase, tmp_path: Path) -> None:
    assert kb.search("poet at Missolonghi")[0].document == "byron.txt"
    assert kb.delete_document("byron.txt")
    assert not kb.delete_document("byron.txt")
    assert not kb.delete_document("docs/")
    assert "byron.txt" not in {one.document for one in kb.search("poet at Missolonghi", top=10)}
    kb.add([tmp_path / "docs" / "byron.txt"])
    assert kb.search("poet at Missolonghi")[0].document == "byron.txt"


def test_the_graph_around_documents_and_names(kb: KnowledgeBase) -> None:
    chunk = next(kb.store.chunks(document="byron.txt")).id
    kb.store.put_triples(chunk, [Triple(chunk, "Lord Byron", "died at", "Missolonghi", "file:x")])
    whole = kb.graph_neighbours("", 20)
    ids = {node["id"] for node in whole["nodes"]}
    assert {"d:ada.txt", "d:byron.txt", "d:babbage.txt", "d:engine.txt", "e:charles babbage"} <= ids
    for focus in ("d:ada.txt", "ada.txt", "Ada Lovelace"):
        near = kb.graph_neighbours(focus, 20)
        assert near["nodes"][0] == {
            "id": "d:ada.txt",
            "kind": "document",
            "label": "Ada Lovelace",
            "document": "ada.txt",
            "weight": 1.0,
        }
        assert {"d:byron.txt", "d:babbage.txt"} <= {node["id"] for node in near["nodes"]}
        assert ("d:ada.txt", "d:byron.txt", "link") in {
            (edge["source"], edge["target"], edge["kind"]) for edge in near["edges"]
        }
    london = kb.graph_neighbours("London", 20)
    assert london["nodes"][0]["id"] == "e:london"
    assert london["nodes"][0]["label"] == "London"
    assert {edge["source"] for edge in london["edges"] if edge["target"] == "e:london"} == {
        "d:engine.txt",
        "d:babbage.txt",
    }
    related = kb.graph_neighbours("e:missolonghi", 20)["edges"]
    assert {"e:lord byron", "e:missolonghi"} in [
        {edge["source"], edge["target"]} for edge in related if edge["kind"] == "relation"
    ]
    assert kb.graph_neighbours("nobody of this name", 20)["nodes"] == []
    for limit in (1, 2, 3):
        for focus in ("", "ada.txt", "e:london"):
            found = kb.graph_neighbours(focus, limit)
            assert 0 < len(found["nodes"]) <= limit
            known = {node["id"] for node in found["nodes"]}
            assert all({edge["source"], edge["target"]} <= known for edge in found["edges"])


def test_a_snapshot_from_before_shows_no_document_that_is_gone(kb: KnowledgeBase) -> None:
    before = kb.retriever.snapshot()
    kb.delete(["byron.txt"])
    with kb.store.reading() as reader:
        shown = neighbours(before, reader, "Ada Lovelace", 20)
    known = {node["id"] for node in shown["nodes"]}
    assert "d:ada.txt" in known and "d:byron.txt" not in known
    assert all({edge["source"], edge["target"]} <= known for edge in shown["edges"])


def test_a_snapshot_from_before_shows_nothing_of_what_was_deleted(kb: KnowledgeBase) -> None:
    chunk = next(kb.store.chunks(document="byron.txt")).id
    kb.store.put_triples(chunk, [Triple(chunk, "Ada Lovelace", "lived in", "London", "file:x")])
    before = kb.retriever.snapshot()

    def shown(focus: str) -> dict[str, Any]:
        with kb.store.reading() as reader:
            return neighbours(before, reader, focus, 40)

    def relations() -> list[set[str]]:
        return [{e["source"], e["target"]} for e in shown("e:london")["edges"] if e["kind"] == "relation"]

    assert shown("d:byron.txt")["nodes"] and shown("Missolonghi")["nodes"]
    assert {"e:ada lovelace", "e:london"} in relations()
    kb.delete(["byron.txt"])
    for focus in ("d:byron.txt", "byron.txt", "Missolonghi", "e:missolonghi"):
        assert shown(focus) == {"nodes": [], "edges": []}, "neither it nor what is next to it"
    assert "e:missolonghi" not in {node["id"] for node in shown("")["nodes"]}
    assert relations() == [], "a deleted passage said that"
    london = next(node for node in shown("London")["nodes"] if node["id"] == "e:london")
    assert london["weight"] == sum("London" in one.text for one in kb.store.chunks())


def test_a_summary_from_before_names_nothing_of_what_was_deleted(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "What are these documents about?"
    for n in range(2):
        kb.add_bytes(f"zed{n}.txt", f"Zed Quill of Missolonghi wrote letter {n} to Lord Byron.".encode())
    before = kb.retriever.snapshot()
    assert "zed quill of missolonghi" in {
        name for one in global_summaries(kb, question) for name in one.entities
    }
    monkeypatch.setattr(kb.retriever, "snapshot", lambda: before)  # as while a large store is derived
    for n in range(2):
        kb.delete([f"zed{n}.txt"])
    found = global_summaries(kb, question)
    assert found and "zed quill of missolonghi" not in {name for one in found for name in one.entities}
    assert not any("Zed" in passage.text for one in found for passage in one.sentences)


def test_a_store_that_is_embedded_again_meanwhile(kb: KnowledgeBase, tmp_path: Path) -> None:
    assert kb.search("poet")
    with KnowledgeBase.open(kb.store.location, embedder="none") as other:
        other.reembed("other")
    with pytest.raises(InputError, match="has those of other-1 by now"):
        kb.search("poet")
    with pytest.raises(InputError, match="by now"):
        kb.sync(tmp_path / "docs")
    assert kb.reembed("auto") == 4
    assert kb.search("poet at Missolonghi", top=1)[0].document == "byron.txt"


def test_a_search_that_began_before_a_store_was_embedded_again(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = kb.retriever
    before = retriever.snapshot()
    with KnowledgeBase.open(kb.store.location, embedder="none") as other:
        other.reembed("other")
    for mode in ("graph", "hybrid", "dense"):
        with pytest.raises(InputError, match=r"embedded again.*while it was searched") as caught:
            retriever.search("poet", mode=mode)
        assert caught.value.remedy == "open it again"
    assert retriever.search("poet", mode="keyword")[0].document == "byron.txt", "needs no vectors"
    monkeypatch.setattr(retriever.newest, "latest", lambda _: (before, False))  # a large store is derived
    assert retriever.search("poet", mode="dense"), "old vectors and the old embedder fit"


def test_a_write_that_fails_leaves_no_lock_behind(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr("llmc.runtime.rag.ingest.chunk_text", fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            kb.add_bytes("new.txt", b"Whales are mammals.")
    with KnowledgeBase.open(kb.store.location, embedder="auto") as other:
        assert other.add_bytes("new.txt", b"Whales are mammals.").added == 1
    assert kb.delete_document("new.txt")
