"""What HTTP costs, and what a long prompt does to a short one: `llmc serve` beside the engine alone.

    python -m benchmarks.serving --model ARTIFACT [--repeat 3] [-o FILE]

In turns: 32 requests of 128 + 64 tokens at once through the server (`llmc bench --server`, with /health
asked 20 times a second meanwhile) and through the engine (`llmc.load` in a process of its own), in each
process a few times, the first of which is not counted. Before each, memory is touched: a virtual machine
gets it from its host then, which otherwise costs whoever uses it first a tenth of the time. Then the
time to the first token of a prompt of 16 tokens, alone and 50 ms after one of 2,000 tokens, beside the time
of one chunk (512 tokens). Medians. The bars: 95 % of the engine's tokens a second; /health below 50 ms in 99
of 100; below twice the idle time and a chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai

from .commands import llmc as command
from .commands import machine, report
from .tools import our_server

STREAMS, PROMPT, ANSWER = 32, 128, 64
LONG, SHORT, CHUNK = 2000, 16, 512
LOADS = 3
"""In one process, after one that is not counted."""
TOUCHED_BYTES = 3 << 30

_ENGINE = """
import json, random, sys, time
import llmc
import numpy as np

path, seed, streams, prompt, answer, loads, touched = sys.argv[1], *map(int, sys.argv[2:])
found = []
with llmc.load(path, context=2560) as llm:
    vocab = llm.tokenizer.vocab_size
    for number in range(1 + loads):
        rng = random.Random(seed + number)
        prompts = [[rng.randrange(vocab // 2) for _ in range(prompt)] for _ in range(streams)]
        np.ones(touched, np.uint8)
        began = time.perf_counter()
        llm.generate_batch(prompts, max_tokens=answer, ignore_eos=True)
        found.append(streams * answer / (time.perf_counter() - began))
print(json.dumps(found[1:]))
"""


def engine_tok_s(artifact: Path, seed: int) -> list[float]:
    """Output tokens a second of the engine alone, for each load."""
    numbers = map(str, (seed, STREAMS, PROMPT, ANSWER, LOADS, TOUCHED_BYTES))
    words = [sys.executable, "-c", _ENGINE, str(artifact), *numbers]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def touch_memory() -> None:
    """Bytes that the system has at hand from now on, for some seconds."""
    np.ones(TOUCHED_BYTES, np.uint8)


def server_run(url: str, seed: int) -> dict[str, Any]:
    """What `llmc bench --server` finds."""
    touch_memory()
    options = {
        "--endpoint": "completions", "--concurrency": STREAMS, "--num-requests": STREAMS,
        "--prompt-tokens": PROMPT, "--output-tokens": ANSWER, "--seed": seed,
    }  # fmt: skip
    words = [word for pair in options.items() for word in map(str, pair)]
    return command("bench", "--server", url, *words, "--health")


async def first_token(client: openai.AsyncOpenAI, tokens: int, seed: int) -> float:
    """Seconds to the first token of an answer to random tokens."""
    rng = random.Random(seed)
    prompt = [rng.randrange(1000, 20000) for _ in range(tokens)]
    began = time.perf_counter()
    found: float | None = None
    stream = await client.completions.create(model="model", prompt=prompt, max_tokens=2, stream=True)
    async for _ in stream:
        found = found or time.perf_counter() - began
    assert found is not None
    return found


async def fairness(url: str, repeat: int) -> dict[str, float]:
    """Medians of the times to the first token, in seconds."""
    idle: list[float] = []
    beside: list[float] = []
    chunk: list[float] = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for number in range(repeat):
            idle.append(await first_token(client, SHORT, 100 + number))
            chunk.append(await first_token(client, CHUNK, 200 + number))
            long = asyncio.ensure_future(first_token(client, LONG, 300 + number))
            await asyncio.sleep(0.05)
            beside.append(await first_token(client, SHORT, 400 + number))
            await long
    names = {"idle_s": idle, "chunk_s": chunk, "beside_long_s": beside}
    return {name: round(statistics.median(values), 4) for name, values in names.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    server: list[float] = []
    engine: list[float] = []
    health: list[float] = []
    for seed in range(0, 100 * arguments.repeat, 100):
        with our_server(arguments.model, 2560) as url:
            found = [server_run(url, seed + number) for number in range(1 + LOADS)]
        server += [round(one["output_throughput"], 1) for one in found[1:]]
        health += [round(one["health"]["p99_ms"], 2) for one in found]
        engine += [round(one, 1) for one in engine_tok_s(arguments.model, seed)]
    with our_server(arguments.model, 2560) as url:
        times = asyncio.run(fairness(url, max(3, arguments.repeat)))
    record = {
        "machine": machine(),
        "server_tok_s": server,
        "engine_tok_s": engine,
        "ratio": round(statistics.median(server) / statistics.median(engine), 3),
        "health_p99_ms": health,
        "first_token": times,
        "first_token_bound_s": round(2 * times["idle_s"] + times["chunk_s"], 4),
    }
    report(json.loads(json.dumps(record)), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
