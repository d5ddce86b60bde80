"""vLLM's `structured_outputs` → a grammar."""

from __future__ import annotations

import json
import re
from typing import Any

from ...ir.errors import InputError
from ..grammar import Grammar
from .schema import StructuredOutputs
from .service import ServedModel


def constraint(model: ServedModel, given: StructuredOutputs | None) -> Grammar | None:
    """The grammar that was asked for. Raises InputError where none or several are given, or one is wrong."""
    if given is None:
        return None
    named: dict[str, Any] = {
        "json": given.json_schema,
        "regex": given.regex,
        "grammar": given.grammar,
        "choice": given.choice,
    }
    asked = {name: value for name, value in named.items() if value is not None}
    if len(asked) != 1:
        raise InputError(
            f"structured_outputs has {len(asked)} constraints", remedy=f"give one of {', '.join(named)}"
        )
    name, value = asked.popitem()
    grammars = model.llm.grammars
    if name == "regex":
        return grammars.regex(value)
    if name == "grammar":
        return grammars.lark(value)
    if name == "choice":
        if not value or not all(value):
            raise InputError("structured_outputs.choice is empty or holds an empty text", remedy="give texts")
        return grammars.regex("|".join(_literal(text) for text in value))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError("structured_outputs.json is not JSON", remedy="give a schema") from None
    return grammars.json_schema(value)


def _literal(text: str) -> str:
    """A regular expression of exactly this text, in the syntax of Rust's regex crate."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text)
