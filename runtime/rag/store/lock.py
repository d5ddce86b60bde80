"""The right to write to a store: one thread of one process has it at a time; who is refused learns which.

Between threads of a process it is a table in memory; between processes what `take` and `drop` do: for SQLite
a lock on a file beside it (`FileLock`), for PostgreSQL an advisory lock. Both vanish with a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from ....ir.errors import InputError


@dataclass
class _Holder:
    right: WriteRight
    thread: int
    process: int
    long: bool
    depth: int = 1


_PATIENCE = 60.0
"""Seconds that a thread waits for another's single write."""

_holders: dict[str, _Holder] = {}
_changed = threading.Condition()


class WriteRight:
    """The right to write to the place `key`, which people call `name`."""

    def __init__(self, key: str, name: str, take: Callable[[], None], drop: Callable[[], None]) -> None:
        self._key = key
        self._name = name
        self._take = take
        self._drop = drop

    @contextlib.contextmanager
    def held(self, *, long: bool) -> Generator[None]:
        """Have the right for as long as the context is open; within it, this thread may take it again.

        A `long` one (`Store.writing`) makes everybody else fail at once. A short one (a single write) lets
        other threads of this process wait for it.

        Raises InputError, naming the process, where another has it.
        """
        self._enter(long)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, long: bool) -> None:
        here = (threading.get_ident(), os.getpid())
        with _changed:
            while (holder := _holders.get(self._key)) is not None and holder.process == here[1]:
                if holder.thread == here[0] and holder.right is self:
                    holder.depth += 1
                    return
                if holder.long or holder.thread == here[0]:
                    raise refusal(self._name, f"another thread of this process (process {here[1]})")
                if not _changed.wait(_PATIENCE):
                    raise refusal(self._name, f"another thread of this process (process {here[1]})")
            _holders[self._key] = _Holder(self, here[0], here[1], long)
        try:
            self._take()
        except BaseException:
            self._forget()
            raise

    def _leave(self) -> None:
        holder = _holders[self._key]
        holder.depth -= 1
        if holder.depth:
            return
        try:
            self._drop()
        finally:
            self._forget()

    def _forget(self) -> None:
        with _changed:
            del _holders[self._key]
            _changed.notify_all()


class BusyError(InputError):
    """Somebody else writes to the store at the moment."""


def refusal(name: str, holder: str) -> BusyError:
    """What the second writer is told."""
    return BusyError(f"{name}: is being written by {holder}", remedy="wait for it, or end it")


class FileLock:
    """A lock on a file that exists while it is held.

    A record lock and not `flock`: a child that the holder has forked must not keep it when the holder is
    killed, and the kernel says which process has it.
    """

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._name = name
        self._file = -1

    def take(self) -> None:
        """Take it at once, or raise InputError naming the process that has it."""
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise InputError(
                    f"{self._name}: cannot be written: {self._path}: {error.strerror}",
                    remedy="make its folder writable, or open it for reading only",
                ) from None
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the file between our opening and locking it.
                if os.stat(self._path).st_ino == os.fstat(file).st_ino:
                    self._file = file
                    return
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise InputError(f"{self._name}: cannot be locked: {error.strerror}") from None
                holder = _holder_of(file)
                os.close(file)
                raise refusal(self._name, f"process {holder}" if holder else "another process") from None
            os.close(file)

    def drop(self) -> None:
        """Give it back. The file goes first: who opens it after that makes a new one."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._file)
        self._file = -1


_FLOCK = "hhqqi"
"""struct flock of Linux: type, whence, start, length, process."""


def _holder_of(file: int) -> int:
    """The process that holds a lock on a file; 0 where it has let go or is in another container."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except (OSError, struct.error):
        return 0
    return max(0, process) if kind != fcntl.F_UNLCK else 0
