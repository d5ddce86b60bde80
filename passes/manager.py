"""Runs passes in order: checks the stage, verifies after each, times them, and dumps the graph's text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.core import Graph
from ..ir.errors import CompileError, VerifyError
from ..ir.printer import print_graph
from ..ir.verifier import verify
from ..plugins.entries import blaming, check_returned, one_line, package_of
from .base import Pass, PassContext, PassResult, Progress

_CALIBRATED = 100  # share of the bar, where a pass that rewrites has 1


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: `seconds` includes verification."""

    name: str
    changed: bool
    ops: int
    seconds: float
    notes: tuple[str, ...]


def run_passes(
    graph: Graph, passes: Sequence[Pass], context: PassContext, dump_ir: Path | None = None
) -> tuple[Graph, list[PassRecord]]:
    """The graph after all passes, and a record of each.

    Args:
        dump_ir: a folder that gets `00-traced.txt`, `01-<pass>.txt`, … (made when absent).
    Raises:
        CompileError: a pass got a graph of the wrong stage; VerifyError: a pass left a broken graph, named in
        the message.
    """
    records: list[PassRecord] = []
    progress, shares = context.progress, _shares(passes)
    if dump_ir is not None:
        dump_ir.mkdir(parents=True, exist_ok=True)
        for old in dump_ir.glob("[0-9][0-9]-*.txt"):  # of an earlier, longer pipeline
            old.unlink()
        (dump_ir / "00-traced.txt").write_text(print_graph(graph), encoding="utf-8")
    for number, p in enumerate(passes, 1):
        started = time.perf_counter()
        if p.requires is not None and graph.stage != p.requires:
            raise CompileError(
                f"pass {p.name} needs a graph of stage {p.requires}, not {graph.stage}",
                remedy="change the order of the passes",
            )
        low, high = shares[number - 1], shares[number]
        progress(f"pass {p.name}", low)
        context.progress = _part(progress, low, high)
        try:
            result = run_one(p, graph, context)
        finally:
            context.progress = progress
        graph = result.graph
        context.notes.extend(result.notes)
        records.append(
            PassRecord(
                str(p), result.changed, len(graph.ops), time.perf_counter() - started, tuple(result.notes)
            )
        )
        if dump_ir is not None:
            (dump_ir / f"{number:02d}-{p.name}.txt").write_text(print_graph(graph), encoding="utf-8")
    return graph, records


def run_one(p: Pass, graph: Graph, context: PassContext) -> PassResult:
    """What a pass gives, its graph verified. Errors of another package's pass name that package."""
    what = f"pass {p.name}"
    with blaming(what, p):
        result: PassResult = check_returned("its run", p, p.run(graph, context), PassResult)
        check_returned("its run, as the graph of its result,", p, result.graph, Graph)
        if p.ensures is not None:
            result.graph.stage = p.ensures
    package = package_of(p)
    whose = what if package is None else f"{what} of package {package}"
    try:
        verify(result.graph)
    except VerifyError as e:
        raise VerifyError(f"after {whose}: {e.message}", remedy=e.remedy) from e
    except Exception as e:
        if package is None or isinstance(e, MemoryError):
            raise
        # A graph that was changed past its own methods can break in any way.
        raise VerifyError(
            f"after {whose}: the graph cannot be verified ({one_line(e)})",
            remedy="change graphs through Graph's methods only",
        ) from e
    return result


def _shares(passes: Sequence[Pass]) -> list[float]:
    """Where each pass begins on the bar of all of them, and 1.0."""
    weights = [_CALIBRATED if p.needs_calibration else 1 for p in passes]
    total = max(1, sum(weights))
    return [sum(weights[:i]) / total for i in range(len(weights) + 1)]


def _part(progress: Progress, low: float, high: float) -> Progress:
    """A pass reports shares of its own work."""
    return lambda what, share: progress(what, low + (high - low) * min(max(share, 0.0), 1.0))
