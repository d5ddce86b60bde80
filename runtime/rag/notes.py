"""What a model said about communities of a store, kept beside it so that the same question costs it once.

It is a cache: no part of the store's logical content, and may be lost. A note is kept under what the model
read (its digest and the prompt's ids), and under the chunks that its community had, whose ids tell their
content. As soon as one of these is changed or deleted, the note is forgotten: what a model said of a document
does not outlive it.
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


class Notes:
    """The notes beside one store. What cannot be read or written is as if it were not there."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / _NAME if folder else None

    def get(self, model: str, prompt: Sequence[int]) -> str | None:
        """What a model said to a prompt."""
        found = _read(self._path)["notes"].get(_key(model, prompt))
        return found["text"] if found is not None else None

    def put(self, model: str, prompt: Sequence[int], members: Sequence[str], text: str) -> None:
        """Keep what a model said to a prompt about the community of these chunks."""
        if self._path is None:
            return
        kept = _read(self._path)
        digest = hashlib.sha256("\n".join(members).encode()).hexdigest()
        kept["members"][digest] = list(members)
        kept["notes"][_key(model, prompt)] = {"members": digest, "text": text}
        for key in list(kept["notes"])[:-_MOST]:
            del kept["notes"][key]
        _write(self._path, kept)


def forget_notes(store: Store) -> None:
    """Remove the notes of communities of which a chunk is not there any more."""
    path = Path(store.cache_folder) / _NAME if store.cache_folder else None
    if path is None or not path.exists():
        return
    kept = _read(path)
    there = set(store.chunk_ids())
    gone = {digest for digest, members in kept["members"].items() if not there.issuperset(members)}
    if gone or not kept["members"]:
        kept["notes"] = {key: one for key, one in kept["notes"].items() if one["members"] not in gone}
        _write(path, kept)


def _key(model: str, prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([model, list(prompt)]).encode()).hexdigest()


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """{"members": digest → chunk ids, "notes": key → {"members": digest, "text"}}"""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        members = {str(digest): [str(id) for id in ids] for digest, ids in found["members"].items()}
        notes = {
            str(key): {"members": one["members"], "text": str(one["text"])}
            for key, one in found["notes"].items()
            if one["members"] in members
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"members": {}, "notes": {}}
    return {"members": members, "notes": notes}


def _write(path: Path, kept: dict[str, dict[str, Any]]) -> None:
    used = {one["members"] for one in kept["notes"].values()}
    kept["members"] = {digest: ids for digest, ids in kept["members"].items() if digest in used}
    with contextlib.suppress(OSError):
        if not kept["notes"]:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=_NAME, suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
