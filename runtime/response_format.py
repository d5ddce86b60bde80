"""OpenAI's `response_format`: what an answer has to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.errors import InputError

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def wanted_schema(wanted: Mapping[str, Any] | None) -> Mapping[str, Any] | bool | None:
    """The JSON schema of the answer; None where it may be any text.

    Raises InputError, naming the field, for what is none of the three forms.
    """
    if wanted is None or wanted.get("type") == "text":
        return None
    kind = wanted.get("type")
    if kind == "json_object":
        return _ANY_OBJECT
    if kind != "json_schema":
        raise InputError(
            f"response_format.type is {str(kind)[:40]!r}",
            remedy='allowed: "text", "json_object", "json_schema"',
        )
    holder = wanted.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping | bool):
        raise InputError(
            "response_format.json_schema.schema is missing", remedy="give the schema as an object"
        )
    return schema
