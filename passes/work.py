"""The work folder of a long compilation: finished pieces, which survive the end of the process.

    work = WorkFolder.open(path, key, resume=True)
    if work.done("layer.3"):
        arrays = work.load("layer.3")
    else:
        work.save("layer.3", arrays)

A piece is there completely or not at all, whenever the process was killed: it is written under another name,
made durable, then renamed. A file is magic, sha256 of all that follows, length of a JSON header, header
([name, dtype, shape, offset of the bytes after the header]), the arrays' bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.dtypes import from_numpy, to_numpy
from ..ir.errors import InputError
from ..ir.weights import ArrayTensor

Array = np.ndarray[Any, Any]

MARKER = "LLMC-WORK"
KEY = "key.json"
_MARKER_TEXT = "Unfinished work of llmc compile. It may be deleted; --resume goes on from it.\n"
_MAGIC = b"LLMCWRK1"
_HEADER = len(_MAGIC) + 32 + 8
_ALIGNMENT = 64
_CHUNK = 8 << 20
_PIECE = ".piece"
_PARTIAL = ".partial"
_SCRATCH = "scratch"
_ADVISE_DROP: int | None = getattr(mmap, "MADV_DONTNEED", None)


class WorkFolder:
    """Made by `open`. `resumed` tells how many pieces were there then."""

    def __init__(self, path: Path, resumed: int) -> None:
        self.path = path
        self.resumed = resumed

    @staticmethod
    def open(path: Path, key: Mapping[str, str], *, resume: bool) -> WorkFolder:
        """The folder of the work that `key` describes: what it is → a digest or a value.

        With `resume`, pieces of the same key are kept, and another key is refused by the names of what
        differs; without, or where nothing was begun, it starts empty.

        Raises InputError also where a folder of that name is not one of ours: nothing in it is touched.
        """
        if os.path.lexists(path):
            _check_ours(path)
        found = _read_key(path)
        if resume and found is not None:
            _check_same(path, found, key)
            _clear(path, keep_pieces=True)
            return WorkFolder(path, sum(1 for _ in path.glob(f"*{_PIECE}")))
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write(path / MARKER, [_MARKER_TEXT.encode()])
            _clear(path, keep_pieces=False)
            _write(path / KEY, [json.dumps(dict(key), sort_keys=True, indent=1).encode()])
        except OSError as error:
            raise _failed(path, error) from None
        return WorkFolder(path, 0)

    def done(self, name: str) -> bool:
        """Whether the piece was saved completely."""
        return self._file(name).is_file()

    def save(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Write a piece, durable when this returns; one of the same name is replaced.

        Raises InputError where the disk is full.
        """
        path = self._file(name)
        try:
            _write(path, _pieces(arrays), checksum=True)
        except OSError as error:
            raise _failed(path, error) from None

    def load(self, name: str, *, mapped: bool = False) -> dict[str, Array]:
        """The arrays of a piece. `mapped`: read-only views of the file, which the system reads when touched.

        Raises InputError where the piece is damaged, KeyError where it was never saved.
        """
        path = self._file(name)
        if not path.is_file():
            raise KeyError(name)
        with open(path, "rb") as file:
            head = file.read(_HEADER)
            digest = hashlib.sha256(head[len(_MAGIC) + 32 :])
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            if head[: len(_MAGIC)] != _MAGIC or digest.digest() != head[len(_MAGIC) : len(_MAGIC) + 32]:
                raise InputError(
                    f"{path} is damaged: its checksum is not its contents'", remedy="compile without --resume"
                )
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        length = int.from_bytes(head[-8:], "little")
        entries = json.loads(bytes(data[_HEADER : _HEADER + length]))
        views = {entry[0]: _view(data[_HEADER + length :], entry) for entry in entries}
        return views if mapped else {label: view.copy() for label, view in views.items()}

    def remove(self, name: str) -> None:
        """Forget a piece that is no longer needed (an activation whose block is done)."""
        self._file(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Names of the pieces, sorted."""
        return sorted(p.name.removesuffix(_PIECE) for p in self.path.glob(f"*{_PIECE}"))

    def scratch(self, name: str) -> Path:
        """A path for a file of this process, which no later one finds: `open` clears them."""
        folder = self.path / _SCRATCH
        folder.mkdir(exist_ok=True)
        return folder / _checked(name)

    def close(self, *, keep: bool) -> bool:
        """Delete the folder; with `keep`, only where no piece was saved, so that nothing useless stays.

        Returns whether it is still there.
        """
        if keep and self.names():
            shutil.rmtree(self.path / _SCRATCH, ignore_errors=True)
            return True
        _clear(self.path, keep_pieces=False)
        shutil.rmtree(self.path, ignore_errors=True)
        return False

    def _file(self, name: str) -> Path:
        return self.path / (_checked(name) + _PIECE)


class PieceTensor(ArrayTensor):
    """An array of a mapped piece as a lazy tensor: rows are copied, and their pages given back, so that a
    weight file made of all pieces takes the memory of one chunk.
    """

    def __init__(self, view: Array, source: str) -> None:
        super().__init__(view, source)
        self._view = view
        base: Any = view
        while isinstance(base, np.ndarray):
            base = base.base
        self._map: Any = base.obj if isinstance(base, memoryview) else None

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        rows = np.array(self._view if not self.shape else self._view[start:stop], order="C")
        if isinstance(self._map, mmap.mmap) and _ADVISE_DROP is not None:
            self._map.madvise(_ADVISE_DROP)
        return rows


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,199}", name):
        raise ValueError(f"{name!r} is no name of a piece: letters, digits, '_', '-', '+' and '.' make one")
    return name


def _failed(path: Path, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space and compile with --resume" if full else "choose another output folder"
    return InputError(f"cannot write {path}: {error.strerror}", remedy=remedy)


def _check_ours(path: Path) -> None:
    """Raise InputError unless the folder bears our marker, or a process was killed before it could."""
    remains = {MARKER + _PARTIAL}
    ours = path.is_dir() and not path.is_symlink()
    if not ours or not ((path / MARKER).is_file() or {p.name for p in path.iterdir()} <= remains):
        raise InputError(
            f"{path} is not a work folder of llmc", remedy="rename it, or choose another output name"
        )


def _read_key(path: Path) -> dict[str, str] | None:
    """The key of the work in the folder; None where there is none."""
    try:
        found = json.loads((path / KEY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and (path / MARKER).is_file() else None


def _check_same(path: Path, found: Mapping[str, str], key: Mapping[str, str]) -> None:
    other = sorted(name for name in found.keys() | key.keys() if found.get(name) != key.get(name))
    if other:
        raise InputError(
            f"{path} holds work of another compilation: {', '.join(other)} differ"
            + ("s" if len(other) == 1 else ""),
            remedy="compile without --resume to start over, or with what it was started with",
        )


def _clear(path: Path, *, keep_pieces: bool) -> None:
    """Delete what lies in the folder but the marker. The key goes first: killed in the middle, nothing is
    left that could be resumed.
    """
    if not keep_pieces:
        (path / KEY).unlink(missing_ok=True)
        _sync(path)
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MARKER and not (keep_pieces and (entry.name == KEY or entry.suffix == _PIECE)):
            entry.unlink(missing_ok=True)


def _pieces(arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """The bytes after the checksum."""
    entries: list[tuple[str, str, list[int], int]] = []
    offset = 0
    for name, array in arrays.items():
        offset += -offset % _ALIGNMENT
        entries.append((name, from_numpy(array.dtype), list(array.shape), offset))
        offset += array.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-(_HEADER + len(header)) % _ALIGNMENT)
    yield len(header).to_bytes(8, "little")
    yield header
    written = 0
    for array, entry in zip(arrays.values(), entries, strict=True):
        yield bytes(entry[3] - written)
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        written = entry[3] + array.nbytes


def _view(data: memoryview, entry: list[Any]) -> Array:
    _, dtype, shape, offset = entry
    kind = np.dtype(to_numpy(dtype))
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data[offset : offset + count * kind.itemsize], dtype=kind).reshape(shape)


def _write(path: Path, parts: Any, *, checksum: bool = False) -> None:
    """Write a file so that it is whole under its name, or not there; durable on return."""
    partial = path.with_name(path.name + _PARTIAL)
    with open(partial, "wb") as file:
        digest = hashlib.sha256()
        if checksum:
            file.write(_MAGIC + bytes(32))
        for part in parts:
            digest.update(part)
            file.write(part)
        if checksum:
            file.seek(len(_MAGIC))
            file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
