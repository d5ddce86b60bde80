"""The agent: a model answers, calls tools, reads their results and goes on, until it has an answer or a limit
ends it.

    agent = Agent(local_chat(ChatModel(llm), params), ToolBox([weather]), confirm=ask)
    result = agent.run([{"role": "user", "content": "Is it raining in Oslo?"}])

What goes wrong in a tool, or in how it is called, is told to the model, which may do better. What ends the
loop is a typed error: a limit, or the third call with the same name and the same arguments, which no further
step would answer otherwise. Results of tools are messages of role "tool" and nothing else: text of bounded
length that is neither parsed nor obeyed by anything here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from ...ir.errors import InputError, LlmcError
from ..tool_calls.base import Tool, ToolCall, new_call_id
from .base import RunnableTool, ToolResult, one_line, shortened
from .guard import REFUSAL, DocumentGuard
from .registry import Allow
from .runner import canonical

Message = dict[str, Any]
Trace = Callable[[dict[str, Any]], None]
"""Gets every event as it happens; `trace.py` says which there are."""

SCHEMA = 1
"""Version of the events; a reader refuses a newer one."""

MOST_IDENTICAL = 3
"""The identical call with this number ends the loop."""


class AgentError(LlmcError):
    """The loop ended without an answer. `result` holds what there was until then."""

    result: AgentResult | None = None


class LimitError(AgentError):
    """A limit was reached."""


class StepLimitError(LimitError):
    """The model has answered `Limits.steps` times, and still calls tools."""


class TimeLimitError(LimitError):
    """`Limits.seconds` are over."""


class TokenLimitError(LimitError):
    """The model has generated `Limits.tokens` tokens."""


class RepeatedCallError(AgentError):
    """The model makes the same call again and again."""


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    steps: int = 8
    """Answers of the model, the last one included."""
    seconds: float = 300.0
    """Of the whole run, without the time that a person takes to decide about a call."""
    tokens: int = 8192
    """Generated tokens, of all answers."""

    def validate(self) -> None:
        """Raise InputError, naming the limit, for one that makes no sense."""
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"limit of {name} is {value}", remedy="allowed: a whole number from 1")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise InputError(f"limit of seconds is {self.seconds}", remedy="allowed: a number above 0")


@dataclass(frozen=True)
class Budget:
    """What is left for one answer."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class ChatAnswer:
    """One answer of a model."""

    content: str
    calls: Sequence[ToolCall] = ()
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str | None = "stop"
    """"stop", "tool_calls", "length", or "cancelled" where the budget's time ended it."""


class Chat(Protocol):
    """A model that answers a conversation: in this process, over a network, or made up by a test."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool], budget: Budget) -> ChatAnswer:
        """The next message of the assistant. It should end at the budget's tokens and seconds."""
        ...


class Tools(Protocol):
    """What the loop needs of a `ToolBox`."""

    @property
    def specs(self) -> Sequence[Tool]: ...

    def run(self, call: ToolCall, *, allow: Allow | None, seconds: float | None) -> ToolResult: ...


@dataclass(frozen=True)
class CallRecord:
    """A call that was made, and what came of it."""

    step: int
    call: ToolCall
    result: ToolResult


@dataclass
class AgentResult:
    """A run, or what there was of it when an error ended it."""

    messages: list[Message]
    """The whole conversation, in the form of OpenAI's API."""
    text: str = ""
    """The last answer."""
    steps: int = 0
    calls: list[CallRecord] = field(default_factory=list)
    reason: str = ""
    """"stop": the model was done. "length": its last answer was cut. Otherwise the name of an error."""
    prompt_tokens: int = 0
    """Of all prompts; what a prompt shares with the one before counts again."""
    generated_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Agent:
    """The loop; see the module's text. It keeps nothing between runs."""

    chat: Chat
    toolbox: Tools
    limits: Limits = Limits()
    """Of each run."""
    confirm: Allow | None = None
    """Asked before a tool with effects is called; the model is told of a refusal. None refuses all of those.
    """
    trace: Trace | None = None
    clock: Callable[[], float] = time.monotonic
    """Seconds; a replay has its own."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the trace says about the model."""

    def run(self, messages: Sequence[Mapping[str, Any]]) -> AgentResult:
        """Answer a conversation, which is left as it is: the result holds its continuation.

        Raises InputError for a limit that makes no sense; AgentError, with the `result` so far, where a limit
        or a repeated call ends it; and whatever the model raises (for a prompt that is too long).
        """
        self.limits.validate()
        return _Run(self, [dict(message) for message in messages]).complete()


class _Run:
    """The state of one run."""

    def __init__(self, agent: Agent, messages: list[Message]) -> None:
        self._agent = agent
        self._result = AgentResult(messages)
        self._seen: Counter[str] = Counter()
        self._guard = DocumentGuard(messages)
        self._began = agent.clock()
        self._waited = 0.0  # for people, whose time is not counted

    def complete(self) -> AgentResult:
        agent, result = self._agent, self._result
        self._emit(
            "start",
            schema=SCHEMA,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            about=dict(agent.about),
            limits=asdict(agent.limits),
            tools=[tool.as_openai() for tool in agent.toolbox.specs],
            messages=[dict(message) for message in result.messages],
        )
        try:
            while (calls := self._answer()) is not None:
                for call in calls:
                    self._call(call)
        except BaseException as error:
            result.reason = type(error).__name__
            if isinstance(error, AgentError):
                error.result = result
            self._emit("error", type=result.reason, message=one_line(error))
            raise
        finally:
            result.seconds = self._elapsed()
            self._emit(
                "end",
                reason=result.reason,
                text=result.text,
                steps=result.steps,
                calls=len(result.calls),
                prompt_tokens=result.prompt_tokens,
                generated_tokens=result.generated_tokens,
            )
        return result

    def _answer(self) -> list[ToolCall] | None:
        """One answer of the model: the calls that it wants, or None where it is the last one."""
        agent, result, limits = self._agent, self._result, self._agent.limits
        budget = Budget(limits.tokens - result.generated_tokens, limits.seconds - self._elapsed())
        self._check(budget)
        before = self._elapsed()
        answer = agent.chat(list(result.messages), list(agent.toolbox.specs), budget)
        calls = [replace(call, id=call.id or new_call_id()) for call in answer.calls]
        message: Message = {"role": "assistant", "content": answer.content}
        if calls:
            message["tool_calls"] = [call.as_openai() for call in calls]
        result.messages.append(message)
        result.steps += 1
        result.text = answer.content
        result.prompt_tokens += answer.prompt_tokens
        result.generated_tokens += answer.generated_tokens
        self._emit(
            "answer",
            step=result.steps,
            message=message,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            generated_tokens=answer.generated_tokens,
            seconds=round(self._elapsed() - before, 6),
        )
        cut = answer.finish_reason in ("length", "cancelled")
        if calls or cut:
            self._check(Budget(limits.tokens - result.generated_tokens, limits.seconds - self._elapsed()))
        if not calls:
            result.reason = answer.finish_reason or "stop"
            return None
        if result.steps == limits.steps:
            raise StepLimitError(
                f"no answer after {limits.steps} steps, the last of which calls {calls[0].name[:64]}",
                remedy="allow more of them (--max-steps), or ask for less at once",
            )
        return calls

    def _check(self, left: Budget) -> None:
        limits = self._agent.limits
        if left.seconds <= 0:
            raise TimeLimitError(
                f"no answer after {limits.seconds:g} s",
                remedy="allow more time (--max-seconds), or ask for less",
            )
        if left.tokens <= 0:
            raise TokenLimitError(
                f"no answer after {limits.tokens} generated tokens",
                remedy="allow more of them (--max-total-tokens), or ask for less",
            )

    def _call(self, call: ToolCall) -> None:
        agent, result = self._agent, self._result
        self._emit("call", step=result.steps, id=call.id, name=call.name, arguments=call.arguments)
        key = canonical(call)
        self._seen[key] += 1
        if self._seen[key] >= MOST_IDENTICAL:
            raise RepeatedCallError(
                f"the model calls {call.name[:64]} for the third time with the same arguments, "
                f"{shortened(call.arguments, 200)}",
                remedy="ask in other words, or use a larger model",
            )
        left = agent.limits.seconds - self._elapsed()
        self._check(Budget(1, left))
        if self._guard.refuses(call):
            done = ToolResult("refused", REFUSAL)
        else:
            done = agent.toolbox.run(call, allow=self._allow, seconds=left)
            self._guard.note(call, done.text)
        message: Message = {"role": "tool", "tool_call_id": call.id, "content": done.content}
        result.messages.append(message)
        result.calls.append(CallRecord(result.steps, call, done))
        self._emit(
            "result",
            step=result.steps,
            id=call.id,
            kind=done.kind,
            text=done.text,
            cut_bytes=done.cut_bytes,
            seconds=done.seconds,
            message=message,
        )

    def _allow(self, tool: RunnableTool, arguments: Mapping[str, Any]) -> bool:
        if self._agent.confirm is None:
            return False
        began = self._agent.clock()
        try:
            return self._agent.confirm(tool, arguments)
        finally:
            self._waited += self._agent.clock() - began

    def _elapsed(self) -> float:
        return self._agent.clock() - self._began - self._waited

    def _emit(self, event: str, **values: Any) -> None:
        if self._agent.trace is not None:
            self._agent.trace({"event": event, "t": round(self._elapsed(), 6), **values})
