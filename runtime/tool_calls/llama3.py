"""Llama 3.1 and later: an answer that is a JSON object `{"name": …, "parameters": …}`, or several with "; ".

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/, "JSON based tool calling". The token
`<|python_tag|>`, which opens calls of built-in tools, may stand before one, then also behind text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .base import TokenIds, Tool, ToolCall
from .lark import Marker, alternatives, answers, argument_rules, call_objects, loose_calls
from .loose import LooseParser

TAG: Final = "<|python_tag|>"


class Llama3:
    """See the module."""

    name = "llama3"
    markers = (TAG,)
    bare_key = "parameters"
    is_marked = False

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        tag = Marker("tag", TAG, token_id)
        calls = 'call ("; " call)*' if parallel else "call"
        loose = loose_calls(tools, "parameters", parallel=parallel, any_name=True)
        rules = [*argument_rules(tools), *alternatives("call", call_objects(tools, "parameters"))]
        rules += tag.rules() if required else [*tag.after_text("begin"), f"calls: {calls}"]
        return answers(f"tag? {calls}", rules, required=required, behind_text=["begin calls"], loose=loose)

    def parser(self, tools: Sequence[Tool]) -> LooseParser:
        return LooseParser(frozenset(tool.name for tool in tools), "parameters", marker=TAG)

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        return None

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(f'{{"name": "{call.name}", "parameters": {call.arguments}}}' for call in calls)
