"""POST /v1/embeddings and /v1/rerank: vectors of texts from an encoder."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from ...ir.errors import InputError
from .completions import listed
from .errors import AsciiJsonResponse
from .schema import EmbeddingRequest, RerankRequest
from .service import ClientGoneError, ServedModel, Service, unless_gone
from .wire import new_id, truncated


def embeddings_router(service: Service) -> APIRouter:
    """The endpoints, for one server."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> AsciiJsonResponse:
        """A vector of length 1 for each text."""
        model = service.model(body.model, generates=False)
        return AsciiJsonResponse(
            await unless_gone(request, service.compute(partial(_embed_body, model, body)))
        )

    @router.post("/v1/rerank")
    async def rerank(body: RerankRequest, request: Request) -> AsciiJsonResponse:
        """Documents by their likeness to a query, best first."""
        model = service.model(body.model, generates=False)
        return AsciiJsonResponse(await unless_gone(request, service.compute(partial(_rerank, model, body))))

    return router


def _vectors(
    model: ServedModel, texts: Sequence[Any], keep: int | None, goes_on: Callable[[], bool]
) -> tuple[np.ndarray, int]:
    """([N, hidden] float32 of length 1, tokens read)."""
    ids = [truncated(model.llm.prompt_ids(text), keep) for text in texts]
    vectors: list[np.ndarray] = []
    for tokens in ids:
        if not goes_on():
            raise ClientGoneError
        vectors.append(model.llm.embeddings([tokens])[0])
    return np.stack(vectors), sum(map(len, ids))


def _embed_body(model: ServedModel, body: EmbeddingRequest, goes_on: Callable[[], bool]) -> dict[str, Any]:
    vectors, tokens = _vectors(model, listed(body.input, "input"), body.truncate_prompt_tokens, goes_on)
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        raise InputError(
            f"dimensions is {body.dimensions}", remedy=f"this model's vectors have {vectors.shape[1]}"
        )
    as_text = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if as_text
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _rerank(model: ServedModel, body: RerankRequest, goes_on: Callable[[], bool]) -> dict[str, Any]:
    vectors, tokens = _vectors(model, [body.query, *body.documents], body.truncate_prompt_tokens, goes_on)
    scores = vectors[1:] @ vectors[0]
    order = np.argsort(-scores, kind="stable")[: body.top_n or len(scores)]
    results: list[dict[str, Any]] = []
    for index in order.tolist():
        entry: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
        if body.return_documents is not False:
            entry["document"] = {"text": body.documents[index]}
        results.append(entry)
    return {
        "id": new_id("rerank-"),
        "model": model.name,
        "usage": {"total_tokens": tokens},
        "results": results,
    }
