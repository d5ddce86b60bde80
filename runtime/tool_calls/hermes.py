"""Hermes and Qwen: each call a JSON object between `<tool_call>` and `</tool_call>`.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Graz"}}
    </tool_call>

https://github.com/NousResearch/Hermes-Function-Calling, and the chat templates of Qwen2, 2.5 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .base import TokenIds, Tool, ToolCall
from .call_object import CallObject
from .lark import Marker, argument_rules, call_objects, loose_calls, marked_calls
from .loose import FENCE, LooseParser

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class Hermes:
    """See the module."""

    name = "hermes"
    markers = (OPEN, CLOSE)
    bare_key = "arguments"
    is_marked = True

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        """With or without the markers: models that seldom write them are held to the tools, too."""
        closing = Marker("close", CLOSE, token_id)
        return marked_calls(
            Marker("open", OPEN, token_id),
            [f'"\\n" {one} "\\n" close' for one in call_objects(tools, "arguments")],
            required=required,
            parallel=parallel,
            between='"\\n"',
            rules=[*closing.rules(), *argument_rules(tools)],
            loose=loose_calls(tools, "arguments", parallel=parallel, any_name=False),
        )

    def parser(self, tools: Sequence[Tool]) -> HermesParser:
        return HermesParser(frozenset(tool.name for tool in tools))

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        return None

    def write(self, calls: Sequence[ToolCall]) -> str:
        texts = [f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in calls]
        return "\n".join(f"{OPEN}\n{text}\n{CLOSE}" for text in texts)


class HermesParser(LooseParser):
    """See CallParser. Several objects in one pair of markers, a missing closing marker, and a call that is
    not JSON to its end are taken for what the model meant.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._marked = False  # behind an opening marker, in or behind its call
        self._within = False  # a call came since the last opening marker, and no closing one yet
        super().__init__(names, "arguments")

    def _new_object(self) -> CallObject:
        return CallObject(self._out.begin) if self._marked else super()._new_object()

    def _text_markers(self) -> tuple[str, ...]:
        # A closing marker without a call is text.
        return (OPEN, FENCE, CLOSE) if self._within else (OPEN, FENCE)

    def _found(self, marker: str) -> None:
        self._marked = marker == OPEN
        self._within = self._within and marker == FENCE
        if marker == OPEN:
            self._state = self._in_block
        elif marker == CLOSE:
            self._raw = []
            self._out.closed()
        else:
            super()._found(marker)

    def _before_call(self, text: str, at: int) -> int:
        at = self._spaces(text, at)
        if at < len(text) and text[at] == OPEN[0]:
            self._give_back()
            return at
        return super()._before_call(text, at)

    def _in_object(self, text: str, at: int) -> int:
        at = super()._in_object(text, at)
        self._within = self._marked and (self._within or self._object.begun)
        return at

    def _called(self, text: str, at: int) -> int:
        """Behind a call: its closing marker, or another object."""
        if not self._marked:
            return super()._called(text, at)
        at = self._spaces(text, at)
        if at == len(text):
            return at
        if text[at] == "{":
            self._try_object("{")
        else:
            self._give_back()
        return at

    def _ends(self) -> tuple[str, ...]:
        return (CLOSE, OPEN) if self._marked else super()._ends()
