"""A small HTTP/1.1 client that spends little on each server-sent event.

The load generator shares its machine with the server that it measures, so what it spends itself counts
(`overhead.py` says how much that is). It does what a benchmark needs (POST, GET, chunked bodies, kept
connections, TLS) and no more: no redirects, no compression, no cookies, no proxies.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from ...ir.errors import InputError
from .connection import Connection, Receive, RequestFailed

_MOST_BODY = 1 << 26
_MOST_LINE = 1 << 22

_Result = TypeVar("_Result")


def run_loop(main: Coroutine[Any, Any, _Result]) -> _Result:
    """`asyncio.run`, in uvloop's event loop where there is one: a sixth less for each event of a stream."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(main)
    return uvloop.run(main)


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
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().close()
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

    async def stream(self, method: str, path: str, body: bytes | None, receive: Receive) -> int:
        """Calls `receive(status, data)` with each piece of the body as it comes; returns the status.

        Raises RequestFailed (`connect`, `disconnected`, `malformed`) and whatever `receive` raises.
        """
        message = self._message(method, path, body)
        while self._idle:
            kept = self._idle.pop()
            if not kept.usable:
                continue
            try:
                return await self._ask(kept, message, receive)
            except RequestFailed as error:
                # A kept connection that the server has closed meanwhile shows so by ending before any answer;
                # that is no failure of the request, which goes over another one.
                if kept.answered or error.failure.kind != "disconnected":
                    raise
        loop, address = asyncio.get_running_loop(), self.address
        try:
            _, fresh = await loop.create_connection(Connection, address.host, address.port, ssl=self._tls)
        except OSError as error:
            raise RequestFailed("connect", error.strerror or str(error)) from error
        return await self._ask(fresh, message, receive)

    async def _ask(self, connection: Connection, message: bytes, receive: Receive) -> int:
        status = await connection.ask(message, receive)
        if connection.usable:
            self._idle.append(connection)
        return status

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode("ascii") + (body or b"")


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
