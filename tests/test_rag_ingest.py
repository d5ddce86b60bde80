"""Documents into a store: only what changed, the bad ones named, nothing left of what is gone."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.folder import UNSURE, checked_name, list_folder, name_fault
from llmc.runtime.rag.ingest import chunk_id
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.readers import ReadLimits

from .rag_documents import FakeEmbedder, counts, dump, faked, fresh, rows, settle, write


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    return faked(monkeypatch)


@pytest.fixture(name="kb")
def _kb(tmp_path: Path, fake: FakeEmbedder) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True) as kb:
        yield kb


# In step with a folder ------------------------------------------------------------------------------------


def test_sync_follows_the_folder(kb: KnowledgeBase, tmp_path: Path, fake: FakeEmbedder) -> None:
    docs = write(
        tmp_path / "docs", a="Ada\n\nAda wrote it.", b="Bob\n\nBob read it.", c="Cid\n\nCid lost it."
    )
    assert counts(kb.sync(docs)) == (3, 0, 0, 0, 0)
    assert [one.id for one in kb.store.documents()] == ["a.txt", "b.txt", "c.txt"]
    made = fake.texts
    generation = kb.store.generation
    assert counts(kb.sync(docs)) == (0, 0, 0, 3, 0)
    assert (fake.texts, kb.store.generation) == (made, generation), "an unchanged folder was written again"
    write(docs, b="Bob\n\nBob burnt it.", d="Dan\n\nDan found it.")
    (docs / "c.txt").unlink()
    assert counts(kb.sync(docs)) == (1, 1, 1, 1, 0)
    assert fake.texts == made + 2
    assert dump(kb) == fresh(docs, tmp_path / "other.kb")


def test_an_unchanged_file_is_not_opened_and_a_touched_one_only_hashed(
    kb: KnowledgeBase, tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.", b="Bob\n\nBob read it.")
    kb.sync(docs)
    generation = kb.store.generation
    os.utime(docs / "b.txt", (2_000, 2_000))
    (docs / "a.txt").chmod(0)
    if os.access(docs / "a.txt", os.R_OK):  # the superuser reads everything
        (docs / "a.txt").chmod(0o644)

    def broken(*_: Any) -> Any:
        raise AssertionError("a file was read again")

    monkeypatch.setattr("llmc.runtime.rag.ingest.read_documents", broken)
    assert counts(kb.sync(docs)) == (0, 0, 0, 2, 0)
    assert kb.store.generation == generation
    stored = kb.store.document("b.txt")
    assert stored is not None and stored.modified_ns == 2_000_000_000_000


def test_a_change_of_the_same_size_within_the_clocks_tick_is_seen(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    path = docs / "a.txt"
    path.write_text("Ada wrote it, or so they say.")
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    kb.sync(docs)
    path.write_text("Bob wrote it, or so they say.")
    os.utime(path, ns=(now, now))
    assert kb.sync(docs).updated == 1
    assert "Bob" in next(kb.store.chunks()).text


def test_rows_of_a_file_are_documents_of_their_own(
    kb: KnowledgeBase, tmp_path: Path, fake: FakeEmbedder
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    path = docs / "rows.jsonl"
    path.write_text(rows("Ada wrote it.", "Bob read it.", "Cid lost it."))
    settle(docs)
    assert counts(kb.sync(docs)) == (3, 0, 0, 0, 0)
    assert [one.id for one in kb.store.documents()] == ["rows.jsonl#r0", "rows.jsonl#r1", "rows.jsonl#r2"]
    assert counts(kb.sync(docs)) == (0, 0, 0, 3, 0)
    made = fake.texts
    path.write_text(rows("Ada wrote it.", "Bob burnt it."))
    settle(docs)
    assert counts(kb.sync(docs)) == (0, 1, 1, 1, 0)
    assert fake.texts == made + 1, "only the row that changed is embedded"
    assert dump(kb) == fresh(docs, tmp_path / "other.kb")
    assert counts(kb.sync(docs)) == (0, 0, 0, 2, 0)
    assert kb.delete(["rows.jsonl#r0"]) == 1
    assert counts(kb.sync(docs)) == (1, 0, 0, 1, 0), "a row that was deleted by hand comes back"
    assert kb.delete(["rows.jsonl"]) == 2


def test_a_broken_document_is_left_out_and_gone_when_it_was_there(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.", b="Bob\n\nBob read it.")
    kb.sync(docs)
    (docs / "b.txt").write_bytes(b"\x7fELF\0\0\0\1" * 100)
    report = kb.sync(docs)
    assert counts(report) == (0, 0, 1, 1, 1)
    assert report.failed[0][0] == "b.txt"
    assert dump(kb) == fresh(docs, tmp_path / "other.kb")
    write(docs, b="Bob\n\nBob is back.")
    assert counts(kb.sync(docs)) == (1, 0, 0, 1, 0)


def test_what_is_out_of_reach_is_not_gone(
    kb: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    write(docs / "sub", b="Bob\n\nBob read it.")
    kb.sync(docs)
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    report = kb.sync(docs)
    assert counts(report) == (0, 0, 0, 1, 1)
    assert report.failed == [("sub", "permission denied")]
    assert kb.store.document("sub/b.txt") is not None


def test_documents_added_by_hand_stay(kb: KnowledgeBase, tmp_path: Path, fake: FakeEmbedder) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    elsewhere = write(tmp_path / "else" / "notes", x="Xen\n\nXen saw it.", y="Yan\n\nYan heard it.")
    kb.sync(docs)
    assert counts(kb.add([elsewhere, elsewhere / "x.txt"])) == (3, 0, 0, 0, 0)
    assert [one.id for one in kb.store.documents()] == ["a.txt", "notes/x.txt", "notes/y.txt", "x.txt"]
    assert counts(kb.sync(docs)) == (0, 0, 0, 1, 0)
    assert counts(kb.add([elsewhere])) == (0, 0, 0, 2, 0)
    # What lies in the folder is named as the folder's.
    write(docs / "sub", new="New\n\nNew it is.")
    kb.add([docs / "sub"])
    assert kb.store.document("sub/new.txt") is not None
    assert kb.delete(["notes/", "x.txt"]) == 3
    assert dump(kb) == fresh(docs, tmp_path / "other.kb")


def test_a_file_takes_the_place_of_a_document_added_by_hand(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    kb.add_bytes("b.txt", b"Bob\n\nBob read it.")
    kb.add_bytes("c.txt", b"Cid\n\nCid lost it.")
    kb.sync(docs)
    assert kb.store.document("c.txt") is not None
    write(docs, b="Bob\n\nBob read it.")
    kb.sync(docs)
    kb.delete(["c.txt"])
    assert dump(kb) == fresh(docs, tmp_path / "other.kb")
    (docs / "b.txt").unlink()
    assert kb.sync(docs).deleted == 1


def test_uploads(kb: KnowledgeBase) -> None:
    assert kb.add_bytes("notes/Größe.txt", "Größe\n\nSie ist groß.".encode()).added == 1
    assert kb.add_bytes("notes/Größe.txt", "Größe\n\nSie ist klein.".encode()).updated == 1
    assert kb.add_bytes("t.jsonl", rows("a b c", "d e f").encode()).added == 2
    assert kb.add_bytes("t.jsonl", rows("a b c").encode()).deleted == 1
    with pytest.raises(InputError, match=r"bad\.pdf"):
        kb.add_bytes("bad.pdf", b"%PDF-1.4 and nothing")
    with pytest.raises(InputError, match="not read"):
        kb.add_bytes("a.exe", b"MZ")
    for name in (
        "../a.txt",
        "/etc/a.txt",
        "a/../b.txt",
        "C:\\a.txt",
        "a\nb.txt",
        "",
        "x" * 252 + ".txt",
        "a//b.txt",
    ):
        with pytest.raises(InputError):
            kb.add_bytes(name, b"Hello there.")
    assert {one.id for one in kb.store.documents()} == {"notes/Größe.txt", "t.jsonl#r0"}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a.txt", False),
        ("sub folder/..a..txt", False),
        ("日本語/文書.md", False),
        ("..", True),
        ("a/./b", True),
        ("/a", True),
        ("a\x1b[2J.txt", True),
        ("a\udce9.txt", True),
        ("ä" * 130, True),
        ("/".join(["a" * 200] * 30), True),
    ],
)
def test_names(name: str, fault: bool) -> None:
    assert bool(name_fault(name)) == fault
    if not fault:
        assert checked_name(name) == name
    assert checked_name("sub\\a.txt") == "sub/a.txt"


def test_chunk_ids_depend_on_each_part() -> None:
    ids = {
        chunk_id("a", 0, "t", "x"),
        chunk_id("b", 0, "t", "x"),
        chunk_id("a", 1, "t", "x"),
        chunk_id("a", 0, "u", "x"),
        chunk_id("a", 0, "t", "y"),
    }
    assert len(ids) == 5
    assert chunk_id("a", 0, "t", "x") == hashlib.blake2b(b"a\0" + b"0\0t\0x", digest_size=16).hexdigest()


# What a folder may hold -----------------------------------------------------------------------------------


def test_links_and_odd_files(kb: KnowledgeBase, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", secret="Secret\n\nKeep it.")
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.", **{"a..b": "Dots\n\nThey are fine."})
    (docs / "out.txt").symlink_to(outside / "secret.txt")
    (docs / "out").symlink_to(outside)
    (docs / "up").symlink_to("..")
    (docs / "loop").symlink_to(".")
    (docs / "itself.txt").symlink_to("itself.txt")
    (docs / "nothing.txt").symlink_to("gone.txt")
    (docs / "alias.txt").symlink_to("a.txt")
    os.mkfifo(docs / "pipe.txt")
    (docs / ".hidden.txt").write_text("hidden")
    (docs / "node_modules").mkdir()
    (docs / "node_modules" / "x.txt").write_text("no")
    (docs / "old.kb").write_text("a store")
    (docs / "picture.png").write_bytes(b"\x89PNG")
    with open(os.fsencode(docs) + b"/\xff.txt", "w") as file:
        file.write("a name of bytes")
    report = kb.sync(docs)
    assert [one.id for one in kb.store.documents()] == ["a..b.txt", "a.txt", "alias.txt"]
    reasons = dict(report.failed)
    assert {name for name, reason in reasons.items() if "out of the folder" in reason} == {
        "out.txt",
        "out",
        "up",
    }
    assert reasons["pipe.txt"] == "is not a regular file"
    assert reasons["\\udcff.txt"] == "is not UTF-8"
    assert set(reasons) == {"out.txt", "out", "up", "itself.txt", "nothing.txt", "pipe.txt", "\\udcff.txt"}
    assert report.unsupported == ["picture.png"]


def test_the_store_in_the_folder_is_no_document(tmp_path: Path, fake: FakeEmbedder) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    with KnowledgeBase.open(docs / "store.txt", create=True) as kb:
        assert counts(kb.sync(docs)) == (1, 0, 0, 0, 0)
        assert counts(kb.sync(docs)) == (0, 0, 0, 1, 0)


def test_folders_in_folders_are_bounded(tmp_path: Path) -> None:
    deep = tmp_path / "docs"
    for _ in range(70):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("deep")
    listing = list_folder(tmp_path / "docs")
    assert not listing.files
    assert "64 deep" in listing.failed[0][1]
    with pytest.raises(InputError, match="does not exist"):
        list_folder(tmp_path / "nowhere")


def test_bad_documents_are_named_and_the_rest_is_indexed(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(
        tmp_path / "docs", good="Good\n\nThis one is fine.", white=" \n\t \n" * 50, word="x" * 10_000
    )
    (docs / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7\n1 0 obj\n<<" + b"\0" * 500)
    (docs / "latin.txt").write_bytes(
        "Caf\xe9 au lait, s'il vous pla\xeet. ".encode("latin-1") + "né".encode()
    )
    with (docs / "huge.txt").open("wb") as file:
        file.truncate(200_000_000)
    report = kb.sync(docs)
    failed = dict(report.failed)
    assert {"binary.txt", "broken.pdf", "huge.txt"} <= set(failed)
    assert "--max-file-mb" in failed["huge.txt"]
    there = {one.id for one in kb.store.documents()}
    assert {"good.txt", "latin.txt", "word.txt"} <= there
    assert "Café" in next(kb.store.chunks(document="latin.txt")).text
    assert max(chunk.tokens for chunk in kb.store.chunks()) <= 256
    assert {"broken.pdf", "binary.txt", "huge.txt"}.isdisjoint(there)


def test_limits_are_the_callers(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a="word " * 300_000)
    report = kb.sync(docs, limits=ReadLimits.of_megabytes(1))
    assert "--max-file-mb" in report.failed[0][1]
    assert kb.sync(docs).added == 1


# Estimates -------------------------------------------------------------------------------------------------


def test_estimate_is_near(tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(7)
    docs = tmp_path / "docs"
    docs.mkdir()
    for n in range(300):
        length = int(drawn.lognormvariate(5, 1))
        (docs / f"{n}.txt").write_text(
            f"Title {n}\n\n" + " ".join(drawn.choices(["alpha", "be", "gamma."], k=length))
        )
    (docs / "rows.jsonl").write_text(
        rows(*(" ".join(drawn.choices(["one", "two"], k=50)) for _ in range(400)))
    )
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True) as kb:
        exact = kb.estimate(docs)
        monkeypatch.setattr("llmc.runtime.rag.estimate._FILES", 120)
        monkeypatch.setattr("llmc.runtime.rag.estimate._LETTERS", 1)
        monkeypatch.setattr("llmc.runtime.rag.estimate._ROWS_LETTERS", 20_000)
        sampled = kb.estimate(docs)
        kb.sync(docs)
        kb.vacuum()
        stats = kb.stats()
        tokens = sum(chunk.tokens for chunk in kb.store.chunks())
    assert exact.sampled == exact.files == 301
    assert sampled.sampled == 120
    assert (exact.documents, exact.chunks, exact.tokens) == (stats["documents"], stats["chunks"], tokens)
    for found, limit in ((exact, 0.1), (sampled, 0.15)):
        assert found.bytes == pytest.approx(stats["bytes"], rel=limit)
        assert found.documents == pytest.approx(stats["documents"], rel=limit)
        assert found.tokens == pytest.approx(tokens, rel=limit)
    assert UNSURE == -1


def test_an_estimate_leaves_out_what_cannot_be_read_and_hides_nothing_else(
    kb: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = write(tmp_path / "docs", good="Whales are mammals.")
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7 and no more")
    (docs / "rows.jsonl").write_text(rows("Herrings are fish.") + "{\n")
    assert (kb.estimate(docs).sampled, kb.estimate(docs).documents) == (3, kb.sync(docs).added)

    def fails(*_: object) -> None:
        raise IndexError("a mistake of ours")

    monkeypatch.setattr("llmc.runtime.rag.ingest.chunk_text", fails)
    with pytest.raises(IndexError, match="of ours"):
        kb.estimate(docs)
