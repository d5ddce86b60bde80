"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ...ir.errors import InputError
from ..tool_calls import tools_from_openai
from .errors import AsciiJsonResponse
from .schema import DetokenizeRequest, TokenizeRequest
from .service import ServedModel, Service


def tokens_router(service: Service) -> APIRouter:
    """The endpoints, for one server."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> AsciiJsonResponse:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        model = service.model(body.model, generates=None)
        return AsciiJsonResponse(await service.prepare(_tokenize, model, body))

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> AsciiJsonResponse:
        """The text of token ids."""
        model = service.model(body.model, generates=None)
        return AsciiJsonResponse(await service.prepare(_detokenize, model, body))

    return router


def _tokenize(model: ServedModel, body: TokenizeRequest) -> dict[str, Any]:
    llm = model.llm
    if (body.prompt is None) == (body.messages is None):
        raise InputError("prompt and messages: exactly one of them is needed", remedy="give one")
    if body.prompt is not None:
        ids = llm.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        messages = [message.model_dump(exclude_none=True) for message in body.messages or ()]
        opening = {"add_generation_prompt": body.add_generation_prompt is not False}
        turn = model.chat.prepare(
            messages, llm.sampling(), tools=tools_from_openai(body.tools or []), template=opening
        )
        ids = turn.prompt_ids
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": llm.context_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [llm.tokenizer.token(token) for token in ids]
    return answer


def _detokenize(model: ServedModel, body: DetokenizeRequest) -> dict[str, Any]:
    most = model.llm.tokenizer.vocab_size
    for token in body.tokens:
        if not 0 <= token < most:
            raise InputError(
                f"tokens holds {str(token)[:40]}, which is no id", remedy=f"allowed: 0 to {most - 1}"
            )
    return {"prompt": model.llm.decode(body.tokens, skip_special_tokens=False)}
