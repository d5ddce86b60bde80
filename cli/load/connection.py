"""One HTTP/1.1 connection of the load generator, as a protocol of the event loop: bytes are taken where they
come, without a task or a buffer between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from .records import Failure

_MOST_HEAD = 1 << 16

Receive = Callable[[int, bytes], None]
"""Takes (status, the next piece of the body)."""


class RequestFailed(Exception):
    """A request that brought no complete answer; `failure` says why."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.failure = Failure(kind, " ".join(detail.split())[:200])


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    length: int | None  # None: until the connection ends, or chunked
    chunked: bool
    keep: bool


class Connection(asyncio.Protocol):
    """Answers one request after the other."""

    def __init__(self) -> None:
        self.usable = True
        """Whether another request may be sent."""
        self.answered = False
        """Whether anything has come since the last request was sent."""
        self._transport: asyncio.Transport | None = None
        self._over: asyncio.Future[int] | None = None  # of the request that is under way
        self._receive: Receive | None = None
        self._begun = b""  # of a head
        self._head: _Head | None = None
        self._chunks: Chunks | None = None
        self._left: int | None = None

    async def ask(self, message: bytes, receive: Receive) -> int:
        """Sends a request, calls `receive` with each piece of the answer's body as it comes; returns the
        status.

        The connection is closed where the request is cancelled, `receive` raises, or no complete answer comes
        (RequestFailed: `disconnected`, `malformed`).
        """
        assert self._transport is not None, "asyncio calls connection_made first"
        self._over = asyncio.get_running_loop().create_future()
        self._receive, self._begun, self._head, self.answered = receive, b"", None, False
        complete = False
        try:
            self._transport.write(message)
            status = await self._over
            complete = True
        finally:
            self._over = None
            if not complete:
                self.close()
        return status

    def close(self) -> None:
        """Ends the connection, whatever is under way."""
        self.usable = False
        if self._transport is not None:
            self._transport.close()

    # Called by the event loop ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Takes the next bytes of an answer."""
        over = self._over
        if over is None or over.done():
            self.close()  # nobody asked
            return
        self.answered = True
        try:
            self._take(data)
        except Exception as error:  # noqa: BLE001  (the request's caller gets it)
            if not over.done():
                over.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends what is under way."""
        self.usable = False
        if self._over is None or self._over.done():
            return
        head = self._head
        if exc is None and head is not None and self._chunks is None and self._left is None:
            self._over.set_result(head.status)  # the end of the connection is the end of the body
            return
        place = "before an answer" if head is None else "inside the body"
        said = f"the connection ended {place}"
        self._over.set_exception(RequestFailed("disconnected", getattr(exc, "strerror", None) or said))

    def _take(self, data: bytes) -> None:
        if self._head is None:
            data = self._begun + data
            end = data.find(b"\r\n\r\n")
            if max(end, len(data) if end < 0 else 0) > _MOST_HEAD:
                raise RequestFailed("malformed", "the answer's head does not end")
            if end < 0:
                self._begun = data
                return
            self._head = _parse_head(data[: end + 4])
            self._chunks = Chunks() if self._head.chunked else None
            self._left = self._head.length
            data = data[end + 4 :]
        self._take_body(self._head, data)

    def _take_body(self, head: _Head, data: bytes) -> None:
        chunks = self._chunks
        if chunks is not None:
            data = chunks.feed(data)
        elif self._left is not None:
            if len(data) > self._left:
                raise RequestFailed("malformed", "the body is longer than its content-length")
            self._left -= len(data)
        if data and self._receive is not None:
            self._receive(head.status, data)
        if (self._left == 0 if chunks is None else chunks.done) and self._over is not None:
            if not head.keep:
                self.close()
            self._over.set_result(head.status)


def _parse_head(head: bytes) -> _Head:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not (status.isascii() and status.isdigit() and len(status) == 3):
        raise RequestFailed("malformed", f"not an HTTP/1.1 answer: {first[:80]!r}")
    headers = {
        name.strip().lower(): value.strip().lower() for name, _, value in (x.partition(":") for x in lines)
    }
    chunked = headers.get("transfer-encoding", "").endswith("chunked")
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit()):
        raise RequestFailed("malformed", f"content-length {length[:40]!r}")
    code = int(status)
    empty = code in (204, 304)
    size = 0 if empty else None if chunked or length is None else int(length)
    keep = version != "HTTP/1.0" and headers.get("connection") != "close"
    return _Head(code, size, chunked and not empty, keep and (chunked or size is not None))


class Chunks:
    """Takes the chunked transfer coding off (RFC 9112, section 7.1), however the bytes were split."""

    def __init__(self) -> None:
        self.done = False
        self._rest = b""
        self._left = 0  # bytes of the chunk that have not come yet
        self._within = False  # in a chunk, up to and with the line end behind it
        self._last = False  # after the chunk of size 0: trailers

    def feed(self, data: bytes) -> bytes:
        """What the next bytes hold of the body. Raises RequestFailed for bytes that are no chunks."""
        data = self._rest + data
        out: list[bytes] = []
        at = 0
        while not self.done:
            if self._within:
                piece = data[at : at + self._left]
                out.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left or len(data) - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise RequestFailed("malformed", "a chunk is longer than its size")
                at += 2
                self._within = False
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > _MOST_HEAD:
                    raise RequestFailed("malformed", "the size of a chunk does not end")
                break
            line, at = data[at:end], end + 2
            self._line(line)
        self._rest = data[at:]
        if self.done and self._rest:
            raise RequestFailed("malformed", "there are bytes after the last chunk")
        return b"".join(out)

    def _line(self, line: bytes) -> None:
        if self._last:
            self.done = not line  # a trailer, or the empty line that ends all
            return
        size = line.partition(b";")[0].strip()
        try:
            self._left = int(size, 16)
        except ValueError:
            self._left = -1
        if not 0 <= self._left < 1 << 31:
            raise RequestFailed("malformed", f"size of a chunk: {size[:40]!r}")
        self._last = self._left == 0
        self._within = not self._last
