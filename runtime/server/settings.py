"""What a server may be asked to do, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits and rights of a server."""

    api_keys: tuple[str, ...] = ()
    """Keys of which requests must bring one ("Authorization: Bearer KEY"); empty: none is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered, without port; empty: any. A server on loopback without keys
    needs this: a page in the user's browser can make a name of its own point here (DNS rebinding)."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other pages that may call the API (CORS); "*" for any."""
    max_body_bytes: int = 8 << 20
    """Longest request body."""
    request_seconds: float | None = 600.0
    """Deadline of a request from its arrival; None for none."""
    drain_seconds: float = 30.0
    """What running requests get to finish after SIGTERM."""
    page: bool = True
    """Whether the web page is served at /."""
    documents_writable: bool = False
    """Whether requests may add documents to what is served of them, and delete them."""
    adapter_folder: Path | None = None
    """Where adapters lie that requests may load, and unload; None: requests change nothing."""
    max_adapters: int = 64
    """Most adapters at a time, where requests load them: each takes memory until it is unloaded."""
    max_upload_bytes: int = 32 << 20
    """Longest document that a request may add."""
