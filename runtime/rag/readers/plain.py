"""Plain text."""

from __future__ import annotations

from collections.abc import Iterator

from ..types import Section, Text
from .base import Source
from .characters import clean, decode
from .titles import split_title

MEDIA_TYPE = "text/plain"


def read_plain(source: Source) -> Iterator[Text]:
    text, encoding = decode(source.read(), source.name)
    text = clean(text).rstrip()
    if not text.strip():
        raise source.no_text()
    if len(text) > source.limits.max_characters:
        raise source.too_large(f"holds {len(text):,} characters", source.limits.max_characters)
    title, start = split_title(text)
    title = " ".join(title.split())
    yield Text(source.name, title, text, (Section(start, len(text)),), MEDIA_TYPE, encoding_note(encoding))


def encoding_note(encoding: str) -> dict[str, str]:
    """What the metadata says of an encoding: nothing of UTF-8."""
    return {} if encoding == "utf-8" else {"encoding": encoding}
