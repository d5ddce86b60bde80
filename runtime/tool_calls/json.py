"""One JSON object `{"name": …, "arguments": …}` and nothing else, or a list of them: for models whose chat
template shows no tools. The system message explains it.

A call is what an answer begins with, or a fenced block of code: other JSON is text, which an answer may well
hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .base import TokenIds, Tool, ToolCall
from .lark import alternatives, answers, argument_rules, call_objects, loose_calls
from .loose import LooseParser

# Tools are shown in another form than calls are, which small models would else repeat.
_INSTRUCTIONS: Final = """\
You can call these functions, each with the JSON schema of its arguments:
{tools}

Where a function helps with the request, answer with the call alone, as JSON without any other text:
{{"name": "<function>", "arguments": {{…}}}}
For several calls at once, answer with a list of such objects. You then get the results. Where no function \
helps, or once you have the result, answer in plain text."""


class Json:
    """See the module."""

    name = "json"
    markers: tuple[str, ...] = ()
    bare_key = "arguments"
    is_marked = False

    def grammar(
        self, tools: Sequence[Tool], *, required: bool, parallel: bool, token_id: TokenIds | None = None
    ) -> str:
        loose = loose_calls(tools, "arguments", parallel=parallel, any_name=True)
        rules = [*argument_rules(tools), *alternatives("call", call_objects(tools, "arguments"))]
        calls = '"[" call (", " call)* "]" | call' if parallel else "call"
        return answers(calls, rules, required=required, loose=loose)

    def parser(self, tools: Sequence[Tool]) -> LooseParser:
        return LooseParser(frozenset(tool.name for tool in tools), "arguments")

    def instructions(self, tools: Sequence[Tool]) -> str | None:
        lines = [f"- {one.name}: {one.description}\n  arguments: {_text(one.parameters)}" for one in tools]
        return _INSTRUCTIONS.format(tools="\n".join(lines))

    def write(self, calls: Sequence[ToolCall]) -> str:
        texts = [f'{{"name": "{call.name}", "arguments": {call.arguments}}}' for call in calls]
        return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _text(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, ensure_ascii=False)
