"""`llmc bench --profile`: where the time of a prompt and of an answer's token goes, by kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..ir.errors import InputError
from ..runtime.executor.base import CallTimes, Profiles
from .measure import Prompts, answering, prefill_seconds
from .output import size, table

if TYPE_CHECKING:
    from ..runtime.engine import Engine

OUTSIDE = "(between steps)"
"""The row of what no kernel is busy with: scheduling, inputs of the step, sampling, detokenizing."""


def profile(
    engine: Engine, weights: Mapping[str, int], *, prompt_tokens: int, output_tokens: int, concurrency: int
) -> dict[str, Any]:
    """`prefill` of a prompt, a step of `decode`, and one of a `batch` of `concurrency` answers, each behind
    128 tokens: `seconds`, `sequences`, and `rows` of kernels by falling `seconds`.

    weights: name → bytes, of the target that runs. Raises InputError where the target cannot tell.
    """
    executor = engine.executor
    if not isinstance(executor, Profiles):
        raise InputError("only tvm-cpu can be profiled", remedy="--target tvm-cpu")
    prompts = Prompts(engine.facts.vocab_size, seed=1)  # none that the prefix cache knows from `speeds`

    def measured(steps: int, sequences: int, run: Callable[[], object]) -> dict[str, Any]:
        with executor.profile() as times:
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
        rows = _rows(times, weights, seconds, steps)
        return {"seconds": seconds / steps, "sequences": sequences, "rows": rows}

    result = {"prefill": measured(1, 1, lambda: prefill_seconds(engine, prompts.take(prompt_tokens)))}
    for what, count in (("decode", 1), ("batch", concurrency)):
        with answering(engine, [prompts.take(128) for _ in range(count)], output_tokens):
            run = partial(_steps, engine, output_tokens)
            result[what] = measured(output_tokens, count, run)
    return result


def _steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


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
    """A table each, for a person."""
    blocks: list[str] = []
    for what, unit in (("prefill", "a prompt"), ("decode", "a token"), ("batch", "a token of {} answers")):
        found = result[what]
        heading = f"{what}: {1000 * found['seconds']:.2f} ms {unit.format(found['sequences'])}"
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
