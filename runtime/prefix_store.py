"""Pages of the KV cache as files, so that a prefix that was computed once need not be after a restart.

    DIR/KEY/hh/HASH.page      96 bytes of head (magic, key, hash, length, SHA-256 of the contents), contents
    DIR/KEY/hh/HASH.page.P-T  the same while thread T of process P writes it

KEY names what the bits depend on beside the tokens (model, kernels, layout of the cache), HASH is the chained
hash of the page's prefix (`block_manager`). A file is read back only where all of its head and its checksum
are right; whatever else lies there is left alone: only regular files of these names, in folders of these
names that are no links, are ever removed. Files are written beside and renamed, by a thread of their own, and
those that were not used for longest go when the folder is larger than it may be. Several processes may use
one folder; each counts all of it again after every twentieth of the limit that it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..ir.errors import InputError

_log = logging.getLogger("llmc.runtime")

_HEAD = struct.Struct("<8s32s16sQ32s")
_MAGIC = b"llmc-kv1"
_PENDING_BYTES = 256 << 20  # of pages that wait to be written; further ones are not kept
_STALE_SECONDS = 3600  # a file beside, whose writer must be gone by then
_ROOM = 0.9  # of the limit, what is left after trimming
_BLIND = 0.05  # of the limit, what is written before all is counted again: others write here too
_FOLDER, _PART = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{32}\.page(?P<beside>\.[0-9]+-[0-9]+)?")
DEFAULT_BYTES = 10 << 30


@dataclass(slots=True)
class StoreCounts:
    """What a store did. Single numbers, which any thread may read."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    """Files that were there and not right."""
    written: int = 0
    dropped: int = 0
    """Pages that were not written: too many waited, or the disk gave an error."""


class PrefixStore:
    """Pages by hash under one key. `get`, `touch` and `put` belong to one thread at a time."""

    def __init__(self, folder: Path, key: bytes, *, page_bytes: int, limit: int = DEFAULT_BYTES) -> None:
        """`key`: 32 bytes. `page_bytes`: of each page's contents. `limit`: bytes of all files of `folder`.

        Raises InputError where the folder cannot be made or written, or the limit holds no page.
        """
        assert len(key) == 32
        if limit < page_bytes + _HEAD.size:
            raise InputError(
                f"a prefix cache of {limit} bytes holds not one page of {page_bytes}", remedy="make it larger"
            )
        self._root, self._folder = folder, folder / key.hex()
        self._key, self._page_bytes, self._limit = key, page_bytes, limit
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is kept tells of prompts
            self._folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise InputError(
                f"{folder}: no prefix cache can be kept there ({error})", remedy="name a folder"
            ) from None
        if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"{folder} cannot be written", remedy="name a folder that this user may write")
        self.counts = StoreCounts()
        self._damaged: set[bytes] = set()
        self._warned = False
        # One thread; where a process ends in order, it first ends what was given to it.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="llmc-prefix")
        self._lock = threading.Lock()
        self._waiting: set[bytes] = set()  # pages that wait to be written
        self._kept = 0  # bytes of the folder, as far as is known
        self._count_at = 0  # of them, when all is counted again
        self._closed = self._failed = False

    def _path(self, block_hash: bytes) -> Path:
        name = block_hash.hex()
        return self._folder / name[:2] / f"{name}.page"

    def get(self, block_hash: bytes) -> np.ndarray | None:
        """uint8 [page_bytes] of the page with that hash; None where it is not kept, or not rightly."""
        path = self._path(block_hash)
        try:
            found = path.lstat()
            whole = stat.S_ISREG(found.st_mode) and found.st_size == _HEAD.size + self._page_bytes
            data = path.read_bytes() if whole else b""
        except OSError:  # most often: there is none
            self.counts.misses += 1
            return None
        contents = memoryview(data)[_HEAD.size :]
        if data[: _HEAD.size] != self._head(block_hash, contents):
            self._note_damaged(path, block_hash)
            return None
        self.counts.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path, follow_symlinks=False)
        return np.frombuffer(contents, np.uint8)

    def _head(self, block_hash: bytes, contents: memoryview) -> bytes:
        checksum = hashlib.sha256(contents).digest()
        return _HEAD.pack(_MAGIC, self._key, block_hash, self._page_bytes, checksum)

    def _note_damaged(self, path: Path, block_hash: bytes) -> None:
        self.counts.damaged += 1
        self._damaged.add(block_hash)
        if not self._warned:
            self._warned = True
            _log.warning("%s is damaged or no page of this model; such files are computed again", path)

    def touch(self, block_hash: bytes) -> bool:
        """Whether the page is kept, or about to be; it counts as used now."""
        if block_hash in self._damaged:
            return False
        if block_hash in self._waiting:
            return True
        try:
            os.utime(self._path(block_hash), follow_symlinks=False)
        except OSError:
            return False
        return True

    def has_room(self) -> bool:
        """Whether `put` would take a page now; where not, one counts as dropped."""
        with self._lock:
            return self._has_room()

    def _has_room(self) -> bool:
        room = not self._closed and (len(self._waiting) + 1) * self._page_bytes <= _PENDING_BYTES
        self.counts.dropped += not room
        return room

    def put(self, block_hash: bytes, contents: np.ndarray) -> None:
        """Keep a page, uint8 [page_bytes], which is not changed afterwards. It is written some time later, or
        dropped where there is no room.
        """
        assert contents.nbytes == self._page_bytes
        self._damaged.discard(block_hash)
        with self._lock:
            if self._has_room():
                self._waiting.add(block_hash)
                self._writer.submit(self._write, block_hash, contents)

    def flush(self) -> None:
        """Wait until all that was put is written."""
        if not self._closed:
            self._writer.submit(int).result()

    def close(self) -> None:
        """Write what was put; what is put afterwards is dropped."""
        with self._lock:
            self._closed = True
        self._writer.shutdown()

    # In the writer's thread ------------------------------------------------------------------------------

    def _write(self, block_hash: bytes, contents: np.ndarray) -> None:
        path = self._path(block_hash)
        beside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}")
        try:
            path.parent.mkdir(exist_ok=True, parents=True, mode=0o700)
            with beside.open("wb") as file:
                file.write(self._head(block_hash, contents.data))
                file.write(contents.data)
            beside.replace(path)
            self.counts.written += 1
            self._trim(_HEAD.size + contents.nbytes)
        except OSError as error:
            self._note_unwritten(error)
            with contextlib.suppress(OSError):
                beside.unlink()
        finally:
            with self._lock:
                self._waiting.discard(block_hash)

    def _note_unwritten(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            _log.warning("%s: a page of the prefix cache could not be written (%s)", self._root, error)
        with self._lock:
            self.counts.dropped += 1

    def _trim(self, added: int) -> None:
        """Remove the files that were not used for longest, where there are too many; of other models too."""
        self._kept += added
        if self._kept <= self._count_at:
            return
        files = sorted(_files(self._root))
        self._kept = sum(size for _, size, _ in files)
        if self._kept > self._limit:
            for _, size, path in files:
                if self._kept <= _ROOM * self._limit:
                    break
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # another process trims too
                    self._kept -= size
        # Where files could not be removed, they are not looked at again for every page.
        blind = self._kept + int(_BLIND * self._limit)
        self._count_at = min(blind, self._limit) if self._kept <= self._limit else blind


def _files(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of the pages of all models; files beside whose writer is gone are
    removed. Nothing else is looked into: a user may have named a folder that holds other things.
    """
    for folder in _inside(root, _FOLDER):
        for part in _inside(folder.path, _PART):
            for entry in _inside(part.path, _FILE, files=True):
                with contextlib.suppress(OSError):  # another process removed it
                    found, path = entry.stat(follow_symlinks=False), Path(entry.path)
                    if entry.name.endswith(".page"):
                        yield found.st_mtime, found.st_size, path
                    elif time.time() - found.st_mtime > _STALE_SECONDS:
                        path.unlink()


def _inside(folder: str | Path, name: re.Pattern[str], *, files: bool = False) -> list[os.DirEntry[str]]:
    """What a folder has of names like that: folders, or regular files, and no links to such."""
    try:
        with os.scandir(folder) as found:
            return [
                one
                for one in found
                if name.fullmatch(one.name)
                and (one.is_file(follow_symlinks=False) if files else one.is_dir(follow_symlinks=False))
            ]
    except OSError:  # it went meanwhile, or is not this user's to read
        return []
