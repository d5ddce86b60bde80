"""How much of the KV cache's allocated memory holds nothing: 500 requests of a public trace through the
engine.

    python -m benchmarks.kv_waste -o benchmarks/results/kv_waste.json

The trace gives, for each request, when it came and how many tokens it had and generated (Azure LLM inference
trace, conversations, 2023-11-16; Patel et al., "Splitwise", ISCA 2024). The executor is the null one, so what
is measured is the engine's bookkeeping: prompts of random tokens (no two share a beginning) that generate
exactly as many tokens as in the trace.

Scaling: prompt and answer of all requests are multiplied by one factor, context / (longest prompt + answer
among them), where that is below 1, so that the longest request just fits; each keeps at least one token.

Time: a step takes `--step-ms`, and a request is added at the step that its arrival falls in. `--speed` plays
the trace faster, so that more requests meet.

Waste at a step: 1 - (slots with a token) / (slots of pages held by sequences), after the step's tokens are
written; a page that sequences share counts once, pages that only the prefix cache holds do not count. The
mean is over steps, weighted by nothing; the peak is the largest share while at least `--peak-floor` slots are
held, because the first token of an idle engine always has a page to itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor.null import NullExecutor
from llmc.runtime.sampling_params import SamplingParams

from .commands import shared_data

VOCAB = 32_000


@dataclass(frozen=True)
class Arrival:
    """One request of the trace: seconds since the first, tokens of prompt and answer."""

    seconds: float
    prompt: int
    answer: int


def read_trace(path: Path, count: int) -> list[Arrival]:
    """The first `count` requests."""
    with open(path, newline="") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
    # Seven digits of a second are one more than the standard library reads.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival((time - times[0]).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]


def scale(arrivals: list[Arrival], context: int) -> tuple[list[Arrival], float]:
    """Lengths multiplied by one factor, so that the longest request fits the context."""
    factor = min(1.0, context / max(a.prompt + a.answer for a in arrivals))
    scaled = [
        Arrival(a.seconds, max(1, int(a.prompt * factor)), max(1, int(a.answer * factor))) for a in arrivals
    ]
    return scaled, factor


def play(arrivals: list[Arrival], args: argparse.Namespace, context: int) -> dict[str, Any]:
    """Run the requests; returns the shares of waste."""
    # No row of logits is looked at: a vocabulary of one column keeps the null executor's zeros small.
    executor = NullExecutor(page_size=args.page_size, vocab_size=1)
    options = EngineOptions(
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        kv_tokens=args.kv_tokens or None,
    )
    engine = Engine(executor, None, ModelFacts(VOCAB, context), options)
    rng = random.Random(0)
    waiting = sorted(arrivals, key=lambda a: a.seconds)
    shares: list[float] = []
    large: list[float] = []
    peak_slots = 0
    clock = 0.0
    while waiting or engine.has_work:
        while waiting and waiting[0].seconds / args.speed <= clock:
            arrival = waiting.pop(0)
            prompt = [rng.randrange(VOCAB) for _ in range(arrival.prompt)]
            answer = min(arrival.answer, engine.limit - len(prompt))
            engine.add_request(prompt, SamplingParams(max_tokens=answer, ignore_eos=True))
        engine.step()
        stats = engine.stats
        if stats.slots_allocated:
            shares.append(stats.waste)
            peak_slots = max(peak_slots, stats.slots_allocated)
            if stats.slots_allocated >= args.peak_floor:
                large.append(stats.waste)
        clock += args.step_ms / 1000
    stats = engine.stats
    return {
        "mean_waste": round(sum(shares) / len(shares), 5),
        "peak_waste": round(max(large), 5),
        "steps": len(shares),
        "peak_slots_allocated": peak_slots,
        "kv_tokens": engine.kv.tokens,
        "tokens_computed": stats.tokens_computed,
        "tokens_generated": stats.tokens_generated,
        "preemptions": stats.preemptions,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Waste of KV memory over a serving trace.")
    parser.add_argument("--trace", type=Path, help="default: the Azure trace of the shared data")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192], help="context of the model")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--kv-tokens", type=int, default=0, help="0: max_sequences full contexts")
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--peak-floor", type=int, default=1024)
    parser.add_argument("--bar", type=float, default=0.04, help="exit 1 where the mean is not below it")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON")
    return parser.parse_args(arguments)


def main() -> int:
    """Print one line a context, write the JSON, and say by the exit code whether the bar holds."""
    args = parse()
    args.trace = args.trace or shared_data() / "serving_traces" / "AzureLLMInferenceTrace_conv.csv"
    if not args.trace.is_file():
        print(f"no trace at {args.trace}: give --trace", file=sys.stderr)
        return 2
    arrivals = read_trace(args.trace, args.requests)
    results: list[dict[str, Any]] = []
    for context in args.context:
        scaled, factor = scale(arrivals, context)
        results.append({"context": context, "scale": round(factor, 5), **play(scaled, args, context)})
        found = results[-1]
        mean, peak = f"{found['mean_waste']:.2%}", f"{found['peak_waste']:.2%}"
        print(
            f"context {context}: lengths x {factor:.3f}, wasted KV share {mean} on average, {peak} at most "
            f"({found['steps']} steps, {found['preemptions']} preemptions)"
        )
    passed = all(result["mean_waste"] < args.bar for result in results)
    if args.output is not None:
        shown = ["python", "-m", "benchmarks.kv_waste", *(a for a in sys.argv[1:] if not a.startswith("/"))]
        record = {
            "command": " ".join(shown),
            "trace": args.trace.name,
            "requests": len(arrivals),
            "page_size": args.page_size,
            "max_sequences": args.max_sequences,
            "max_batch_tokens": args.max_batch_tokens,
            "step_ms": args.step_ms,
            "bar": args.bar,
            "passed": passed,
            "python": platform.python_version(),
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
