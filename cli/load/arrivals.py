"""When requests arrive and how long they are: at a random rate, all at once, or as a published trace says."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from ...ir.errors import InputError
from .records import Arrival

BLOCK_TOKENS = 512
"""Tokens of a block of a Mooncake trace: its `hash_ids` are of that many."""

MOST_TOKENS = 10_000_000
_LONGEST_LINE = 1 << 20
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def at_once(count: int, prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """`count` requests that are all due at the start: for closed loops, and for a rate without limit."""
    return [Arrival(0.0, prompt_tokens, output_tokens)] * count


def random_arrivals(
    count: int, rate: float, prompt_tokens: int, output_tokens: int, *, burstiness: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """`count` requests at `rate` a second, `count / rate` seconds from the start to the last one.

    The gaps are drawn from a gamma distribution of shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is more even, infinity is a metronome. They are scaled so that their sum is exact, as vLLM's
    `bench serve` does it: else runs of different seeds would be of different rates.
    """
    draw = random.Random(seed)
    if math.isinf(burstiness):
        gaps = [1.0] * count
    else:
        gaps = [draw.gammavariate(burstiness, 1.0) for _ in range(count)]
    times = list(accumulate(gaps))
    scale = count / rate / times[-1] if times and times[-1] > 0 else 0.0
    return [Arrival(at * scale, prompt_tokens, output_tokens) for at in times]


def stretched(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """The same requests over `factor` times the time."""
    return [replace(arrival, at=arrival.at * factor) for arrival in arrivals]


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests a second from the first to the last one; infinite where all come at once."""
    span = arrivals[-1].at - arrivals[0].at if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0 else math.inf


def clipped(arrivals: Sequence[Arrival], most_prompt_tokens: int) -> tuple[list[Arrival], int]:
    """Requests with prompts cut to `most_prompt_tokens`, and how many had to be."""
    cut = sum(arrival.prompt_tokens > most_prompt_tokens for arrival in arrivals)
    kept = [replace(a, prompt_tokens=min(a.prompt_tokens, most_prompt_tokens)) for a in arrivals]
    return kept, cut


def read_trace(path: Path, count: int) -> list[Arrival]:
    """The first `count` requests of a trace, the first of them at 0.

    Two published forms are known, by their content: Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`,
    github.com/Azure/AzurePublicDataset) and Mooncake's JSON lines (`timestamp` in ms, `input_length`,
    `output_length`, `hash_ids`; github.com/kvcache-ai/Mooncake). An answer of 0 tokens becomes one of 1.

    Raises InputError, naming the line, for anything else.
    """
    with path.open(encoding="utf-8-sig", errors="strict", newline="") as file:
        lines = _lines(file, path)
        try:
            first = next(lines, "")
            if first.lstrip().startswith("{"):
                rows = _mooncake(path, first, lines)
            elif tuple(cell.strip() for cell in first.split(",")) == _AZURE:
                rows = _azure(path, lines)
            else:
                raise InputError(
                    f"{path.name} is no trace that is known",
                    remedy=f"allowed: CSV with the header {','.join(_AZURE)}, or Mooncake's JSON lines",
                )
            found = list(islice(rows, count))
        except UnicodeDecodeError as error:
            raise InputError(f"{path.name} is not UTF-8 text") from error
    if not found:
        raise InputError(f"{path.name} has no requests")
    found.sort(key=lambda arrival: arrival.at)  # some of them lie a moment out of order
    return [replace(arrival, at=arrival.at - found[0].at) for arrival in found]


def _lines(file: Any, path: Path) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise InputError(f"{path.name} has a line of more than {_LONGEST_LINE} characters")
        if line.strip():
            yield line


def _azure(path: Path, lines: Iterator[str]) -> Iterator[Arrival]:
    for number, cells in enumerate(csv.reader(lines), start=2):
        try:
            when, context, generated = cells
            seconds = datetime.fromisoformat(when.strip()).timestamp()
            yield Arrival(seconds, _tokens(context), max(1, _tokens(generated, least=0)))
        except ValueError as error:
            raise InputError(f"{path.name}, line {number}: {error}") from error


def _mooncake(path: Path, first: str, lines: Iterator[str]) -> Iterator[Arrival]:
    number, line = 1, first
    while line:
        try:
            row = json.loads(line)
            seconds = float(row["timestamp"]) / 1000
            if not math.isfinite(seconds):
                raise ValueError("timestamp is not finite")
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            answer = max(1, _tokens(row["output_length"], least=0))
            yield Arrival(seconds, _tokens(row["input_length"]), answer, blocks)
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f"{path.name}, line {number}: {error}") from error
        except KeyError as error:
            raise InputError(f"{path.name}, line {number}: there is no {error}") from error
        number, line = number + 1, next(lines, "")


def _tokens(value: Any, *, least: int = 1) -> int:
    count = int(value)
    if not least <= count <= MOST_TOKENS:
        raise ValueError(f"{count} tokens; allowed: {least} to {MOST_TOKENS}")
    return count
