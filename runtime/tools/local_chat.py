"""The model of this process as the agent's `Chat`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..tool_calls.base import Content, Tool
from .agent import Budget, Chat, ChatAnswer, Message
from .base import ArgumentError
from .runner import parse_arguments

if TYPE_CHECKING:
    from ..chat import ChatModel, Turn, TurnReader
    from ..sampling_params import SamplingParams


def local_chat(
    model: ChatModel, params: SamplingParams, *, on_text: Callable[[str], None] | None = None
) -> Chat:
    """A `Chat` that generates with `model`.

    Args:
        model: the loaded artifact with its chat template.
        params: of every answer; `max_tokens` is of one answer, within what the run has left.
        on_text: gets the text of answers as it comes.
    """

    def chat(messages: Sequence[Message], tools: Sequence[Tool], budget: Budget) -> ChatAnswer:
        deadline = time.monotonic() + budget.seconds
        most = budget.tokens if params.max_tokens is None else min(params.max_tokens, budget.tokens)
        limited = replace(params, n=1, max_tokens=most, min_tokens=min(params.min_tokens, most))
        shown = [_readable(message) for message in messages]
        turn = model.prepare(shown, limited, tools=tools)
        reader = turn.reader()
        prompt_tokens, generated_tokens, late = len(turn.prompt_ids), 0, False
        for part in _turns(turn, reader):
            spent = generated_tokens
            with model.llm.stream(part.prompt_ids, part.params) as stream:
                for output in stream:
                    generated_tokens = spent + output.generated_tokens
                    for event in reader.push(output):
                        if on_text is not None and isinstance(event, Content):
                            on_text(event.text)
                    late = output.finish_reason is None and time.monotonic() > deadline
                    if late or reader.finish_reason is not None or reader.wants_prose:
                        break
            if late:
                break
        reason = "cancelled" if late else reader.finish_reason
        return ChatAnswer(reader.content, tuple(reader.calls), prompt_tokens, generated_tokens, reason)

    return chat


def _turns(turn: Turn, reader: TurnReader) -> Iterator[Turn]:
    """The turn, and one more that asks for text where the first one only repeated a call."""
    yield turn
    if reader.wants_prose and turn.prose is not None:
        again = turn.prose()
        reader.into_prose()
        yield again


def _readable(message: Message) -> dict[str, Any]:
    """The message as the template may get it: arguments that are no JSON object, which a model can write
    where nothing constrains it, are left out, for templates read them.
    """
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": _object_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object_text(arguments: str) -> str:
    try:
        parse_arguments(arguments)
    except ArgumentError:
        return "{}"
    return arguments
