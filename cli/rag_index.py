"""`llmc rag index`, `sync`, `embed`: a store follows a folder, or gets vectors of another embedder."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option, note, notes_from_logging, size
from .progress import Progress
from .rag_options import (
    embedder_option,
    kb_argument,
    max_file_option,
    note_failed,
    open_kb,
    read_limits,
    report_json,
    report_text,
)

if TYPE_CHECKING:
    from ..runtime.rag.estimate import Estimate
    from ..runtime.rag.knowledge import KnowledgeBase

_GRAPHS = ("fast", "llm", "none")


@click.command("index", short_help="Index a folder of documents.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "kb", metavar="KB", help="The store.  [default: NAME.kb in the current directory]"
)
@click.option("--store", metavar="URL", help="Keep it in PostgreSQL: postgresql://user@host/database.")
@embedder_option
@click.option(
    "--graph",
    metavar="|".join((*_GRAPHS, "FILE.jsonl")),
    help="Entities and links by rules (fast), with relations that --model or a file gives, or no graph.  "
    "[default: fast]",
)
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="ARTIFACT", help="Finds relations, for --graph llm."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of the model, for --graph llm, prompts included; the next run goes on.",
)
@click.option(
    "--chunk-tokens", type=click.IntRange(16, 8192), metavar="N", help="Of a passage.  [default: 256]"
)
@max_file_option
@click.option("--estimate", is_flag=True, help="Say what it would take, from a sample, and write nothing.")
@json_option
def index(
    folder: Path,
    kb: str | None,
    store: str | None,
    embedder: str,
    graph: str | None,
    model: Path | None,
    max_tokens: int | None,
    chunk_tokens: int | None,
    max_file_mb: int | None,
    estimate: bool,
    as_json: bool,
) -> int:
    """Index the documents of FOLDER, or bring an index of it up to date: what has not changed costs nothing.

    txt, md, html, pdf, docx, csv, tsv, json, jsonl and source code are read; each row of csv and jsonl is a
    document. Hidden files are left out, links are not followed out of FOLDER. A document that cannot be read
    is named and left out, and the exit code is 1. Killed at any moment, the next run goes on.

    --graph FILE.jsonl takes relations from rows {"document": id or title, "triples": [[subject, predicate,
    object], …]}.
    """
    notes_from_logging()
    graph, triples = _graph(graph, model)
    location = _location(folder, kb, store)
    if estimate:
        return _estimate(folder, location, embedder, chunk_tokens, max_file_mb, model, as_json=as_json)
    _check_folder(folder, location)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        from ..runtime.rag.knowledge import KnowledgeBase

        opened = KnowledgeBase.open(
            location, embedder=embedder, create=True, chunk_tokens=chunk_tokens, graph=graph
        )
        stack.enter_context(opened)
        _check_same_folder(opened, folder, location)
        with Progress() as progress:
            report = opened.sync(folder, progress=progress, limits=read_limits(max_file_mb))
        code = note_failed(report)
        result: dict[str, Any] = {"kb": location, **report_json(report)}
        if triples is not None or model is not None:
            result["graph"] = _relations(opened, triples, model, max_tokens)
        _prepare(opened)
        _emit(opened, result, report_text(report), time.perf_counter() - began, as_json=as_json)
    return code


def _graph(graph: str | None, model: Path | None) -> tuple[str | None, Path | None]:
    """(the setting of the store, the file of triples)."""
    if graph is not None and graph not in _GRAPHS:
        path = Path(graph)
        if not path.is_file():
            raise InputError(
                f"--graph {graph} is neither {', '.join(_GRAPHS)} nor a file of triples",
                remedy="see llmc rag index --help",
            )
        return "fast", path
    if graph == "llm" and model is None:
        raise InputError("--graph llm needs a model", remedy="name it: --model ARTIFACT")
    if graph != "llm" and model is not None:
        raise InputError("--model is for --graph llm", remedy="pass --graph llm, or leave --model out")
    return graph, None


def _location(folder: Path, kb: str | None, store: str | None) -> str:
    from ..runtime.rag.knowledge import default_location
    from ..runtime.rag.store import is_postgres

    if kb is not None and store is not None:
        raise click.UsageError("-o and --store both name the store")
    if store is not None and not is_postgres(store):
        raise InputError(f"--store {store} is no URL of PostgreSQL", remedy="postgresql://…, or -o FILE.kb")
    named = kb or store
    if named is None:
        return str(default_location(folder))
    if not is_postgres(named) and Path(named).is_dir():
        raise InputError(f"{named} is a folder", remedy="name a file for the store: -o FILE.kb")
    return named


def _check_folder(folder: Path, location: str) -> None:
    """A new store is made for a folder only that holds something to read."""
    from ..runtime.rag.folder import list_folder
    from ..runtime.rag.store import is_postgres

    if folder.is_file():
        raise InputError(f"{folder} is a file", remedy=f"index its folder, or llmc rag add KB {folder}")
    new = not is_postgres(location) and not Path(location).exists()
    listing = list_folder(folder, exclude=() if is_postgres(location) else (Path(location),))
    if new and not listing.files:
        problems = [f"{name} {reason}" for name, reason in listing.failed]
        problems += [f"{name} is of a kind that is not read" for name in listing.unsupported]
        why = f": {problems[0]}" if problems else ""
        raise InputError(
            f"{folder} holds no document that could be read{why}",
            remedy="txt, md, html, pdf, docx, csv, json, jsonl and source code are read",
        )


def _check_same_folder(kb: KnowledgeBase, folder: Path, location: str) -> None:
    known = kb.folder
    if known is not None and known != folder.resolve() and known.is_dir():
        raise InputError(
            f"{location} holds the documents of {known}",
            remedy=f"llmc rag add {location} {folder} adds these, "
            f"llmc rag sync {location} {folder} replaces them",
        )


def _relations(
    kb: KnowledgeBase, triples: Path | None, model: Path | None, max_tokens: int | None
) -> dict[str, Any]:
    from .rag_extract import from_file, from_model

    if triples is not None:
        return from_file(kb, triples)
    assert model is not None, "checked before"
    return from_model(kb, model, max_tokens)


def _prepare(kb: KnowledgeBase) -> None:
    with Progress() as progress:
        progress("preparing search", 0.0)
        kb.prepare()


def _emit(kb: KnowledgeBase, result: dict[str, Any], done: str, seconds: float, *, as_json: bool) -> None:
    stats = kb.stats()
    result |= {
        "documents": stats["documents"],
        "chunks": stats["chunks"],
        "embedder": stats["embedder"],
        "bytes": stats["bytes"],
        "seconds": round(seconds, 3),
    }
    rows = [
        ("done", done),
        ("store", result["kb"]),
        ("holds", f"{stats['documents']} documents, {stats['chunks']} passages"),
        ("embedder", stats["embedder"] or "none"),
        ("size", None if stats["bytes"] is None else size(stats["bytes"])),
        ("took", f"{seconds:.1f} s"),
    ]
    emit(result, as_json=as_json, text=facts(rows))


# Estimates -------------------------------------------------------------------------------------------------


def _estimate(
    folder: Path,
    location: str,
    embedder: str,
    chunk_tokens: int | None,
    max_file_mb: int | None,
    model: Path | None,
    *,
    as_json: bool,
) -> int:
    from ..runtime.rag.embedder import open_embedder
    from ..runtime.rag.estimate import estimate_listing
    from ..runtime.rag.folder import list_folder
    from ..runtime.rag.knowledge import CHUNK_TOKENS, KnowledgeBase
    from ..runtime.rag.store import is_postgres
    from .rag_extract import estimator

    with contextlib.ExitStack() as stack, Progress() as progress:
        limits = read_limits(max_file_mb)
        extraction = None if model is None else estimator(stack, model)
        if not is_postgres(location) and Path(location).exists():
            kb = stack.enter_context(KnowledgeBase.open(location, embedder=embedder))
            found = kb.estimate(folder, limits=limits, progress=progress, extraction=extraction)
        else:
            listing = list_folder(folder)
            vectors = open_embedder(embedder)
            if vectors is not None:
                stack.callback(vectors.close)
            tokens = chunk_tokens or CHUNK_TOKENS
            found = estimate_listing(listing, vectors, tokens, limits, progress, extraction)
    result = {"folder": str(folder), "kb": location, "estimate": vars(found)}
    emit(result, as_json=as_json, text=estimate_text(found))
    return 0


def estimate_text(found: Estimate) -> str:
    """An estimate for a person."""
    return facts(
        [
            ("documents", f"{found.documents:,} of {found.files:,} files ({found.sampled:,} sampled)"),
            ("passages", f"{found.chunks:,}"),
            ("tokens", f"{found.tokens:,}"),
            ("time", duration(found.seconds)),
            ("size", size(found.bytes)),
            *_model_facts(found),
        ]
    )


def _model_facts(found: Estimate) -> list[tuple[str, str]]:
    if not found.model_tokens:
        return []
    most = found.model_tokens_at_most
    return [
        ("model's tokens", f"{found.model_tokens:,}, at most {most:,}"),
        ("model's time", duration(found.model_seconds)),
    ]


def duration(seconds: float) -> str:
    """3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# Other commands --------------------------------------------------------------------------------------------


@click.command("sync", short_help="Bring a store up to its folder.")
@kb_argument
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@embedder_option
@max_file_option
@json_option
def sync(kb: str, folder: Path | None, embedder: str, max_file_mb: int | None, as_json: bool) -> int:
    """Make KB hold what FOLDER holds: new and changed documents are read, those that are gone are deleted.

    Without FOLDER it is the folder that was indexed. Documents that llmc rag add brought from elsewhere stay.
    """
    notes_from_logging()
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder=embedder)
        place = folder or opened.folder
        if place is None:
            raise InputError(f"{kb} was not made of a folder", remedy=f"name it: llmc rag sync {kb} FOLDER")
        with Progress() as progress:
            report = opened.sync(place, progress=progress, limits=read_limits(max_file_mb))
        code = note_failed(report)
        _prepare(opened)
        result = {"kb": opened.store.location, **report_json(report)}
        _emit(opened, result, report_text(report), time.perf_counter() - began, as_json=as_json)
    return code


@click.command("embed", short_help="Embed a store again, with another embedder.")
@kb_argument
@click.option(
    "--embedder",
    required=True,
    metavar="SPEC",
    help="An encoder artifact, Hugging Face folder or hub id, auto, or none: vectors are dropped.",
)
@json_option
def embed(kb: str, embedder: str, as_json: bool) -> None:
    """Give all passages of KB vectors of another embedder, or of none. Killed, the next run goes on."""
    notes_from_logging()
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        with Progress() as progress:
            count = opened.reembed(embedder, progress=progress)
        if embedder != "none" and opened.embedder is None:
            note("no embedder was found; the vectors were dropped")
        result = {"kb": opened.store.location, "embedded": count}
        _emit(opened, result, f"{count} passages embedded", time.perf_counter() - began, as_json=as_json)
