"""Asks `/health` at a fixed pace while other work runs: whether the server's event loop is ever blocked."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Self

from .connection import RequestFailed
from .http import Client
from .statistics import percentile

INTERVAL = 0.05  # seconds


class HealthPoller:
    """An asynchronous context manager; polls every `interval` seconds until it is left.

    A poll that takes longer than the interval delays the next one, so a server that hangs for a second counts
    once with a second, not twenty times.
    """

    def __init__(self, client: Client, *, interval: float = INTERVAL) -> None:
        self._client = client
        self._interval = interval
        self._seconds: list[float] = []
        self._failed = 0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    def result(self) -> dict[str, Any]:
        """Milliseconds until the whole answer was there, of polls that got a 200."""
        milliseconds = [1000 * seconds for seconds in self._seconds]
        return {
            "polls": len(self._seconds) + self._failed,
            "failed": self._failed,
            "p50_ms": percentile(milliseconds, 50),
            "p99_ms": percentile(milliseconds, 99),
            "max_ms": max(milliseconds, default=None),
        }

    async def _poll(self) -> None:
        due = time.perf_counter()
        while True:
            began = time.perf_counter()
            try:
                status, _ = await self._client.fetch("GET", "/health")
            except RequestFailed:
                status = 0
            if status == 200:
                self._seconds.append(time.perf_counter() - began)
            else:
                self._failed += 1
            due = max(due + self._interval, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
