"""How a call of a tool is run: in a thread that can be left behind, with a bounded text as its result.

A Python function cannot be stopped from outside, so a call that takes too long is abandoned: its thread, a
daemon, goes on until it ends by itself, and nothing waits for it. (A process for each call could be killed,
but then a tool could not keep anything in memory, nor use what its file has opened; and forking beside the
engine's threads is not safe.) What holds Python's lock without end, as a hopeless regular expression does,
holds up everything: that is the one thing that a tool must not do.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import threading
import time
from collections.abc import Mapping, Set
from typing import Any

from ...ir.errors import InputError
from ..tool_calls.base import ToolCall
from .base import ArgumentError, Invocation, ResultKind, ToolError, ToolResult, one_line, shortened

MAX_ARGUMENTS = 1 << 20
MAX_ABANDONED = 8

_MAX_MESSAGE = 2000


class CallTimeoutError(ToolError):
    """A call took longer than it may."""


def parse_arguments(text: str) -> dict[str, Any]:
    """Arguments of a call from their JSON text; none at all is none. Raises ArgumentError."""
    if len(text) > MAX_ARGUMENTS:
        raise ArgumentError(f"the arguments have {len(text)} characters", remedy=f"at most {MAX_ARGUMENTS}")
    try:
        value = json.loads(text or "{}", parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ArgumentError("the arguments hold half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the arguments are not JSON ({one_line(error)[:200]})") from None
    if not isinstance(value, dict):
        raise ArgumentError("the arguments are no JSON object", remedy='give {"name": value, …}')
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def canonical(call: ToolCall) -> str:
    """A text that two calls share where they mean the same: same name, same arguments in any order."""
    try:
        return f"{call.name} {json.dumps(parse_arguments(call.arguments), sort_keys=True)}"
    except ArgumentError:
        return f"{call.name} {call.arguments}"


class Runner:
    """Runs calls within limits. Safe to use from several threads."""

    def __init__(self) -> None:
        self._abandoned: list[threading.Thread] = []

    def run(self, name: str, invoke: Invocation, *, seconds: float, max_bytes: int) -> ToolResult:
        """The call's result; whatever goes wrong in it is a result too."""
        self._abandoned = [thread for thread in self._abandoned if thread.is_alive()]
        if len(self._abandoned) >= MAX_ABANDONED:
            return ToolResult("error", f"{len(self._abandoned)} earlier calls still run; no further one can")
        outcome: list[tuple[ResultKind, str]] = []
        done = threading.Event()

        def work() -> None:
            try:
                outcome.append(("ok", to_text(invoke(seconds))))
            except CallTimeoutError as error:
                outcome.append(("timeout", str(error)))
            except InputError as error:
                outcome.append(("arguments" if isinstance(error, ArgumentError) else "error", str(error)))
            except BaseException as error:  # noqa: BLE001  (a tool may raise anything; the model gets to read it)
                outcome.append(("error", shortened(one_line(error), _MAX_MESSAGE)))
            finally:
                done.set()

        began = time.monotonic()
        thread = threading.Thread(target=work, name=f"llmc-tool-{name}", daemon=True)
        thread.start()
        try:
            finished = done.wait(seconds)
        finally:
            if not done.is_set():  # also where Ctrl-C ends the wait
                self._abandoned.append(thread)
        took = round(time.monotonic() - began, 6)
        kind, text = (
            outcome[0]
            if finished
            else ("timeout", f"the call took longer than {seconds:g} s and was given up")
        )
        text, cut = _cut(text, max_bytes)
        return ToolResult(kind, text, took, cut)


def to_text(value: Any) -> str:
    """A result as text: a text as it is, anything else as JSON."""
    if isinstance(value, enum.Enum):
        value = value.value
    return str(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """What json does not know."""
    if isinstance(value, type):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Set):
        return sorted(value, key=str)
    return value.item() if hasattr(value, "item") else str(value)


def _cut(text: str, limit: int) -> tuple[str, int]:
    """(text in at most `limit` bytes and a note of what is missing, the number of bytes that are)."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode(), 0
    kept = data[:limit].decode(errors="ignore")
    left = len(data) - len(kept.encode())
    return f"{kept}\n[cut here: {left} of {len(data)} bytes are not shown]", left
