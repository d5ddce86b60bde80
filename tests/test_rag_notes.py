"""What a model said about communities: what it is kept under, and that it is forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from llmc.runtime.adapters import LoadedAdapter
from llmc.runtime.custom_sampler import Sampler, SamplerContext
from llmc.runtime.rag import newest, notes
from llmc.runtime.rag.answer import answer
from llmc.runtime.rag.derive_child import Child, ChildError
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.newest import Newest
from llmc.runtime.rag.notes import Notes

from .rag_answers import Scripted
from .rag_searches import SONGS, record, song_store

pytest_plugins = ("tests.rag_stores",)

TEXTS = {
    f"{name}{number}.txt": text.format(number)
    for number in range(4)
    for name, text in (
        ("harbour", "Port Alder has pier {0}, where Nils Brandt keeps the boat Grey Heron number {0}."),
        ("bakery", "Irma Voss bakes rye bread number {0} in the Oven House of Tartu every morning."),
    )
}
QUESTION = "What are the main topics of these documents?"


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(tmp_path / "notes.kb", embedder="none", create=True) as made:
        for name, text in TEXTS.items():
            made.add_bytes(name, text.encode())
        yield made


@dataclass(frozen=True)
class Louder(Sampler):
    by: float = 1.0

    def adjust(self, logits: np.ndarray, context: SamplerContext) -> np.ndarray:
        return self.by * logits


def prompts(kb: KnowledgeBase, **prefers: Any) -> int:
    """How often a model is asked, of which two adapters of one name may be loaded."""
    says = "Port Alder has piers. Irma Voss bakes rye bread."
    llm = Scripted(says)
    llm.inner.artifact = cast(Any, SimpleNamespace(manifest={"model": {"name": "one"}}))
    salt = prefers.pop("salt", None)
    if salt is not None:
        adapter = LoadedAdapter(name="tuned", slot=0, salt=salt)
        llm.inner.engine.engine.adapters._loaded["tuned"] = adapter
        llm.inner.prefer(adapter="tuned")
    llm.inner.prefer(**prefers)
    assert answer(kb, cast(Any, llm), QUESTION).found
    return len(llm.prompts)


def test_another_adapter_or_sampler_makes_notes_of_its_own(kb: KnowledgeBase) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"salt": b"first"},
        {"salt": b"second"},
        {"sampler": Louder()},
        {"sampler": Louder(2.0)},
        {"repetition_penalty": 1.3},
    ]
    assert [prompts(kb, **way) for way in ways] == [3] * len(ways)
    assert [prompts(kb, **way) for way in ways] == [1] * len(ways), "each finds its own"


def test_the_file_is_read_once(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = notes._parsed
    monkeypatch.setattr(notes, "_parsed", lambda path: read.append(path) or real(path))
    assert prompts(kb) == 3 and read == [], "there was none, and what is written is known"
    assert prompts(kb) == 1 and len(read) == 1


def test_what_another_process_wrote_is_seen(tmp_path: Path) -> None:
    mine, other = Notes(str(tmp_path)), Notes(str(tmp_path))
    mine.put("m", [1], ["a"], "of a")
    other.put("m", [2], ["b"], "of b")
    assert (mine.get("m", [1]), mine.get("m", [2]), other.get("m", [1])) == ("of a", "of b", "of a")
    (tmp_path / "notes.json").unlink()
    assert mine.get("m", [1]) is None and other.get("m", [2]) is None
    nowhere = Notes("")
    nowhere.put("m", [1], ["a"], "x")
    assert nowhere.get("m", [1]) is None


def test_what_cannot_be_read_is_removed_with_the_next_document(tmp_path: Path) -> None:
    store = song_store(tmp_path)
    path = Path(store.cache_folder) / "notes.json"
    path.parent.mkdir()
    path.write_text('{"members": {}, "notes": {"k": {"text": "of somebody"')
    notes.forget_notes(store)
    assert not path.exists()
    store.close()


def test_no_more_than_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_MOST", 2)
    kept = Notes(str(tmp_path))
    for number in range(3):
        kept.put("m", [number], [f"chunk {number}"], str(number))
    assert [kept.get("m", [number]) for number in range(3)] == [None, "1", "2"]
    assert len(json.loads((tmp_path / "notes.json").read_text())["members"]) == 2


def test_forgotten_although_deriving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = song_store(tmp_path)
    searched = Newest(store)
    before = searched.get()
    kept = Notes(store.cache_folder)
    kept.put("m", [1], list(before.ids), "of all songs")

    def fails(self: Child, address: str) -> dict[str, str]:
        raise ChildError("out of memory")

    monkeypatch.setattr(newest, "_SMALL", 0)
    monkeypatch.setattr(Child, "derive", fails)
    store.delete([f"{next(iter(SONGS))}.txt"])  # by another program: it does not know of notes
    assert searched.get(patience=0.0) is before
    searched.close()
    assert kept.get("m", [1]) is None
    store.close()


def test_what_another_machine_deletes_is_forgotten_when_this_one_searches(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "here"))
    place = f"{postgres_url}&llmc_store=notes"
    with KnowledgeBase.open(place, embedder="none", create=True) as here:
        here.store.put([record(f"{t}.txt", t, [x], vectors=False) for t, x in SONGS.items()])
        ids = here.store.chunk_ids()
        kept = Notes(here.store.cache_folder)
        kept.put("m", [1], ids, "of all songs")
        kept.put("m", [2], [ids[0]], "of one")
        gone = next(here.store.chunks([ids[1]])).document
        monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "there"))
        with KnowledgeBase.open(place, embedder="none") as there:
            there.delete([gone])
        monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "here"))
        assert kept.get("m", [1]) == "of all songs"
        here.search("rock band", mode="graph")
        assert (kept.get("m", [1]), kept.get("m", [2])) == (None, "of one")
