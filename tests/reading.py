"""What the tests of readers share: a file written, read and checked in one call."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag.readers import ReadLimits, read_documents
from llmc.runtime.rag.types import Text


class Read:
    """Writes a file and reads it; `problems` are what was reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[tuple[str, str]] = []

    def all(self, name: str, data: str | bytes, limits: ReadLimits | None = None) -> list[Text]:
        path = self.folder / Path(name).name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        self.problems = []
        texts = list(read_documents(path, name, limits, lambda id, why: self.problems.append((id, why))))
        for text in texts:
            check(text)
        return texts

    def one(self, name: str, data: str | bytes, limits: ReadLimits | None = None) -> Text:
        (text,) = self.all(name, data, limits)
        return text

    def error(self, name: str, data: str | bytes, limits: ReadLimits | None = None) -> str:
        with pytest.raises(InputError) as caught:
            self.all(name, data, limits)
        assert caught.value.message.startswith(f"{name}: ")
        return str(caught.value)


def check(text: Text) -> None:
    """What holds of every document: sections in order, not empty, inside; characters that can be stored."""
    position = 0
    for section in text.sections:
        assert position <= section.start < section.end <= len(text.text)
        assert text.text[section.start : section.end].strip()
        position = section.end
    assert text.sections
    assert unicodedata.is_normalized("NFC", text.title)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text.text + text.title)
    assert text.title == " ".join(text.title.split())


def parts(text: Text) -> list[tuple[tuple[str, ...], str]]:
    return [(section.heading, text.text[section.start : section.end]) for section in text.sections]


def body(text: Text) -> str:
    return "\n\n".join(part for _, part in parts(text))
