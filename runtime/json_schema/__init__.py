"""JSON schemas, checked and rewritten so that llguidance obeys all of what they say, or refused.

llguidance refuses most of what it does not implement. It reads over the rest: keywords of other drafts,
formats of numbers, numbers that a double does not hold, a name spelled in two ways. And it can be sent into
minutes of work, or out of memory, by a few hundred bytes. Nothing is ever fetched: a `$ref` leads to the
schema's own parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import copied
from .errors import GrammarError
from .keywords import check_keywords
from .references import Document
from .size import is_large, names_are_open, refuse_endless

__all__ = ["CheckedSchema", "GrammarError", "check_schema"]


class CheckedSchema:
    """A schema to compile.

    `is_large`: that may take long. `plain_names`: names of properties must not be spelled with \\u escapes.
    """

    __slots__ = ("is_large", "plain_names", "schema")

    def __init__(self, schema: dict[str, Any], *, is_large: bool = False, plain_names: bool = False) -> None:
        self.schema = schema
        self.is_large = is_large
        self.plain_names = plain_names


def check_schema(schema: Mapping[str, Any] | bool) -> CheckedSchema:
    """Raise GrammarError, naming the keyword and its place, unless the schema can be honoured.

    Drafts 4, 6, 7, 2019-09 and 2020-12, the last where `$schema` names none.
    """
    if isinstance(schema, bool):
        return CheckedSchema({} if schema else {"allOf": [False]})
    root = copied(schema)
    document = Document(root)
    reached = check_keywords(document)
    refuse_endless(document, reached)
    return CheckedSchema(root, is_large=is_large(document, reached), plain_names=names_are_open(reached))
