"""Azure's trace of conversations against `llmc serve`, beside llama.cpp's server with the same GGUF file.

    python -m benchmarks.trace --model ARTIFACT [--gguf FILE] [--requests 40] [--repeat 1] [--soak MINUTES]
        [--rate R] [-o FILE]

In turns, for each server (ours alone without --gguf): the largest rate at which 95 of 100 requests get
their first token within 2 seconds (`llmc bench --server --trace --find-knee`), the trace stretched to the
rate, over its first requests. Then, with --soak, `llmc serve` alone under that rate for so long: requests
that were lost, and the server's memory by `/metrics` every few seconds, as medians of its quarters. It grows
until the cache's pages are full of prompts that may come again; after that it should be flat, so the soak's
cache is small enough to fill soon.
With --rate nothing is searched and only the soak runs. A server that holds no rate takes long: rates are
halved six times.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .commands import llmc as command
from .commands import machine, report, shared_data
from .llama_server import llama_server
from .tools import our_server

CONTEXT, SLOTS = 8192, 8
TRACE = "serving_traces/AzureLLMInferenceTrace_conv.csv"
SAMPLE_SECONDS = 5.0
SOAK_TOKENS = 65536  # of the cache
RESIDENT = "process_resident_memory_bytes"


def knee(url: str, requests: int, start: float) -> dict[str, Any]:
    """What `llmc bench --find-knee` finds."""
    trace = shared_data() / TRACE
    found = command(
        "bench", "--server", url, "--trace", trace, "--num-requests", str(requests),
        "--request-rate", str(start), "--find-knee",
    )  # fmt: skip
    kept = ("output_throughput", "request_throughput", "p95_ttft_ms", "median_ttft_ms", "median_tpot_ms")
    return {**found["knee"], **{name: found[name] for name in kept if name in found}}


def resident_bytes(url: str) -> float:
    """Memory of the server, by its own metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{RESIDENT} "))


@contextlib.contextmanager
def sampled(url: str) -> Iterator[list[float]]:
    """The memory of a server every few seconds, in a list that grows meanwhile."""
    samples: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            samples.append(resident_bytes(url))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def soak(artifact: Path, rate: float, minutes: float) -> dict[str, Any]:
    """`llmc serve` under a rate: what was lost, and how its memory went."""
    count = max(1, round(rate * 60 * minutes))
    began = time.perf_counter()
    with (
        our_server(artifact, CONTEXT, "--kv-tokens", str(SOAK_TOKENS)) as url,
        sampled(url) as samples,
    ):
        found = command(
            "bench", "--server", url, "--trace", shared_data() / TRACE, "--num-requests", str(count),
            "--request-rate", str(rate),
        )  # fmt: skip
    quarter = len(samples) // 4
    quarters = [statistics.median(samples[i * quarter : (i + 1) * quarter]) for i in range(4) if quarter]
    return {
        "request_rate": rate,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "requests": count,
        "failed": found["failed"],
        "kv_tokens": SOAK_TOKENS,
        "p95_ttft_ms": found["p95_ttft_ms"],
        "resident_mb_by_quarter": [round(value / 1e6, 1) for value in quarters],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--gguf", type=Path, help="the file it was made of; without it llama.cpp is left out")
    parser.add_argument("--requests", type=int, default=40, help="of a run [default: 40]")
    parser.add_argument("--start", type=float, default=0.5, help="first rate tried, a second [default: 0.5]")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--rate", type=float, help="of the soak, requests a second; no search then")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    knees: dict[str, list[dict[str, Any]]] = {"llmc": [], "llama.cpp": []}
    for _ in range(0 if arguments.rate else arguments.repeat):
        with our_server(arguments.model, CONTEXT) as url:
            knees["llmc"].append(knee(url, arguments.requests, arguments.start))
        if arguments.gguf is not None:
            with llama_server(arguments.gguf, context=CONTEXT, slots=SLOTS) as url:
                knees["llama.cpp"].append(knee(url, arguments.requests, arguments.start))
    record: dict[str, Any] = {
        "machine": machine(),
        "model": (arguments.gguf or arguments.model).name,
        "knees": knees,
    }
    rates = [arguments.rate] if arguments.rate else [one["request_rate"] for one in knees["llmc"]]
    rates = [rate for rate in rates if rate is not None]
    if arguments.soak and rates:
        record["soak"] = soak(arguments.model, statistics.median(rates), arguments.soak)
    report(record, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
