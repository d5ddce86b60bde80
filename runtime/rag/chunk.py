"""Chunking: a document's text cut into pieces that an embedder can take whole.

Cuts fall between sections where they can, else between paragraphs, sentences, words, and only then inside a
word. What a piece says is exactly what stands at its place in the document, so that a citation can be
checked. The same text gives the same pieces, in time that grows with its length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from ...ir.errors import InputError
from .types import Section, Text

SEPARATOR = " › "
_CHARACTERS_A_TOKEN = 16
"""A piece has at most this many times `limit` characters as well: to some tokenizers a word of 10,000
characters is one token, the unknown one."""
_MIN_SENTENCE = 40  # characters: what is shorter stays with the next, which saves calls of the counter
_MIN_TOKENS = 8
_SMALL = 1 / 3  # of a full piece: what is joined with a neighbour under another heading
_TINY = 1 / 8
_MAX_HEADER = 120  # characters of a table's header row in a heading

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(
    r"[.!?…][\"'”’»)\]]{0,5}\s+"
    r"|[。！？｡](?![。！？｡])[\"'”’」』）】]{0,5}\s*"
    r"|\n(?=[ \t]*(?:[-*•‣·]|\d{1,3}[.)])[ \t])"
)
_CLAUSE_END = re.compile(r"[;:,、，；：)][ \n]|[、，；：]")
_ABBREVIATIONS = frozenset(
    {
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "jr",
        "sr",
        "gen",
        "col",
        "lt",
        "capt",
        "rev",
        "hon",
        "no",
        "vol",
        "vs",
    }
    | {
        "etc",
        "al",
        "approx",
        "fig",
        "eq",
        "sec",
        "ch",
        "pp",
        "ed",
        "inc",
        "ltd",
        "co",
        "corp",
        "bros",
        "mt",
        "ft",
    }
    | {"jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec", "ca", "cf", "sgt"}
)


@dataclass(frozen=True)
class Piece:
    """A chunk before it has features: `text` is what stands at `start` to `end` of the document's text."""

    ordinal: int
    title: str
    heading: str
    text: str
    start: int
    end: int
    page: int | None
    tokens: int


def chunk_text(text: Text, counter: Callable[[str], int], limit: int, overlap: int = 0) -> list[Piece]:
    """The pieces of a document, in order, each of at most `limit` tokens by `counter`.

    A document within the limit is one piece. Small sections are joined with their neighbours. With `overlap`,
    a piece begins with up to that many tokens of the one before it under the same heading; without, the
    pieces hold every character of the sections but white space exactly once.
    """
    beside = counter("")  # special tokens, which do not add up
    if limit - beside < _MIN_TOKENS:
        raise InputError(
            f"chunks of {limit} tokens are too small to hold text", remedy=f"at least {beside + _MIN_TOKENS}"
        )
    if not 0 <= overlap <= limit // 2:
        raise InputError(f"an overlap of {overlap} tokens", remedy=f"0 to {limit // 2} fit chunks of {limit}")
    return _Chunker(text, counter, limit, beside, overlap).pieces()


@dataclass(frozen=True)
class _Atom:
    """What is cut only if it must be: a sentence, a row, a whole table. `boundary` is how good a cut before
    it is: 0 inside a sentence … 3 between sections; `alone` forbids to join it with what stands before."""

    start: int
    end: int
    tokens: int
    section: int
    boundary: int
    alone: bool = False


Range = tuple[int, int]


class _Chunker:
    def __init__(
        self, text: Text, counter: Callable[[str], int], limit: int, beside: int, overlap: int
    ) -> None:
        self._document = text
        self._text = text.text
        self._counter = counter
        self._limit = limit
        self._beside = beside
        self._budget = limit - beside
        self._overlap = overlap
        self._full = 1 - overlap / self._budget  # of a piece before it gets its overlap
        self._max_characters = _CHARACTERS_A_TOKEN * limit
        self._sections = _in_order(text)
        self._headers: dict[int, tuple[str, int]] = {}
        """Section → header row, and its start, of a table that had to be cut."""
        self._atoms: list[_Atom] = []
        self._tokens = [0]  # of all atoms before
        self._characters = [0]

    def pieces(self) -> list[Piece]:
        if not self._sections:
            return []
        whole = self._whole()
        if whole is not None:
            return [whole]
        for number in range(len(self._sections)):
            for atom in self._atoms_of(number):
                self._atoms.append(atom)
                self._tokens.append(self._tokens[-1] + atom.tokens)
                self._characters.append(self._characters[-1] + atom.end - atom.start)
        ranges = self._merged(part for run in self._runs() for part in self._packed(run))
        if self._overlap:
            ranges = [self._extended(part) for part in ranges]
        spans = [span for part in ranges for span in self._verified(part)]
        return [self._piece(ordinal, *span) for ordinal, span in enumerate(spans)]

    def _whole(self) -> Piece | None:
        """The document as one piece, where it is within the limit and its sections follow one another."""
        start, end = self._sections[0].start, self._sections[-1].end
        if end - start > self._max_characters or any(
            self._text[one.end : other.start].strip() for one, other in pairwise(self._sections)
        ):
            return None
        start, end = self._trimmed(start, end)
        tokens = self._counter(self._text[start:end])
        return (
            self._piece(0, start, end, tokens, 0, len(self._sections) - 1) if tokens <= self._limit else None
        )

    # Atoms.

    def _cost(self, start: int, end: int) -> int:
        return max(0, self._counter(self._text[start:end]) - self._beside)

    def _fits(self, start: int, end: int, tokens: int) -> bool:
        return tokens <= self._budget and end - start <= self._max_characters

    def _trimmed(self, start: int, end: int) -> tuple[int, int]:
        """Without white space at both ends. Looks no further than it must, so that many calls stay linear."""
        while start < end and self._text[start].isspace():
            start += 1
        while end > start and self._text[end - 1].isspace():
            end -= 1
        return start, end

    def _atoms_of(self, number: int) -> Iterator[_Atom]:
        section = self._sections[number]
        boundary, alone = 3, False
        if number:
            before = self._sections[number - 1]
            alone = bool(self._text[before.end : section.start].strip())
            if before.heading == section.heading:
                boundary = 1 if before.page != section.page else 2
        for start, end, inner in self._parts(section, number):
            start, end = self._trimmed(start, end)
            if start == end:  # an empty line of code
                boundary = max(boundary, 2)
                continue
            for begin, stop, tokens in self._fitting(start, end):
                yield _Atom(begin, stop, tokens, number, boundary, alone)
                boundary, alone = 0, False
            boundary = inner

    def _parts(self, section: Section, number: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, how good a cut behind it is) of paragraphs' sentences, or of a table's rows."""
        if section.unbroken:
            start, end = self._trimmed(section.start, section.end)
            if end - start <= self._max_characters and self._cost(start, end) <= self._budget:
                yield start, end, 2
                return
            header = self._text[start : start + 10 * _MAX_HEADER].split("\n", 1)[0]
            if " | " in header:
                self._headers[number] = " ".join(header.split())[:_MAX_HEADER], start
            yield from self._between(section.start, section.end, re.compile("\n"), 1)
            return
        for start, end, _ in self._between(section.start, section.end, _PARAGRAPH_END, 2):
            last: tuple[int, int] | None = None
            for begin, stop in self._sentences(start, end):
                if last is not None:
                    yield *last, 1
                last = begin, stop
            if last is not None:
                yield *last, 2

    def _between(
        self, start: int, end: int, mark: re.Pattern[str], boundary: int
    ) -> Iterator[tuple[int, int, int]]:
        for found in mark.finditer(self._text, start, end):
            yield start, found.start(), boundary
            start = found.end()
        yield start, end, boundary

    def _sentences(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        shortest = min(_MIN_SENTENCE, self._limit)
        for found in _SENTENCE_END.finditer(self._text, start, end):
            if shortest <= found.end() - start < end - start and self._ends_sentence(found, start):
                yield start, found.end()
                start = found.end()
        yield start, end

    def _ends_sentence(self, found: re.Match[str], start: int) -> bool:
        mark = found[0][0]
        if mark not in ".!?…":
            return True
        if self._text[found.end()].islower():
            return False
        if mark != ".":
            return True
        words = self._text[max(start, found.start() - 20) : found.start()].split()
        word = words[-1].lstrip("([\"'“‘") if words else ""
        return not (
            word.casefold() in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word.isupper())
        )

    def _fitting(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, tokens) of the sentence, or of the parts that it must be cut into."""
        size = 2 * self._limit  # characters: seldom more than fits, so that little is counted twice
        if end - start <= 2 * size:
            tokens = self._cost(start, end)
            if self._fits(start, end, tokens):
                yield start, end, tokens
                return
            size = (end - start + 1) // 2
        while start < end:
            stop = end if end - start <= size else self._cut(start, start + size)
            begin, last = self._trimmed(start, stop)
            if begin < last:
                yield from self._halved(begin, last)
            start = stop

    def _cut(self, start: int, stop: int) -> int:
        """The best place to cut in the second half of the characters: behind a line, a clause, a word."""
        middle = (start + stop) // 2
        line = self._text.rfind("\n", middle, stop)
        if line >= 0:
            return line + 1
        for found in _CLAUSE_END.finditer(self._text, middle, stop):
            line = found.end()
        if line >= 0:
            return line
        for place in range(stop, middle, -1):
            if self._text[place - 1].isspace():
                return place
        return self._hard(start, stop)

    def _hard(self, start: int, stop: int) -> int:
        """A cut inside of a word, but not between a letter and its accents or inside of a joined emoji."""
        for place in range(stop, max(start + 1, stop - 16), -1):
            if place >= len(self._text):
                return place
            behind, before = self._text[place], self._text[place - 1]
            if not (unicodedata.category(behind)[0] == "M" or behind == "\u200d" or before == "\u200d"):
                return place
        return stop

    def _halved(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        waiting = [(start, end)]
        while waiting:
            start, end = self._trimmed(*waiting.pop())
            tokens = self._cost(start, end)
            if self._fits(start, end, tokens) or end - start <= 1:
                if start < end:
                    yield start, end, tokens
                continue
            middle = self._cut(start, start + (end - start + 1) // 2)
            waiting += [(middle, end), (start, middle)]

    # Ranges of atoms.

    def _size(self, start: int, end: int) -> float:
        """Of atoms, as a share of a full piece."""
        return max(
            (self._tokens[end] - self._tokens[start]) / self._budget,
            (self._characters[end] - self._characters[start]) / self._max_characters,
        )

    def _runs(self) -> Iterator[Range]:
        """Atoms that stand under one heading, with nothing else between."""
        start = 0
        for number in range(1, len(self._atoms)):
            if self._atoms[number].boundary == 3 or self._atoms[number].alone:
                yield start, number
                start = number
        if self._atoms:
            yield start, len(self._atoms)

    def _packed(self, run: Range) -> Iterator[Range]:
        """A run in pieces of about the same size, cut where a cut is best."""
        start, end = run
        while start < end:
            left = self._size(start, end)
            if left <= self._full:
                yield start, end
                return
            target = left / -(-left // self._full)
            best, best_score = start + 1, float("-inf")
            for place in range(start + 1, end):
                size = self._size(start, place)
                if size > self._full:
                    break
                score = 0.2 * self._atoms[place].boundary - abs(size - target) / target
                if score > best_score and (size * 2 >= target or best == start + 1):
                    best, best_score = place, score
            yield start, best
            start = best

    def _merged(self, ranges: Iterable[Range]) -> list[Range]:
        """Small neighbours joined: those under one heading, and small ones under headings side by side."""
        merged: list[tuple[Range, tuple[str, ...]]] = []
        for part in ranges:
            heading = self._sections[self._atoms[part[0]].section].heading
            if merged and self._belong(*merged[-1], part, heading):
                (start, _), above = merged.pop()
                part, heading = (start, part[1]), _common(above, heading)
            merged.append((part, heading))
        return [part for part, _ in merged]

    def _belong(self, one: Range, above: tuple[str, ...], other: Range, below: tuple[str, ...]) -> bool:
        if self._atoms[other[0]].alone or self._size(one[0], other[1]) > self._full:
            return False
        if above == below:
            return True
        smaller = min(self._size(*one), self._size(*other))
        common = len(_common(above, below))
        return smaller < _TINY or (smaller < _SMALL and common >= min(len(above), len(below)) - 1)

    def _extended(self, part: Range) -> Range:
        """With atoms of the piece before in front, as long as they are within the overlap."""
        start, end = part
        while start and self._atoms[start].boundary < 3 and not self._atoms[start].alone:
            if (
                self._tokens[part[0]] - self._tokens[start - 1] > self._overlap
                or self._size(start - 1, end) > 1
            ):
                break
            start -= 1
        return start, end

    # Pieces.

    def _verified(self, part: Range) -> Iterator[tuple[int, int, int, int, int]]:
        """(start, end, tokens, first and last section): the range, or parts of it where tokens do not add
        up."""
        waiting = [part]
        while waiting:
            first, behind = waiting.pop()
            start, end = self._atoms[first].start, self._atoms[behind - 1].end
            sections = self._atoms[first].section, self._atoms[behind - 1].section
            tokens = self._counter(self._text[start:end])
            if tokens <= self._limit:
                yield start, end, tokens, *sections
            elif behind - first > 1:
                middle = (first + behind) // 2
                waiting += [(middle, behind), (first, middle)]
            else:
                for begin, stop, counted in self._halved(start, end):
                    yield begin, stop, counted + self._beside, *sections

    def _piece(self, ordinal: int, start: int, end: int, tokens: int, first: int, last: int) -> Piece:
        heading = self._sections[first].heading
        for section in self._sections[first + 1 : last + 1]:
            heading = _common(heading, section.heading)
        header, table = self._headers.get(first, ("", 0))
        if header and first == last and start > table:
            heading = (*heading, header)  # rows further down do not say what their columns are
        page = self._sections[first].page
        said = self._text[start:end]
        return Piece(ordinal, self._document.title, SEPARATOR.join(heading), said, start, end, page, tokens)


def _in_order(text: Text) -> list[Section]:
    """The sections that hold anything, in the text's order, none reaching into the next."""
    found: list[Section] = []
    position = 0
    for section in sorted(text.sections, key=lambda section: (section.start, section.end)):
        start, end = max(position, section.start), min(section.end, len(text.text))
        if start < end and text.text[start:end].strip():
            found.append(Section(start, end, section.heading, section.page, section.unbroken))
            position = end
    return found


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """The headings above both."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
