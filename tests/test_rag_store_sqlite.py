"""The SQLite store's own: whose file it is, versions, permissions, full disks, its lock and its cache."""

from __future__ import annotations

import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.store import Store, matrix, open_store, schema
from llmc.runtime.rag.store import sqlite as sqlite_store

from .rag_records import DIMENSIONS, SETTINGS, check_whole, record

VECTOR = np.eye(DIMENSIONS, dtype=np.float32)[0]


def make(path: Path, documents: int = 8) -> Store:
    store = open_store(path, create=True)
    store.set_settings(SETTINGS)
    store.put(record(number) for number in range(documents))
    return store


def test_an_old_or_bare_sqlite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(InputError, match=r"stores need 3\.38 or newer"):
        open_store(tmp_path / "a.kb", create=True)
    monkeypatch.undo()
    monkeypatch.setattr(schema, "_has_fts5", lambda: False)
    with pytest.raises(InputError, match="without full-text search"):
        open_store(tmp_path / "a.kb", create=True)
    assert os.listdir(tmp_path) == []


# Whose file ------------------------------------------------------------------------------------------------


def test_a_missing_store_is_made_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a ?#%20ü.kb"
    with pytest.raises(InputError, match=r"no such store; make one with `llmc rag index"):
        open_store(path)
    with pytest.raises(InputError, match="no such store"):
        open_store(path, create=True, read_only=True)
    assert os.listdir(tmp_path) == []
    make(path).close()
    assert check_whole(open_store(path, create=True)) == 8
    with pytest.raises(InputError, match=r"cannot be (made|opened)"):
        open_store(tmp_path / "nowhere" / "a.kb", create=True)
    with pytest.raises(InputError, match="no name"):
        open_store("")


def _foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()


def _foreign_in_a_crash(path: Path) -> None:
    """Another program's file with a journal to roll back: opening it the usual way would change it."""
    _foreign(path)
    path.with_name(path.name + "-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("notes of mine" * 100), "is no SQLite file"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(10)), "is no SQLite file"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(5000)), "is no SQLite file"),
        (_foreign, "of another program"),
        (_foreign_in_a_crash, "of another program"),
        (lambda path: path.mkdir(), "is not a file"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to(path), "cannot be read|no such store"),
    ],
    ids=["empty", "text", "short", "zeros", "foreign", "crashed", "folder", "pipe", "loop"],
)
@pytest.mark.parametrize("create", [False, True])
def test_other_files_are_refused_and_left_alone(
    tmp_path: Path, write: Callable[[Path], None], message: str, create: bool
) -> None:
    path = tmp_path / "some.kb"
    write(path)

    def state() -> dict[str, bytes | None]:
        return {one.name: one.read_bytes() if one.is_file() else None for one in tmp_path.iterdir()}

    before = state() if not path.is_symlink() else None
    with pytest.raises(InputError, match=message) as caught:
        open_store(path, create=create)
    assert "some.kb" in str(caught.value)
    assert before is None or state() == before


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    make(path, 200).close()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    said: list[str] = []
    for _ in range(12):
        damaged = bytearray(whole)
        place = int(rng.integers(4096, len(whole) - 6000))
        damaged[place : place + 6000] = rng.bytes(6000)
        path.write_bytes(damaged)
        try:
            store = open_store(path)
            list(store.dump())
            store.keyword("river", 5)
            store.close()
        except InputError as error:
            said.append(str(error))
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    assert len(said) >= 8  # what is left unsaid lies in gaps between rows
    assert all("damaged" in message and "a.kb" in message for message in said)
    path.write_bytes(whole[:9000])
    with pytest.raises(InputError, match="damaged"):
        open_store(path)


def test_a_store_without_its_tables_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    make(path).close()
    connection = sqlite3.connect(path)
    connection.executescript("DELETE FROM meta; DROP TABLE features;")
    connection.close()
    with pytest.raises(InputError, match="damaged"):
        open_store(path)


def test_a_store_whose_log_was_not_copied_whole_is_opened(tmp_path: Path) -> None:
    """A process that was killed, or a disk that filled, while the log was copied into the file."""
    path, cut = tmp_path / "a.kb", tmp_path / "cut.kb"
    make(path, 60).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("VACUUM")  # now the whole store is in the log
    for end in ("", "-wal"):
        Path(f"{cut}{end}").write_bytes(Path(f"{path}{end}").read_bytes())
    connection.close()
    with cut.open("r+b") as file:
        file.truncate(2 * schema.PAGE_SIZE)
    store = open_store(cut)
    assert check_whole(store) == 60
    store.close()


WRITE_AND_CLOSE = """
import sys
from llmc.runtime.rag.store import open_store
store = open_store(sys.argv[1])
store.delete(["folder/0001.txt"])
store.close()
"""


def test_opening_a_store_twice_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """Closing any descriptor of a file gives up all locks that a process has on it (POSIX). Another process
    would then take itself for the last one, and remove the log from under the first.
    """
    path = tmp_path / "a.kb"
    store = make(path)
    assert check_whole(store) == 8
    open_store(path).close()
    log = os.stat(f"{path}-wal").st_ino
    subprocess.run([sys.executable, "-c", WRITE_AND_CLOSE, str(path)], check=True)
    assert os.stat(f"{path}-wal").st_ino == log
    assert check_whole(store) == 7
    store.close()


# Permissions and space -------------------------------------------------------------------------------------


def _use(path: str, say: Connection) -> None:
    """In a process of its own: what a user who owns nothing here can do with a store."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    said: list[object] = []
    try:
        store = open_store(path)
        said.append(store.counts()["documents"])
        said.append(len(store.nearest(VECTOR, 3)))
        store.delete(["folder/0001.txt"])
        said.append("deleted")
    except InputError as error:
        said.append(str(error))
    say.send(said)


def _as_somebody_else(path: Path) -> list[object]:
    context = multiprocessing.get_context("forkserver")
    hear, say = context.Pipe(duplex=False)
    other = context.Process(target=_use, args=(str(path), say))
    other.start()
    assert hear.poll(60)
    said: list[object] = hear.recv()
    other.join()
    return said


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that other users may read and not write. Not in pytest's, which is ours alone."""
    with tempfile.TemporaryDirectory(prefix="llmc-store-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_store_in_a_folder_that_cannot_be_written_is_read(closed_folder: Path) -> None:
    path = closed_folder / "a.kb"
    make(path).close()
    closed_folder.chmod(0o555)
    try:
        *read, said = _as_somebody_else(path)
        assert read == [8, 3], said
        assert isinstance(said, str) and re.search("cannot be written.*a.kb-lock: Permission denied", said)
        assert os.listdir(closed_folder) == ["a.kb"]
    finally:
        closed_folder.chmod(0o755)


def test_a_store_that_may_not_be_read_says_so(closed_folder: Path) -> None:
    path = closed_folder / "a.kb"
    make(path).close()
    path.chmod(0o000)
    (said,) = _as_somebody_else(path)
    assert isinstance(said, str) and "a.kb: cannot be opened" in said and "check the permissions" in said


def test_reading_without_locks_notices_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    make(path).close()
    store = open_store(path)
    # As in a folder that we cannot write: SQLite has no way to tell us of a writer.
    store._readers.empty()  # type: ignore[attr-defined]
    store._stamp = store._file_stamp()  # type: ignore[attr-defined]
    assert check_whole(store) == 8

    def read_while_another_writes() -> None:
        with store.reading() as state:
            other = open_store(path)
            other.put(record(number) for number in range(20))
            other.vacuum()
            other.close()
            state.counts()

    with pytest.raises(InputError, match="was written to while it was read"):
        read_while_another_writes()
    assert store.counts()["documents"] == 20, "the next reader sees the new state"
    store.close()


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.kb"
    make(path).close()
    real = sqlite_store.connect

    def small(name: str, access: sqlite_store.Access) -> sqlite3.Connection:
        connection = real(name, access)
        if access == "write":
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages + 3}")
        return connection

    monkeypatch.setattr(sqlite_store, "connect", small)
    store = open_store(path)
    with pytest.raises(InputError, match=r"a.kb: the disk is full.*make room"):
        store.put(record(number) for number in range(200))
    assert check_whole(store) == 8
    store.delete([record(1).document.id])
    assert check_whole(store) == 7
    store.close()


# Lock, cache, space ----------------------------------------------------------------------------------------


def test_the_lock_file_is_there_only_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path)
    lock = tmp_path / "a.kb-lock"
    assert not lock.exists()
    with store.writing():
        assert lock.exists()
    assert not lock.exists()
    lock.write_text("left by a killed process")
    store.put([record(30)])
    assert check_whole(store) == 9 and not lock.exists()
    store.close()
    assert os.listdir(tmp_path) == ["a.kb"], "closing leaves one file"


def test_a_child_does_not_inherit_the_right_to_write(tmp_path: Path) -> None:
    """A process that was forked while its parent wrote neither writes nor keeps the lock."""
    path = tmp_path / "a.kb"
    script = (
        "import os, sys, time\n"
        "from llmc.runtime.rag.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "list(store.documents())\n"
        "with store.writing():\n"
        "    if os.fork() == 0:\n"
        "        try:\n"
        "            store.delete(['folder/0001.txt'])\n"
        "        except Exception as error:\n"
        "            print(str(error), len(list(store.documents())), flush=True)\n"
        "        time.sleep(60)\n"
        "    os.wait()\n"
    )
    make(path).close()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        said = parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
        parent.wait()
        try:
            assert f"process {parent.pid}" in said and said.strip().endswith(" 8")
            store = open_store(path)
            store.put([record(40)])
            assert check_whole(store) == 9
            store.close()
        finally:
            for child in children:
                os.kill(int(child), 9)


def test_the_matrix_is_kept_in_the_cache_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path)
    first = store.nearest(VECTOR, 5)
    folder = Path(store.cache_folder)
    assert folder == tmp_path / "a.kb.cache"
    kept = sorted(one.name for one in folder.iterdir())
    assert kept == [f"vectors-{store.generation}.json", f"vectors-{store.generation}.npy"]
    again = open_store(path)
    assert again.nearest(VECTOR, 5) == first
    again.put([record(60)])
    assert len(again.nearest(VECTOR, 100)) == again.counts()["vectors"]
    assert sorted(one.name for one in folder.iterdir()) != kept and len(list(folder.iterdir())) == 2
    # A file that somebody cut, or that is something else, is made anew.
    for name, content in (("npy", b"\x93NUMPY"), ("json", b"[1, 2]"), ("json", b"[[[")):
        (folder / "new").write_bytes(content)
        (folder / "new").replace(folder / f"vectors-{again.generation}.{name}")
        third = open_store(path)
        assert third.nearest(VECTOR, 5) == again.nearest(VECTOR, 5)
        third.close()
    for one in folder.iterdir():
        one.unlink()
    folder.rmdir()
    folder.write_text("not a folder")
    third = open_store(path)
    assert third.nearest(VECTOR, 5) == again.nearest(VECTOR, 5), "in memory"
    for one in (store, again, third):
        one.close()


def test_halves_become_singles_exactly() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)].reshape(2, -1)
    out = np.empty(finite.shape, np.float32)
    matrix._to_single(finite, out)
    assert (out == finite.astype(np.float32)).all() and (np.signbit(out) == np.signbit(finite)).all()


def test_a_vacuum_beside_readers(tmp_path: Path) -> None:
    path = tmp_path / "a.kb"
    store = make(path, 300)
    store.delete([record(number).document.id for number in range(20, 300)])
    large = path.stat().st_size + path.with_name("a.kb-wal").stat().st_size
    with store.reading() as state:
        with pytest.raises(
            InputError, match=r"cannot shrink while somebody reads the old state; run it again"
        ):
            store.vacuum()
        assert check_whole(state) == 20
    store.vacuum()
    assert path.stat().st_size < large / 3 and path.with_name("a.kb-wal").stat().st_size == 0
    assert check_whole(store) == 20
    store.close()
