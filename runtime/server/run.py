"""A server's life: listening, and going down without losing what runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ...ir.errors import InputError
from .service import Service

_log = logging.getLogger("llmc.server")

_POLL_SECONDS = 0.05
_SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """Answers new requests with 503 from the first SIGTERM or SIGINT on, waits for those that run (at most
    `drain_seconds`), then ends. A second signal ends at once. /health and /ready answer to the last.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn in the event loop's thread."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        _log.info("going down: %d requests are finished first", self._service.active)
        try:
            asyncio.get_running_loop().call_soon_threadsafe(self._begin_drain)
        except RuntimeError:  # not yet, or no longer, in its loop: nothing runs
            self.should_exit = True

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._wait_and_exit())

    async def _wait_and_exit(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._service.settings.drain_seconds):
                while self._service.active:
                    await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before models are loaded: a port in use is found in a second, not in a minute.

    Raises InputError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{host}:{port}: {reason}", remedy="choose another --host or --port") from None
    listener.setblocking(False)
    return listener


def run(app: FastAPI, listener: socket.socket, **options: Any) -> bool:
    """Serve until a signal; returns whether every request was finished. `options` go to uvicorn's Config."""
    service: Service = app.state.service
    # The engine's thread waits for the interpreter after each step as long as the event loop's may keep it: 5
    # ms by default, a twentieth of a step.
    sys.setswitchinterval(_SWITCH_SECONDS)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        **options,
    )
    Server(config, service).run(sockets=[listener])
    return service.active == 0


__all__ = ["Server", "listen", "run"]
