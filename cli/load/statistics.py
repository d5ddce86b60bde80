"""From records to numbers, by the definitions of vLLM's `bench serve` (vllm/benchmarks/serve.py), same names.

TTFT is from sending the request to the first piece of the answer, E2EL to the last one, ITL the time between
pieces, TPOT = (E2EL - TTFT) / (tokens - 1), of answers of more than one token. Rates are over the whole run,
from its start until the last request has ended. Failed requests count in no mean, no rate and no goodput.
Percentiles are numpy's (linear), deviations those of a population.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...ir.errors import InputError
from .records import Record

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")
_SLOS = ("ttft", "tpot", "e2el")


def summarize(
    records: Sequence[Record], duration: float, *, goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All numbers of a run of `duration` seconds; `goodput` is limits in milliseconds by metric.

    Of a metric that no request has (TPOT where every answer is of one token), the numbers are None.
    """
    done = [record for record in records if record.failure is None]
    prompt = sum(record.prompt_tokens for record in done)
    output = sum(record.output_tokens for record in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "failures": failures(records),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": _busiest_second(done),
        "max_concurrent_requests": peak_concurrency(done),
    }
    if goodput:
        good = sum(meets(record, goodput) for record in done)
        result |= {"goodput": dict(goodput), "request_goodput": good / duration, "good_requests": good}
    for metric, values in _values(done).items():
        result |= _distribution(metric, values)
    chunks = sum(len(record.chunks) for record in done)
    result |= {
        "tokens_per_chunk": output / chunks if chunks else None,
        "other_length": sum(record.output_tokens != record.arrival.output_tokens for record in done),
        "usage_missing": sum(not record.counted for record in done),
        "p99_client_lag_ms": percentile([1000 * (r.started - r.scheduled) for r in records], 99),
    }
    return result


def meets(record: Record, goodput: Mapping[str, float]) -> bool:
    """Whether an answer kept every limit (milliseconds); TPOT of an answer of one token is 0."""
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.latency}
    return all(1000 * values[metric] <= limit for metric, limit in goodput.items())


def failures(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Kind of failure → how many, and what the first of them said."""
    found = [record.failure for record in records if record.failure is not None]
    counts = Counter(failure.kind for failure in found)
    examples = {failure.kind: failure.detail for failure in reversed(found)}
    return {kind: {"count": count, "example": examples[kind]} for kind, count in counts.most_common()}


def peak_concurrency(records: Sequence[Record]) -> int:
    """Most requests that were under way at one moment; one that ends as another starts is not beside it."""
    events = sorted(
        [(record.started, 1) for record in records] + [(record.chunks[-1], -1) for record in records]
    )
    running = most = 0
    for _, change in events:
        running += change
        most = max(most, running)
    return most


def percentile(values: Sequence[float], q: float) -> float | None:
    """The `q`th percentile, interpolated linearly; None of no values."""
    if not values:
        return None
    import numpy as np

    return float(np.percentile(values, q))


def parse_goodput(text: str) -> dict[str, float]:
    """`ttft:2000,tpot:200` → limits in milliseconds. Raises InputError, naming the part that is wrong."""
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        metric, _, value = part.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if metric not in _SLOS or metric in limits or not limit > 0:
            raise InputError(
                f"--goodput {part!r} is no limit",
                remedy=f"allowed: {', '.join(f'{name}:MILLISECONDS' for name in _SLOS)}, each once",
            )
        limits[metric] = limit
    if not limits:
        raise InputError("--goodput is empty", remedy="pass --goodput ttft:2000,tpot:200")
    return limits


def _values(done: Sequence[Record]) -> dict[str, list[float]]:
    return {
        "ttft": [record.ttft for record in done],
        "tpot": [tpot for record in done if (tpot := record.tpot) is not None],
        "itl": [gap for record in done for gap in record.itl],
        "e2el": [record.latency for record in done],
    }


def _distribution(metric: str, values: Sequence[float]) -> dict[str, float | None]:
    names = ("mean", "median", "std", *(f"p{q}" for q in PERCENTILES))
    if not values:
        return {f"{name}_{metric}_ms": None for name in names}
    import numpy as np

    array = 1000 * np.asarray(values, dtype=np.float64)
    numbers = (array.mean(), np.median(array), array.std(), *np.percentile(array, PERCENTILES))
    return {f"{name}_{metric}_ms": float(number) for name, number in zip(names, numbers, strict=True)}


def _busiest_second(done: Sequence[Record]) -> int:
    """Most pieces of answers that came within one second, of seconds counted from the first request."""
    if not done:
        return 0
    start = min(record.started for record in done)
    seconds = Counter(int(at - start) for record in done for at in record.chunks)
    return max(seconds.values())
