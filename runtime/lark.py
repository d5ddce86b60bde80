"""The `%json` blocks in Lark source: found without being misled by what strings and comments hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .json_schema.errors import GrammarError

# What may hold "%json" without meaning it, or the word itself.
_TOKEN = re.compile(
    r"""
    (?P<comment> //[^\n]* | \#[^\n]* )
  | (?P<string>  "(?:\\.|[^"\\\n])*" )
  | (?P<regex>   /(?:\\.|[^/\\\n])+/ )
  | (?P<json>    %json\b\s* )
    """,
    re.VERBOSE,
)


def rewrite_json_blocks(source: str, rewrite: Callable[[Mapping[str, Any] | bool], str]) -> str:
    """The source with the schema of each `%json {...}` replaced by what `rewrite` makes of it.

    Raises GrammarError where the text behind a `%json` is no JSON.
    """
    decoder = json.JSONDecoder()
    parts: list[str] = []
    place = 0
    while (found := _TOKEN.search(source, place)) is not None:
        parts.append(source[place : found.end()])
        place = found.end()
        if found["json"] is None:
            continue
        try:
            schema, end = decoder.raw_decode(source, place)
        except (ValueError, RecursionError):
            line = source.count("\n", 0, place) + 1
            raise GrammarError(
                f"%json in line {line} of the grammar is not followed by JSON", remedy="write %json {...}"
            ) from None
        parts.append(rewrite(schema))
        place = end
    parts.append(source[place:])
    return "".join(parts)
