"""The largest rate of requests at which the slowest 5 % still get their first token in time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from .records import Record

PRECISION = 1.1  # the rate that holds and the lowest that does not are closer than this


@dataclass(frozen=True)
class Trial:
    """One run at `rate` requests a second: whether it held the limit, and what it showed."""

    rate: float
    holds: bool
    request_throughput: float
    p95_ttft_ms: float | None
    failed: int
    stopped: bool


async def find_knee(
    trial: Callable[[float], Awaitable[Trial]], start: float, highest: float
) -> tuple[float | None, list[Trial]]:
    """Doubles the rate from `start` until a run does not hold, then halves the gap (geometrically).

    Where `start` does not hold, it is halved first, six times at most. Returns the largest rate that held
    (None: not even the lowest tried), and every trial in order. Rates above `highest` are not tried; nothing
    is looked for within a gap of `PRECISION`.
    """
    trials: list[Trial] = []
    good: float | None = None
    bad: float | None = None
    rate = min(start, highest)
    while True:
        found = await trial(rate)
        trials.append(found)
        if found.holds:
            good = rate
        else:
            bad = rate
        if bad is None:
            if rate >= highest:
                break
            rate = min(2 * rate, highest)
        elif good is None:
            if rate <= start / 64:
                break
            rate = rate / 2
        elif bad / good <= PRECISION:
            break
        else:
            rate = (good * bad) ** 0.5
    return good, trials


def too_many_late(values: Sequence[float], count: int, limit: float) -> bool:
    """Whether the 95th percentile of `count` values will be above `limit` whatever the others are like.

    `values` are those known so far. The percentile lies between two neighbours in order of size; it is above
    the limit for certain once the lower one is.
    """
    lower = int(0.95 * (count - 1))
    return sum(value > limit for value in values) >= count - lower


def holds(records: Sequence[Record], p95_ttft_ms: float | None, limit_ms: float) -> bool:
    """Whether a run kept the limit: every request answered, and the 95th percentile of TTFT within it."""
    lost = any(record.failure is not None for record in records)
    return not lost and p95_ttft_ms is not None and p95_ttft_ms <= limit_ms
