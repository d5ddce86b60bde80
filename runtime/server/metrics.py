"""What Prometheus reads at /metrics. Names are vLLM's where the meaning is the same ("Production metrics" in
its documentation), so that dashboards made for it work.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation import StepOutput

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_LABELS = ("model_name",)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.mean_seconds: dict[str, float] = {}
        """By model: the running mean of how long requests take, the latest counting a tenth."""
        registry = self.registry
        ProcessCollector(registry=registry)  # memory, CPU time and open files of this process
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Tokens of prompts.", _LABELS, registry=registry)
        self.streams: dict[str, StreamNumbers] = {}
        """By model."""
        registry.register(_StreamCollector(self.streams))
        self.success = Counter(
            "vllm:request_success", "Requests that ended.", (*_LABELS, "finished_reason"), registry=registry
        )
        self.refused = Counter(
            "llmc:requests_refused", "Requests answered with an error.", ("status",), registry=registry
        )
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From arrival to the first token.",
            _LABELS,
            buckets=_FIRST,
            registry=registry,
        )
        self.per_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time a token after the first, by request.",
            _LABELS,
            buckets=_BETWEEN,
            registry=registry,
        )
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end.", _LABELS,
            buckets=_WHOLE, registry=registry,
        )  # fmt: skip

    def watch(self, engines: Mapping[str, Engine]) -> None:
        """Read these engines' gauges whenever the metrics are asked for."""
        self.registry.register(_EngineCollector(engines))

    def page(self) -> bytes:
        """The text exposition."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class StreamNumbers:
    """What is counted for every token of a model, in the event loop's thread: a `Histogram` and a
    `Counter` of prometheus_client, which lock each number, cost several times as much.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.pauses = [0] * (len(_BETWEEN) + 1)
        """From token to token of a request: how many were at most as long as each bound and longer than the
        one before; the last ones are longer than all.
        """

    def pause(self, seconds: float) -> None:
        """Count one."""
        self.pauses[bisect_left(_BETWEEN, seconds)] += 1
        self.seconds += seconds


class _StreamCollector(Collector):
    def __init__(self, streams: Mapping[str, StreamNumbers]) -> None:
        self._streams = streams

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=_LABELS)
        between = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "From token to token of a request.", labels=_LABELS
        )
        bounds = [*(floatToGoString(bound) for bound in _BETWEEN), "+Inf"]
        for name, numbers in self._streams.items():
            tokens.add_metric([name], numbers.tokens)
            counts = accumulate(numbers.pauses)
            between.add_metric([name], list(zip(bounds, counts, strict=True)), numbers.seconds)
        yield from (tokens, between)


class _EngineCollector(Collector):
    """Numbers that the engine keeps. They are single integers, read without stopping it."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Sequences that run.", labels=_LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait.", labels=_LABELS)
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of the KV cache's pages in use, 0 to 1.", labels=_LABELS
        )
        preempted = CounterMetricFamily(
            "vllm:num_preemptions", "Sequences sent back to wait.", labels=_LABELS
        )
        queries = CounterMetricFamily(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", labels=_LABELS
        )
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens found there.", labels=_LABELS)
        from_disk = CounterMetricFamily(
            "llmc:prefix_cache_disk_hits", "Prompt tokens read from --prefix-cache.", labels=_LABELS
        )
        steps = CounterMetricFamily("llmc:engine_steps", "Steps computed.", labels=_LABELS)
        for name, engine in self._engines.items():
            count = engine.counters
            running.add_metric([name], len(engine.scheduler.running))
            waiting.add_metric([name], len(engine.scheduler.waiting))
            usage.add_metric([name], engine.blocks.num_used / engine.blocks.num_pages)
            preempted.add_metric([name], count.preemptions)
            queries.add_metric([name], count.tokens_looked_up)
            hits.add_metric([name], count.tokens_from_cache)
            from_disk.add_metric([name], count.tokens_from_disk)
            steps.add_metric([name], count.steps)
        yield from (running, waiting, usage, preempted, queries, hits, from_disk, steps)


class Timing:
    """The clock of one request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._arrived = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._tokens = 0
        self._prompts: set[str] = set()
        self._stream = metrics.streams.setdefault(model, StreamNumbers())

    def note(self, outputs: list[StepOutput]) -> None:
        """Take up outputs that have just come."""
        now = time.perf_counter()
        for output in outputs:
            if not output.token_ids:
                continue
            self._tokens += len(output.token_ids)
            if output.request_id not in self._prompts:
                self._prompts.add(output.request_id)
                self._metrics.prompt_tokens.labels(self._model).inc(output.prompt_tokens)
            if self._first is None:
                self._first = now
                self._metrics.first_token.labels(self._model).observe(now - self._arrived)
            elif output.index == 0:
                self._stream.pause(now - self._last)
            self._stream.tokens += len(output.token_ids)
            if output.index == 0:
                self._last = now

    def end(self, reason: str) -> None:
        """The request is over: "stop", "length", "abort" or "error"."""
        now = time.perf_counter()
        self._metrics.success.labels(self._model, reason).inc()
        self._metrics.whole.labels(self._model).observe(now - self._arrived)
        means, seconds = self._metrics.mean_seconds, now - self._arrived
        means[self._model] = 0.9 * means.get(self._model, seconds) + 0.1 * seconds
        if self._first is not None and self._tokens > 1:
            mean = (self._last - self._first) / (self._tokens - 1)
            self._metrics.per_token.labels(self._model).observe(mean)
