"""Sends requests when they are due, or N at a time, and collects the records."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from .records import Arrival, Record

Send = Callable[[int, Record], Awaitable[None]]
"""Sends request number `index` and fills its record; `scheduled` is there already."""


_WATCH_SECONDS = 0.25
_One = Callable[[int, float], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Run:
    """All requests of a run that ended by itself or was stopped, and its length in seconds."""

    records: list[Record]
    duration: float
    stopped: bool = False


async def run(
    arrivals: Sequence[Arrival],
    send: Send,
    *,
    concurrency: int | None = None,
    watch: Callable[[Sequence[Record]], bool] | None = None,
) -> Run:
    """Sends every request when it is due; with `concurrency`, as soon as fewer than that are under way.

    `watch` sees all records, those under way too, four times a second; once it returns True nothing more is
    sent, what is under way is cancelled, and the run's records are those that were complete.
    """
    _allow_connections(concurrency or len(arrivals))
    records: list[Record] = []

    async def one(index: int, due: float) -> None:
        record = Record(arrivals[index], scheduled=due)
        records.append(record)
        await send(index, record)

    start = time.perf_counter()
    if concurrency is None:
        work = asyncio.create_task(_open_loop(arrivals, one, start))
    else:
        work = asyncio.create_task(_closed_loop(arrivals, one, concurrency))
    stopped = False
    try:
        while not work.done() and not stopped:
            await asyncio.wait([work], timeout=_WATCH_SECONDS)
            stopped = watch is not None and not work.done() and watch(records)
    finally:
        work.cancel()
        await asyncio.wait([work])
    if not stopped:
        work.result()
    duration = time.perf_counter() - start
    return Run([record for record in records if record.ended], duration, stopped)


async def _open_loop(arrivals: Sequence[Arrival], one: _One, start: float) -> None:
    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals):
            due = start + arrival.at
            # Also where it is late: the answers to what was sent are to be read meanwhile.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(index, due))


async def _closed_loop(arrivals: Sequence[Arrival], one: _One, concurrency: int) -> None:
    waiting = iter(range(len(arrivals)))

    async def worker() -> None:
        for index in waiting:
            await one(index, time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(arrivals))):
            group.create_task(worker())


def _allow_connections(count: int) -> None:
    """Each request under way is an open file; the usual soft limit (1,024) is below what may be asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 128
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
