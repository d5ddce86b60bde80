"""The record of agent runs: JSON lines, written as things happen, which replay without the model.

A file holds one run or, of an interactive session, several. Every event has "event" and "t" (seconds since
the run began, without the time that people took to decide):

    start    schema, time (UTC), about (the model), limits, tools (as in OpenAI's API), messages
    answer   step (from 1), message (the assistant's, with tool_calls), finish_reason, prompt_tokens,
             generated_tokens, seconds
    call     step, id, name, arguments (as the model wrote them)
    result   step, id, kind ("ok", "error", …), text, cut_bytes, seconds, message
    error    type, message
    end      reason, text, steps, calls, prompt_tokens, generated_tokens

Their messages in order, those of `start` first, are the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from ...ir.errors import InputError, LlmcError
from ..tool_calls.base import Tool, ToolCall, tools_from_openai
from .agent import SCHEMA, Agent, Budget, ChatAnswer, Limits, Message, Tools
from .base import ToolResult
from .registry import Allow

MAX_LINE = 64 << 20

Event = dict[str, Any]

_TIMES = frozenset({"t", "time", "seconds"})
_NEEDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"schema": int, "limits": dict, "tools": list, "messages": list},
    "answer": {"step": int, "message": dict, "prompt_tokens": int, "generated_tokens": int},
    "call": {"step": int, "id": str, "name": str, "arguments": str},
    "result": {"step": int, "id": str, "kind": str, "text": str},
    "error": {"type": str, "message": str},
    "end": {"reason": str, "text": str, "steps": int},
}


class TraceFile:
    """Writes events to a file: an agent's `trace`. Every line is on disk before the next thing happens."""

    def __init__(self, path: Path) -> None:
        """Begins the file anew. Raises OSError."""
        # A lone surrogate is written as \\udXXX, which is how JSON spells it.
        self._file = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115  (open until close)

    def __call__(self, event: Event) -> None:
        """Write one event. Raises OSError."""
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Reading ---------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> list[list[Event]]:
    """The events of each run in a trace. The last run may be without its end, where the process was killed; a
    line that it was killed in is left out.

    Raises InputError, naming file and line, for what is no trace, or one of a newer llmc.
    """
    runs: list[list[Event]] = []
    for number, (line, whole) in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            event: Any = json.loads(line)
        except (ValueError, RecursionError):
            if not whole:
                break
            raise InputError(f"{where}: no JSON", remedy="give a file that --trace wrote") from None
        _check(event, where)
        if event["event"] == "start":
            runs.append([])
        elif not runs:
            raise InputError(f"{where}: begins without a start", remedy="give a file that --trace wrote")
        runs[-1].append(event)
    if not runs:
        raise InputError(f"{path}: holds no run", remedy="give a file that --trace wrote")
    return runs


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """(line, whether it is complete) of a file."""
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{path}: a line of more than {MAX_LINE >> 20} MB", remedy="give another file"
                )
            yield line, line.endswith(b"\n")


def _check(event: Any, where: str) -> None:
    kind = event.get("event") if isinstance(event, dict) else None
    if kind not in _NEEDED:
        raise InputError(f"{where}: no event of a trace", remedy="give a file that --trace wrote")
    if kind == "start" and isinstance(event.get("schema"), int) and event["schema"] > SCHEMA:
        raise InputError(f"{where}: schema {event['schema']} is newer than {SCHEMA}", remedy="upgrade llmc")
    for name, types in {"t": (int, float), **_NEEDED[kind]}.items():
        if not isinstance(event.get(name), types):
            raise InputError(
                f"{where}: {name} of the event {kind} is missing or wrong", remedy="give another file"
            )


# Replaying -------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """What a replay came to."""

    runs: int = 0
    steps: int = 0
    calls: int = 0
    complete: bool = True
    """False where the recorded process was killed, or its model failed, before the run's end."""
    differences: list[str] = field(default_factory=list)
    """A sentence each."""
    texts: list[str] = field(default_factory=list)
    """The last answer of each run."""

    @property
    def same(self) -> bool:
        """Whether everything went as it was recorded."""
        return not self.differences


def replay(path: Path, *, toolbox: Tools | None = None, confirm: Allow | None = None) -> Replay:
    """Run the loop again with the recorded answers of the model, and compare.

    Args:
        path: a file that `TraceFile` wrote.
        toolbox: tools that are really called; None takes their recorded results, and calls nothing.
        confirm: as in `Agent`, for those.

    Raises InputError where the file is no trace.
    """
    found = Replay()
    for number, events in enumerate(read_trace(path), 1):
        found.runs += 1
        again, complete = _run_again(events, toolbox, confirm, f"{path}, run {number}")
        found.complete &= complete
        prefix = f"run {number}, " if number > 1 else ""
        found.differences += [prefix + text for text in _compare(events, again, complete)]
        found.steps += sum(event["event"] == "answer" for event in again)
        found.calls += sum(event["event"] == "call" for event in again)
        found.texts.append(again[-1].get("text", ""))
    return found


class _EndOfTraceError(LlmcError):
    """There is no further answer in the trace."""


class _Recording:
    """The recorded model and tools, and their clock: it shows when the last event happened, or where an error
    follows, when that did.
    """

    def __init__(self, events: Sequence[Event], tools: Sequence[Tool]) -> None:
        self._events = events
        self._tools = tools
        self._taken = {"answer": -1, "result": -1}
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def take(self, kind: str) -> Event | None:
        """The next event of a kind."""
        start = self._taken[kind] + 1
        index = next((i for i in range(start, len(self._events)) if self._events[i]["event"] == kind), None)
        if index is None:
            return None
        self._taken[kind] = index
        event, following = self._events[index], self._events[min(index + 1, len(self._events) - 1)]
        self._now = float((following if following["event"] in ("error", "end") else event)["t"])
        return event

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool], budget: Budget) -> ChatAnswer:
        event = self.take("answer")
        if event is None:
            raise _EndOfTraceError("the trace has no further answer of the model")
        message = event["message"]
        calls = [
            ToolCall(str(call["id"]), str(call["function"]["name"]), str(call["function"]["arguments"]))
            for call in message.get("tool_calls", [])
        ]
        counts = (event["prompt_tokens"], event["generated_tokens"])
        return ChatAnswer(str(message.get("content", "")), calls, *counts, event.get("finish_reason"))

    @property
    def specs(self) -> Sequence[Tool]:
        return self._tools

    def run(self, call: ToolCall, *, allow: Allow | None, seconds: float | None) -> ToolResult:
        event = self.take("result")
        if event is None:
            raise _EndOfTraceError("the trace has no further result of a tool")
        return ToolResult(event["kind"], event["text"], 0.0, int(event.get("cut_bytes", 0)))


@dataclass
class _Live:
    """Tools that are really called, in the time of the recording."""

    toolbox: Tools
    recording: _Recording

    @property
    def specs(self) -> Sequence[Tool]:
        return self.toolbox.specs

    def run(self, call: ToolCall, *, allow: Allow | None, seconds: float | None) -> ToolResult:
        result = self.toolbox.run(call, allow=allow, seconds=None)
        self.recording.take("result")
        return result


def _run_again(
    events: Sequence[Event], toolbox: Tools | None, confirm: Allow | None, where: str
) -> tuple[list[Event], bool]:
    """(events of the run as it goes now, whether the recording reaches its end)."""
    start, again = events[0], list[Event]()
    try:
        recording = _Recording(events, tools_from_openai(start["tools"]))
        limits = Limits(**start["limits"])
        messages = cast(list[Mapping[str, Any]], start["messages"])
        tools = recording if toolbox is None else _Live(toolbox, recording)
        agent = Agent(recording.chat, tools, limits, confirm, again.append, recording.clock)
        try:
            agent.run(messages)
        except _EndOfTraceError:
            return again[:-2], False  # without its "error" and "end"
        except InputError:
            raise
        except LlmcError:
            pass  # an error of the loop is an event, which is compared
    except (InputError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {error}", remedy="give a file that --trace wrote") from error
    return again, events[-1]["event"] == "end"


def _compare(recorded: Sequence[Event], again: Sequence[Event], complete: bool) -> list[str]:
    """Sentences, one for each value that differs."""
    names: dict[str, str] = {}
    found: list[str] = []
    for old, new in zip(recorded, again, strict=False):
        if old["event"] == "call":
            names[old["id"]] = f"{old['name']}({old['arguments'][:100]})"
        where = f"step {old['step']}" if "step" in old else str(old["event"])
        if old["event"] != new["event"]:
            return [*found, f"{where}: recorded was the event {old['event']}, now it is {new['event']}"]
        if old["event"] == "result":
            where = f"{where}, {names.get(old['id'], 'a call')}"
        for key in sorted((old.keys() | new.keys()) - _TIMES - {"about"}):
            # The message of a result says what its text says.
            told = key == "message" and old["event"] == "result" and old["text"] != new["text"]
            if old.get(key) != new.get(key) and not told:
                found.append(f"{where}: {key} was {_shown(old.get(key))}, is {_shown(new.get(key))}")
    if complete and len(recorded) != len(again):
        found.append(f"{len(recorded)} events were recorded, now there are {len(again)}")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
