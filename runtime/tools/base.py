"""What a tool is to the rest of the runtime: a function that a model may call, with what it is told about it.

A tool has two halves. The model sees a `Tool` (`runtime/tool_calls`): a name, a description and the JSON
schema of its arguments. The agent sees a `RunnableTool`: that, whether calling changes anything, where it
came from, and how to call it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...ir.errors import InputError, LlmcError
from ..tool_calls.base import Tool

MAX_NAME = 64
MAX_DESCRIPTION = 1024

NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{MAX_NAME}}}")
"""Names that OpenAI's API allows for functions; ASCII, so that no two that look alike differ."""

Invocation = Callable[[float], Any]
"""A call that is ready to be made: given the seconds that it may take, it returns the tool's result."""


class ToolError(LlmcError):
    """A tool failed. The model gets the message as it is, without the name of a Python exception."""


class ArgumentError(InputError):
    """Arguments that a tool cannot be called with. The message names the argument; it goes to the model."""


class RunnableTool(Protocol):
    """A tool that can be called."""

    @property
    def spec(self) -> Tool:
        """What the model is told."""
        ...

    @property
    def effects(self) -> bool:
        """Whether a call changes something: a person is asked first."""
        ...

    @property
    def origin(self) -> str:
        """Where it came from, for people: "llmc", a file, a package, or the command of an MCP server."""
        ...

    @property
    def timeout(self) -> float | None:
        """Seconds that a call may take; None for the tool box's own limit."""
        ...

    def bind(self, arguments: Mapping[str, Any]) -> Invocation:
        """The call with these arguments (values of JSON). Raises ArgumentError, naming the argument."""
        ...


ResultKind = Literal["ok", "unknown_tool", "arguments", "refused", "error", "timeout"]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to. It is data, whoever wrote it: text for the model, and nothing else."""

    kind: ResultKind
    text: str
    """The result, or what went wrong; cut to the tool box's limit."""
    seconds: float = 0.0
    cut_bytes: int = 0
    """Bytes of UTF-8 that were left out."""

    @property
    def ok(self) -> bool:
        """Whether the tool gave a result."""
        return self.kind == "ok"

    @property
    def content(self) -> str:
        """The text of the message to the model."""
        return self.text if self.ok else f"error: {self.text}"


def check_name(name: str, origin: str) -> str:
    """The name. Raises InputError where it is not one that a tool may have."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{origin}: {name[:80]!r} cannot be the name of a tool",
            remedy=f"use 1 to {MAX_NAME} of the letters a to z and A to Z, digits, _ and -",
        )
    return name


def one_line(error: BaseException) -> str:
    """An exception in one line: its own words, or its type where it has none."""
    if isinstance(error, LlmcError):
        return str(error)
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def shortened(text: str, limit: int) -> str:
    """Text in at most `limit` characters, without control characters other than line feeds."""
    plain = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"
