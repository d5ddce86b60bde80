"""The kernel libraries of one compilation: from the cache, or from workers, several at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

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
        self._cache = LibraryCache(graph_text, others=others)
        self._stack = ExitStack()
        self._built: dict[str, dict[str, Any]] = {}
        self._waiting: list[str] = []
        self._started: dict[str, Compilation] = {}

    def __enter__(self) -> Self:
        for level, out in self._outputs.items():
            built = self._cache.take(level, self._schedules[level], out)
            if built is None:
                self._waiting.append(level)
            else:
                self._built[level] = built
        for _ in range(processes_at_once(len(self._waiting), WORKER_BYTES)):
            self._start_next()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _start_next(self) -> None:
        if self._waiting:
            level = self._waiting.pop(0)
            worker = Compilation(self._text, level, self._outputs[level], self._schedules[level])
            self._started[level] = self._stack.enter_context(worker)

    def result(self, level: str) -> dict[str, Any]:
        """What `build` returned for a level, as JSON; its file is written then. Ask in the order of
        `outputs`. Raises what `build` raised, or CompileError where a worker died.
        """
        if level not in self._built:
            built = self._started[level].result()
            self._start_next()
            self._cache.keep(level, self._schedules[level], self._outputs[level], built)
            self._built[level] = built
        return self._built[level]
