"""A small HTTP/1.1 client on asyncio's streams, which spends little on each server-sent event.

The load generator shares its machine with the server that it measures, so what it spends itself counts
(`overhead.py` says how much that is). It does what a benchmark needs (POST, GET, chunked bodies, kept
connections, TLS) and no more: no redirects, no compression, no cookies, no proxies.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from ...ir.errors import InputError
from .records import Failure

_MOST_HEAD = 1 << 16
_MOST_BODY = 1 << 26
_MOST_LINE = 1 << 22
_READ = 1 << 16

_Result = TypeVar("_Result")
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run_loop(main: Coroutine[Any, Any, _Result]) -> _Result:
    """`asyncio.run`, in uvloop's event loop where there is one: a sixth less for each event of a stream."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(main)
    return uvloop.run(main)


class RequestFailed(Exception):
    """A request that brought no complete answer; `failure` says why."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.failure = Failure(kind, " ".join(detail.split())[:200])


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. `prefix` is what stands before `/v1/…` in its paths."""

    host: str
    port: int
    tls: bool
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """From `http://host:port`, with or without a path before `/v1` and with or without `/v1`.

        Raises InputError for anything else.
        """
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise InputError(f"--server {url!r}: {error}", remedy="pass http://HOST:PORT") from error
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or not plain:
            raise InputError(f"--server {url!r} is no address of a server", remedy="pass http://HOST:PORT")
        if parts.username or parts.password:
            raise InputError("--server holds a user's name or password", remedy="pass --api-key")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), tls, prefix)

    @property
    def authority(self) -> str:
        """What stands in the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Client:
    """Requests to one server, as many at once as are asked for; connections are kept for later ones.

    Use it as an asynchronous context manager. A cancelled request closes its connection, which is how a
    server learns that nobody waits any more.
    """

    def __init__(self, address: Address, *, api_key: str | None = None, timeout: float = 60.0) -> None:
        self.address = address
        self._timeout = timeout
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InputError("--api-key holds characters that no HTTP header may", remedy="pass ASCII")
        lines = [f"Host: {address.authority}", "User-Agent: llmc-bench", "Accept: */*"]
        lines += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._headers = "\r\n".join(lines)
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop()[1].close()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def fetch(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """(status, whole body). Raises RequestFailed where there is none within the client's timeout."""
        parts: list[bytes] = []
        held = 0

        def keep(_: int, data: bytes) -> None:
            nonlocal held
            held += len(data)
            if held > _MOST_BODY:
                raise RequestFailed("malformed", f"the body of {path} is longer than {_MOST_BODY} bytes")
            parts.append(data)

        try:
            async with asyncio.timeout(self._timeout):
                status = await self.stream(method, path, body, keep)
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no end after {self._timeout:g} s") from error
        return status, b"".join(parts)

    async def stream(
        self, method: str, path: str, body: bytes | None, receive: Callable[[int, bytes], None]
    ) -> int:
        """Calls `receive(status, data)` with each piece of the body as it comes; returns the status.

        Raises RequestFailed (`connect`, `disconnected`, `malformed`) and whatever `receive` raises.
        """
        (reader, writer), head = await self._begin(self._message(method, path, body))
        keep = False
        try:
            keep = await _read_body(reader, head, receive)
        finally:
            if keep:
                self._idle.append((reader, writer))
            else:
                writer.close()
        return head.status

    async def _begin(self, message: bytes) -> tuple[_Connection, _Head]:
        """Sends over a kept connection or a new one; returns it with the head of the answer.

        A kept connection that the server has closed meanwhile shows so by ending before any answer; that is
        no failure of the request, which goes over another one.
        """
        while self._idle:
            kept = self._idle.pop()
            if kept[0].at_eof() or kept[1].is_closing():
                kept[1].close()
            elif (head := await _send(*kept, message, fresh=False)) is not None:
                return kept, head
        try:
            fresh = await asyncio.open_connection(
                self.address.host, self.address.port, ssl=self._tls, limit=_MOST_HEAD
            )
        except OSError as error:
            raise RequestFailed("connect", error.strerror or str(error)) from error
        head = await _send(*fresh, message, fresh=True)
        assert head is not None, "only a kept connection may end without an answer"
        return fresh, head

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode("ascii") + (body or b"")


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    length: int | None  # None: until the connection ends, or chunked
    chunked: bool
    keep: bool


async def _send(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes, *, fresh: bool
) -> _Head | None:
    """Sends and reads the answer's head; the connection is closed where there is none. None: it had ended."""
    head = None
    try:
        writer.write(message)
        await writer.drain()
        head = _parse_head(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.IncompleteReadError as error:
        if fresh or error.partial:
            raise RequestFailed("disconnected", "the connection ended before an answer") from error
    except asyncio.LimitOverrunError as error:
        raise RequestFailed("malformed", "the answer's head does not end") from error
    except OSError as error:
        if fresh:
            raise RequestFailed("disconnected", error.strerror or str(error)) from error
    finally:
        if head is None:
            writer.close()
    return head


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


async def _read_body(
    reader: asyncio.StreamReader, head: _Head, receive: Callable[[int, bytes], None]
) -> bool:
    """Hands on the body; returns whether the connection can be used again."""
    chunks = Chunks() if head.chunked else None
    left = head.length
    while left != 0 and not (chunks is not None and chunks.done):
        try:
            data = await reader.read(_READ)
        except OSError as error:
            raise RequestFailed("disconnected", error.strerror or str(error)) from error
        if not data:
            if chunks is None and left is None:
                return False  # the end of the connection is the end of the body
            raise RequestFailed("disconnected", "the connection ended inside the body")
        if chunks is not None:
            data = chunks.feed(data)
        elif left is not None:
            if len(data) > left:
                raise RequestFailed("malformed", "the body is longer than its content-length")
            left -= len(data)
        if data:
            receive(head.status, data)
    return head.keep


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


class Events:
    """Server-sent events, however the bytes were split: the text of each `data:` line.

    One event of an OpenAI-compatible server is one line of JSON; other fields and comments say nothing here.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete. Raises RequestFailed for a line without an end."""
        lines = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MOST_LINE:
            raise RequestFailed("malformed", f"an event is longer than {_MOST_LINE} bytes")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
