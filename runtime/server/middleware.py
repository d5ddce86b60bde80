"""What every request passes before an endpoint sees it: host, origin, key, size of the body, and whether the
server is going down. Plain ASGI, so that a client's going is seen by the endpoint itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Service

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Served without a key, and while the server goes down. So are the page's own files."""

STATIC = "/static/"

DIRECT = "llmc.send"
"""In a request's scope: the server's own `send`."""

UPLOADS = "/v1/rag/documents"


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path: str = scope["path"]
        free = path in OPEN_PATHS or path.startswith(STATIC)
        refusal = self._refusal(scope, headers, free=free)
        if refusal is not None:
            self._service.metrics.refused.labels(str(refusal.status)).inc()
            await refusal.response()(scope, receive, send)
            return
        origin = headers.get("origin")
        if scope["method"] == "OPTIONS" and origin is not None:
            await _preflight(send, origin)
            return
        limited = _Limited(receive, self._most(scope))
        sender = _Sender(send, self._service, origin)
        scope[DIRECT] = send
        if free:
            await self._app(scope, limited, sender)
            return
        self._service.active += 1
        try:
            await self._app(scope, limited, sender)
        finally:
            self._service.active -= 1

    def _refusal(self, scope: Scope, headers: Headers, *, free: bool) -> ApiError | None:
        settings = self._service.settings
        if settings.allowed_hosts and _host(headers.get("host", "")) not in settings.allowed_hosts:
            return ApiError(
                403, "this Host is not served here; --allowed-host names others", code="wrong_host"
            )
        origin = headers.get("origin")
        if origin is not None and not self._may_call(origin, headers.get("host", "")):
            return ApiError(
                403, "pages of this Origin may not call; --cors-origin allows it", code="wrong_origin"
            )
        if scope["method"] == "OPTIONS" and origin is not None:
            return None
        if not free and not self._service.accepts(headers.get("authorization")):
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._service.draining and not free:
            return ApiError(
                503, "the server is going down", code="shutting_down", headers={"Retry-After": "5"}
            )
        return _body_refusal(headers, self._most(scope))

    def _most(self, scope: Scope) -> int:
        """Bytes that a body may have: a document's file has a limit of its own."""
        settings = self._service.settings
        if scope["path"] == UPLOADS and scope["method"] == "POST":
            return settings.max_upload_bytes
        return settings.max_body_bytes

    def _may_call(self, origin: str, host: str) -> bool:
        allowed = self._service.settings.allowed_origins
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc.lower() == host.lower()


def _body_refusal(headers: Mapping[str, str], most: int) -> ApiError | None:
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        return ApiError(
            413, f"the body has {length[:20]} bytes, allowed are {most}", param="body", code="body_too_large"
        )
    return None


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.rsplit(":", 1)[0] if header.rpartition(":")[2].isdigit() else header
    return name.strip("[]").lower()


async def _preflight(send: Send, origin: str) -> None:
    headers = [
        (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
        (b"vary", b"origin"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _Limited:
    """Receives a body of bounded length, whatever Content-Length says."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most
        self._most = most

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                # Not an ApiError: FastAPI lets only this one through while it reads a body.
                raise HTTPException(413, f"the body is longer than {self._most} bytes")
        return message


class _Sender:
    """Sends an answer with the headers that all of them have, and counts the refusals."""

    def __init__(self, send: Send, service: Service, origin: str | None) -> None:
        self._send = send
        self._service = service
        self._origin = origin

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.setdefault("headers", [])
            headers.append((b"x-content-type-options", b"nosniff"))
            if self._origin is not None:
                headers.append((b"access-control-allow-origin", self._origin.encode("latin-1", "replace")))
                headers.append((b"vary", b"origin"))
            if message["status"] >= 400:
                self._service.metrics.refused.labels(str(message["status"])).inc()
        await self._send(message)
