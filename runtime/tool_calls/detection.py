"""Which format a chat template writes calls in, found by making it write one and reading that back.

Nothing is guessed from a template's text or a model's name: a format is chosen where its parser finds, in
what the template wrote for a message with a call, exactly that call.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Final, Literal, Protocol

from ...ir.errors import CompileError, InputError
from ...plugins.entries import blaming, warn
from .base import Tool, ToolCall, ToolFormat, collect

Arguments = Literal["object", "text"]

_LETTERS: Final = string.ascii_letters + string.digits


class Template(Protocol):
    """What is needed of `runtime.chat_template.ChatTemplate`."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str: ...


@dataclass(frozen=True)
class Detected:
    """How a model's chat template deals with tools.

    Attributes:
        format: name in FORMATS.
        in_template: whether the template itself shows tools and writes calls; where not, the format's
            `instructions` belong in the system message, and calls and results must be given to the template
            as plain text.
        arguments: whether the template wants a call's arguments as an object or as JSON text.
        parallel: whether it takes several calls in one message.
        short_ids: whether it insists on ids of nine letters and digits for calls (Mistral's do).
    """

    format: str
    in_template: bool
    arguments: Arguments = "object"
    parallel: bool = True
    short_ids: bool = False

    def as_manifest(self) -> dict[str, Any]:
        """The entry "tool_calls" of the manifest's "tokenizer"."""
        return asdict(self)

    @staticmethod
    def from_manifest(entry: Any, formats: Mapping[str, ToolFormat]) -> Detected | None:
        """What was recorded when the artifact was compiled; None where it was not, or by a newer version."""
        if not isinstance(entry, Mapping) or entry.get("format") not in formats:
            return None
        arguments: Arguments = "text" if entry.get("arguments") == "text" else "object"
        return Detected(
            str(entry["format"]),
            bool(entry.get("in_template")),
            arguments,
            entry.get("parallel") is not False,
            entry.get("short_ids") is True,
        )

    def template_id(self, call_id: str) -> str:
        """A call's id as the template takes it: the same one for a call and for its result."""
        if not self.short_ids:
            return call_id
        number = int.from_bytes(sha256(call_id.encode(errors="surrogatepass")).digest()[:8], "big")
        return "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(9))


NO_TOOLS: Final = Detected("json", in_template=False)

_NAMES: Final = ("find_weather", "count_stars")
_DESCRIPTION: Final = "Says what the sky holds over a place."
_IDS: Final = ("call_0123456789abcdef01234567", "call_76543210fedcba9876543210")
# Nothing here may look the same as Python writes it and as JSON does.
_ARGUMENTS: Final = '{"place": "Graz, the \\"old\\" town", "nights": [1, 2.5], "clear": true}'
_USER: Final = {"role": "user", "content": "What is over Graz?"}
_TOOLS: Final = [
    Tool(
        name,
        _DESCRIPTION,
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Name of the place"},
                "nights": {"type": "array", "items": {"type": "number"}, "description": "Which"},
                "clear": {"type": "boolean", "description": "Whether it is"},
            },
            "required": ["place"],
        },
    )
    for name in _NAMES
]


Formats = Mapping[str, ToolFormat] | Callable[[], Mapping[str, ToolFormat]]
"""Name → format, in the order in which they are tried; or what makes that, where it takes time."""


def detect_among(template: Template, *groups: Formats) -> Detected:
    """The first format in which a call that `template` writes is read back, of the first of `groups` where
    there is one; NO_TOOLS where there is none, or where the template shows the model no tools.
    """
    render = _Render(template)
    if not _shows_tools(render):
        return NO_TOOLS
    for group in groups:
        formats = group() if callable(group) else group
        if formats and (found := _first(render, formats)) is not None:
            return found
    return NO_TOOLS


def _first(render: _Render, formats: Mapping[str, ToolFormat]) -> Detected | None:
    for short_ids in (False, True):
        for arguments in ("object", "text"):
            written = _written(render, 1, arguments, short_ids)
            if written is None:
                continue
            for format in formats.values():
                if _reads(format, written, 1):
                    two = _written(render, 2, arguments, short_ids)
                    parallel = two is not None and _reads(format, two, 2)
                    return Detected(format.name, True, arguments, parallel, short_ids)
    return None


class _Render:
    """What a template writes with the tools above, each conversation once: one that is slow costs its limit
    each time.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._tools = [tool.as_openai() for tool in _TOOLS]
        self._written: dict[str, str | None] = {}

    def __call__(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str | None:
        """None where the template refuses."""
        key = json.dumps([messages, prompt])
        if key not in self._written:
            try:
                text = self._template.render(messages, tools=self._tools, add_generation_prompt=prompt)
            except InputError:
                text = None
            self._written[key] = text
        return self._written[key]


def _shows_tools(render: _Render) -> bool:
    text = render([_USER], prompt=True)
    return text is not None and _NAMES[0] in text and _DESCRIPTION in text


def _call(number: int, arguments: Arguments, short_ids: bool) -> dict[str, Any]:
    call_id = f"a0b1c2d3{number}" if short_ids else _IDS[number]
    given = json.loads(_ARGUMENTS) if arguments == "object" else _ARGUMENTS
    function = {"name": _NAMES[number], "arguments": given}
    return {"id": call_id, "type": "function", "function": function}


def _written(render: _Render, calls: int, arguments: Arguments, short_ids: bool) -> str | None:
    """What the template writes for the assistant's message with so many calls; None where it refuses.

    It is what stands behind the prompt for that message or, where a prompt ends otherwise than a message
    begins, behind what this message and one of text have in common.
    """
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [_call(number, arguments, short_ids) for number in range(calls)],
    }
    whole = render([_USER, message])
    if whole is None:
        return None
    prompt = render([_USER], prompt=True)
    if prompt is not None and whole.startswith(prompt):
        return whole[len(prompt) :]
    other = render([_USER, {"role": "assistant", "content": "\x1a"}])
    if other is None:
        return None
    same = next((i for i, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b), len(other))
    return whole[same:]


def _reads(format: ToolFormat, written: str, calls: int) -> bool:
    try:
        with blaming(f"tool format {format.name}", format):
            parser = format.parser(_TOOLS)
            _, found = collect([*parser.push(written), *parser.finish()])
    except CompileError as error:  # of another package: it reads nothing then
        warn(str(error))
        return False
    return len(found) == calls and all(_same(call, _NAMES[number]) for number, call in enumerate(found))


def _same(call: ToolCall, name: str) -> bool:
    try:
        return call.name == name and json.loads(call.arguments) == json.loads(_ARGUMENTS)
    except ValueError:
        return False
