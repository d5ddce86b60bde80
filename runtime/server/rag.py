"""/v1/rag/…: documents that are listed, read, added, deleted and searched, and answers from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ...ir.errors import InputError
from ..rag.folder import checked_name
from .errors import ApiError, AsciiJsonResponse
from .library import Library
from .rag_answer import answer_response
from .rag_graph import graph_body
from .rag_wire import chunk_entry, document_entry, passage_entry, plain
from .schema import RagAnswerRequest, RagSearchRequest
from .service import ClientGoneError, unless_gone

if TYPE_CHECKING:
    from ..rag.knowledge import KnowledgeBase
    from ..rag.store.base import StoreReader

T = TypeVar("T")

_MOST_LISTED = 1000
_MOST_CHUNKS = 500
_MOST_REPORTED = 100  # documents and failures of one upload

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

_Knowledge = Annotated[
    str | None, Query(max_length=512, description="Which knowledge base; where there are several.")
]
_Id = Annotated[str, Query(max_length=8192)]

_FILE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def rag_router(library: Library) -> APIRouter:
    """The endpoints, for one server."""
    router = APIRouter()
    _add_reading(router, library)
    _add_writing(router, library)
    _add_asking(router, library)
    return router


def _add_reading(router: APIRouter, library: Library) -> None:
    @router.get("/v1/rag/knowledge")
    async def knowledge(request: Request) -> AsciiJsonResponse:
        """The knowledge bases, with what they hold."""
        work = partial(_knowledge_body, library)
        return AsciiJsonResponse(await unless_gone(request, library.reading.run(work)))

    @router.get("/v1/rag/documents")
    async def documents(
        request: Request,
        knowledge: _Knowledge = None,
        after: _Id = "",
        limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 100,
    ) -> AsciiJsonResponse:
        """Documents in order of their ids, those behind `after`."""
        name, base = library.base(knowledge)
        work = partial(_documents_body, name, base, after, limit)
        return AsciiJsonResponse(await unless_gone(request, library.reading.run(work)))

    @router.get("/v1/rag/documents/{id:path}")
    async def document(
        id: str,
        request: Request,
        knowledge: _Knowledge = None,
        chunk: Annotated[str, Query(max_length=64)] = "",
        first: Annotated[int | None, Query(ge=0, le=10**9)] = None,
        limit: Annotated[int, Query(ge=1, le=_MOST_CHUNKS)] = 100,
    ) -> AsciiJsonResponse:
        """A document's text, in chunks: from the number `first` on, or those around one `chunk`."""
        name, base = library.base(knowledge)
        work = partial(_document_body, name, base, id, chunk, first, limit)
        return AsciiJsonResponse(await unless_gone(request, library.reading.run(work)))

    @router.get("/v1/rag/graph")
    async def graph(
        request: Request,
        knowledge: _Knowledge = None,
        focus: _Id = "",
        limit: Annotated[int, Query(ge=1, le=200)] = 40,
    ) -> AsciiJsonResponse:
        """What is next to an entity or a document in the graph; without `focus`, what most is next to."""
        name, base = library.base(knowledge)
        work = partial(graph_body, name, base, focus, limit)
        return AsciiJsonResponse(await unless_gone(request, library.reading.run(work)))


def _add_writing(router: APIRouter, library: Library) -> None:
    @router.post("/v1/rag/documents", openapi_extra=_FILE, status_code=201)
    async def upload(
        request: Request,
        name: Annotated[
            str, Query(min_length=1, max_length=4096, description="The file's name, with its ending.")
        ],
        knowledge: _Knowledge = None,
        replace: bool = False,
    ) -> AsciiJsonResponse:
        """Add the file that is the request's body; `replace` one of the same name."""
        library.check_writable()
        base_name, base = library.base(knowledge)
        file = _file_name(name)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in _FORMS:
            message = "the body is a form; send the file itself as the body, and its name in ?name="
            raise ApiError(415, message, param="body", code="unsupported_media_type")
        async with library.upload():
            if not replace:  # before the file is sent, and again when it is written
                await library.reading.run(partial(_check_free, base, file))
            data = await request.body()
        if not data:
            raise ApiError(400, "the body is empty; it must be the file", param="body", code="empty_body")
        work = partial(_unless_busy, partial(_add, base_name, base, file, data, replace))
        return AsciiJsonResponse(await unless_gone(request, library.writing.run(work)), 201)

    @router.delete("/v1/rag/documents/{id:path}")
    async def delete(id: str, request: Request, knowledge: _Knowledge = None) -> AsciiJsonResponse:
        """Delete one document, with all that came from it."""
        library.check_writable()
        name, base = library.base(knowledge)
        work = partial(_unless_busy, partial(_delete, name, base, id))
        return AsciiJsonResponse(await unless_gone(request, library.writing.run(work)))


def _add_asking(router: APIRouter, library: Library) -> None:
    @router.post("/v1/rag/search")
    async def search(body: RagSearchRequest, request: Request) -> AsciiJsonResponse:
        """Passages for a question, best first."""
        name, base = library.base(body.knowledge)
        work = partial(_search, name, base, body)
        return AsciiJsonResponse(await unless_gone(request, library.reading.run(work)))

    @router.post("/v1/rag/answer")
    async def answer(body: RagAnswerRequest, request: Request) -> Response:
        """An answer to a question from the documents, with citations."""
        return await answer_response(library, body, request)


# Reading -------------------------------------------------------------------------------------------------


def _knowledge_body(library: Library, goes_on: Callable[[], bool]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for name, base in library.bases.items():
        settings = base.settings
        entries.append(
            {
                "id": name,
                "object": "rag.knowledge",
                "documents": base.store.counts().get("documents", 0),
                "embedder": settings.embedder or None,
                "graph": settings.graph,
                "stats": _public(base.stats()),
            }
        )
    limits = {"writable": library.writable, "max_upload_bytes": library.service.settings.max_upload_bytes}
    return {"object": "list", "data": entries, **limits}


def _public(stats: Any) -> Any:
    """Statistics without where the store lies, which is nobody's business but the machine's owner's."""
    hidden = ("location", "path", "cache_folder", "folder", "root")
    return {name: value for name, value in plain(stats).items() if name not in hidden}


def _documents_body(
    name: str, base: KnowledgeBase, after: str, limit: int, goes_on: Callable[[], bool]
) -> dict[str, Any]:
    with base.store.reading() as reader:
        found = list(reader.documents(after=after, limit=limit + 1))
        total = reader.counts().get("documents", 0)
    return {
        "object": "list",
        "knowledge": name,
        "data": [document_entry(document) for document in found[:limit]],
        "has_more": len(found) > limit,
        "total": total,
    }


def _document_body(
    name: str,
    base: KnowledgeBase,
    id: str,
    chunk: str,
    first: int | None,
    limit: int,
    goes_on: Callable[[], bool],
) -> dict[str, Any]:
    with base.store.reading() as reader:
        document = reader.document(id)
        if document is None:
            raise _no_document(id)
        begin = first if first is not None else _around(reader, id, chunk, limit)
        shown: list[dict[str, Any]] = []
        more = False
        for one in reader.chunks(document=id):
            if not goes_on():
                raise ClientGoneError
            if one.ordinal < begin:
                continue
            if len(shown) == limit:
                more = True
                break
            shown.append(chunk_entry(one))
    return {**document_entry(document), "knowledge": name, "first": begin, "has_more": more, "chunks": shown}


def _around(reader: StoreReader, document: str, chunk: str, limit: int) -> int:
    """The ordinal to begin with so that `chunk` is among `limit` chunks, with some before it."""
    found = next(iter(reader.chunks(ids=[chunk])), None) if chunk else None
    if found is None or found.document != document:
        return 0
    return max(0, found.ordinal - limit // 3)


def _no_document(id: str) -> ApiError:
    return ApiError(404, f"there is no document {id[:200]!r}", param="id", code="document_not_found")


# Writing -------------------------------------------------------------------------------------------------

_BUSY_SECONDS = 5
"""When to try again while another process writes."""


def _unless_busy(write: Callable[[Callable[[], bool]], T], goes_on: Callable[[], bool]) -> T:
    """What `write` gives. Raises ApiError where another process writes to the documents: it says no more of
    it, for the store's place and the process are the machine's owner's business."""
    from ..rag.store import BusyError

    try:
        return write(goes_on)
    except BusyError:
        raise ApiError(
            409,
            "the documents are being written by another program; try again when it is done",
            code="documents_busy",
            headers={"Retry-After": str(_BUSY_SECONDS)},
        ) from None


def _file_name(given: str) -> str:
    """The name of a file to add. Raises ApiError."""
    from ..rag.readers import is_supported

    try:
        name = checked_name(given)
    except InputError as error:
        raise ApiError(400, str(error), param="name", code="invalid_name") from None
    if any(part.startswith(".") for part in name.split("/")):
        raise ApiError(400, "the name is that of a hidden file", param="name", code="invalid_name")
    # Below a place that is no folder: the name alone is asked about, and no file of this machine looked at.
    if not is_supported(Path(os.devnull, name)):
        ending = Path(name).suffix[:20] or "no ending"
        message = f"files with {ending!r} cannot be read as documents"
        raise ApiError(415, message, param="name", code="unsupported_document")
    return name


def _check_free(base: KnowledgeBase, name: str, goes_on: Callable[[], bool]) -> None:
    if base.store.documents_of_path(name):
        message = f"there is a document {name[:200]!r} already; replace=true takes its place"
        raise ApiError(409, message, param="name", code="document_exists")


def _add(
    knowledge: str, base: KnowledgeBase, name: str, data: bytes, replace: bool, goes_on: Callable[[], bool]
) -> dict[str, Any]:
    if not replace:
        _check_free(base, name, goes_on)
    report = base.add_bytes(name, data)
    failed = [{"path": str(path), "reason": str(reason)} for path, reason in report.failed]
    found = base.store.documents_of_path(name)
    taken = report.added or report.updated or report.unchanged
    if not found or (failed and not taken):  # where it was to replace another, that one is still there
        reason = failed[0]["reason"] if failed else "there is no text in this file"
        raise ApiError(400, reason, param="body", code="unreadable_document")
    return {
        "object": "rag.upload",
        "knowledge": knowledge,
        "name": name,
        "documents": [document_entry(document) for document in islice(found, _MOST_REPORTED)],
        "total": len(found),
        "failed": failed[:_MOST_REPORTED],
    }


def _delete(name: str, base: KnowledgeBase, id: str, goes_on: Callable[[], bool]) -> dict[str, Any]:
    if not base.delete_document(id):
        raise _no_document(id)
    return {"id": id, "object": "rag.document.deleted", "knowledge": name, "deleted": True}


# Asking --------------------------------------------------------------------------------------------------


def _search(
    name: str, base: KnowledgeBase, body: RagSearchRequest, goes_on: Callable[[], bool]
) -> dict[str, Any]:
    options: dict[str, Any] = {"top": body.top, "mode": body.mode, "per_document": body.per_document}
    found = base.search(body.query, explain=body.explain, **options)
    return {
        "object": "list",
        "knowledge": name,
        "query": body.query,
        "mode": body.mode,
        "data": [passage_entry(passage, body.query, explain=body.explain) for passage in found],
    }
