"""A whole benchmark of one server: its model, the prompts, the run or runs, the numbers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from ...ir.errors import InputError, LlmcError
from . import arrivals as arrival_times
from .answers import error_message, request_body, send
from .connection import RequestFailed
from .health import HealthPoller
from .http import Address, Client, run_loop
from .knee import Trial, find_knee, holds, too_many_late
from .prompts import Prompts, random_prompts, read_prompts
from .records import Arrival, Record
from .runner import Run, run
from .statistics import summarize

SETTLE_SECONDS = 1.0  # between two runs: cancelled requests leave the server
SHORTEST_TRIAL_SECONDS = 1.0  # over which a run's requests arrive; a shorter run says nothing of a rate

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Load:
    """What to do to a server. Lengths and rates are those of `llmc bench --server --help`.

    `rate` is None where nothing was said: a trace then keeps its own times, everything else comes at once.
    """

    server: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    endpoint: str = "chat"
    num_requests: int = 100
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    trace: Path | None = None
    time_scale: float | None = None
    prompts: Path | None = None
    prompt_tokens: int = 512
    output_tokens: int = 64
    max_prompt_tokens: int | None = None
    goodput: dict[str, float] = field(default_factory=dict[str, float])
    seed: int = 0
    timeout: float = 600.0
    health: bool = False
    knee_ms: float | None = None

    def validate(self) -> None:
        """Raises InputError for options that contradict each other."""
        if self.concurrency is not None and (self.trace is not None or self.rate is not None):
            other = "--trace" if self.trace is not None else "--request-rate"
            raise InputError(f"--concurrency and {other} are two ways to time requests", remedy="pass one")
        if self.time_scale is not None and (self.trace is None or self.rate is not None):
            raise InputError("--time-scale stretches a --trace that has no --request-rate", remedy="drop it")
        if self.trace is not None and self.rate is not None and math.isinf(self.rate):
            raise InputError("--request-rate inf leaves nothing of a trace's times", remedy="pass a number")
        if self.knee_ms is not None and self.concurrency is not None:
            raise InputError("--find-knee looks for a rate; --concurrency has none", remedy="pass one")
        if self.knee_ms is not None and self.time_scale is not None:
            raise InputError("--find-knee sets the time scale itself", remedy="drop --time-scale")

    def arrivals(self) -> tuple[list[Arrival], dict[str, Any]]:
        """Every request of a run, and how to say so in the result."""
        if self.trace is not None:
            found = arrival_times.read_trace(self.trace, self.num_requests)
            scale = self.time_scale or 1.0
            if self.rate is not None:
                scale = arrival_times.mean_rate(found) / self.rate
                if math.isinf(scale):
                    raise InputError(f"all requests of {self.trace.name} come at once: it has no rate")
            found = arrival_times.stretched(found, scale)
            rate = arrival_times.mean_rate(found)
            how = {"kind": "trace", "file": self.trace.name, "time_scale": scale}
            return self._clip(found, {**how, "request_rate": None if math.isinf(rate) else rate})
        lengths = (self.prompt_tokens, self.output_tokens)
        if self.concurrency is not None:
            how = {"kind": "closed", "concurrency": self.concurrency}
            return self._clip(arrival_times.at_once(self.num_requests, *lengths), how)
        if self.rate is None or math.isinf(self.rate):
            return self._clip(arrival_times.at_once(self.num_requests, *lengths), {"kind": "at_once"})
        found = arrival_times.random_arrivals(
            self.num_requests, self.rate, *lengths, burstiness=self.burstiness, seed=self.seed
        )
        burstiness = self.burstiness if math.isfinite(self.burstiness) else "inf"
        return self._clip(found, {"kind": "random", "request_rate": self.rate, "burstiness": burstiness})

    def _clip(self, found: list[Arrival], how: dict[str, Any]) -> tuple[list[Arrival], dict[str, Any]]:
        if self.max_prompt_tokens is not None:
            found, cut = arrival_times.clipped(found, self.max_prompt_tokens)
            how["clipped_prompts"] = cut
        return found, how


def bench(load: Load, report: Report) -> tuple[dict[str, Any], list[Record]]:
    """Runs it all; returns the result (keys as vLLM's `bench serve` names them) and the run's records.

    With `knee_ms`, the numbers and records are those of the largest rate that held. Raises LlmcError where
    the server cannot be reached or no request came through, InputError where the options are wrong.
    """
    load.validate()
    return run_loop(_bench(load, report))


async def _bench(load: Load, report: Report) -> tuple[dict[str, Any], list[Record]]:
    address = Address.parse(load.server)
    async with Client(address, api_key=load.api_key, timeout=load.timeout) as client:
        report("asking the server", 0.0)
        model = load.model or await _first_model(client)
        prompts = await _prompts(client, model, load)
        session = _Session(load, client, model, prompts, report)
        head = {"server": load.server, "model": model, "endpoint": load.endpoint, "seed": load.seed}
        if load.knee_ms is None:
            found, how = load.arrivals()
            result, records = await session.measure(found)
            return {**head, "num_requests": len(found), "arrivals": how, **result}, records
        knee, result, records = await session.find_knee(load.knee_ms)
        return {**head, "num_requests": load.num_requests, **result, "knee": knee}, records


class _Session:
    def __init__(self, load: Load, client: Client, model: str, prompts: Prompts, report: Report) -> None:
        self._load = load
        self._client = client
        self._model = model
        self._prompts = prompts
        self._report = report

    async def measure(self, found: Sequence[Arrival]) -> tuple[dict[str, Any], list[Record]]:
        """One run and its numbers."""
        done, health = await self._run(found, None, f"sending {len(found)} requests")
        result = summarize(done.records, done.duration, goodput=self._load.goodput)
        if not result["completed"]:
            kind, what = next(iter(result["failures"].items()))
            raise LlmcError(f"no request came through; {what['count']} times {kind}: {what['example']}")
        return {**result, **health}, done.records

    async def find_knee(self, limit_ms: float) -> tuple[dict[str, Any], dict[str, Any], list[Record]]:
        """(the knee and every trial, the numbers at the knee, its records)."""
        load = self._load
        best: tuple[dict[str, Any], list[Record]] = {}, []
        prompts = self._prompts
        runs = count()

        async def trial(rate: float) -> Trial:
            nonlocal best
            found, how = replace(load, rate=rate).arrivals()
            self._prompts = prompts.for_run(next(runs))
            done, health = await self._run(found, limit_ms, f"{rate:.3g} requests/s")
            result = summarize(done.records, done.duration, goodput=load.goodput)
            kept = not done.stopped and holds(done.records, result["p95_ttft_ms"], limit_ms)
            if kept:
                best = {"arrivals": how, **result, **health}, done.records
            await asyncio.sleep(SETTLE_SECONDS)
            # What had ended when a run was stopped are its quick ones: their percentile says nothing.
            late = None if done.stopped else result["p95_ttft_ms"]
            return Trial(rate, kept, result["request_throughput"], late, result["failed"], done.stopped)

        start = load.rate if load.rate is not None and math.isfinite(load.rate) else 1.0
        highest = load.num_requests / SHORTEST_TRIAL_SECONDS
        rate, trials = await find_knee(trial, start, highest)
        rows = [
            {
                "request_rate": one.rate,
                "holds": one.holds,
                "request_throughput": one.request_throughput,
                "p95_ttft_ms": one.p95_ttft_ms,
                "failed": one.failed,
                "stopped": one.stopped,
            }
            for one in trials
        ]
        bounded = any(not one.holds for one in trials)
        knee = {"p95_ttft_limit_ms": limit_ms, "request_rate": rate, "bounded": bounded, "trials": rows}
        return knee, *best

    async def _run(
        self, found: Sequence[Arrival], limit_ms: float | None, phase: str
    ) -> tuple[Run, dict[str, Any]]:
        """Sends it all; with `limit_ms`, until a request fails or it is certain that too many are late."""
        load, total = self._load, len(found)
        self._report(phase, 0.0)

        async def one(index: int, record: Record) -> None:
            body = request_body(
                self._model, self._prompts.fields(index, record.arrival), record.arrival.output_tokens
            )
            await send(self._client, load.endpoint, body, record, timeout=load.timeout)

        def watch(records: Sequence[Record]) -> bool:
            self._report(phase, sum(record.ended > 0 for record in records) / total)
            if limit_ms is None:
                return False
            now = time.perf_counter()
            waits = [r.ttft if r.chunks else now - r.started for r in records if r.started]
            return too_many_late(waits, total, limit_ms / 1000) or any(r.failure for r in records)

        async with contextlib.AsyncExitStack() as stack:
            poller = await stack.enter_async_context(HealthPoller(self._client)) if load.health else None
            done = await run(found, one, concurrency=load.concurrency, watch=watch)
        return done, {"health": poller.result()} if poller is not None else {}


async def _first_model(client: Client) -> str:
    """The first model that the server lists."""
    try:
        status, body = await client.fetch("GET", "/v1/models")
    except RequestFailed as error:
        where = client.address.authority
        raise LlmcError(f"{where} does not answer: {error.failure.kind}: {error.failure.detail}") from error
    if status != 200:
        remedy = "pass --api-key" if status == 401 else "pass --model"
        raise LlmcError(f"/v1/models answers {status}: {error_message(body)[:200]}", remedy=remedy)
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise LlmcError("/v1/models names no model", remedy="pass --model") from error


async def _prompts(client: Client, model: str, load: Load) -> Prompts:
    if load.prompts is not None:
        return read_prompts(load.prompts, chat=load.endpoint == "chat", most=load.num_requests)
    return await random_prompts(client, model, load.endpoint, load.seed)
