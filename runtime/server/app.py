"""The server as an ASGI app: which paths there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmc
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from ..llm import LLM
from .adapters import adapters_router
from .chat import chat_router
from .completions import completions_router
from .embeddings import embeddings_router
from .errors import ApiError, AsciiJsonResponse, add_error_handlers
from .library import Library
from .middleware import Gate
from .rag import rag_router
from .responses import responses_router
from .service import ClientGoneError, Service
from .settings import ServerSettings
from .tokens import tokens_router

if TYPE_CHECKING:
    from ..rag.knowledge import KnowledgeBase

_STATIC = Path(__file__).parent / "static"

# The page loads nothing from elsewhere and runs no script that is written into it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def create_app(
    models: Mapping[str, LLM],
    settings: ServerSettings | None = None,
    knowledge: Mapping[str, KnowledgeBase] | None = None,
) -> FastAPI:
    """An OpenAI-compatible server of these models, by the names that requests use, and of documents, by the
    names of their knowledge bases. They stay the caller's to close. Raises InputError where one of the models
    is no language model or encoder.
    """
    service = Service(models, settings or ServerSettings())
    library = Library(service, knowledge or {})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service.warm_up()
        yield
        service.close()
        await asyncio.to_thread(library.close)

    app = FastAPI(
        title="llmc", version=llmc.__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="OpenAI-compatible API of a model compiled by llmc.",
    )  # fmt: skip
    app.state.service = service
    for router in (
        chat_router(service),
        completions_router(service),
        responses_router(service),
        embeddings_router(service),
        tokens_router(service),
        rag_router(library),
        _about_router(service),
    ):
        app.include_router(router)
    if (folder := service.settings.adapter_folder) is not None:
        app.include_router(adapters_router(service, folder, service.settings.max_adapters))
    if service.settings.page:
        _add_page(app)
    add_error_handlers(app)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    app.add_middleware(Gate, service=service)
    return app


def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for it; nobody reads it


def _about_router(service: Service) -> APIRouter:
    """Models, health and numbers."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> AsciiJsonResponse:
        """The models that are served."""
        return AsciiJsonResponse({"object": "list", "data": [m.describe() for m in service.models.values()]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> AsciiJsonResponse:
        """One of them."""
        return AsciiJsonResponse(service.model(name, generates=None).describe())

    @router.get("/health")
    async def health() -> AsciiJsonResponse:
        """200 while every engine lives."""
        return AsciiJsonResponse(*_health(service))

    @router.get("/ready")
    async def ready() -> AsciiJsonResponse:
        """200 while new requests are accepted."""
        body, status = _health(service)
        if service.draining:
            body, status = {"status": "draining"}, 503
        return AsciiJsonResponse(body, status)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text exposition."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _health(service: Service) -> tuple[dict[str, Any], int]:
    broken = [name for name, model in service.models.items() if not model.llm.engine.alive]
    if broken:
        return {"status": "failed", "models": broken}, 503
    return {"status": "ok"}, 200


def _add_page(app: FastAPI) -> None:
    files = StaticFiles(directory=_STATIC)

    class Page(StaticFiles):
        """The page's files, with the policy that confines them."""

        async def get_response(self, path: str, scope: Any) -> Response:
            response = await files.get_response(path, scope)
            response.headers["Content-Security-Policy"] = _PAGE_POLICY
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["Cache-Control"] = "no-cache"
            return response

    page = Page(directory=_STATIC)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return await page.get_response("index.html", request.scope)

    app.mount("/static", page, name="static")


__all__ = ["ApiError", "create_app"]
