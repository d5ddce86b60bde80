"""The picture of a run: how latencies are distributed, and what happened over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...ir.errors import InputError
from .records import Record


def check(path: Path) -> None:
    """Raises InputError, before anything is measured, for a picture that could not be drawn."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--plot {path.name}", remedy="allowed: a name that ends in .svg, .png or .pdf")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed", remedy="pip install 'llmc[plot]'")


def draw(path: Path, records: Sequence[Record], result: dict[str, Any]) -> None:
    """Writes the picture of the answered requests to `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    done = sorted((record for record in records if record.failure is None), key=lambda one: one.started)
    start = done[0].started
    with rc_context({"svg.hashsalt": "llmc", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        figure.suptitle(
            f"{result['model']}, {len(done)} requests in {result['duration']:.0f} s, "
            f"{result['output_throughput']:.0f} tokens/s"
        )
        (ttft, tpot), (waits, rate) = figure.subplots(2, 2)
        _distribution(ttft, "TTFT", [1000 * record.ttft for record in done])
        _distribution(tpot, "TPOT", [1000 * value for one in done if (value := one.tpot) is not None])
        waits.plot([one.started - start for one in done], [1000 * one.ttft for one in done], ".", ms=4)
        waits.set(xlabel="sent, s", ylabel="TTFT, ms", title="first token, by time of sending")
        _over_time(rate, done, start)
        for axes in (ttft, tpot, waits, rate):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _distribution(axes: Any, name: str, milliseconds: Sequence[float]) -> None:
    """Share of requests at or below each value."""
    values = sorted(milliseconds)
    shares = [(index + 1) / len(values) for index in range(len(values))]
    axes.step(values, shares, where="post")
    axes.axhline(0.95, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"{name}, ms", ylabel="share of requests", title=f"{name} (dashed: p95)")


def _over_time(axes: Any, done: Sequence[Record], start: float) -> None:
    """Tokens and running requests, by second."""
    tokens: defaultdict[int, float] = defaultdict(float)
    running: defaultdict[int, int] = defaultdict(int)
    for record in done:
        # A chunk may hold several tokens: each counts as its share of the answer.
        share = record.output_tokens / len(record.chunks)
        for at in record.chunks:
            tokens[int(at - start)] += share
        for second in range(int(record.started - start), int(record.chunks[-1] - start) + 1):
            running[second] += 1
    seconds = range(max(running) + 1)
    axes.step(seconds, [tokens[second] for second in seconds], where="post", label="output tokens/s")
    axes.step(seconds, [running[second] for second in seconds], where="post", label="requests under way")
    axes.set(xlabel="s", title="over time")
    axes.legend(loc="upper right")
