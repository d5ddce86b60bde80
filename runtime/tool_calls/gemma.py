"""Gemma's function-calling models: FunctionGemma, and Gemma 4 with other markers.

    <start_function_call>call:weather{city:<escape>Graz<escape>}<end_function_call>
    <|tool_call>call:weather{city:<|"|>Graz<|"|>}<tool_call|>

https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices, and the chat template of Gemma
4. The template of Gemma 3 knows no tools: its models are told of them as format "json" does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from .base import TokenIds, Tool, ToolCall
from .call_object import MAX_NAME
from .gemma_grammar import GemmaRules
from .gemma_value import GemmaArguments, write_value
from .lark import Marker, marked_calls, quoted
from .parser import ObjectParser
from .stream import find, starts


class Dialect(NamedTuple):
    """The markers of a generation of models."""

    open: str
    close: str
    quote: str


DIALECTS: Final = (
    Dialect("<start_function_call>", "<end_function_call>", "<escape>"),
    Dialect("<|tool_call>", "<tool_call|>", '<|"|>'),
)

_CALL: Final = "call:"
_WORD: Final = re.compile(r"[\w.-]+")


class Gemma:
    """See the module."""

    name = "gemma"
    markers = tuple(text for dialect in DIALECTS for text in dialect)
    bare_key = None
    is_marked = True

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        """Of the dialect whose markers the vocabulary has. Raises GrammarError for a tool's schema that
        this form cannot keep to.
        """
        dialect = DIALECTS[0]
        if token_id is not None and token_id(dialect.open) is None and token_id(DIALECTS[1].open) is not None:
            dialect = DIALECTS[1]
        closing = Marker("close", dialect.close, token_id)
        rules = GemmaRules("value", Marker("quote", dialect.quote, token_id))
        bodies = [f"{quoted(_CALL + tool.name)} {rules.tool(tool)} close" for tool in tools]
        return marked_calls(
            Marker("open", dialect.open, token_id),
            bodies,
            required=required,
            parallel=parallel,
            between="",
            rules=[*closing.rules(), *rules.rules()],
        )

    def parser(self, tools: Sequence[Tool]) -> GemmaParser:
        return GemmaParser()

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        return None

    def write(self, calls: Sequence[ToolCall]) -> str:
        first = DIALECTS[0]
        texts = [write_value(json.loads(call.arguments), first.quote) for call in calls]
        return "".join(
            f"{first.open}{_CALL}{call.name}{text}{first.close}"
            for call, text in zip(calls, texts, strict=True)
        )


class GemmaParser(ObjectParser):
    """See CallParser."""

    def __init__(self) -> None:
        super().__init__()
        self._dialect = DIALECTS[0]
        self._within = False  # a call came, and no closing marker yet
        self._name = ""
        self._arguments = GemmaArguments(self._raw.append, "")

    def _ends(self) -> tuple[str, ...]:
        return tuple(text for dialect in DIALECTS for text in (dialect.close, dialect.open))

    def _in_text(self, text: str, at: int) -> int:
        opens = [dialect.open for dialect in DIALECTS]
        position, marker = find(text, at, [*opens, self._dialect.close] if self._within else opens)
        self._out.content(text[at:position])
        if marker is None:
            return position
        self._within = False
        if marker in opens:
            self._dialect = DIALECTS[opens.index(marker)]
            self._raw = [marker]
            self._state = self._opened
        else:
            self._out.closed()
        return position + len(marker)

    def _opened(self, text: str, at: int) -> int:
        """Behind the opening marker."""
        at = self._spaces(text, at)
        found = starts(text, at, _CALL)
        if found:
            self._raw.append(_CALL)
            self._name = ""
            self._state = self._in_name
            return at + len(_CALL)
        if found is False:
            self._give_back()
        return at

    def _in_name(self, text: str, at: int) -> int:
        word = _WORD.match(text, at)
        end = word.end() if word else at
        self._name += text[at:end]
        self._raw.append(text[at:end])
        if end < len(text) and text[end] == "{" and 0 < len(self._name) <= MAX_NAME:
            self._raw = []
            self._rest = self._out.begin(self._name)
            self._arguments = GemmaArguments(self._rest, self._dialect.quote)
            self._within = True
            self._state = self._in_arguments
        elif end < len(text) or len(self._name) > MAX_NAME:
            self._give_back()
        return end

    def _in_arguments(self, text: str, at: int) -> int:
        at = self._arguments.push(text, at)
        if self._arguments.done:
            self._state = self._in_text
        elif self._arguments.failed:
            self._state = self._broken
        return at

    def _ended(self, rest: str) -> None:
        if self._state == self._in_arguments:
            self._arguments.finish(rest)
        else:
            super()._ended(rest)
