"""A store after kills, full disks, second writers, other embedders: like a new one, or it says why not."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError, LlmcError
from llmc.runtime.rag.knowledge import KnowledgeBase, locate

from .conftest import LONG
from .rag_documents import FakeEmbedder, dump, faked, fresh, killed, rows, settle, sync, write


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    return faked(monkeypatch)


@pytest.fixture(name="kb")
def _kb(tmp_path: Path, fake: FakeEmbedder) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(tmp_path / "kb.kb", create=True) as kb:
        yield kb


# Settings --------------------------------------------------------------------------------------------------


def test_another_embedder_is_refused_with_the_command(tmp_path: Path, fake: FakeEmbedder) -> None:
    place = tmp_path / "kb.kb"
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    fresh(docs, place)
    with pytest.raises(InputError) as caught:
        KnowledgeBase.open(place, embedder="other")
    assert caught.value.remedy == f"re-embed it: llmc rag embed {place} --embedder other"
    with KnowledgeBase.open(place, embedder="none") as kb:
        with pytest.raises(InputError, match="was embedded with fake-1"):
            kb.sync(docs)
        assert kb.delete(["a.txt"]) == 1
    with pytest.raises(InputError, match="chunks of 256 tokens, not 100"):
        KnowledgeBase.open(place, create=True, chunk_tokens=100)


def test_reembedding(tmp_path: Path, fake: FakeEmbedder) -> None:
    place = tmp_path / "kb.kb"
    docs = write(tmp_path / "docs", **{f"d{n}": f"Title {n}\n\nText of {n}." for n in range(40)})
    plain = fresh(docs, tmp_path / "plain.kb", embedder="none")
    as_other = fresh(docs, tmp_path / "other.kb", embedder="other")
    fresh(docs, place)
    with KnowledgeBase.open(place, embedder="none") as kb:
        assert kb.reembed("other") == 40
        assert dump(kb) == as_other
        assert kb.reembed("other") == 0 or dump(kb) == as_other
        kb.reembed("none")
        assert dump(kb) == plain
    with KnowledgeBase.open(place) as kb:
        assert kb.embedder is None
        assert kb.settings.embedder_hash == ""


def test_reembedding_goes_on_after_a_kill(
    tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "kb.kb"
    docs = write(tmp_path / "docs", **{f"d{n:02}": f"Title {n}\n\nText of {n}." for n in range(40)})
    as_other = fresh(docs, tmp_path / "other.kb", embedder="other")
    fresh(docs, place)
    monkeypatch.setattr("llmc.runtime.rag.renew._CHUNKS_AT_ONCE", 10)
    assert killed(lambda: reembed(place), at=4)
    with KnowledgeBase.open(place) as kb:
        assert kb.embedder is None, "half of the vectors are no embedder's"
        with pytest.raises(InputError, match="only partly embedded") as caught:
            kb.sync(docs)
        assert "llmc rag embed" in caught.value.remedy
        assert 0 < len(kb.store.vectors()[0]) < 40
        assert kb.reembed("other") < 40
        assert dump(kb) == as_other


def reembed(place: Path) -> None:
    with KnowledgeBase.open(place, embedder="none") as kb:
        kb.reembed("other")


def test_renewed_features(tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "kb.kb"
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.", b="Bob\n\nBob read it.")
    before = fresh(docs, place)
    made = fake.texts
    monkeypatch.setattr("llmc.runtime.rag.knowledge.FEATURES_VERSION", 99)
    monkeypatch.setattr("llmc.runtime.rag.renew.FEATURES_VERSION", 99)
    with KnowledgeBase.open(place) as kb:
        with pytest.raises(InputError, match="another version"):
            kb.search("Who wrote it?")
        kb.sync(docs)
        assert [line for line in dump(kb) if '"settings"' not in line] == [
            line for line in before if '"settings"' not in line
        ]
        assert kb.settings.features_version == 99
    assert fake.texts == made


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = write(tmp_path / "docs", a="x")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match="has not been indexed"):
        locate(str(docs))
    (tmp_path / "docs.kb").touch()
    assert locate(str(docs)) == str(tmp_path / "docs.kb")
    Path("docs.kb").touch()
    assert locate(str(docs)) == "docs.kb"
    assert locate("postgresql://h/d") == "postgresql://h/d"
    with pytest.raises(InputError, match="does not exist"):
        locate("nothing.kb")


# Kills, full disks, second writers -------------------------------------------------------------------------


def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.rag.ingest._BATCH_CHUNKS", 3)
    monkeypatch.setattr("llmc.runtime.rag.ingest._AT_ONCE", 2)


def test_a_killed_index_goes_on(tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    docs = write(tmp_path / "docs", **{f"d{n}": f"Title {n}\n\nText of {n}." for n in range(8)})
    (docs / "rows.jsonl").write_text(rows(*(f"text of row {n}" for n in range(8))))
    settle(docs)
    whole = fresh(docs, tmp_path / "whole.kb")
    for at in range(1, 60):
        place = tmp_path / f"{at}.kb"
        if not killed(lambda place=place: sync(place, docs), at=at):
            break
        with KnowledgeBase.open(place, create=True) as kb:
            before = kb.store.counts()["documents"]
            report = kb.sync(docs)
            assert report.added == 16 - before, "what was committed is not read again"
            assert dump(kb) == whole, f"killed at step {at}"
    else:
        pytest.fail("it never came to its end")
    assert at > 20


class _World:
    """A folder with files, what was added from elsewhere, and a store, all changed at random."""

    def __init__(self, root: Path, random: random.Random) -> None:
        self.random = random
        self.docs = root / "docs"
        self.place = root / "kb.kb"
        self.elsewhere = root / "elsewhere"
        self.docs.mkdir(parents=True)
        self.elsewhere.mkdir()
        self.added: set[str] = set()

    def change(self) -> None:
        """One file is written, changed or removed."""
        name = self.random.choice(["a.txt", "b.txt", "sub/c.txt", "d.md", "rows.jsonl", "more/rows.csv"])
        path = self.docs / name
        if path.exists() and self.random.random() < 0.3:
            path.unlink()
            return
        path.parent.mkdir(exist_ok=True)
        path.write_text(self.text(path.suffix))
        past = self.random.randrange(10**18)
        os.utime(path, ns=(past, past))

    def text(self, suffix: str) -> str:
        words = [
            "Ada Lovelace",
            "wrote",
            "the",
            "Analytical Engine",
            "in",
            "London",
            "with",
            "Babbage",
            "1843",
        ]
        texts = [" ".join(self.random.choices(words, k=self.random.randrange(3, 9))) for _ in range(4)]
        if suffix == ".jsonl":
            return rows(*texts[: self.random.randrange(1, 5)])
        if suffix == ".csv":
            kept = texts[: self.random.randrange(1, 5)]
            return "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(kept))
        return f"{self.random.choice(['Ada', 'Bob', 'Cid'])}\n\n" + "\n\n".join(texts)

    def act(self) -> Callable[[], Any]:
        """Something to do with the store."""
        kind = self.random.choice(["sync", "sync", "add", "add", "delete"])
        if kind == "sync":
            return lambda: sync(self.place, self.docs)
        if kind == "add":
            name = self.random.choice(["x.txt", "y.jsonl"])
            path = self.elsewhere / name
            if name not in self.added or self.random.random() < 0.5:
                path.write_text(self.text(path.suffix))
                past = self.random.randrange(10**18)
                os.utime(path, ns=(past, past))
            self.added.add(name)
            return lambda: add(self.place, path)
        with KnowledgeBase.open(self.place, create=True) as kb:
            ids = [one.id for one in kb.store.documents() if one.path not in self.added]
        name = self.random.choice(ids or ["nothing"])
        return lambda: delete(self.place, name)

    def check(self, other: Path) -> None:
        """The store is what a new one would be."""
        with KnowledgeBase.open(self.place, create=True) as kb, KnowledgeBase.open(other, create=True) as new:
            kb.sync(self.docs)
            new.sync(self.docs)
            for name in sorted(self.added):
                kb.add([self.elsewhere / name])
                new.add([self.elsewhere / name])
            assert dump(kb) == dump(new)
            kb.vacuum()
            new.vacuum()
            sizes = [kb.stats()["bytes"], new.stats()["bytes"]]
            assert sizes[0] <= 1.3 * sizes[1], sizes


def add(place: Path, path: Path) -> None:
    with KnowledgeBase.open(place, create=True) as kb:
        kb.add([path])


def delete(place: Path, name: str) -> None:
    with KnowledgeBase.open(place, create=True) as kb:
        kb.delete([name])


def _histories(tmp_path: Path, seeds: Sequence[int]) -> int:
    kills = 0
    for seed in seeds:
        drawn = random.Random(seed)
        world = _World(tmp_path / f"history{seed}", drawn)
        for _ in range(drawn.randrange(3, 9)):
            for _ in range(drawn.randrange(4)):
                world.change()
            action = world.act()
            if drawn.random() < 0.6:
                kills += killed(action, at=drawn.randrange(1, 16))
            else:
                action()
        world.check(tmp_path / f"fresh{seed}.kb")
        shutil.rmtree(world.docs.parent)
    return kills


def test_histories_with_kills_end_like_a_new_store(
    tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch)
    assert _histories(tmp_path, range(8)) > 4


@pytest.mark.slow
def test_many_histories(tmp_path: Path, fake: FakeEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    count = 200 if LONG else 25
    assert _histories(tmp_path, range(100, 100 + count)) > count


def test_a_second_writer_is_refused_and_readers_are_not(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    kb.sync(docs)
    code = (
        "import sys; from llmc.runtime.rag.knowledge import KnowledgeBase\n"
        "from pathlib import Path\n"
        "with KnowledgeBase.open(sys.argv[1], embedder='none') as kb:\n"
        "    print(len(list(kb.store.documents())))\n"
        "    kb.delete(['a.txt'])\n"
    )
    with kb.store.writing():
        done = subprocess.run([sys.executable, "-c", code, kb.store.location], capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert done.returncode == 1
    assert f"being written by process {os.getpid()}" in done.stderr
    assert kb.store.counts()["documents"] == 1


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path, fake: FakeEmbedder) -> None:
    place = tmp_path / "kb.kb"
    docs = write(tmp_path / "docs", a="Ada\n\nAda wrote it.")
    sync(place, docs)
    write(docs, **{f"d{n}": f"Title {n}\n\n" + f"word{n} " * 3000 for n in range(40)})

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            sync(place, docs)
        except LlmcError as error:
            os._exit(0 if "full" in str(error) or "large" in str(error) else 4)
        os._exit(3)

    assert not killed(limited, at=-1)
    with KnowledgeBase.open(place) as kb:
        assert kb.store.document("a.txt") is not None
        assert kb.sync(docs).failed == []
        assert dump(kb) == fresh(docs, tmp_path / "other.kb")


def test_foreign_and_damaged_files_are_refused(tmp_path: Path, fake: FakeEmbedder) -> None:
    foreign = tmp_path / "foreign.kb"
    with closing(sqlite3.connect(foreign)) as database:
        database.execute("CREATE TABLE people (name)")
        database.commit()
    text = tmp_path / "text.kb"
    text.write_text("not a database at all, " * 100)
    good = tmp_path / "good.kb"
    sync(good, write(tmp_path / "docs", a="Ada\n\nAda wrote it."))
    newer = tmp_path / "newer.kb"
    shutil.copy(good, newer)
    with closing(sqlite3.connect(newer)) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute(f"PRAGMA user_version = {version + 1}")
    for place in (foreign, text, newer):
        before = place.read_bytes()
        with pytest.raises(InputError, match=place.name):
            KnowledgeBase.open(place, create=True)
        assert place.read_bytes() == before
    with pytest.raises(InputError, match="does not exist"):
        KnowledgeBase.open(tmp_path / "nothing.kb")


def test_reading_goes_on_while_it_is_written(kb: KnowledgeBase, tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", **{f"d{n}": f"Ada {n}\n\nAda wrote book {n}." for n in range(30)})
    kb.sync(docs)
    wrong: list[Any] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found = kb.search("Who wrote book 7?", top=3)
                if not found or any("Ada" not in one.title for one in found):
                    wrong.append(found)
            except Exception as error:  # noqa: BLE001  (any error of a reader is what this looks for)
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(5):
        write(docs, **{f"d{n}": f"Ada {n}\n\nAda wrote book {n} in year {turn}." for n in range(15)})
        kb.sync(docs)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
