"""POST /v1/rag/answer: an answer from the documents, whole or as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.responses import Response

from ..rag.types import Passage
from .errors import AsciiJsonResponse
from .library import Library
from .rag_wire import passage_entry
from .schema import RagAnswerRequest
from .service import ClientGoneError, ServedModel, unless_gone
from .streams import DONE, EventStream, event
from .wire import new_id, now

if TYPE_CHECKING:
    from ..rag.answer import Answer, AnswerEvent, Citation
    from ..rag.knowledge import KnowledgeBase


async def answer_response(library: Library, body: RagAnswerRequest, request: Request) -> Response:
    """The answer to a request, in the form that it asks for."""
    name, base = library.base(body.knowledge)
    model = library.service.model(body.model)
    head = {"id": new_id("ragans-"), "created": now(), "model": model.name, "knowledge": name}
    events = await library.service.prepare(_events, base, model, body)
    if body.stream:
        return EventStream(_stream(library, events, body, head))
    found = await unless_gone(request, library.answering.run(partial(_whole, events)))
    message = {"role": "assistant", "content": found.text}
    choice = {"index": 0, "message": message, "finish_reason": found.finish_reason or "stop"}
    return AsciiJsonResponse({**head, "object": "rag.answer", "choices": [choice], **_facts(found, body)})


def _events(
    base: KnowledgeBase, model: ServedModel, body: RagAnswerRequest
) -> Generator[AnswerEvent, None, None]:
    """What happens on the way to an answer, as one asks for it. Raises InputError for a bad request."""
    from ..rag.answer import stream_answer

    options: dict[str, Any] = {"top": body.top, "mode": body.mode, "iterative": body.iterative}
    if body.max_tokens is not None:
        options["max_tokens"] = body.max_tokens
    return stream_answer(base, model.llm, body.question, **options)


def _whole(events: Generator[AnswerEvent, None, None], goes_on: Callable[[], bool]) -> Answer:
    """Runs in a thread. Raises ClientGoneError as soon as nobody waits any more."""
    from ..rag.answer import Answer

    with closing(events):
        for one in events:
            if not goes_on():
                raise ClientGoneError
            if isinstance(one, Answer):
                return one
    raise AssertionError("the last event is the answer")


def _facts(found: Answer, body: RagAnswerRequest) -> dict[str, Any]:
    """What is known of an answer besides its text. Citation n is of the n-th passage."""
    return {
        "found": found.found,
        "supported": found.supported,
        "citations": [_citation(one) for one in found.citations],
        "passages": _passages(found.passages, body),
        "removed": list(found.removed),
        "searches": [step.question for step in found.steps],
        "usage": {
            "prompt_tokens": found.prompt_tokens,
            "completion_tokens": found.generated_tokens,
            "total_tokens": found.prompt_tokens + found.generated_tokens,
        },
    }


def _passages(found: tuple[Passage, ...], body: RagAnswerRequest) -> list[dict[str, Any]]:
    return [
        {"number": number, **passage_entry(one, body.question)} for number, one in enumerate(found, start=1)
    ]


def _citation(one: Citation) -> dict[str, Any]:
    return {
        "number": one.number,
        "document": one.passage.document,
        "chunk": one.passage.chunk,
        "title": one.passage.title,
        "heading": one.passage.heading,
        "page": one.passage.page,
        "span": [one.start, one.end],
        "quote": one.quote,
        "given": one.given,
    }


# As events -----------------------------------------------------------------------------------------------


async def _stream(
    library: Library,
    events: Generator[AnswerEvent, None, None],
    body: RagAnswerRequest,
    head: dict[str, Any],
) -> AsyncGenerator[str, None]:
    """Events like those of a chat completion. `passages` come with each search; the text as the model writes
    it; with the last event `content`, the text as it stands after its citations were checked.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[AnswerEvent | None] = asyncio.Queue()

    def work(goes_on: Callable[[], bool]) -> None:
        with closing(events):
            for one in events:
                if not goes_on():
                    return
                loop.call_soon_threadsafe(waiting.put_nowait, one)

    head = {**head, "object": "rag.answer.chunk"}
    task = asyncio.ensure_future(library.answering.run(work))
    task.add_done_callback(lambda _: waiting.put_nowait(None))
    try:
        while (one := await waiting.get()) is not None:
            yield event({**head, **_chunk(one, body)})
        await task  # raises what went wrong
        yield DONE
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _chunk(one: AnswerEvent, body: RagAnswerRequest) -> dict[str, Any]:
    from ..rag.answer import Said, Searched

    if isinstance(one, Said):
        return {"choices": [{"index": 0, "delta": {"content": one.text}, "finish_reason": None}]}
    if isinstance(one, Searched):
        choice: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": None}
        return {"choices": [choice], "query": one.question, "passages": _passages(one.passages, body)}
    choice = {"index": 0, "delta": {}, "finish_reason": one.finish_reason or "stop"}
    return {"choices": [choice], "content": one.text, **_facts(one, body)}
