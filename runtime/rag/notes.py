"""What a model said about communities of a store, kept beside it so that the same question costs it once.

It is a cache: no part of the store's logical content, and may be lost. A note is kept under what made it (the
model and how it was decoded, the prompt's ids), and under the chunks that its community had, whose ids tell
their content. As soon as one of these is changed or deleted, the note is forgotten: what a model said of a
document does not outlive it. Where another machine deletes it (PostgreSQL), the next search here forgets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .store.base import Store

_NAME = "notes.json"
_MOST = 500
"""Notes that are kept; the oldest go first."""

_Kept = dict[str, dict[str, Any]]
"""{"members": digest → chunk ids, "notes": key → {"members": digest, "text"}}; replaced, never changed."""


class Notes:
    """The notes beside one store. What cannot be read or written is as if it were not there. The file is read
    again only where it is not the one that was read last.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / _NAME if folder else None
        self._stamp: tuple[int, int, int] | None = None
        self._kept = _none()

    def get(self, model: str, prompt: Sequence[int]) -> str | None:
        """What a model said to a prompt. `model` tells all that decides about the answer but the prompt."""
        found = self._read()["notes"].get(_key(model, prompt))
        return found["text"] if found is not None else None

    def put(self, model: str, prompt: Sequence[int], members: Sequence[str], text: str) -> None:
        """Keep what a model said to a prompt about the community of these chunks."""
        kept = self._read()
        digest = hashlib.sha256("\n".join(members).encode()).hexdigest()
        members_of = {**kept["members"], digest: list(members)}
        notes = {**kept["notes"], _key(model, prompt): {"members": digest, "text": text}}
        self._write(members_of, dict(list(notes.items())[-_MOST:]))

    def forget(self, store: Store) -> None:
        """Remove the notes of communities of which a chunk is not in the store any more."""
        kept = self._read()
        if not kept["notes"]:
            if self._stamp is not None:  # nothing in it can be read: who knows what it tells
                self._write({}, {})
            return
        there = set(store.chunk_ids())
        gone = {digest for digest, members in kept["members"].items() if not there.issuperset(members)}
        if gone:
            notes = {key: one for key, one in kept["notes"].items() if one["members"] not in gone}
            self._write(kept["members"], notes)

    def _read(self) -> _Kept:
        if self._path is None:
            return self._kept
        try:
            stamp = _stamp_of(self._path.stat())
        except OSError:
            stamp = None
        if stamp != self._stamp or stamp is None:
            self._stamp, self._kept = stamp, _none() if stamp is None else _parsed(self._path)
        return self._kept

    def _write(self, members: dict[str, Any], notes: dict[str, Any]) -> None:
        if self._path is None:
            return
        used = {one["members"] for one in notes.values()}
        kept = {"members": {digest: ids for digest, ids in members.items() if digest in used}, "notes": notes}
        with contextlib.suppress(OSError):
            if not notes:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=_NAME, suffix=".partial", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(kept, file)
                    file.flush()
                    stamp = _stamp_of(os.fstat(file.fileno()))
                os.replace(partial, self._path)
            except BaseException:
                os.unlink(partial)
                raise
            self._stamp, self._kept = stamp, kept


def forget_notes(store: Store) -> None:
    """Remove the notes beside a store that are of chunks which are not there any more."""
    Notes(store.cache_folder).forget(store)


def _key(model: str, prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([model, list(prompt)]).encode()).hexdigest()


def _none() -> _Kept:
    return {"members": {}, "notes": {}}


def _stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from the one that took its name: each is written beside and renamed."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _parsed(path: Path) -> _Kept:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        members = {str(digest): [str(id) for id in ids] for digest, ids in found["members"].items()}
        notes = {
            str(key): {"members": one["members"], "text": str(one["text"])}
            for key, one in found["notes"].items()
            if one["members"] in members
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _none()
    return {"members": members, "notes": notes}
