"""Grammars of answers with calls, in llguidance's Lark dialect.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. An answer is text, or text and then
calls; nothing follows the calls, since what a model writes there is mostly the result that it expects.
Around a call's arguments everything is as templates write it, so that most of those tokens are forced. What
opens a call behind text is one lazy lexeme with that text: it ends as soon as the opening is complete, and
all else is ruled out then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .base import TokenIds, Tool, ToolFormat

_OPENING_KEYWORDS: Final = (
    "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames",
    "$ref", "allOf", "anyOf", "oneOf", "if", "not",
)  # fmt: skip
_SPACES: Final = r"[ \t\r\n]*"
_TYPE: Final = rf'("type"{_SPACES}:{_SPACES}"[^"\\]*"{_SPACES},{_SPACES})?'


def quoted(text: str) -> str:
    """A literal of the grammar; "" for the empty text, which is no literal."""
    return json.dumps(text) if text else ""


def alternatives(name: str, bodies: Sequence[str]) -> list[str]:
    """Rule `name`: one of the bodies, each a rule of its own with a number behind the name."""
    numbered = [f"{name}_{number}" for number in range(len(bodies))]
    return [f"{name}: {' | '.join(numbered)}", *(f"{n}: {b}" for n, b in zip(numbered, bodies, strict=True))]


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments: the tool's own, closed where it lists properties and does not say
    whether there may be others, since no function takes arguments that it does not name.
    """
    schema = dict(tool.parameters)
    if "properties" in schema and not any(keyword in schema for keyword in _OPENING_KEYWORDS):
        schema["additionalProperties"] = False
    return schema


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """An inline schema; the grammar compiler adds how JSON is spaced."""
    return f"%json {json.dumps(schema)}"


def argument_rules(tools: Sequence[Tool]) -> list[str]:
    """Rules args_0, args_1, …: the arguments of each tool as JSON."""
    return [f"args_{number}: {json_rule(arguments_schema(tool))}" for number, tool in enumerate(tools)]


def call_objects(tools: Sequence[Tool], key: str, rest: str = "") -> list[str]:
    """`{"name": …, KEY: …}` of each tool; `rest`: what else may stand at the object's end."""
    opened = [f'{{"name": "{tool.name}", "{key}": ' for tool in tools]
    return [f'{quoted(text)} args_{number} {rest} "}}"' for number, text in enumerate(opened)]


class Marker:
    """A text that opens or closes calls, as rule `name`: its own token where there is one, or spelled."""

    def __init__(self, name: str, text: str, token_id: TokenIds | None) -> None:
        self.name = name
        self.text = text
        self._id = token_id(text) if token_id is not None else None

    def rules(self) -> list[str]:
        """The rule of this name: the token alone, which is then forced."""
        return [f"{self.name}: {quoted(self.text) if self._id is None else f'<[{self._id}]>'}"]

    def after_text(self, name: str, terminal: str = "TEXT") -> list[str]:
        """Rule `name`: text of a terminal up to the first such marker, and the marker.

        It may be spelled where it has a token, too: as mere text that would be a call which nothing
        constrains.
        """
        spelled = f"{name}_spelled[lazy]: {terminal} {quoted(self.text)}"
        token = "" if self._id is None else f"{terminal} <[{self._id}]> | "
        return [f"{name}: {token}{name}_spelled", spelled]


def answers(
    calls: str,
    rules: Sequence[str],
    *,
    required: bool,
    behind_text: Sequence[str] = (),
    loose: Loose | None = None,
) -> str:
    """The grammar of `calls`, or, where none is required, of text as well.

    Args:
        behind_text: ways to go on from text to calls; each begins with a lexeme that holds the text.
        loose: calls without markers, where none is required.
    """
    if required:
        return "\n".join(["%llguidance {}", f"start: {calls}", *rules]) + "\n"
    ways = ["TEXT", *behind_text, *(loose.behind_text if loose else ())]
    before = f"{loose.no_call}* " if loose else ""
    lines = [
        "%llguidance {}",
        f"start: {' | '.join(['answer', *(loose.at_begin if loose else ())])}",
        f"answer: {before}({' | '.join(ways)})",
        r"TEXT: /(.|\n)*/",
        *rules,
        *(loose.rules if loose else ()),
    ]
    return "\n".join(lines) + "\n"


def marked_calls(
    opening: Marker,
    bodies: Sequence[str],
    *,
    required: bool,
    parallel: bool,
    between: str,
    rules: Sequence[str] = (),
    loose: Loose | None = None,
) -> str:
    """The grammar of calls that each begin with `opening`, go on as one of `bodies`, and have `between`
    between them.
    """
    more = f" ({between} {opening.name} call)*" if parallel else ""
    lines = [*alternatives("call", bodies), *opening.rules(), *rules]
    if not required:
        lines += opening.after_text("begin")
    calls = f"{opening.name} call{more}"
    return answers(calls, lines, required=required, behind_text=[f"begin call{more}"], loose=loose)


def calls_or_json(
    format: ToolFormat,
    tools: Sequence[Tool],
    schema: Mapping[str, Any] | bool,
    *,
    parallel: bool,
    token_id: TokenIds | None = None,
) -> str:
    """The grammar of an answer that is JSON of a schema, or that calls.

    A call that is a bare object is written as a schema, too: beside JSON, a literal that begins with a brace
    would be one lexeme with it, and rule out all other objects. Raises as `ToolFormat.grammar`.
    """
    ways, rules = ["said"], [f"said: {json_rule(schema)}"]
    if format.bare_key is not None:
        ways.append("bare")
        rules += alternatives("bare", [json_rule(_call_schema(tool, format.bare_key)) for tool in tools])
    if format.is_marked:
        calls = format.grammar(tools, required=True, parallel=parallel, token_id=token_id)
        ways.append("called")
        rules.append("called: " + calls.partition("\nstart: ")[2])
    return "\n".join(["%llguidance {}", f"start: {' | '.join(ways)}", *rules]) + "\n"


def _call_schema(tool: Tool, key: str) -> dict[str, Any]:
    """The schema of `{"name": …, KEY: …}`; definitions stay where references look for them."""
    arguments = arguments_schema(tool)
    shared = {name: arguments.pop(name) for name in ("$schema", "$defs", "definitions") if name in arguments}
    return {
        **shared,
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }


@dataclass(frozen=True)
class Loose:
    """Calls without markers, as LooseParser reads them; the parts of a grammar for `answers`.

    Attributes:
        at_begin: ways of an answer that begins with a call. behind_text: those further on.
        no_call: what looks like one up to its name, which is no tool's.
        rules: theirs; they want those of `argument_rules`.
    """

    at_begin: list[str]
    behind_text: list[str]
    no_call: str
    rules: list[str]


def loose_calls(tools: Sequence[Tool], key: str, *, parallel: bool, any_name: bool) -> Loose:
    """An answer that begins with the object of a call goes on as such, and so does a fenced block of code
    that begins with the call of a known name. What else is JSON stays text.

    Args:
        key: what arguments are called.
        any_name: an answer that begins with an object whose first key is "name" is a call, and the name must
            be a tool's; where not, it is a call only once the name is a tool's.
    """
    more = ' (W? ("," | ";")? W? loose_object)*' if parallel else ""
    listed = (' (W? "," W? loose_object)*' if parallel else "") + ' W? "]"'
    at_begin = [
        f"loose_name loose_named{more}",
        f"listed_name loose_named{listed}",
        f"loose_first W? loose_swapped{more}",
        f"listed_first W? loose_swapped{listed}",
        *([] if any_name else ["loose_name OTHER answer", "listed_name OTHER answer"]),
    ]
    named = rf'\{{{_SPACES}{_TYPE}"name"{_SPACES}:'
    first = rf"\{{{_SPACES}{quoted(key)}{_SPACES}:"
    text = r'"([^"\\]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
    names = "|".join(re.escape(tool.name) for tool in tools)
    rules = [
        r"W: / |\r?\n[ \t]{0,40}/",
        f"loose_name[lazy]: /{_SPACES}{named}/",
        f"listed_name[lazy]: /{_SPACES}\\[{_SPACES}{named}/",
        f"loose_first[lazy]: /{_SPACES}{first}/",
        f"listed_first[lazy]: /{_SPACES}\\[{_SPACES}{first}/",
        f"fenced[lazy]: /(.|\\n)*```(json)?{_SPACES}{named}/",
        # A whole name that is none of the tools', or what is no name at all; but no beginning of a marker.
        f'OTHER: /{_SPACES}({text}|[^" \\t\\r\\n`<])/ & ~/{_SPACES}"({names})"/',
        *_loose_objects(tools, key),
    ]
    return Loose(at_begin, [f'fenced loose_named{more} W? "```"'], "(fenced OTHER)", rules)


def _loose_objects(tools: Sequence[Tool], key: str) -> list[str]:
    """Rules of objects: from the name on, whole, and with the arguments before the name."""
    numbers = range(len(tools))
    tail = f'W? "," W? {quoted(quoted(key))} W? ":" W?'
    head = f'W? "," W? {quoted(quoted("name"))} W? ":"'
    return [
        *(f'NAME_{n}: /{_SPACES}"{re.escape(tool.name)}"/' for n, tool in enumerate(tools)),
        *alternatives("loose_named", [f'NAME_{n} {tail} args_{n} W? "}}"' for n in numbers]),
        *alternatives("loose_swapped", [f'args_{n} {head} NAME_{n} W? "}}"' for n in numbers]),
        f'loose_object: "{{" W? {quoted(quoted("name"))} W? ":" loose_named',
    ]
