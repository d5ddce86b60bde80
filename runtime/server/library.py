"""The documents that a server offers: knowledge bases by name, and threads for work on them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from ...ir.errors import LlmcError
from .errors import ApiError, hide_places
from .service import Service

if TYPE_CHECKING:
    from ..rag.knowledge import KnowledgeBase

T = TypeVar("T")
Work = Callable[[Callable[[], bool]], T]
"""Gets a function that says whether anybody still waits for the result."""

_READERS = 2
_MOST_READING = 64
_MOST_WRITING = 16
_ANSWERERS = 4
_MOST_ANSWERING = 32
_PATIENCE = 0.5  # seconds
_MOST_UPLOADS = 4
"""Bodies that come in at once: each is held in memory whole."""


class Lane:
    """Threads for work of any length, of which a bounded amount may wait."""

    def __init__(
        self, service: Service, name: str, threads: int, most: int, places: Mapping[str, str]
    ) -> None:
        """`places`: paths that errors do not tell, each with the name that stands for it."""
        self._service = service
        self._places = places
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"llmc-{name}")
        self._most = most
        self._waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[None]:
        """One of the places in the lane. Raises ApiError where all are taken."""
        if self._waiting >= self._most:
            headers = {"Retry-After": "1"}
            message = f"{self._waiting} requests for documents wait"
            raise ApiError(429, message, code="queue_full", headers=headers)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def run(self, work: Work[T]) -> T:
        """The result of `work`. Raises ApiError where too much waits or the deadline passes. Work that has
        not begun when its caller is cancelled never does; work that has is told.
        """
        wanted = threading.Event()
        wanted.set()
        async with self.place():
            try:
                async with asyncio.timeout(self._service.settings.request_seconds):
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(self._pool, work, wanted.is_set)
            except TimeoutError:
                raise self._service.too_late() from None
            except LlmcError as error:
                hide_places(error, self._places)
                raise
            finally:
                wanted.clear()

    def close(self) -> None:
        """Wait for what runs: its knowledge base must outlive it."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _places(bases: Mapping[str, KnowledgeBase]) -> dict[str, str]:
    """Where each knowledge base lies → its name; a name without a folder tells nothing."""
    found: dict[str, str] = {}
    for name, base in bases.items():
        location = base.store.location
        found |= {base.store.cache_folder: "the cache", os.path.realpath(location): name, location: name}
    return {place: name for place, name in found.items() if "/" in place}


class Library:
    """The knowledge bases of one server. They stay the caller's to close."""

    def __init__(self, service: Service, bases: Mapping[str, KnowledgeBase]) -> None:
        self.service = service
        self.bases = dict(bases)
        for base in self.bases.values():
            base.patience = _PATIENCE  # a search is not to wait for what a large store derives of a write
        places = _places(bases)
        self.reading = Lane(service, "read", _READERS, _MOST_READING, places)
        # One writer: a store has one at a time, and a second would only be refused.
        self.writing = Lane(service, "write", 1, _MOST_WRITING, places)
        self.answering = Lane(service, "answer", _ANSWERERS, _MOST_ANSWERING, places)
        self._uploads = 0

    @property
    def writable(self) -> bool:
        """Whether requests may add and delete."""
        return self.service.settings.documents_writable

    def base(self, name: str | None) -> tuple[str, KnowledgeBase]:
        """The knowledge base of a request, with its name. Raises ApiError: 404 with those there are."""
        if not self.bases:
            raise ApiError(
                404,
                "no documents are served here; llmc serve --documents KB offers some",
                code="no_documents",
            )
        if name is None and len(self.bases) == 1:
            return next(iter(self.bases.items()))
        known = ", ".join(self.bases)
        if name is None:
            raise ApiError(
                400,
                f"knowledge is missing; served here: {known}",
                param="knowledge",
                code="missing_required_parameter",
            )
        if name not in self.bases:
            raise ApiError(
                404,
                f"knowledge {name[:200]!r} is not served here; there are: {known}",
                param="knowledge",
                code="knowledge_not_found",
            )
        return name, self.bases[name]

    def check_writable(self) -> None:
        """Raises ApiError: 403 where requests may not change the documents."""
        if not self.writable:
            raise ApiError(
                403,
                "documents can only be read here; llmc serve --documents-writable lets requests change them",
                code="read_only",
            )

    @asynccontextmanager
    async def upload(self) -> AsyncGenerator[None]:
        """The right to send a file, under the deadline of requests. Raises ApiError."""
        if self._uploads >= _MOST_UPLOADS:
            headers = {"Retry-After": "1"}
            message = f"{self._uploads} documents are being sent"
            raise ApiError(429, message, code="queue_full", headers=headers)
        self._uploads += 1
        try:
            async with asyncio.timeout(self.service.settings.request_seconds):
                yield
        except TimeoutError:
            raise self.service.too_late() from None
        finally:
            self._uploads -= 1

    def close(self) -> None:
        """End the threads, after what they do now."""
        for lane in (self.reading, self.writing, self.answering):
            lane.close()
