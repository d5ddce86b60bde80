"""A stranger's schema as plain, bounded JSON of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import GrammarError

MAX_DEPTH = 96
"""Objects and arrays inside one another; the compiler's own reader stops at 128."""
MAX_VALUES = 50_000
EXACT = 1 << 53
"""Whole numbers up to here are what they are as doubles, which the compiler reckons with."""


def copied(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy, without options for the compiler. Raises GrammarError for what is no JSON, or too much."""
    if not isinstance(schema, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise GrammarError("the schema is no JSON object", remedy="give an object, true or false")
    count = 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise GrammarError(
                f"the schema is nested more than {MAX_DEPTH} deep"
                if depth > MAX_DEPTH
                else f"the schema has more than {MAX_VALUES} values",
                remedy="simplify it",
            )
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _checked_text(value)
        if isinstance(value, int | float):
            return _checked_number(value)
        if isinstance(value, Mapping):
            entries: Mapping[Any, Any] = value
            return {_checked_text(key): copy(entry, depth + 1) for key, entry in entries.items()}
        if isinstance(value, list | tuple):
            elements: list[Any] | tuple[Any, ...] = value
            return [copy(element, depth + 1) for element in elements]
        raise GrammarError(f"the schema holds a {type(value).__name__}", remedy="give plain JSON")

    result = copy({key: value for key, value in schema.items() if key != "x-guidance"}, 1)
    assert isinstance(result, dict)
    return result  # pyright: ignore[reportUnknownVariableType]


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise GrammarError("the schema has a name that is no text", remedy="give plain JSON")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarError(
            "the schema holds text that is not valid Unicode", remedy="give it as UTF-8"
        ) from None
    return text


def _checked_number(number: float) -> float:
    if isinstance(number, int) and number.bit_length() > 1000:
        raise GrammarError("the schema holds a number that is too large", remedy="allowed: up to 1e300")
    if not math.isfinite(number):
        raise GrammarError(f"the schema holds {number}, which is no JSON number", remedy="leave it out")
    return number
