"""PDF, page by page. pypdf works in a process of its own, bounded in time and memory (`pdf_child.py`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....ir.errors import InputError
from ..types import Text
from .base import Builder, Source
from .characters import clean
from .titles import sensible, split_title

MEDIA_TYPE = "application/pdf"
_CHILD = Path(__file__).with_name("pdf_child.py")
_MEMORY = 3 << 30  # of addresses
_MIN_RUNNING = 4  # pages from which on a line that many of them begin or end with is a running header
_MAX_RUNNING_LINE = 100

_HYPHEN = re.compile(r"(\w{2,40})[-\u2010]\n[ \t]*([^\W\d_]\w{0,40})")
_SOFT_HYPHEN = re.compile("\u00ad[ \t]*\n[ \t]*")
_WORD = re.compile(r"\w{4,80}")
_DIGITS = re.compile(r"\d+")


def read_pdf(source: Source) -> Iterator[Text]:
    with source.open() as file:
        source.check_size(file)
        extracted = _extract(file.fileno(), source)
    if not any(text.strip() for _, text in extracted.pages):
        raise source.no_text("scanned pages need text recognition (OCR) first" if extracted.total else "")
    pages = _without_running_lines(_dehyphenated(extracted.pages))
    builder = Builder(source)
    title, start = _title(extracted, pages[0][1] if pages else "")
    if start:
        builder.heading(1, title)
    outline = _Outline(extracted.outline, title)
    for number, (page, text) in enumerate(pages):
        builder.page = page
        for heading, piece in outline.split(page, text[start:] if number == 0 else text):
            builder.block(piece, heading=heading)
    yield builder.finish(title, MEDIA_TYPE, {"pages": extracted.total})


@dataclass
class _Extracted:
    title: str = ""
    largest: str = ""
    outline: list[tuple[int, str, int]] = field(default_factory=list[tuple[int, str, int]])
    total: int = 0
    pages: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    finished: bool = False

    def take(self, said: dict[str, Any], source: Source) -> None:
        """One line of the child's."""
        if "error" in said:
            raise InputError(f"{source.name}: {said['error']}", remedy=said.get("remedy", ""))
        if "document" in said:
            document = said["document"]
            self.title, self.total = document["title"], document["pages"]
            self.outline = [(level, clean(title), page) for level, title, page in document["outline"]]
        elif "text" in said:
            soft = _SOFT_HYPHEN.sub("", said["text"].replace("\r\n", "\n"))  # before clean() drops its mark
            self.pages.append((said["page"], clean(soft)))
            self.largest = self.largest or clean(said["largest"])
        elif "skipped" in said:
            source.problem(f"{source.name}", f"page {said['page']} {said['skipped']}")
        elif said.get("end") == "characters":
            raise source.too_large("holds more text than is allowed", source.limits.max_characters)
        elif "end" in said:
            self.finished = True
            if said["end"] == "pages":
                source.problem(
                    source.name,
                    f"has {self.total:,} pages; those behind {source.limits.max_pages:,} are left out",
                )


def _extract(file: int, source: Source) -> _Extracted:
    limits = source.limits
    task = {
        "memory": _MEMORY + 2 * limits.max_bytes,
        "seconds": int(limits.max_seconds) + 1,
        "pages": limits.max_pages,
        "characters": limits.max_characters,
    }
    found = _Extracted()
    # -P: the folder of the script holds modules named like Python's own (html).
    command = [sys.executable, "-P", str(_CHILD), json.dumps(task)]
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(limits.max_seconds, stop)
        clock.daemon = True
        clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.endswith(b"\n"):  # a line cut off by the end of the process is no JSON
                    found.take(json.loads(line), source)
        finally:
            clock.cancel()
            process.kill()
    if not found.finished:
        why = (
            f"took more than {limits.max_seconds:g} s"
            if late.is_set()
            else "broke off (damaged, or too large)"
        )
        if not found.pages:
            raise InputError(f"{source.name}: reading it {why}", remedy="print it to a new PDF")
        source.problem(source.name, f"reading it {why} behind page {found.pages[-1][0]} of {found.total}")
    return found


def _dehyphenated(pages: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Words that a line's end divides made whole. The hyphen stays where the document writes the word with it
    elsewhere, or where what follows is no lower-case letter."""
    if not any("-\n" in text or "\u2010\n" in text for _, text in pages):
        return pages
    words: set[str] = set()
    hyphened: set[str] = set()
    for _, text in pages:
        words.update(word.casefold() for word in _WORD.findall(text))
        hyphened.update(word.casefold() for word in re.findall(r"\w{2,40}-\w{2,40}", text))

    def join(match: re.Match[str]) -> str:
        before, after = match[1], match[2]
        whole, divided = (before + after).casefold(), f"{before}-{after}".casefold()
        keep = not after[0].islower() or (divided in hyphened and whole not in words)
        return f"{before}-{after}" if keep else before + after

    return [(page, _HYPHEN.sub(join, text)) for page, text in pages]


def _without_running_lines(pages: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Pages without the lines that most of them begin or end with: headers, footers, page numbers."""
    if len(pages) < _MIN_RUNNING:
        return pages
    split = [(page, text.strip().split("\n")) for page, text in pages]
    for place in (0, -1):
        seen = Counter(_masked(lines[place]) for _, lines in split if len(lines) > 1)
        running = {line for line, times in seen.items() if line and times * 10 >= len(split) * 6}
        split = [
            (page, lines[1:] if place == 0 else lines[:-1])
            if len(lines) > 1 and _masked(lines[place]) in running
            else (page, lines)
            for page, lines in split
        ]
    return [(page, "\n".join(lines)) for page, lines in split]


def _masked(line: str) -> str:
    line = " ".join(line.split())
    return _DIGITS.sub("#", line).casefold() if len(line) <= _MAX_RUNNING_LINE else ""


def _title(extracted: _Extracted, first: str) -> tuple[str, int]:
    """The title, and where on the first page the text behind it begins (0 where it does not stand there)."""
    told = sensible(extracted.title)
    for title in (told, sensible(extracted.largest)):
        if title and (end := _starts_with(first, title)):
            return title, end
    if told:
        return told, 0
    if large := sensible(extracted.largest):
        return large, 0
    tops = [entry for entry in extracted.outline if entry[0] == 1]
    if len(tops) == 1 and len(extracted.outline) > 1 and sensible(tops[0][1]):
        return sensible(tops[0][1]), 0
    title, start = split_title(first)
    return " ".join(title.split()), start


def _starts_with(text: str, title: str) -> int:
    """The end of the title at the start of the text, whatever space divides its words; else 0."""
    words = [re.escape(word) for word in title.split()]
    found = re.compile(r"\s*" + r"\s+".join(words) + r"(?=\s|$)", re.IGNORECASE).match(text)
    return found.end() if found else 0


class _Outline:
    """Follows the bookmarks through the pages: which headings a piece of a page stands under."""

    def __init__(self, entries: list[tuple[int, str, int]], title: str) -> None:
        self._entries: dict[int, list[tuple[int, str]]] = {}
        for level, text, page in entries:
            name = " ".join(text.split())
            if name and name.casefold() != title.casefold():
                self._entries.setdefault(page, []).append((level, name))
        self._path: list[tuple[int, str]] = []

    def split(self, page: int, text: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """The page's text in pieces, cut where a line says what a bookmark of this page says."""
        entries = self._entries.get(page, [])
        position = 0
        for number, (level, name) in enumerate(entries):
            found = _line_saying(text, name, position)
            if found < 0 and number == 0 and position == 0:
                found = 0  # a bookmark whose words do not stand there: the page is its
            if found > position:
                yield self._headings(), text[position:found]
                position = found
            while self._path and self._path[-1][0] >= level:
                self._path.pop()
            self._path.append((level, name))
        yield self._headings(), text[position:]

    def _headings(self) -> tuple[str, ...]:
        return tuple(name for _, name in self._path)


def _line_saying(text: str, name: str, start: int) -> int:
    """Start of the line that says `name`, with at most a number before it; -1 where none does."""
    folded = name.casefold()
    position = start
    for line in text[start:].split("\n"):
        said = " ".join(line.split()).casefold()
        if said.endswith(folded) and len(said) <= len(folded) + 10:
            return position
        position += len(line) + 1
    return -1
