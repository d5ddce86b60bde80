"""POST /v1/responses: the part of OpenAI's newer API that its package's helper methods use. Nothing is
stored: a conversation comes whole with each request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...ir.errors import InputError
from ..chat import Turn
from ..generation import StepOutput
from ..tool_calls import CallArguments, CallBegin, Content, Event, tools_from_openai
from .errors import ApiError, AsciiJsonResponse
from .schema import ResponsesRequest, Sampling
from .service import Running, ServedModel, Service, unless_gone
from .streams import EventStream, event
from .wire import Usage, ask_for_prose, new_id, now, tool_choice_of


def responses_router(service: Service) -> APIRouter:
    """The endpoint, for one server."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """An answer to a conversation, as a list of items."""
        model = service.model(body.model)
        turn: Turn = await service.prepare(_prepare, model, body)
        running = Running(service, model)
        running.start([turn.prompt_ids], [turn.params])
        answer = _Answer(service, model, running, turn, body)
        if body.stream:
            return EventStream(answer.stream(), error_event="error")
        return AsciiJsonResponse(await unless_gone(request, answer.whole()))

    @router.get("/v1/responses/{response_id}")
    async def stored(response_id: str) -> Response:
        """None is ever found: answers are not stored."""
        raise ApiError(404, "responses are not stored here", param="response_id", code="not_found")

    return router


def _prepare(model: ServedModel, body: ResponsesRequest) -> Turn:
    """Check, render and tokenize; outside the event loop."""
    messages = _messages(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    options = Sampling(temperature=body.temperature, top_p=body.top_p)
    return model.chat.prepare(
        messages,
        model.sampling(options, body.max_output_tokens),
        tools=tools_from_openai([_nested(tool, i) for i, tool in enumerate(body.tools or ())]),
        tool_choice=tool_choice_of(body.tool_choice),
        parallel=body.parallel_tool_calls is not False,
        response_format=_format(body.text),
    )


def _nested(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A tool as chat completions have it; here its fields stand beside the type."""
    if tool.get("type") != "function":
        raise InputError(
            f"tools[{index}].type is {str(tool.get('type'))[:40]!r}",
            remedy="only functions can be called here",
        )
    inner = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": inner}


def _format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    wanted = (text or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping):
        raise InputError("text.format is no object", remedy='for example {"type": "text"}')
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    return {"type": wanted.get("type")}


def _messages(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The input's items as messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":
            raise InputError(
                f"input[{number}].type is {str(kind)[:40]!r}",
                remedy="allowed: message, function_call, function_call_output",
            )
    return messages


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Calls that follow one another, or what the assistant said, are one message."""
    call = {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": item.get("name"), "arguments": item.get("arguments")},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


class _Item:
    """One item of the output as it grows: a message, or a call."""

    def __init__(self, index: int, call: CallBegin | None) -> None:
        self.index = index
        self.call = call
        self.id = new_id("msg_" if call is None else "fc_")
        self.text = ""

    def body(self, status: str) -> dict[str, Any]:
        """Its JSON; an item that has begun holds nothing yet."""
        if self.call is not None:
            return {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "call_id": self.call.id,
                "name": self.call.name,
                "arguments": self.text,
            }
        parts = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": parts}

    def part(self) -> dict[str, Any]:
        """The text of a message."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class _Answer:
    """The answer to one request, as a whole or as events."""

    def __init__(
        self, service: Service, model: ServedModel, running: Running, turn: Turn, body: ResponsesRequest
    ) -> None:
        self._service = service
        self._turn = turn
        self._running = running
        self._reader = turn.reader()
        self._items: list[_Item] = []
        self._usage = Usage()
        self._number = 0
        self._head: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": now(),
            "model": model.name,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": turn.params.temperature,
            "top_p": turn.params.top_p,
            "max_output_tokens": body.max_output_tokens,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "text": body.text or {"format": {"type": "text"}},
            "store": False,
            "truncation": "disabled",
            "previous_response_id": None,
            "error": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        with self._running as running:
            while outputs := await running.take():
                self._usage.note(outputs)
                for output in outputs:
                    for one in self._reader.push(output):
                        self._take(one)
                await self._go_on()
        return self._body()

    async def _go_on(self) -> None:
        """As for chat completions: end early, or start again for text."""
        await ask_for_prose(self._service, self._running, self._turn, self._reader, self._usage, None)
        if self._reader.finish_reason is not None:
            self._running.finish(self._reader.finish_reason)

    def _take(self, one: Event) -> tuple[_Item, bool]:
        """Take up an event: (the item that it belongs to, whether it began it)."""
        match one:
            case CallBegin():
                self._items.append(_Item(len(self._items), one))
                return self._items[-1], True
            case Content(text):
                begins = not self._items or self._items[-1].call is not None
                if begins:
                    self._items.append(_Item(len(self._items), None))
                self._items[-1].text += text
                return self._items[-1], begins
            case CallArguments(index, text):
                calls = [item for item in self._items if item.call is not None]
                calls[index].text += text
                return calls[index], False

    def _body(self, status: str | None = None) -> dict[str, Any]:
        """The response object; without `status`, as it ended."""
        cut = self._reader.finish_reason == "length"
        status = status or ("incomplete" if cut else "completed")
        done = status in ("completed", "incomplete")
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "incomplete_details": details,
            "output": [item.body(status) for item in self._items] if done else [],
            "usage": self._usage_body() if done else None,
        }

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.generated,
        }

    # As events -------------------------------------------------------------------------------------------

    def _event(self, kind: str, **data: Any) -> str:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **data}, kind)

    async def stream(self) -> AsyncGenerator[str, None]:
        """The events of an answer."""
        with self._running as running:
            yield self._event("response.created", response=self._body("in_progress"))
            yield self._event("response.in_progress", response=self._body("in_progress"))
            while outputs := await running.take():
                self._usage.note(outputs)
                text = "".join([self._events(output) for output in outputs])
                if text:
                    yield text
                await self._go_on()
        if self._items:
            yield self._close(self._items[-1])
        body = self._body()
        yield self._event(f"response.{body['status']}", response=body)

    def _events(self, output: StepOutput) -> str:
        text = ""
        for one in self._reader.push(output):
            before = self._items[-1] if self._items else None
            item, begins = self._take(one)
            if begins:
                text += self._close(before) if before is not None else ""
                text += self._open(item)
            if isinstance(one, Content):
                text += self._event(
                    "response.output_text.delta",
                    **self._place(item),
                    content_index=0,
                    delta=one.text,
                    logprobs=[],
                )
            elif isinstance(one, CallArguments):
                text += self._event(
                    "response.function_call_arguments.delta", **self._place(item), delta=one.text
                )
        return text

    def _place(self, item: _Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.index}

    def _open(self, item: _Item) -> str:
        empty = _Item(item.index, item.call)
        empty.id = item.id
        text = self._event(
            "response.output_item.added", output_index=item.index, item=empty.body("in_progress")
        )
        if item.call is None:
            text += self._event(
                "response.content_part.added", **self._place(item), content_index=0, part=empty.part()
            )
        return text

    def _close(self, item: _Item) -> str:
        place = self._place(item)
        if item.call is None:
            text = self._event(
                "response.output_text.done", **place, content_index=0, text=item.text, logprobs=[]
            )
            text += self._event("response.content_part.done", **place, content_index=0, part=item.part())
        else:
            text = self._event(
                "response.function_call_arguments.done", **place, name=item.call.name, arguments=item.text
            )
        done = "incomplete" if self._reader.finish_reason == "length" else "completed"
        return text + self._event("response.output_item.done", output_index=item.index, item=item.body(done))
