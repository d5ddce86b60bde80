"""What `llmc bench --server` prints for a person."""

from __future__ import annotations

from typing import Any

from ..output import facts, table
from .statistics import METRICS, PERCENTILES

_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def text(result: dict[str, Any]) -> str:
    """The numbers of a run, or of a search for the knee, as lines and tables."""
    parts = [_knee(result["knee"])] if "knee" in result else []
    if "duration" in result:
        parts += [_facts(result), _latencies(result)]
        parts += [_failures(result["failures"])] if result["failures"] else []
    return "\n\n".join(parts)


def _facts(result: dict[str, Any]) -> str:
    health = result.get("health")
    return facts(
        [
            ("server", f"{result['server']} ({result['model']}, {result['endpoint']})"),
            ("arrivals", _arrivals(result["arrivals"])),
            ("requests", _requests(result)),
            ("tokens", f"{result['total_input_tokens']:,} in, {result['total_output_tokens']:,} out"),
            ("request throughput", f"{result['request_throughput']:.2f} /s"),
            ("goodput", _goodput(result)),
            ("output throughput", f"{result['output_throughput']:.1f} tok/s"),
            ("total throughput", f"{result['total_token_throughput']:.1f} tok/s"),
            ("peak concurrency", result["max_concurrent_requests"]),
            ("/health", _health(health) if health else None),
            ("sent late (p99)", f"{result['p99_client_lag_ms'] or 0:.1f} ms after they were due"),
            ("", _lengths(result)),
        ]
    )


def _requests(result: dict[str, Any]) -> str:
    failed = f", {result['failed']} failed" if result["failed"] else ""
    return f"{result['completed']} in {result['duration']:.1f} s{failed}"


def _arrivals(how: dict[str, Any]) -> str:
    rate = how.get("request_rate")
    if how["kind"] == "closed":
        return f"{how['concurrency']} at a time"
    if how["kind"] == "at_once":
        return "all at once"
    if how["kind"] == "trace":
        clipped = f", {how['clipped_prompts']} prompts cut" if how.get("clipped_prompts") else ""
        speed = f"{rate:.3g} /s, " if rate else ""
        return f"{how['file']}, {speed}its times × {how['time_scale']:.3g}{clipped}"
    return f"{rate:.3g} /s, burstiness {how['burstiness']}"


def _goodput(result: dict[str, Any]) -> str | None:
    if "goodput" not in result:
        return None
    limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in result["goodput"].items())
    return f"{result['request_goodput']:.2f} /s ({result['good_requests']} requests: {limits})"


def _health(health: dict[str, Any]) -> str:
    if health["p99_ms"] is None:
        return f"{health['polls']} polls, none answered"
    failed = f", {health['failed']} failed" if health["failed"] else ""
    return f"p50 {health['p50_ms']:.1f} ms, p99 {health['p99_ms']:.1f} ms, {health['polls']} polls{failed}"


def _lengths(result: dict[str, Any]) -> str | None:
    said: list[str] = []
    if result["other_length"]:
        said.append(f"{result['other_length']} answers were of another length than asked for")
    if result["usage_missing"]:
        said.append(f"{result['usage_missing']} came without usage: their chunks were counted")
    return "; ".join(said) or None


def _latencies(result: dict[str, Any]) -> str:
    names = ("mean", "std", *(f"p{q}" for q in PERCENTILES))
    rows = [
        (_TITLES[metric], *(_milliseconds(result[f"{name}_{metric}_ms"]) for name in names))
        for metric in METRICS
    ]
    return table(("ms", *names), rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _failures(failures: dict[str, dict[str, Any]]) -> str:
    rows = [(kind, what["count"], what["example"]) for kind, what in failures.items()]
    return table(("failed", "times", "the first one said"), rows)


def _knee(knee: dict[str, Any]) -> str:
    limit = f"p95 TTFT ≤ {knee['p95_ttft_limit_ms']:g} ms"
    if knee["request_rate"] is None:
        said = f"no rate that was tried holds {limit}"
    elif not knee["bounded"]:
        said = f"{knee['request_rate']:.3g} /s holds {limit}; higher rates want more --num-requests"
    else:
        said = f"{knee['request_rate']:.3g} /s is the largest rate tried that holds {limit}"
    rows = [
        (
            f"{row['request_rate']:.3g}",
            "yes" if row["holds"] else "no",
            _milliseconds(row["p95_ttft_ms"]) + (" (stopped early)" if row["stopped"] else ""),
            row["failed"],
        )
        for row in knee["trials"]
    ]
    return f"{said}\n\n{table(('rate /s', 'holds', 'p95 TTFT ms', 'failed'), rows)}"
