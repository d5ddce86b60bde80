"""Which snapshot searches see while a store is written to.

    newest = Newest(store)
    snapshot = newest.get(patience=0.5)

Deriving a snapshot of a large store takes many seconds. Who may not wait for it searches the one before: its
arrays belong to one state, and passages are read from the newest, so that what was deleted since is not
found. A larger store is derived by a process of its own (`derive_child.py`), since a thread would share
Python's lock with the searches, and its memory would be theirs; its result comes back as the file in the
store's cache folder.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from ...ir.errors import InputError
from .derive_child import Child, ChildError
from .notes import forget_notes
from .snapshot import Snapshot
from .store.base import Store

_log = logging.getLogger("llmc.runtime")

_SMALL = 2000
"""Passages up to which a thread derives in less time than a process needs to start."""
_REST, _LONGEST_REST = 10.0, 600.0
"""Seconds until a process is started again after one failed; twice as long after each further failure."""


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
        self._begun_at = 0.0
        self._noticed: dict[int, float] = {}
        """Generations that are not in the snapshot, and since when they are known."""
        self._failure: InputError | None = None
        self._rest, self._rests_until = _REST, 0.0
        self._child: Child | None = None
        self._closed = False

    def get(self, patience: float | None = None) -> Snapshot:
        """The snapshot of the store's state now; where it has been behind for more than `patience` seconds,
        the one before, at once. Without patience to give (None), or without one before, it waits.
        """
        return self.latest(patience)[0]

    def latest(self, patience: float | None = None) -> tuple[Snapshot, bool]:
        """What `get` gives, and whether it holds all that was written before the call."""
        wanted = self._store.generation
        with self._changed:
            begun = self._begun
            while True:
                snapshot = self._snapshot
                if snapshot is not None and (snapshot.generation == wanted or self._number > begun):
                    return snapshot, True
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if patience is None:
                    if self._deriving:
                        self._changed.wait()
                    else:
                        self._here()
                    continue
                left = self._in_background(wanted) + patience - time.monotonic()
                if snapshot is None:
                    if not self._deriving and self._failure is not None:
                        raise self._failure
                    self._changed.wait()
                    continue
                if left <= 0 or not self._deriving:
                    return snapshot, False
                self._changed.wait(left)

    def renew(self) -> None:
        """Begin to derive where the newest state is not there; waits for nothing."""
        generation = self._store.generation
        with self._changed:
            if self._snapshot is None or self._snapshot.generation != generation:
                self._in_background(generation)

    def facts(self) -> dict[str, Any] | None:
        """How what is searched stands to the store: {"generation", "current", "behind_seconds"}; None where
        nothing was searched yet. `behind_seconds` counts from when the first write that it does not hold was
        noticed.
        """
        generation = self._store.generation
        with self._changed:
            if self._snapshot is None:
                return None
            current = self._snapshot.generation == generation
            since = None if current else min(self._noticed.values(), default=None)
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
            if self._child is not None:
                self._child.kill()
            while self._deriving:
                self._changed.wait()
            self._snapshot = None

    # Deriving -----------------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """To be called with the lock; returns the number of what is begun."""
        if self._closed:
            raise InputError(f"{self._store.location}: the store was closed")
        if self._child is not None:
            self._child.kill()  # it is at the communities of a state that is no more
        self._deriving = True
        self._begun += 1
        self._begun_at = time.monotonic()
        return self._begun

    def _end(self, number: int, snapshot: Snapshot | None, error: Exception | None = None) -> None:
        self._deriving, self._error = False, error
        if snapshot is not None:
            self._snapshot, self._number, self._failure = snapshot, number, None
            # What was noticed before is in it, and so are earlier generations; the others' time goes on.
            self._noticed = {
                generation: since
                for generation, since in self._noticed.items()
                if since > self._begun_at and generation > snapshot.generation
            }
        self._changed.notify_all()

    def _here(self) -> None:
        """Derives in the caller's thread. To be called with the lock, which is given up meanwhile."""
        number = self._begin()
        snapshot: Snapshot | None = None
        self._changed.release()
        try:
            snapshot = Snapshot.of(self._store)
            forget_notes(self._store)  # of what another machine has deleted
        finally:
            self._changed.acquire()
            self._end(number, snapshot)

    def _in_background(self, wanted: int) -> float:
        """Starts a thread that derives, unless one does or the last has failed just now; returns since when
        the snapshot is known to be behind. To be called with the lock."""
        now = time.monotonic()
        self._noticed.setdefault(wanted, now)
        if not self._deriving and now >= self._rests_until:
            number = self._begin()
            threading.Thread(target=self._work, args=(number,), name="llmc-derive", daemon=True).start()
        return min(self._noticed.values())

    def _work(self, number: int) -> None:
        snapshot: Snapshot | None = None
        error: Exception | None = None
        child: Child | None = None
        try:
            large = self._store.counts().get("chunks", 0) > _SMALL
            snapshot = Snapshot.at_hand(self._store) if large else None
            if snapshot is None and large:
                child = self._start_child()
            if child is not None:
                snapshot = self._of_child(child)
            elif snapshot is None and not self._closed:
                snapshot = Snapshot.of(self._store)
            if snapshot is not None:
                self._rest = _REST
            forget_notes(self._store)  # of what another machine has deleted
        except Exception as raised:  # noqa: BLE001  (who searches next gets it)
            error = raised
        finally:
            if child is not None and snapshot is None:
                child.kill()
            with self._changed:
                self._end(number, snapshot, error)
            if child is not None:
                self._part(child)

    def _start_child(self) -> Child | None:
        """The process that derives; None where none can be started, or could not hand its result over."""
        if not _can_be_written(self._store.cache_folder):
            return None
        with self._changed:
            if not self._closed:
                self._child = Child.start()
            return self._child

    def _of_child(self, child: Child) -> Snapshot | None:
        """What a process derives; None where it fails."""
        try:
            facts = child.derive(self._store.address)
        except ChildError as failure:
            self._fail(str(failure))
            return None
        found = Snapshot.kept(Path(self._store.cache_folder), facts)
        # Its file may have made room for that of a newer state, which another process derived since.
        found = Snapshot.at_hand(self._store) if found is None else found
        if found is None:
            self._fail(f"what it derived does not lie in {self._store.cache_folder}")
        return found

    def _fail(self, reason: str) -> None:
        """The state before is searched on. Deriving here instead would take the searches' memory and time."""
        if self._closed:
            return
        _log.warning(
            "%s: what was written cannot be searched yet; again in %d s: deriving it failed: %s",
            self._store.location,
            self._rest,
            reason,
        )
        with self._changed:
            self._rests_until = time.monotonic() + self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
            self._failure = InputError(
                f"{self._store.location}: what searches need could not be derived",
                remedy="the log says why; it is tried again",
            )

    def _part(self, child: Child) -> None:
        """Waits for what a process does when its snapshot is there."""
        failure = child.close()
        with self._changed:
            if self._child is child:
                self._child = None
        if failure and not self._closed:
            _log.debug("%s: the process that derived ended badly: %s", self._store.location, failure)


def _can_be_written(folder: str) -> bool:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


__all__ = ["Newest"]
