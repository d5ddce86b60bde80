"""Relations for `llmc rag index --graph`: from a file, or found by a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .agent import visible
from .output import note
from .progress import Progress

if TYPE_CHECKING:
    from ..runtime.rag.extract import ExtractEstimate
    from ..runtime.rag.knowledge import KnowledgeBase
    from ..runtime.rag.store.base import Store

_SHOWN = 5


def from_file(kb: KnowledgeBase, path: Path) -> dict[str, Any]:
    """Puts the triples of a file on the passages that say them; what became of them."""
    from ..runtime.rag.triples_file import import_triples

    report = import_triples(kb.store, path)
    for where, reason in report.unmatched[:_SHOWN]:
        note(f"{path}, {where}: {visible(reason)}")
    if len(report.unmatched) > _SHOWN:
        note(f"{path}: {len(report.unmatched) - _SHOWN} more rows fit no document (--json names them)")
    note(f"relations: {report.triples} of {report.rows} rows, on {report.chunks} passages")
    return {"file": str(path), **vars(report)}


def from_model(kb: KnowledgeBase, model: Path, max_tokens: int | None) -> dict[str, Any]:
    """Lets a model find relations in the passages that it has not read yet, within a budget of tokens."""
    from ..runtime.loader import load
    from ..runtime.rag.extract import extract_triples

    with contextlib.ExitStack() as stack, Progress() as progress:
        llm = stack.enter_context(load(model))

        def told(done: int, total: int) -> None:
            progress("finding relations", done / max(1, total))

        report = extract_triples(kb, llm, max_tokens=max_tokens, progress=told)
    note(f"relations: {report.triples} found in {report.chunks} passages with {report.tokens} tokens")
    if report.quarantined:
        reason = next(iter(report.quarantined.values()))
        note(f"{len(report.quarantined)} passages gave none, such as: {visible(reason)}")
    if report.stopped == "tokens":
        note(f"--max-tokens ended it with {report.left} passages left; the same command goes on")
    return {"model": model.name, "tokens": report.tokens, **vars(report)}


@dataclass(frozen=True)
class _Held:
    store: Store


def estimator(stack: contextlib.ExitStack, model: Path) -> Callable[[Store], ExtractEstimate]:
    """Says of a store what finding relations in it would take."""
    from ..runtime.loader import load
    from ..runtime.rag.extract import estimate_extraction

    llm = stack.enter_context(load(model))
    return lambda store: estimate_extraction(_Held(store), llm)
