"""`llmc bench --profile`: where the time of a prompt and of an answer's token goes, by kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from ..runtime.executor.base import CallTimes, Profiles
from .measure import Prompts, decode_seconds, prefill_seconds
from .output import size, table

if TYPE_CHECKING:
    from ..runtime.engine import Engine

OUTSIDE = "(between steps)"
"""The row of what no kernel is busy with: scheduling, inputs of the step, sampling, detokenizing."""


def profile(
    engine: Engine, weights: Mapping[str, int], *, prompt_tokens: int, output_tokens: int
) -> dict[str, Any]:
    """`prefill` and `decode`: `seconds` of a prompt or a token, and `rows` of kernels by falling `seconds`.

    weights: name → bytes, of the target that runs. Raises InputError where the target cannot tell.
    """
    executor = engine.executor
    if not isinstance(executor, Profiles):
        raise InputError("only tvm-cpu can be profiled", remedy="--target tvm-cpu")
    prompts = Prompts(engine.facts.vocab_size, seed=1)  # none that the prefix cache knows from `speeds`
    result: dict[str, Any] = {}
    runs: list[tuple[str, int, Callable[[], float]]] = [
        ("prefill", 1, lambda: prefill_seconds(engine, prompts.take(prompt_tokens))),
        # A prompt of one token: its step is like those that follow.
        ("decode", output_tokens + 1, lambda: decode_seconds(engine, prompts.take(1), output_tokens)),
    ]
    for what, steps, run in runs:
        run()
        with executor.profile() as times:
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
        result[what] = {"seconds": seconds / steps, "rows": _rows(times, weights, seconds, steps)}
    return result


def _rows(times: CallTimes, weights: Mapping[str, int], seconds: float, steps: int) -> list[dict[str, Any]]:
    """One row for the calls of a kernel with a weight of the same name in different layers, and the rest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for (kernel, weight), spent in zip(times.calls, times.seconds_of_calls(), strict=True):
        name = "" if weight is None else re.sub(r"\.\d+\.", ".*.", weight)
        row = found.setdefault(
            (kernel, name), {"op": kernel, "weight": name, "calls": 0, "seconds": 0.0, "weight_bytes": 0}
        )
        row["calls"] += 1
        row["seconds"] += float(spent) / steps
        if not kernel.endswith("embedding"):  # a token takes one row of the table
            row["weight_bytes"] += _bytes(weights, weight)
    rest = (seconds - times.seconds) / steps
    rows = sorted(found.values(), key=lambda row: -row["seconds"])
    rows.append({"op": OUTSIDE, "weight": "", "calls": 0, "seconds": rest, "weight_bytes": 0})
    return [{**row, "share": row["seconds"] * steps / seconds} for row in rows]


def _bytes(weights: Mapping[str, int], weight: str | None) -> int:
    """Bytes of a weight with its scales and zero points, which are weights of their own."""
    if weight is None:
        return 0
    stem = weight.removesuffix(".q")
    parts = (weight, *(f"{stem}.{part}" for part in ("scale", "zero_point") if weight.endswith(".q")))
    return sum(weights.get(part, 0) for part in parts)


def text(result: Mapping[str, Any]) -> str:
    """Two tables for a person."""
    blocks: list[str] = []
    for what, unit in (("prefill", "prompt"), ("decode", "token")):
        found = result[what]
        heading = f"{what}: {1000 * found['seconds']:.2f} ms a {unit}"
        blocks.append(f"{heading}\n{table(_HEADER, map(_cells, found['rows']))}")
    return "\n\n".join(blocks)


_HEADER = ("op", "calls", "ms", "share", "weights", "GB/s", "weight")


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    read = row["weight_bytes"]
    return (
        row["op"],
        str(row["calls"] or ""),
        f"{1000 * row['seconds']:.3f}",
        f"{row['share']:.1%}",
        size(read) if read else "",
        f"{read / row['seconds'] / 1e9:.1f}" if read and row["seconds"] else "",
        row["weight"],
    )
