"""What the commands of `llmc rag` share: opening a store, options, how passages and reports are shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .agent import visible
from .output import note

if TYPE_CHECKING:
    from ..runtime.rag.ingest import SyncReport
    from ..runtime.rag.knowledge import KnowledgeBase
    from ..runtime.rag.readers import ReadLimits

F = TypeVar("F", bound=Callable[..., Any])

MODES = ("auto", "hybrid", "rrf", "graph", "keyword", "dense", "global")
_SHOWN = 20  # failed documents on the screen; --json has all

kb_argument = click.argument("kb")

embedder_option = click.option(
    "--embedder",
    default="auto",
    metavar="SPEC",
    help="An encoder artifact, Hugging Face folder or hub id, or none.  [default: the store's]",
)

max_file_option = click.option(
    "--max-file-mb",
    type=click.IntRange(min=1),
    metavar="N",
    help="Refuse larger files (rows of csv and jsonl are read one by one).  [default: 100]",
)


def open_kb(stack: contextlib.ExitStack, kb: str, **options: Any) -> KnowledgeBase:
    """The store that KB means, closed with `stack`. Options are those of `KnowledgeBase.open`."""
    from ..runtime.rag.knowledge import KnowledgeBase, locate

    return stack.enter_context(KnowledgeBase.open(locate(kb), **options))


def read_limits(megabytes: int | None) -> ReadLimits:
    """The limits that `--max-file-mb` stands for."""
    from ..runtime.rag.readers import ReadLimits

    return ReadLimits() if megabytes is None else ReadLimits.of_megabytes(megabytes)


def report_json(report: SyncReport) -> dict[str, Any]:
    """What was done, as values of JSON."""
    return {
        "added": report.added,
        "updated": report.updated,
        "deleted": report.deleted,
        "unchanged": report.unchanged,
        "chunks_written": report.chunks,
        "failed": [{"document": name, "reason": reason} for name, reason in report.failed],
        "unsupported": report.unsupported,
        "empty": report.empty,
    }


def report_text(report: SyncReport) -> str:
    """What was done, in one line."""
    counts = [
        f"{count} {what}"
        for count, what in (
            (report.added, "added"),
            (report.updated, "updated"),
            (report.deleted, "deleted"),
            (report.unchanged, "unchanged"),
            (len(report.failed), "failed"),
        )
        if count
    ]
    return ("documents: " + ", ".join(counts)) if counts else "no documents"


def note_failed(report: SyncReport) -> int:
    """Says on stderr what was left out, and why; returns the exit code."""
    for name, reason in report.failed[:_SHOWN]:
        # The reader's own message begins with the name.
        text = reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"
        note(f"left out: {visible(text)}")
    if len(report.failed) > _SHOWN:
        note(f"left out: {len(report.failed) - _SHOWN} more (--json names them)")
    if report.unsupported:
        note(
            f"{len(report.unsupported)} files are of kinds that are not read, such as {report.unsupported[0]}"
        )
    if report.empty:
        note(f"{len(report.empty)} files are empty, such as {visible(report.empty[0])}")
    return 1 if report.failed else 0


def one_line(text: str, limit: int) -> str:
    """The beginning of a text, for a row of a table."""
    line = visible(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def passage_json(passage: Any, *, explain: bool = False) -> dict[str, Any]:
    """A passage as values of JSON."""
    found: dict[str, Any] = {
        "document": passage.document,
        "title": passage.title,
        "heading": passage.heading,
        "text": passage.text,
        "score": float(passage.score),
        "span": [passage.start, passage.end],
        "page": passage.page,
        "chunk": passage.chunk,
    }
    if explain:
        found["scores"] = {name: float(score) for name, score in passage.scores.items()}
    return found


def place(passage: Any) -> str:
    """Where a passage stands."""
    page = "" if passage.page is None else f", page {passage.page}"
    return f"{visible(passage.document)}:{passage.start}–{passage.end}{page}"


def names(items: Sequence[str], limit: int = 5) -> str:
    """Some names for a message."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(visible(item) for item in items[:limit]) + more
