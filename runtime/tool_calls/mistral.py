"""Mistral: calls behind the token `[TOOL_CALLS]`, first as one list, in newer models one by one.

    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Graz"}, "id": "a1b2c3d4e"}]
    [TOOL_CALLS]weather[ARGS]{"city": "Graz"}
    [TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Graz"}

https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-tool_calling, and the chat templates from
Mistral 7B v0.3 to Ministral 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from .base import TokenIds, Tool, ToolCall
from .call_object import MAX_NAME, Arguments
from .lark import Marker, alternatives, argument_rules, call_objects, marked_calls, quoted
from .parser import ObjectParser
from .scanner import skip_space
from .stream import find, starts

OPEN: Final = "[TOOL_CALLS]"
ID: Final = "[CALL_ID]"
ARGS: Final = "[ARGS]"

_ID_PATTERN: Final = "/[a-zA-Z0-9]{9}/"
_GIVEN_ID: Final = r"""(", \"id\": \"" /[a-zA-Z0-9]{9}/ "\"")?"""
_WORD: Final = re.compile(r"[\w.-]+")


class Mistral:
    """See the module."""

    name = "mistral"
    markers = (OPEN, ID, ARGS)
    bare_key = None
    is_marked = True

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        """Which of the forms, the tokenizer says: only the newer ones have a token `[ARGS]`."""
        opening = Marker("open", OPEN, token_id)
        known = [token_id is None or token_id(text) is not None for text in (ID, ARGS)]
        bodies: list[str] = []
        rules = argument_rules(tools)
        if known[1]:
            between = "given_id? args" if known[0] else "args"
            rules += Marker("args", ARGS, token_id).rules()
            if known[0]:
                rules += [*Marker("id", ID, token_id).rules(), f"given_id: id {_ID_PATTERN}"]
            bodies += [f"{quoted(one.name)} {between} args_{n}" for n, one in enumerate(tools)]
        if not known[1] or token_id is None:
            rules += alternatives("item", call_objects(tools, "arguments", rest=_GIVEN_ID))
            bodies.append('" "? "[" item (", " item)* "]"' if parallel else '" "? "[" item "]"')
        again = parallel and known[1]
        return marked_calls(opening, bodies, required=required, parallel=again, between="", rules=rules)

    def parser(self, tools: Sequence[Tool]) -> MistralParser:
        return MistralParser()

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        return None

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "".join(f"{OPEN}{call.name}{ARGS}{call.arguments}" for call in calls)


class MistralParser(ObjectParser):
    """See CallParser."""

    def __init__(self) -> None:
        super().__init__()
        self._in_list = False
        self._name = ""
        self._given_id: str | None = None
        self._arguments = Arguments(self._raw.append, lenient=True)

    def _ends(self) -> tuple[str, ...]:
        return (OPEN,)

    def _in_text(self, text: str, at: int) -> int:
        position, marker = find(text, at, (OPEN,))
        self._out.content(text[at:position])
        if marker is None:
            return position
        self._raw = [OPEN]
        self._in_list = False
        self._state = self._opened
        return position + len(OPEN)

    def _opened(self, text: str, at: int) -> int:
        """Behind the marker: a list, an object, or a name."""
        at = self._spaces(text, at)
        if at == len(text):
            return at
        if text[at] == "[":
            self._in_list = True
            self._raw.append("[")
            self._state = self._called
            return at + 1
        if _WORD.match(text, at):
            self._name, self._given_id = "", None
            self._state = self._in_name
        else:
            self._try_object(text[at])
        return at

    def _called(self, text: str, at: int) -> int:
        """Between the elements of a list, or behind an object."""
        at = self._spaces(text, at)
        if at == len(text):
            return at
        if self._in_list and text[at] == ",":
            self._raw.append(",")
            return at + 1
        if self._in_list and text[at] == "]" and OPEN not in self._raw:
            self._raw = []
            self._state = self._in_text
            return at + 1
        self._try_object(text[at] if self._in_list else "")
        return at

    def _in_name(self, text: str, at: int) -> int:
        """In a call's name, or the id behind it, up to the arguments or their marker."""
        word = _WORD.match(text, at)
        end = word.end() if word else at
        self._raw.append(text[at:end])
        if self._given_id is None:
            self._name += text[at:end]
        else:
            self._given_id += text[at:end]
        if len(self._name) > MAX_NAME or len(self._given_id or "") > MAX_NAME:
            self._give_back()
        elif end < len(text):
            return self._behind_name(text, end)
        return end

    def _behind_name(self, text: str, at: int) -> int:
        is_arguments, is_id = starts(text, at, ARGS), starts(text, at, ID)
        if is_arguments or text[at] == "{":
            self._raw = []
            self._rest = self._out.begin(self._name)
            self._arguments = Arguments(self._rest, lenient=True)
            self._state = self._in_arguments
            return at + len(ARGS) if is_arguments else at
        if is_id and self._given_id is None:
            self._given_id = ""
            self._raw.append(ID)
            return at + len(ID)
        if is_arguments is False and is_id is False:
            self._give_back()
        return at

    def _in_arguments(self, text: str, at: int) -> int:
        if not self._arguments.begun:
            at = skip_space(text, at)
        if at == len(text):
            return at
        at = self._arguments.push(text, at)
        if self._arguments.done:
            self._state = self._in_text
        elif self._arguments.failed:
            self._state = self._broken
        return at

    def _ended(self, rest: str) -> None:
        if self._state == self._in_arguments:
            self._arguments.finish()
        else:
            super()._ended(rest)
