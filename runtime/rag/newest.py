"""Which snapshot searches see while a store is written to.

    newest = Newest(store)
    snapshot = newest.get(patience=0.5)

Deriving a snapshot of a large store takes many seconds. Who may not wait for it searches the one before: its
arrays belong to one state, and passages are read from the newest, so that what was deleted since is not
found. A larger store is derived by a process of its own, since a thread would share Python's lock with the
searches; its result comes back as the file in the store's cache folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ...ir.errors import InputError
from .snapshot import Snapshot
from .store import open_store
from .store.base import Store

_SMALL = 2000
"""Passages up to which a thread derives in less time than a process needs to start."""


class Newest:
    """Hands out snapshots of a store. Safe to use from several threads; one snapshot at a time is derived."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._error: Exception | None = None
        self._deriving = False
        self._begun = self._number = 0
        """How often deriving was begun, and the number of what gave the snapshot."""
        self._stale_since: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def get(self, patience: float | None = None) -> Snapshot:
        """The snapshot of the store's state now; where it has been behind for more than `patience` seconds,
        the one before, at once. Without patience to give (None), or without one before, it waits.
        """
        wanted = self._store.generation
        with self._changed:
            begun = self._begun
            while True:
                snapshot = self._snapshot
                if snapshot is not None and (snapshot.generation == wanted or self._number > begun):
                    return snapshot
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if snapshot is None or patience is None:
                    if self._deriving:
                        self._changed.wait()
                    else:
                        self._here()
                    continue
                left = self._in_background() + patience - time.monotonic()
                if left <= 0:
                    return snapshot
                self._changed.wait(left)

    def renew(self) -> None:
        """Begin to derive, where there is something to replace and it is stale; waits for nothing."""
        generation = self._store.generation
        with self._changed:
            if self._snapshot is not None and self._snapshot.generation != generation:
                self._in_background()

    def facts(self) -> dict[str, Any] | None:
        """How what is searched stands to the store: {"generation", "current", "behind_seconds"}; None where
        nothing was searched yet. `behind_seconds` counts from when that was first noticed.
        """
        generation = self._store.generation
        with self._changed:
            if self._snapshot is None:
                return None
            current = self._snapshot.generation == generation
            since = None if current else self._stale_since
            behind = 0.0 if since is None else time.monotonic() - since
            return {
                "generation": self._snapshot.generation,
                "current": current,
                "behind_seconds": round(behind, 3),
            }

    def close(self) -> None:
        """End what is being derived."""
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill()
            while self._deriving:
                self._changed.wait()
            self._snapshot = None

    # Deriving -----------------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """To be called with the lock; returns the number of what is begun."""
        if self._closed:
            raise InputError(f"{self._store.location}: the store was closed")
        self._deriving = True
        self._begun += 1
        return self._begun

    def _end(self, number: int, snapshot: Snapshot | None, error: Exception | None = None) -> None:
        self._deriving, self._error = False, error
        if snapshot is not None:
            self._snapshot, self._number, self._stale_since = snapshot, number, None
        self._changed.notify_all()

    def _here(self) -> None:
        """Derives in the caller's thread. To be called with the lock, which is given up meanwhile."""
        number = self._begin()
        snapshot: Snapshot | None = None
        self._changed.release()
        try:
            snapshot = Snapshot.of(self._store)
        finally:
            self._changed.acquire()
            self._end(number, snapshot)

    def _in_background(self) -> float:
        """Starts a thread that derives, unless one does; returns since when the snapshot is known to be
        behind. To be called with the lock."""
        if self._stale_since is None:
            self._stale_since = time.monotonic()
        if not self._deriving:
            number = self._begin()
            threading.Thread(target=self._work, args=(number,), name="llmc-derive", daemon=True).start()
        return self._stale_since

    def _work(self, number: int) -> None:
        snapshot: Snapshot | None = None
        error: Exception | None = None
        try:
            if self._store.counts().get("chunks", 0) > _SMALL:
                snapshot = self._by_process()
            if snapshot is None and not self._closed:
                snapshot = Snapshot.of(self._store)
        except Exception as raised:  # noqa: BLE001  (who searches next gets it)
            error = raised
        with self._changed:
            self._end(number, snapshot, error)

    def _by_process(self) -> Snapshot | None:
        """The snapshot that another process derived; None where it left none (the folder cannot be written,
        no process can be started)."""
        folder = self._store.cache_folder
        if not folder:
            return None
        command = [sys.executable, "-m", __name__]
        try:
            with self._changed:
                if self._closed:
                    return None
                process = self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            answer, _ = process.communicate(self._store.address)  # not an argument: it may hold a password
            facts = json.loads(answer) if process.returncode == 0 else None
        except (OSError, ValueError):
            return None
        finally:
            with self._changed:
                self._process = None
        return None if facts is None else Snapshot.kept(Path(folder), facts)


def main() -> int:
    """Derives the snapshot of the store whose address stands in standard input, into its cache folder."""
    import os

    os.nice(5)  # searches go first
    store = open_store(sys.stdin.read(), read_only=True)
    snapshot = Snapshot.of(store)
    print(json.dumps(snapshot.facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
