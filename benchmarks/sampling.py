"""What sampling costs beside a step: the time of a step of many answers, drawn in several ways.

    python -m benchmarks.sampling --model ARTIFACT [--streams 32] [--steps 24] [--repeat 5] [-o FILE]

Greedily, with a temperature, with `top_p`, with `top_k` and with a penalty, in turns in one process; the
prompts are of random ids, and their own steps are not counted. Medians over the rounds of each round's median
step, and each round's ratio to its greedy steps; CPU time is of all threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import llmc
from llmc.cli.measure import Prompts
from llmc.runtime.llm import LLM

from .commands import labels, report

PROMPT = 16
"""Tokens of each prompt."""

WAYS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9 at 0.7": {"temperature": 0.7, "top_p": 0.9},
    "top_k 40 at 0.7": {"temperature": 0.7, "top_k": 40},
    "presence_penalty 0.5 at 0.7": {"temperature": 0.7, "presence_penalty": 0.5},
}


def timed(llm: LLM, prompts: list[list[int]], steps: int, way: dict[str, Any]) -> tuple[float, float]:
    """The median of the steps in which every prompt gets one token: seconds, and CPU seconds."""
    found: list[tuple[float, float]] = []
    with llm.engine.paused() as engine:
        for number, prompt in enumerate(prompts):
            params = llm.sampling(max_tokens=steps + 1, ignore_eos=True, seed=number, **way)
            engine.add_request(prompt, params)
        while engine.has_work:
            began, cpu = time.perf_counter(), time.process_time()
            if len(engine.step()) == len(prompts):
                found.append((time.perf_counter() - began, time.process_time() - cpu))
    del found[0]  # it may be the prompts' own
    return median(seconds for seconds, _ in found), median(cpu for _, cpu in found)


def measure(artifact: Path, *, streams: int, steps: int, repeat: int) -> list[dict[str, Any]]:
    """Rows of the record, one for each way."""
    rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    room = {"kv_tokens": streams * (PROMPT + steps + 32), "max_sequences": streams}
    with llmc.load(artifact, **room) as llm:
        prompts = Prompts(llm.engine.engine.facts.vocab_size)
        for number in range(repeat + 1):  # the first round touches memory
            given = [prompts.take(PROMPT) for _ in range(streams)]
            for way, params in WAYS.items():
                one = timed(llm, given, steps, params)
                if number:
                    rounds[way].append(one)
    greedy = rounds["greedy"]
    return [
        {
            "way": way,
            "step_ms": round(1e3 * median(seconds for seconds, _ in times), 2),
            "of_greedy": round(median(t[0] / g[0] for t, g in zip(times, greedy, strict=True)), 3),
            "of_greedy_cpu": round(median(t[1] / g[1] for t, g in zip(times, greedy, strict=True)), 3),
        }
        for way, times in rounds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--streams", type=int, default=32, help="answers at once [default: 32]")
    parser.add_argument("--steps", type=int, default=24, help="tokens of each answer [default: 24]")
    parser.add_argument("--repeat", type=int, default=5, help="rounds [default: 5]")
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.model, streams=arguments.streams, steps=arguments.steps, repeat=arguments.repeat)
    sizes = {"streams": arguments.streams, "steps": arguments.steps, "repeat": arguments.repeat}
    report({**labels(arguments.model), **sizes, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
