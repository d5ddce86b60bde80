"""What every format of tool calls shares: a tool, a call, and the events that a parser makes of an answer.

The forms are those of the OpenAI API (https://platform.openai.com/docs/guides/function-calling): a tool is a
name, a description and a JSON schema of an object; a call is a name and a JSON text of its arguments.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from ...ir.errors import InputError
from ..json_depth import deeper

MAX_TOOLS: Final = 128
MAX_DESCRIPTION: Final = 16_384
MAX_PARAMETERS: Final = 65_536
MAX_SCHEMA_DEPTH: Final = 64

_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def _no_parameters() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: letters, digits, "_" and "-", 64 at most.
        description: what it does, for the model.
        parameters: JSON schema of an object, the arguments.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=_no_parameters)

    @staticmethod
    def from_openai(raw: Any, where: str = "tools[0]") -> Tool:
        """The tool of `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`.

        Raises InputError naming the field under `where`. A function without parameters takes none.
        """
        if not isinstance(raw, Mapping):
            raise InputError(f"{where} is no object", remedy='give {"type": "function", "function": {…}}')
        if raw.get("type", "function") != "function":
            raise InputError(f"{where}.type is {_shown(raw['type'])}", remedy='allowed: "function"')
        function = raw.get("function")
        if not isinstance(function, Mapping):
            raise InputError(f"{where}.function is missing or no object", remedy='give {"name": …, …}')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"{where}.function.name is {_shown(name)}",
                remedy="allowed: 1 to 64 letters, digits, _ and -",
            )
        description = function.get("description")
        where = f"{where}.function"
        return Tool(
            name,
            _checked_description(description, f"{where}.description"),
            _checked_parameters(function.get("parameters"), f"{where}.parameters"),
        )

    def as_openai(self) -> dict[str, Any]:
        """`{"type": "function", "function": {…}}`, which chat templates get as an element of `tools`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tools_from_openai(raw: Any) -> list[Tool]:
    """The tools of a request's `tools`. Raises InputError naming the field, also where two share a name."""
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise InputError("tools is no list", remedy='give [{"type": "function", "function": {…}}, …]')
    if len(raw) > MAX_TOOLS:
        raise InputError(f"tools has {len(raw)} elements", remedy=f"at most {MAX_TOOLS} are allowed")
    found: list[Tool] = []
    names: set[str] = set()
    for number, one in enumerate(raw):
        tool = Tool.from_openai(one, f"tools[{number}]")
        if tool.name in names:
            raise InputError(
                f"tools[{number}].function.name {tool.name!r} is there twice", remedy="name each tool once"
            )
        names.add(tool.name)
        found.append(tool)
    return found


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:80]


def _checked_description(text: Any, where: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{where} is {_shown(text)}", remedy="give a text")
    size = _size(text, where)
    if size > MAX_DESCRIPTION:
        raise InputError(f"{where} has {size} bytes", remedy=f"at most {MAX_DESCRIPTION} are allowed")
    return text


def _checked_parameters(schema: Any, where: str) -> Mapping[str, Any]:
    if schema is None:
        return _no_parameters()
    if not isinstance(schema, Mapping):
        raise InputError(f"{where} is {_shown(schema)}", remedy="give a JSON schema of an object")
    if schema.get("type", "object") != "object":
        raise InputError(f"{where}.type is {_shown(schema['type'])}", remedy='allowed: "object"')
    if deeper(schema, MAX_SCHEMA_DEPTH):
        raise InputError(
            f"{where} is nested too deep", remedy=f"at most {MAX_SCHEMA_DEPTH} levels are allowed"
        )
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is no JSON ({error})", remedy="give a JSON schema of an object") from None
    size = _size(text, where)
    if size > MAX_PARAMETERS:
        raise InputError(f"{where} has {size} bytes", remedy=f"at most {MAX_PARAMETERS} are allowed")
    return {"type": "object", **schema}


def _size(text: str, where: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InputError(f"{where} is not valid Unicode", remedy="give it as UTF-8") from None


@dataclass(frozen=True)
class ToolCall:
    """A complete call: `arguments` is JSON text, an object unless the model wrote nonsense or was cut off."""

    id: str
    name: str
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """The element of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """Call number `index` (from 0) of the message begins; its name is complete."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | CallBegin | CallArguments


class CallParser(Protocol):
    """Turns the text of one answer, in pieces, into events: joined, the same events for any pieces."""

    def push(self, text: str) -> list[Event]:
        """What the further text makes certain."""
        ...

    def finish(self) -> list[Event]:
        """The rest, once the answer has ended. Nothing may be pushed afterwards."""
        ...


TokenIds = Callable[[str], int | None]
"""The id of the one token that is this text in the vocabulary; None where there is none."""


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that open or close calls. Some tokenizers have special tokens of them, which the parser must
        see as text.
        """
        ...

    @property
    def bare_key(self) -> str | None:
        """What arguments are called where a call may be a bare JSON object; None where none may."""
        ...

    @property
    def is_marked(self) -> bool:
        """Whether calls can begin with a marker, which no JSON begins with."""
        ...

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        """llguidance's Lark source of what the model may write: text, and calls of these tools with arguments
        that obey their schemas.

        Args:
            tools: at least one. required: a call, and nothing before it. parallel: more than one call.
            token_id: of the tokenizer. Markers that are tokens of their own must be named as such in a
            grammar;
                without it, they are taken to be spelled.

        Raises GrammarError where the format cannot keep to a tool's schema.
        """
        ...

    def parser(self, tools: Sequence[Tool]) -> CallParser: ...

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        """Text for the system message where the chat template shows no tools; None where the format is only
        spoken by models whose template does.
        """
        ...

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model writes them."""
        ...


def new_call_id() -> str:
    """ "call_" and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def collect(events: Sequence[Event]) -> tuple[str, list[ToolCall]]:
    """The content and the calls of an answer's events."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    begun = [event for event in events if isinstance(event, CallBegin)]
    pieces: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, CallArguments):
            pieces.setdefault(event.index, []).append(event.text)
    return content, [ToolCall(one.id, one.name, "".join(pieces.get(one.index, []))) for one in begun]
