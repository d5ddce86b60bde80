"""JSON: one value with many documents, or one document.

    [row, row, …]                       rows as in JSON lines, or texts, or ["title", ["sentence", …]] pairs
    {"title": "text" | ["sentence", …]} each key a document's title
    {"id": row, …}                      each key a row's id
    {"anything": [row, row, …], …}      the rows of every such list
    any other object                    one document: its field of text, or all that it says

The outermost list or object is taken apart value by value, so that a large one is never held twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ....ir.errors import InputError
from ..types import Text
from .base import Source
from .characters import decode
from .plain import encoding_note
from .rows import ID_FIELDS, TEXT_FIELDS, TITLE_FIELDS, Rows, is_text, text_field

MEDIA_TYPE = "application/json"
_MAX_VALUES = 10_000_000
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(source: Source) -> Iterator[Text]:
    text, encoding = decode(source.read(), source.name)
    if not text.strip():
        raise source.no_text()
    reader = _Reader(text, source)
    rows = Rows(source, MEDIA_TYPE)
    note = encoding_note(encoding)
    for number, (own_id, title, value) in enumerate(reader.rows()):
        if rows.over_limit():
            return
        rows.number += 1
        document = rows.document(value, number=number, own_id=own_id, title=title, note=note)
        if document is None:
            continue
        if reader.single:
            document = Text(
                source.name, document.title, document.text, document.sections, MEDIA_TYPE, document.metadata
            )
        yield document


Row = tuple[object, str, object]
"""Id and title that stand outside the row, where they do, and the row."""


class _Reader:
    def __init__(self, text: str, source: Source) -> None:
        self._text = text
        self._source = source
        self._decoder = json.JSONDecoder()
        self.single = False
        values = text.count(",") + text.count("[") + text.count("{")
        if values > _MAX_VALUES:
            raise InputError(
                f"{source.name}: may hold {values:,} values; at most {_MAX_VALUES:,} are read",
                remedy="write it as JSON lines, which are read one by one",
            )

    def rows(self) -> Iterator[Row]:
        start = self._skip(0)
        opening = self._text[start : start + 1]
        if opening == "[":
            for value in self._elements(start):
                yield _pair(value)
        elif opening == "{":
            yield from self._of_object(start)
        else:
            value, _ = self._value(start)
            self.single = True
            yield None, "", value

    def _of_object(self, start: int) -> Iterator[Row]:
        value, end = self._value(start)
        following = self._skip(end)
        if self._text[following : following + 1] == "{":  # JSON lines under another name
            yield None, "", value
            while following < len(self._text):
                value, end = self._value(following)
                yield None, "", value
                following = self._skip(end)
            return
        self._check_end(following)
        assert isinstance(value, dict)
        if not value:
            return
        if _is_titles(value):
            for title, text in value.items():
                yield title, title, text
        elif all(_is_row(inner) for inner in value.values()):
            for key, row in value.items():
                yield key, "", row
        else:
            lists = [inner for inner in value.values() if isinstance(inner, list) and _is_rows(inner)]
            if lists and not text_field({str(key).casefold(): inner for key, inner in value.items()})[0]:
                for inner in lists:
                    for row in inner:
                        yield _pair(row)
            else:
                self.single = True
                yield None, "", value

    def _elements(self, start: int) -> Iterator[Any]:
        position = self._skip(start + 1)
        if self._text[position : position + 1] == "]":
            self._check_end(self._skip(position + 1))
            return
        while True:
            value, position = self._value(position)
            yield value
            position = self._skip(position)
            mark = self._text[position : position + 1]
            if mark == "]":
                self._check_end(self._skip(position + 1))
                return
            if mark != ",":
                raise self._wrong("expected ',' or ']'", position)
            position = self._skip(position + 1)

    def _value(self, start: int) -> tuple[Any, int]:
        try:
            return self._decoder.raw_decode(self._text, start)
        except json.JSONDecodeError as error:
            raise self._wrong(error.msg, error.pos) from error
        except RecursionError as error:
            raise InputError(f"{self._source.name}: its values are nested too deep") from error
        except ValueError as error:  # a number of thousands of digits
            raise InputError(f"{self._source.name}: {error}") from error

    def _skip(self, position: int) -> int:
        found = _SPACE.match(self._text, position)
        return found.end() if found else position

    def _check_end(self, position: int) -> None:
        if position < len(self._text):
            raise self._wrong("more text behind the value", position)

    def _wrong(self, what: str, position: int) -> InputError:
        line = self._text.count("\n", 0, position) + 1
        return InputError(f"{self._source.name}: no valid JSON: line {line}: {what}")


def _pair(value: object) -> Row:
    """A row as it is, or the title and text of `["title", ["sentence", …]]`."""
    if isinstance(value, list) and len(value) == 2:
        title, sentences = value
        if isinstance(title, str) and isinstance(sentences, list) and is_text(sentences):
            return None, title, sentences
    return None, "", value


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and bool(
        text_field({str(key).strip().casefold(): inner for key, inner in value.items()})[0]
    )


def _is_rows(values: list[object]) -> bool:
    return bool(values) and all(_is_row(value) for value in values[:100])


def _is_titles(value: dict[str, object]) -> bool:
    """Whether keys are titles and values their texts: all are text, and it is not one row's fields."""
    if len(value) < 2 or not all(is_text(text) for text in value.values()):
        return False
    fields = {*TEXT_FIELDS, *TITLE_FIELDS, *ID_FIELDS}
    return len(value) > 30 or not any(key.strip().casefold() in fields for key in value)
