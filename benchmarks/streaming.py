"""Texts longer than the cache: perplexity by position where older tokens are evicted (`--sinks`), with
attention sinks and without.

    python -m benchmarks.streaming [--model smollm2] [--context 2048] [--sinks 4,0] [--length 16384] [-o F]

One model (SmolLM2-135M, `--quant keep`, cache in bfloat16) scores the first tokens of a public-domain book,
as `LLM.token_logprobs` does it, in a cache of `--context` tokens: once for each number of sinks; and without
eviction, in the model's own context, what of the text that holds. Buckets of positions are the same for all;
the record also has what turning the keys took.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from .commands import labels, report, shared_data
from .long_context import compiled


class Timed:
    """Counts and times the calls of an executor's `rotate_keys`."""

    def __init__(self, executor: Any) -> None:
        self.calls, self.pages, self.seconds = 0, 0, 0.0
        self._inner = executor.rotate_keys
        executor.rotate_keys = self

    def __call__(self, pages: Any, shift: int, window: int | None = None) -> None:
        began = time.perf_counter()
        self._inner(pages, shift, window)
        self.seconds += time.perf_counter() - began
        self.calls, self.pages = self.calls + 1, self.pages + len(pages)


def scored(
    artifact: Path, text: str, *, length: int, bucket: int, context: int | None, sinks: int | None
) -> dict[str, Any]:
    """Perplexity of each bucket of positions in one pass over the text, and what the cache took."""
    import llmc

    with llmc.load(artifact, context=context, sinks=sinks, max_sequences=1) as llm:
        timed = Timed(llm.executor)
        most = length if sinks is not None else min(length, llm.context_length - 1)
        ids = llm.encode(text)[: most + 1]
        began = time.perf_counter()
        nll = -llm.token_logprobs(ids)
        seconds = time.perf_counter() - began
        cache = llm.kv_cache
    starts = range(0, len(nll), bucket)
    found: dict[str, Any] = {
        "context": llm.context_length,
        "sinks": sinks,
        "kv_bytes": cache.bytes,
        "tokens": len(nll),
        "ppl": [math.exp(nll[at : at + bucket].mean()) for at in starts],
        "ppl_all": math.exp(nll.mean()),
        "ppl_beyond": math.exp(nll[llm.context_length :].mean()) if sinks is not None else None,
        "seconds": seconds,
    }
    if timed.calls:
        found |= {"evictions": timed.calls, "pages_turned": timed.pages, "turning_seconds": timed.seconds}
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the cache")
    parser.add_argument("--sinks", default="4,0")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the text")
    parser.add_argument("--bucket", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    artifact = compiled("none", arguments.model, "bfloat16")
    path = shared_data() / "longtext" / "alice_in_wonderland.txt"
    text = path.read_text(encoding="utf-8")
    sizes = {"length": arguments.length, "bucket": arguments.bucket}
    ways = [(None, None), *((arguments.context, int(sinks)) for sinks in arguments.sinks.split(","))]
    rows = [scored(artifact, text, **sizes, context=context, sinks=sinks) for context, sinks in ways]
    record = {**labels(artifact), "text": path.name, "bucket": arguments.bucket, "rows": rows}
    report(record, arguments.output)


if __name__ == "__main__":
    main()
