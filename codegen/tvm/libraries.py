"""The kernel libraries of one compilation: from the cache, or from workers, several at once."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, Self

from ...ir.errors import CompileError
from ..memory import processes_at_once
from ..peak import WORKER_BYTES
from .kernels.schedule import Schedule
from .library_cache import LibraryCache
from .worker import Compilation


class Libraries:
    """A library for each level of `outputs` (level → file), of the graph with this text. Those that are not
    in the cache begin to be compiled when the `with` block is entered, and end with it.
    """

    def __init__(
        self,
        graph_text: str,
        outputs: Mapping[str, Path],
        schedules: Mapping[str, Mapping[str, Schedule] | None],
        others: str = "",
    ) -> None:
        """`others`: what the libraries depend on besides our sources (`extensions_key`)."""
        self._text, self._outputs, self._schedules = graph_text, outputs, schedules
        self._asked = (graph_text, dict(outputs), dict(schedules), others)
        self._cache = LibraryCache(graph_text, others=others)
        self._built: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, Future[dict[str, Any]]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._running: set[Compilation] = set()
        self._lock = threading.Lock()
        self._left = False

    def __enter__(self) -> Self:
        missing: list[str] = []
        for level, out in self._outputs.items():
            built = self._cache.take(level, self._schedules[level], out)
            if built is None:
                missing.append(level)
            else:
                self._built[level] = built
        if missing:
            # A thread for each process that runs at once: it waits for a level, and begins the next.
            self._threads = ThreadPoolExecutor(processes_at_once(len(missing), WORKER_BYTES), "kernels")
            for level in reversed(missing):  # the last take the longest: a short one should end it
                here = copy_context()  # which knows the workers that are ready
                self._waiting[level] = self._threads.submit(here.run, self._compile, level)
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._left = True
            for compilation in self._running:
                compilation.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def alike(self, other: Libraries) -> bool:
        """Whether the same files are asked for, and these have not ended."""
        return not self._left and self._asked == other._asked

    def _compile(self, level: str) -> dict[str, Any]:
        with self._lock:
            if self._left:
                raise CompileError("the compilation was left", remedy="start it again")
            worker = Compilation(self._text, level, self._outputs[level], self._schedules[level])
            self._running.add(worker)
        with worker:
            try:
                return worker.result()
            finally:
                with self._lock:
                    self._running.discard(worker)

    def result(self, level: str) -> dict[str, Any]:
        """What `build` returned for a level, as JSON; its file is written then. Raises what `build` raised,
        or CompileError where a worker died.
        """
        if level not in self._built:
            built = self._waiting[level].result()
            self._cache.keep(level, self._schedules[level], self._outputs[level], built)
            self._built[level] = built
        return self._built[level]


_begun: ContextVar[Libraries | None] = ContextVar("begun", default=None)


@contextmanager
def begun(libraries: Libraries) -> Generator[None]:
    """These libraries are being compiled within the block, for `compiled` to take."""
    with libraries:
        token = _begun.set(libraries)
        try:
            yield
        finally:
            _begun.reset(token)


@contextmanager
def compiled(libraries: Libraries) -> Generator[Libraries]:
    """These libraries, or those of a block around that are the same, which end with this one. Others of such
    a block end first: they may have the same files.
    """
    earlier = _begun.get()
    if earlier is not None and earlier.alike(libraries):
        try:
            yield earlier
        finally:
            earlier.__exit__()
        return
    if earlier is not None:
        earlier.__exit__()
    with libraries:
        yield libraries
