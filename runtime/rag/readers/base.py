"""What every reader shares: the limits, the file as bytes, and the builder that puts a text together."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ....ir.errors import InputError
from ..types import Section, Text
from .characters import clean

MEGABYTE = 1_000_000
_MAX_HEADING = 300  # characters
_MAX_BLOCKS = 1_000_000


@dataclass(frozen=True)
class ReadLimits:
    """What a file may ask of us. The defaults are far above what people write, and below what hurts.

    max_bytes      of a file that is read as a whole, of one row where rows are read one by one, and of what
                   an archive (docx) holds once it is unpacked; `--max-file-mb` raises it
    max_characters of one document's extracted text; raised by the same option
    max_rows       rows of a file; what follows is reported and left out
    max_pages      pages of a PDF; what follows is reported and left out
    max_nesting    of JSON values, of elements in a docx
    max_seconds    that a PDF may take
    """

    max_bytes: int = 100 * MEGABYTE
    max_characters: int = 20 * MEGABYTE
    max_rows: int = 5_000_000
    max_pages: int = 20_000
    max_nesting: int = 200
    max_seconds: float = 300.0

    @classmethod
    def of_megabytes(cls, size: int) -> ReadLimits:
        """The limits that `--max-file-mb SIZE` stands for."""
        if size < 1:
            raise InputError(f"--max-file-mb {size}", remedy="pass 1 or more")
        return cls(max_bytes=size * MEGABYTE, max_characters=size * MEGABYTE)


OnProblem = Callable[[str, str], None]
"""Told the id and the reason of what was skipped: a row, a page."""


@dataclass(frozen=True)
class Source:
    """A file on its way into a reader. `name` is the path below the folder, and the id of its document."""

    path: Path
    name: str
    limits: ReadLimits
    problem: OnProblem

    def open(self) -> BinaryIO:
        """The file, opened for reading. Only a regular one: a pipe would wait, a device never end."""
        try:
            number = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"{self.name}: cannot be opened: {_reason(error)}") from error
        file = os.fdopen(number, "rb")
        if not stat.S_ISREG(os.fstat(number).st_mode):
            file.close()
            raise InputError(f"{self.name}: is not a regular file")
        return file

    def check_size(self, file: BinaryIO) -> int:
        size = os.fstat(file.fileno()).st_size
        if size > self.limits.max_bytes:
            raise self.too_large(f"has {size / MEGABYTE:,.1f} MB", self.limits.max_bytes)
        return size

    def read(self) -> bytes:
        """All bytes of the file, which are refused above `max_bytes`."""
        with self.open() as file:
            self.check_size(file)
            try:
                data = file.read(self.limits.max_bytes + 1)
            except OSError as error:
                raise InputError(f"{self.name}: cannot be read: {_reason(error)}") from error
        if len(data) > self.limits.max_bytes:  # it has grown since it was asked for its size
            raise self.too_large("is larger", self.limits.max_bytes)
        return data

    def too_large(self, what: str, limit: int) -> InputError:
        return InputError(
            f"{self.name}: {what}; at most {limit / MEGABYTE:,.0f} MB are read of one file",
            remedy="raise the limit with --max-file-mb, or split the file",
        )

    def no_text(self, hint: str = "") -> InputError:
        return InputError(f"{self.name}: holds no text", remedy=hint)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@dataclass(frozen=True)
class Format:
    """One line of the table of formats: its suffixes, and the reader that yields its documents."""

    media_type: str
    suffixes: tuple[str, ...]
    read: Callable[[Source], Any]
    names: tuple[str, ...] = ()


@dataclass
class _Block:
    text: str
    level: int = 0  # above 0: a heading
    page: int | None = None
    unbroken: bool = False
    heading: tuple[str, ...] | None = None  # overrides the headings above it


@dataclass
class Builder:
    """Collects a document's headings and blocks in order, then lays them out as one text with sections.

    Headings stand in the text and belong to the section that follows them. The one that is the document's
    title is in no section: every chunk carries the title already.
    """

    source: Source
    blocks: list[_Block] = field(default_factory=list[_Block])
    page: int | None = None
    _characters: int = 0

    def heading(self, level: int, text: str) -> None:
        line = " ".join(clean(text).split())
        if len(line) > _MAX_HEADING:  # marked as a heading, but a text
            self.block(line)
        elif line:
            self._add(_Block(line, max(1, level), self.page))

    def block(self, text: str, *, unbroken: bool = False, heading: tuple[str, ...] | None = None) -> None:
        """A paragraph, list, table or piece of code. `heading` is its whole path of headings where the
        blocks before it do not tell."""
        text = clean(text).strip("\n").rstrip()
        if text.strip():
            self._add(_Block(text, 0, self.page, unbroken, heading))

    def _add(self, block: _Block) -> None:
        if len(self.blocks) >= _MAX_BLOCKS:
            raise InputError(
                f"{self.source.name}: holds more than {_MAX_BLOCKS:,} paragraphs", remedy="split the file"
            )
        self._characters += len(block.text)
        limit = self.source.limits.max_characters
        if self._characters > limit:
            raise self.source.too_large("holds more text than is allowed", limit)
        self.blocks.append(block)

    def only_top_heading(self) -> str:
        """The heading that names the whole document: the first, where no other stands at its level or above.
        Several of one level name parts."""
        headings = [block for block in self.blocks if block.level]
        if not headings or any(block.level <= headings[0].level for block in headings[1:]):
            return ""
        return headings[0].text

    def finish(
        self, title: str, media_type: str, metadata: Mapping[str, Any] | None = None, *, id: str = ""
    ) -> Text:
        """The document, of this title. Raises InputError where the blocks hold no text."""
        if not self.blocks:
            raise self.source.no_text()
        title = " ".join(clean(title).split())[:1000]
        layout = _Layout(self._without_title(title))
        text, sections = layout.lay_out(title)
        if not sections:  # a title and nothing else: then the title is what can be found
            sections = (Section(0, len(text)),)
        return Text(id or self.source.name, title, text, sections, media_type, dict(metadata or {}))

    def _without_title(self, title: str) -> list[_Block]:
        """The blocks after the title's heading is marked as none (level -1)."""
        folded = title.casefold()
        for place, block in enumerate(self.blocks):
            if folded and block.level and block.text.casefold() == folded:
                marked = _Block(block.text, -1, block.page)
                return [*self.blocks[:place], marked, *self.blocks[place + 1 :]]
        return self.blocks


class _Layout:
    """Joins blocks into one text, a blank line between them, and says which characters are which section."""

    def __init__(self, blocks: list[_Block]) -> None:
        self._blocks = blocks
        self._parts: list[str] = []
        self._length = 0
        self._sections: list[Section] = []
        self._path: list[tuple[int, str]] = []  # levels and texts of the headings that are open
        self._waiting: tuple[int, int, int | None] | None = None  # start, end, page of headings with no body

    def lay_out(self, title: str) -> tuple[str, tuple[Section, ...]]:
        for block in self._blocks:
            start = self._append(block.text)
            if block.level > 0:
                self._open(block, start)
            elif block.level == 0:
                self._body(block, start)
        self._flush()
        return "".join(self._parts), tuple(self._sections)

    def _append(self, text: str) -> int:
        if self._parts:
            self._parts.append("\n\n")
            self._length += 2
        start = self._length
        self._parts.append(text)
        self._length += len(text)
        return start

    def _open(self, block: _Block, start: int) -> None:
        deeper = bool(self._path) and block.level > self._path[-1][0]
        if self._waiting is not None and not deeper:
            self._flush()
        while self._path and self._path[-1][0] >= block.level:
            self._path.pop()
        self._path.append((block.level, block.text))
        begin, page = (start, block.page) if self._waiting is None else (self._waiting[0], self._waiting[2])
        self._waiting = (begin, self._length, page)

    def _flush(self) -> None:
        """Headings that nothing followed are a section of their own, lest their words be lost."""
        if self._waiting is not None:
            start, end, page = self._waiting
            self._sections.append(Section(start, end, self._headings(), page))
            self._waiting = None

    def _headings(self) -> tuple[str, ...]:
        return tuple(text for _, text in self._path)

    def _body(self, block: _Block, start: int) -> None:
        heading = self._headings() if block.heading is None else block.heading
        page = block.page
        last = self._sections[-1] if self._sections else None
        if self._waiting is not None:
            if (
                block.unbroken
            ):  # the headings stay whole with their table only if both fit: leave it to chunking
                self._sections.append(Section(self._waiting[0], self._waiting[1], heading, self._waiting[2]))
            else:
                start, page = self._waiting[0], self._waiting[2]
            self._waiting = None
        elif (
            last is not None
            and not block.unbroken
            and not last.unbroken
            and (last.heading, last.page) == (heading, page)
            and self._between_is_empty(last.end, start)
        ):
            self._sections[-1] = Section(last.start, self._length, heading, page)
            return
        self._sections.append(Section(start, self._length, heading, page, block.unbroken))

    def _between_is_empty(self, end: int, start: int) -> bool:
        return start - end <= 2  # the blank line between two blocks; a title's line is longer
