"""Documents that a server of tests has, and how they are written to it."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from llmc.runtime.server import ServerSettings

from .server_harness import RunningServer

WRITABLE = ServerSettings(documents_writable=True, max_upload_bytes=20_000)
ADA = "# Ada\n\nAda Lovelace was born in London.\n\nShe wrote the first program for the Engine."
BABBAGE = "# Babbage\n\nCharles Babbage designed the Engine in London."


def upload(server: RunningServer, name: str, data: bytes, query: str = "", **headers: str) -> tuple[int, Any]:
    path = f"/v1/rag/documents?name={quote(name, safe='')}{query}"
    given = {"Content-Type": "application/octet-stream", **headers}
    status, body, _ = server.request("POST", path, raw=data, headers=given)
    return status, body


def ids(server: RunningServer) -> list[str]:
    return [one["id"] for one in server.get("/v1/rag/documents")[1]["data"]]
