"""Files of many documents: what a row (of JSON lines, JSON or CSV) says its title, text and id are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..types import Section, Text
from .base import Source
from .characters import clean
from .titles import split_title

# The first that a row has counts.
TEXT_FIELDS = (
    "text",
    "content",
    "contents",
    "body",
    "passage",
    "paragraph_text",
    "paragraph",
    "passage_text",
)
TITLE_FIELDS = ("title", "name", "heading", "headline", "page_title")
ID_FIELDS = ("id", "_id", "doc_id", "docid", "pid", "passage_id", "uuid")
_MAX_ID, _MAX_TITLE, _MAX_VALUE, _MAX_FIELDS = 200, 300, 500, 20
_MAX_FLAT = 20_000  # values of a row that has no field of text
_TOO_MUCH = "\n"
_MAX_PATH = 300  # characters of the names of such a value


class Rows:
    """Makes documents of a file's rows, and tells what was skipped. Ids are distinct within the file."""

    def __init__(self, source: Source, media_type: str) -> None:
        self.source = source
        self._media_type = media_type
        self._taken: dict[int, int] = {}
        """How often an id came, by its hash: a million ids themselves would not be small."""
        self.number = 0

    def skip(self, number: int, reason: str) -> None:
        self.source.problem(f"{self.source.name}#{number}", reason)

    def over_limit(self) -> bool:
        """Whether this file has had its number of rows; said once."""
        limit = self.source.limits.max_rows
        if self.number < limit:
            return False
        self.source.problem(self.source.name, f"has more than {limit:,} rows; those behind are left out")
        return True

    def id(self, own: object, number: int) -> str:
        """`path#own`, or `path#number` where the row has no id that can be one."""
        row = " ".join(clean(str(own)).split()) if isinstance(own, str | int) else ""
        if not row or len(row) > _MAX_ID or isinstance(own, bool):
            row = str(number)
        taken = self._taken.get(_short(row), 0)
        name = row if not taken else f"{row}~{taken + 1}"
        while taken and _short(name) in self._taken:  # the file has this id, too
            taken += 1
            name = f"{row}~{taken + 1}"
        self._taken[_short(row)] = taken + 1
        self._taken.setdefault(_short(name), 1)
        return f"{self.source.name}#{name}"

    def document(
        self, row: object, *, number: int, own_id: object = None, title: str = "", note: Mapping[str, str]
    ) -> Text | None:
        """The document of one row; None where it holds no text, which is reported.

        `title` and `own_id` where something outside the row tells them (the key that it stands under).
        """
        if isinstance(row, dict):
            fields = {str(key).strip().casefold(): value for key, value in row.items()}
            said = str(_first(fields, TITLE_FIELDS, (str, int, float)) or "")
            key, text = text_field(fields)
            body = joined(text) if key else self._flat(_without_title(row), number)
            own = _first(fields, ID_FIELDS, (str, int))
            metadata = _metadata(fields, key)
        else:
            said, own, metadata = "", None, {}
            body = joined(row) if is_text(row) else self._flat(row, number)
        text = clean(body).strip()
        if not text:
            if body is not _TOO_MUCH:
                self.skip(number, "holds no text")
            return None
        start = 0
        title = said or title
        if not title and "\n" in text[:_MAX_TITLE]:  # "title\ntext" in one field
            title, start = split_title(text)
        title = " ".join(clean(title).split())[:_MAX_TITLE]
        document_id = self.id(own_id if own is None else own, number)
        sections = (Section(start, len(text)),)
        return Text(document_id, title, text, sections, self._media_type, {**metadata, **note})

    def _flat(self, value: object, number: int) -> str:
        limit = self.source.limits.max_nesting
        said = flat(value, limit)
        if said is _TOO_MUCH:
            self.skip(
                number, f"has no field of text, and more than {_MAX_FLAT:,} values or {limit} levels of them"
            )
        return said


def _without_title(row: Mapping[Any, object]) -> dict[Any, object]:
    return {key: value for key, value in row.items() if str(key).strip().casefold() not in TITLE_FIELDS}


def _short(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def is_text(value: object) -> bool:
    """A string, or a list of nothing but strings."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def joined(value: object) -> str:
    """Sentences of a list as one text, each apart from the next."""
    if not isinstance(value, list):
        return str(value)
    parts: list[str] = []
    for part in value:
        sentence = str(part)
        if parts and not parts[-1].endswith((" ", "\n")) and not sentence.startswith((" ", "\n")):
            parts.append(" ")
        parts.append(sentence)
    return "".join(parts)


def text_field(fields: Mapping[str, object]) -> tuple[str, object]:
    """The field that holds the row's text, and its value; ("", None) where none does."""
    for key in TEXT_FIELDS:
        if is_text(fields.get(key)):
            return key, fields[key]
    return "", None


def _first(fields: Mapping[str, object], keys: Iterable[str], kinds: tuple[type, ...]) -> object:
    for key in keys:
        value = fields.get(key)
        if isinstance(value, kinds) and not isinstance(value, bool) and str(value).strip():
            return value
    return None


def _metadata(fields: Mapping[str, object], text_key: str) -> dict[str, Any]:
    """The row's other plain values, few and short."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if key == text_key or not text_key or len(found) >= _MAX_FIELDS:
            continue
        if isinstance(value, str) and 0 < len(value) <= _MAX_VALUE:
            found[clean(key[:_MAX_VALUE])] = clean(value)
        elif isinstance(value, bool) or (isinstance(value, int | float) and abs(value) < 1e15):
            found[clean(key[:_MAX_VALUE])] = value
    for key in (*TITLE_FIELDS, *ID_FIELDS):
        found.pop(key, None)
    return found


def flat(value: object, max_nesting: int) -> str:
    """Nested values as lines of `path: value`, in order; `_TOO_MUCH` where there are too many."""
    lines: list[str] = []
    waiting: list[tuple[str, int, object]] = [("", 0, value)]
    while waiting:
        path, depth, value = waiting.pop()
        if len(lines) > _MAX_FLAT or depth > max_nesting:
            return _TOO_MUCH
        if isinstance(value, dict):
            for key, inner in reversed(value.items()):
                name = str(key)[:_MAX_PATH]
                waiting.append((f"{path}.{name}"[-_MAX_PATH:] if path else name, depth + 1, inner))
        elif isinstance(value, list) and not is_text(value):
            waiting += [(path, depth + 1, inner) for inner in reversed(value)]
        elif value is not None and value != "" and value != []:
            said = "; ".join(value) if isinstance(value, list) else str(value)
            lines.append(f"{path}: {said}" if path else said)
    return "\n".join(lines)
