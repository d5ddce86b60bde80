"""Tool calls: how models write them, how they are read, and what constrains them.

A format (`FORMATS`) knows a family's way of writing calls: the grammar that holds a model to the tools'
schemas, and the parser that finds the calls in its text. `detect` chooses one by what the chat template
writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ir.errors import LlmcError
from ...plugins.entries import warn
from .base import (
    CallArguments,
    CallBegin,
    CallParser,
    Content,
    Event,
    TokenIds,
    Tool,
    ToolCall,
    ToolFormat,
    collect,
    new_call_id,
    tools_from_openai,
)
from .detection import Arguments, Detected, Template, detect_among
from .gemma import Gemma
from .hermes import Hermes
from .json import Json
from .lark import calls_or_json
from .llama3 import Llama3
from .mistral import Mistral
from .plugin import plugin_format, plugin_formats

__all__ = [
    "FORMATS",
    "Arguments",
    "CallArguments",
    "CallBegin",
    "CallParser",
    "Content",
    "Detected",
    "Event",
    "TokenIds",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "calls_or_json",
    "collect",
    "detect",
    "detect_once",
    "find_format",
    "new_call_id",
    "recorded",
    "tools_from_openai",
]

_ALL: tuple[ToolFormat, ...] = (Llama3(), Json(), Hermes(), Mistral(), Gemma())
FORMATS: dict[str, ToolFormat] = {one.name: one for one in _ALL}
"""Name → format, in the order in which `detect` tries them: those without markers first, as Hermes' parser
reads theirs, too.
"""


def detect(template: Template) -> Detected:
    """How a chat template writes calls, proved by reading back one that it wrote. Formats of other packages
    are tried where none of ours reads it.
    """
    return detect_among(template, FORMATS, lambda: plugin_formats(FORMATS))


def find_format(name: str) -> ToolFormat:
    """The format of a name, ours or another package's. Raises InputError where none that is installed has it,
    or its package is broken.
    """
    ours = FORMATS.get(name)
    return ours if ours is not None else plugin_format(name)


def recorded(entry: Any) -> Detected | None:
    """What was found when an artifact was compiled: None where nothing was recorded, or the format is one
    that is not installed here (then a warning says which).
    """
    if isinstance(entry, Mapping) and isinstance(name := entry.get("format"), str) and name not in FORMATS:
        try:
            return Detected.from_manifest(entry, {name: plugin_format(name)})
        except LlmcError as error:
            warn(f"the artifact was compiled for tool calls in a format that cannot be used here: {error}")
            return None
    return Detected.from_manifest(entry, FORMATS)


def detect_once(source: str, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """`detect` from a template's text, for the manifest: what the compiler records."""
    from ..chat_template import ChatTemplate

    return detect(ChatTemplate(source, special_tokens)).as_manifest()
