"""`llmc rag add`, `update`, `delete`, `documents`, `show`: single documents of a store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .agent import visible
from .output import emit, facts, json_option, notes_from_logging, size, table
from .progress import Progress
from .rag_options import (
    embedder_option,
    kb_argument,
    max_file_option,
    names,
    note_failed,
    one_line,
    open_kb,
    read_limits,
    report_json,
    report_text,
)

if TYPE_CHECKING:
    from ..runtime.rag.knowledge import KnowledgeBase
    from ..runtime.rag.types import Chunk, Document

_root_option = click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Names are paths below it.  [default: the folder that was indexed; elsewhere the files' own names]",
)


@click.command("add", short_help="Add documents.")
@kb_argument
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True)
@_root_option
@embedder_option
@max_file_option
@json_option
def add(
    kb: str,
    paths: tuple[Path, ...],
    root: Path | None,
    embedder: str,
    max_file_mb: int | None,
    as_json: bool,
) -> int:
    """Add files, or all files of folders, to KB. Those that it has under the same name are replaced where
    they have changed. From outside of the indexed folder, they stay when that is synchronised.
    """
    return _put(kb, paths, root, embedder, max_file_mb, as_json=as_json, known_only=False)


@click.command("update", short_help="Read documents again.")
@kb_argument
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True)
@_root_option
@embedder_option
@max_file_option
@json_option
def update(
    kb: str,
    paths: tuple[Path, ...],
    root: Path | None,
    embedder: str,
    max_file_mb: int | None,
    as_json: bool,
) -> int:
    """Read files again that KB has; one that it does not have is an error."""
    return _put(kb, paths, root, embedder, max_file_mb, as_json=as_json, known_only=True)


def _put(
    kb: str,
    paths: Sequence[Path],
    root: Path | None,
    embedder: str,
    max_file_mb: int | None,
    *,
    as_json: bool,
    known_only: bool,
) -> int:
    notes_from_logging()
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder=embedder)
        if known_only and (unknown := opened.unknown(paths, root=root)):
            raise InputError(
                f"{kb} has no document {names(unknown)}", remedy=f"llmc rag add {kb} {unknown[0]} adds it"
            )
        with Progress() as progress:
            report = opened.add(paths, root=root, progress=progress, limits=read_limits(max_file_mb))
        code = note_failed(report)
        seconds = round(time.perf_counter() - began, 3)
        result = {"kb": opened.store.location, **report_json(report), "seconds": seconds}
        emit(result, as_json=as_json, text=report_text(report))
    return code


@click.command("delete", short_help="Delete documents.")
@kb_argument
@click.argument("documents", nargs=-1, required=True)
@json_option
def delete(kb: str, documents: tuple[str, ...], as_json: bool) -> None:
    """Take documents out of KB, by id, by path (all rows of a file), or all below FOLDER/.

    What came from them goes with them: passages, entities, relations. A file that still lies in the indexed
    folder comes back with the next sync.
    """
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        unknown = [name for name in documents if not opened.matching(name)]
        if unknown:
            raise InputError(
                f"{kb} has no document {names(unknown)}", remedy=f"llmc rag documents {kb} lists them"
            )
        count = opened.delete(documents)
        emit({"kb": opened.store.location, "deleted": count}, as_json=as_json, text=f"{count} deleted")


@click.command("documents", short_help="List documents.")
@kb_argument
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N.")
@click.option("--after", default="", metavar="ID", help="Those behind this one, in order of their ids.")
@json_option
def documents(kb: str, limit: int | None, after: str, as_json: bool) -> None:
    """List the documents of KB, in order of their ids."""
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        found = list(opened.store.documents(after, limit))
        result = {
            "kb": opened.store.location,
            "count": opened.store.counts()["documents"],
            "documents": [_document_json(document) for document in found],
        }
    rows = [(visible(d.id), one_line(d.title, 60), d.media_type, size(d.size)) for d in found]
    emit(result, as_json=as_json, text=table(("document", "title", "kind", "size"), rows))


def _document_json(document: Document) -> dict[str, Any]:
    return {
        "id": document.id,
        "path": document.path,
        "title": document.title,
        "media_type": document.media_type,
        "digest": document.digest,
        "size": document.size,
        "metadata": dict(document.metadata),
    }


@click.command("show", short_help="Show a document or a passage.")
@kb_argument
@click.argument("document")
@json_option
def show(kb: str, document: str, as_json: bool) -> None:
    """Show what KB has of DOCUMENT (an id, or a path), or of a passage (its id): text, places, entities."""
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        found = _found(opened, document)
        if found is None:
            raise InputError(
                f"{kb} has no document and no passage {names([document])}",
                remedy=f"llmc rag documents {kb} lists them",
            )
        of, chunks = found
        result = {
            "document": _document_json(of),
            "chunks": [_chunk_json(chunk) for chunk in chunks],
        }
    emit(result, as_json=as_json, text=_shown(of, chunks))


def _found(kb: KnowledgeBase, name: str) -> tuple[Document, list[Chunk]] | None:
    matching = kb.matching(name)
    if matching:
        if len(matching) > 1:
            raise InputError(
                f"{name} holds {len(matching)} documents", remedy=f"name one, such as {matching[0]}"
            )
        document = kb.store.document(matching[0])
        return None if document is None else (document, list(kb.store.chunks(document=document.id)))
    chunks = list(kb.store.chunks([name]))
    document = kb.store.document(chunks[0].document) if chunks else None
    return None if document is None else (document, chunks)


def _chunk_json(chunk: Chunk) -> dict[str, Any]:
    return {
        "chunk": chunk.id,
        "ordinal": chunk.ordinal,
        "title": chunk.title,
        "heading": chunk.heading,
        "text": chunk.text,
        "span": [chunk.start, chunk.end],
        "page": chunk.page,
        "tokens": chunk.tokens,
        "entities": [
            {"key": one.key, "surface": one.surface, "span": [one.start, one.end]}
            for one in chunk.features.mentions
        ],
    }


def _shown(document: Document, chunks: Sequence[Chunk]) -> str:
    head = facts(
        [
            ("document", visible(document.id)),
            ("title", visible(document.title) or None),
            ("kind", document.media_type),
            ("size", size(document.size)),
            ("sha256", document.digest),
            *((visible(str(key)), visible(str(value), 200)) for key, value in document.metadata.items()),
        ]
    )
    parts = [head]
    for chunk in chunks:
        page = "" if chunk.page is None else f", page {chunk.page}"
        above = f"  {visible(chunk.heading)}" if chunk.heading else ""
        keys = ", ".join(dict.fromkeys(visible(one.surface) for one in chunk.features.mentions))
        parts.append(
            f"[{chunk.ordinal}] {chunk.id}  {chunk.start}–{chunk.end}{page}  {chunk.tokens} tokens{above}\n"
            + visible(chunk.text)
            + (f"\n→ {keys}" if keys else "")
        )
    return "\n\n".join(parts)
