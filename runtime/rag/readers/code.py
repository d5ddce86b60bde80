"""Source code and configuration: a section for each definition, found by its first line. Nothing is run, and
nothing is parsed in full: half a program, or one of the newest syntax, is read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..types import Section, Text
from .base import Source
from .characters import clean, decode
from .languages import Language, language_of, name_of
from .plain import encoding_note


def read_code(source: Source) -> Iterator[Text]:
    text, encoding = decode(source.read(), source.name)
    text = clean(text).rstrip()
    if not text.strip():
        raise source.no_text()
    language = language_of(source.name)
    sections = sections_of(text, language)
    metadata = {"language": language.suffixes[0], **encoding_note(encoding)}
    yield Text(source.name, "", text, sections, language.media_type, metadata)


_LEADING = re.compile(r"\s*(?:@|#|//|/\*|\*|--|;|%)")
_MAX_LINE = 1000  # characters of a line that are looked at: definitions stand at its beginning


@dataclass
class _Open:
    name: str
    indent: int
    container: bool


def sections_of(text: str, language: Language) -> tuple[Section, ...]:
    """Sections by definitions at the left margin and by the members of classes. Comments, decorators and
    annotations right above a definition belong to it."""
    starts: list[tuple[int, tuple[str, ...]]] = [(0, ())]
    path: list[_Open] = []
    for line, leading in _code_lines(text, language):
        stripped = line.lstrip()
        indent = len(line) - len(stripped)
        while path and not path[-1].container and indent <= path[-1].indent:
            path.pop()
        found = language.definition.match(stripped)
        if found is None:
            if language.closed and not indent and starts[-1][1] and not language.closed.match(stripped):
                path.clear()
                starts.append((leading, ()))  # statements behind a definition are not its
            continue
        while path and indent <= path[-1].indent:
            path.pop()
        if (indent and not path) or (path and not path[-1].container):
            continue  # inside a function
        container = language.container is not None and language.container.match(stripped) is not None
        path.append(_Open(name_of(found).strip(" \"'"), indent, container))
        starts.append((leading, tuple(part.name for part in path if part.name)))
    return _cut(text, starts)


def _code_lines(text: str, language: Language) -> Iterator[tuple[str, int]]:
    """(line, start of it or of the comments right above it) of lines outside text of several lines."""
    position = 0
    leading: int | None = None
    inside = ""
    for full in text.split("\n"):
        line = full[:_MAX_LINE]
        was_inside, inside = inside, _string_after(full, inside, language.strings)
        if was_inside:
            leading = None
        elif _LEADING.match(line):
            leading = position if leading is None else leading
            if line.lstrip().startswith("#include") or line.lstrip().startswith("#!"):
                leading = None
        elif line.strip():
            yield line, position if leading is None else leading
            leading = None
        else:
            leading = None
        position += len(full) + 1


def _string_after(line: str, inside: str, marks: tuple[str, ...]) -> str:
    """The mark of the text that is open behind this line."""
    position = 0
    if len(line) > 10 * _MAX_LINE:  # data, or a program that was packed
        return inside
    while True:
        if inside:
            end = line.find(inside, position)
            if end < 0:
                return inside
            position, inside = end + len(inside), ""
            continue
        found = [(place, mark) for mark in marks if (place := line.find(mark, position)) >= 0]
        if not found:
            return ""
        place, inside = min(found)
        position = place + len(inside)


def _cut(text: str, starts: list[tuple[int, tuple[str, ...]]]) -> tuple[Section, ...]:
    sections: list[Section] = []
    for number, (start, heading) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else len(text)
        piece = text[start:end]
        if piece.strip():
            begin = start + len(piece) - len(piece.lstrip("\n"))
            sections.append(Section(begin, start + len(piece.rstrip()), heading, None, unbroken=True))
    return tuple(sections)
