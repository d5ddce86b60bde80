"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...ir.errors import InputError
from ..chat import Turn, TurnReader
from ..generation import StepOutput
from ..sampler import TokenLogprob
from ..tool_calls import tools_from_openai
from .constraints import constraint
from .errors import AsciiJsonResponse
from .schema import ChatRequest
from .service import Running, ServedModel, Service, unless_gone
from .streams import DONE, ChoiceEvents, EventStream, event
from .wire import (
    Usage,
    ask_for_prose,
    chat_delta,
    chat_logprobs,
    new_id,
    now,
    tool_choice_of,
    truncated,
    wants_usage,
)

_TEMPLATE_VARIABLES = 64


def chat_router(service: Service) -> APIRouter:
    """The endpoint, for one server."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation."""
        model = service.model(body.model)
        usage = wants_usage(body.stream, body.stream_options)
        turn: Turn = await service.prepare(_prepare, model, body)
        running = Running(service, model)
        running.start([truncated(turn.prompt_ids, body.truncate_prompt_tokens)], [turn.params])
        answer = _Answer(service, model, running, turn, keep=body.truncate_prompt_tokens)
        if body.stream:
            return EventStream(answer.stream(usage=usage))
        return AsciiJsonResponse(await unless_gone(request, answer.whole()))

    return router


def _prepare(model: ServedModel, body: ChatRequest) -> Turn:
    """Check, render and tokenize; outside the event loop."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InputError("max_tokens and max_completion_tokens are both given", remedy="give one of them")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs is given without logprobs", remedy="set logprobs to true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.structured_outputs is not None and (body.response_format is not None or body.tools):
        raise InputError(
            "structured_outputs is given beside response_format or tools", remedy="give one of them"
        )
    grammar = constraint(model, body.structured_outputs)
    params = model.sampling(body, most, logprobs=logprobs, grammar=grammar)
    variables = dict(body.chat_template_kwargs or {})
    if len(variables) > _TEMPLATE_VARIABLES or not {"messages", "tools", "documents"}.isdisjoint(variables):
        raise InputError(
            "chat_template_kwargs holds what is given elsewhere, or too much", remedy="leave it out"
        )
    return model.chat.prepare(
        [message.model_dump(exclude_none=True) for message in body.messages],
        params,
        tools=tools_from_openai(body.tools or []),
        tool_choice=tool_choice_of(body.tool_choice),
        parallel=body.parallel_tool_calls is not False,
        response_format=body.response_format,
        template=variables,
    )


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    reader: TurnReader
    logprobs: list[TokenLogprob] = field(default_factory=list)
    begun: bool = False


class _Answer:
    """The answer to one request, as a whole or as chunks."""

    def __init__(
        self, service: Service, model: ServedModel, running: Running, turn: Turn, *, keep: int | None
    ) -> None:
        """`keep`: tokens of a prompt that are kept at most, where the request asked for that."""
        self._keep = keep
        self._service = service
        self._turn = turn
        self._model = model
        self._running = running
        self._with_logprobs = turn.params.logprobs is not None
        self._choices = [_Choice(turn.reader()) for _ in range(turn.params.n)]
        self._head: dict[str, Any] = {"id": new_id("chatcmpl-"), "created": now(), "model": model.name}

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        usage = Usage()
        with self._running as running:
            while outputs := await running.take():
                usage.note(outputs)
                for output in outputs:
                    choice = self._choices[output.index]
                    if choice.reader.finish_reason is None:
                        choice.logprobs += output.logprobs
                    choice.reader.push(output)
                await self._go_on(usage)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)],
            "usage": usage.body(),
        }

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        reader = choice.reader
        message: dict[str, Any] = {"role": "assistant", "content": reader.content, "refusal": None}
        if reader.calls:
            message["content"] = reader.content or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in reader.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": reader.finish_reason,
        }

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": chat_logprobs(self._model.llm.tokenizer, entries), "refusal": None}

    async def stream(self, *, usage: bool) -> AsyncGenerator[str, None]:
        """The chunks of an answer, as events: the role first, the reason of the end last, then the usage."""
        counted = Usage()
        made = ChoiceEvents({**self._head, "object": _CHUNK}, '"delta":{"content":%s}', usage=usage)
        with self._running as running:
            while outputs := await running.take():
                counted.note(outputs)
                text = "".join([self._chunks(output, made) for output in outputs])
                if text:
                    yield text
                await self._go_on(counted)
        if usage:
            yield event({**self._head, "object": _CHUNK, "choices": [], "usage": counted.body()})
        yield DONE

    async def _go_on(self, usage: Usage) -> None:
        """Where every choice has ended by what it said, the engine need not go on; where text is wanted
        instead of a call that was made before, it starts again.
        """
        reader = self._choices[0].reader
        await ask_for_prose(self._service, self._running, self._turn, reader, usage, self._keep)
        if all(choice.reader.finish_reason is not None for choice in self._choices):
            self._running.finish(reader.finish_reason)

    def _chunks(self, output: StepOutput, made: ChoiceEvents) -> str:
        choice = self._choices[output.index]
        if choice.reader.finish_reason is not None:
            return ""
        delta = chat_delta(choice.reader.push(output))
        if choice.reader.wants_prose:
            return ""
        text = ""
        if not choice.begun:
            choice.begun = True
            text += _chunk(made, output.index, {"role": "assistant", "content": ""})
        if delta.keys() == _PLAIN and not self._with_logprobs:
            text += made.text(output.index, delta["content"])
        elif delta or output.logprobs:
            text += _chunk(made, output.index, delta, logprobs=self._logprobs(output.logprobs))
        if choice.reader.finish_reason is not None:
            text += _chunk(made, output.index, {}, reason=choice.reader.finish_reason)
        return text


def _chunk(
    made: ChoiceEvents, index: int, delta: Any, *, logprobs: Any = None, reason: str | None = None
) -> str:
    return made.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})


_PLAIN = {"content"}
_CHUNK = "chat.completion.chunk"
