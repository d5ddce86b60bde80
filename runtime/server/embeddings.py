"""POST /v1/embeddings and /v1/rerank: vectors of texts from an encoder, scores from a cross-encoder."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from ...ir.errors import InputError
from ..encoder import STEP_TOKENS, prompts
from .completions import listed
from .errors import ApiError, AsciiJsonResponse
from .schema import EmbeddingRequest, RerankRequest
from .service import ClientGoneError, ServedModel, Service, unless_gone
from .wire import new_id, truncated

_PAIRS = 16
"""Documents that a cross-encoder reads before it is asked whether the client is still there."""


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
        """Documents, best first: by a cross-encoder's probability that they answer the query, or by the
        cosine of an encoder's vectors.
        """
        model = service.model(body.model, generates=False)
        return AsciiJsonResponse(await unless_gone(request, service.compute(partial(_rerank, model, body))))

    return router


def _vectors(
    model: ServedModel, texts: Sequence[Any], keep: int | None, goes_on: Callable[[], bool]
) -> tuple[np.ndarray, int]:
    """([N, hidden] float32 of length 1, tokens read)."""
    ids = [truncated(model.llm.prompt_ids(text), keep) for text in texts]
    vectors: list[np.ndarray] = []
    for part in _parts(ids):
        if not goes_on():
            raise ClientGoneError
        vectors.append(model.llm.embeddings(part))
    return np.concatenate(vectors), sum(map(len, ids))


def _shortened(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first elements of vectors, of length 1 again, which models that were trained for it keep their
    meaning in (Kusupati et al. 2022, "Matryoshka Representation Learning", arXiv:2205.13147).
    """
    short = vectors[:, :dimensions]
    return short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)


def _parts(ids: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """What is computed at a time: a step or two, after which is asked whether the client is still there."""
    part: list[list[int]] = []
    for tokens in ids:
        part.append(tokens)
        if sum(map(len, part)) >= STEP_TOKENS:
            yield part
            part = []
    if part:
        yield part


def _embed_body(model: ServedModel, body: EmbeddingRequest, goes_on: Callable[[], bool]) -> dict[str, Any]:
    if model.llm.kind == "classifier":
        raise ApiError(
            400,
            f"model {model.name!r} is a cross-encoder and makes no vectors; use /v1/rerank",
            param="model",
            code="unsupported_model",
        )
    width = model.llm.executor.vocab_size
    if body.dimensions is not None and body.dimensions > width:
        raise InputError(f"dimensions is {body.dimensions}", remedy=f"this model's vectors have {width}")
    vectors, tokens = _vectors(model, listed(body.input, "input"), body.truncate_prompt_tokens, goes_on)
    if body.dimensions is not None:
        vectors = _shortened(vectors, body.dimensions)
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


def _likeness(model: ServedModel, body: RerankRequest, goes_on: Callable[[], bool]) -> tuple[np.ndarray, int]:
    artifact = model.llm.artifact
    asked, told = prompts(artifact.model) if artifact is not None else ("", "")
    texts = [asked + body.query, *(told + document for document in body.documents)]
    vectors, tokens = _vectors(model, texts, body.truncate_prompt_tokens, goes_on)
    return vectors[1:] @ vectors[0], tokens


def _relevance(
    model: ServedModel, body: RerankRequest, goes_on: Callable[[], bool]
) -> tuple[np.ndarray, int]:
    """What is too long of a pair is cut, as it was in the model's training."""
    if body.truncate_prompt_tokens is not None:
        raise InputError(
            "truncate_prompt_tokens does not go with a cross-encoder",
            remedy="leave it out: a document that is too long is cut",
        )
    scores: list[np.ndarray] = []
    tokens = 0
    for start in range(0, len(body.documents), _PAIRS):
        if not goes_on():
            raise ClientGoneError
        found, count = model.llm.rank_counted(body.query, body.documents[start : start + _PAIRS])
        scores.append(found)
        tokens += count
    return 1 / (1 + np.exp(-np.concatenate(scores))), tokens


def _rerank(model: ServedModel, body: RerankRequest, goes_on: Callable[[], bool]) -> dict[str, Any]:
    score = _likeness if model.llm.kind == "encoder" else _relevance
    scores, tokens = score(model, body, goes_on)
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
