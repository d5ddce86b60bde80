"""Citations are checked: what an answer says must stand in the passage that it names, at a place.

A claim is a sentence of the answer. It is supported by a place (one to three sentences of a passage) that
shares enough of its words, those that the question did not bring counting most; each number of the claim
must stand in the passage as it is. A citation whose number no passage has, or whose passage does not say the
claim, is removed; a claim that names no source gets one where a passage does say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .features.terms import fold, term_of
from .types import Passage

MAX_CLAIMS = 200
_MAX_SENTENCES = 2000

_MARK = re.compile(
    r"[\[【(](?:documents?|doc\.?|passages?|sources?)?\s*#?(\d{1,4}(?:\s*(?:,|;|and|&|-|–)\s*#?\d{1,4}){0,19})[\]】)]",
    re.I,
)
_SQUARE = re.compile(r"[\[【]")
_RANGE = re.compile(r"(\d{1,4})(?:\s*[-–]\s*(\d{1,4}))?")
_WORD = re.compile(r"[^\W_]+(?:['’ʼ][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’ʼ]s?$")
_INSIDE = re.compile(r"[\w,;&)'’-]\s*[\"“'‘(]?$")
_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$|[A-Z])|\n+")
_ABBREVIATION = re.compile(
    r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Inc|Ltd|Co|Mt|Ft|e\.g|i\.e|cf|approx))\.$"
    r"|^[ \t]*\d{1,3}\.$",  # of a list
    re.MULTILINE,
)
_ENUMERATED = re.compile(r"^\s*(?:\d{1,3}[.)]|[-*•])\s+")
_COMMON_WORDS = """
a an the of in on at by for to and or is are was were be been being with from as that this these those it its
he she they his her their him them who whom whose which what when where how why did do does has have had will
would can could may might shall should not no nor than then so such also both same each other into about there
here i you we me my your our us if but because while during after before between said says document documents
passage according stated mentioned provided answer question yes based given
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_NEW, _SHARED, _LEAST, _NAMES = 0.6, 0.4, 0.5, 0.75
"""Of the words that the question did not bring, of all words, of all where the question brought all, and of
the names that the question did not bring (in the passage, not in the one place)."""


@dataclass(frozen=True)
class Citation:
    """A source of a claim. `number` counts the passages of the answer from 1; `start` and `end` are
    characters of the document's extracted text, and `quote` is what stands there. `given` says whether the
    model named the source, or it was found for a claim without one.
    """

    number: int
    passage: Passage
    quote: str
    start: int
    end: int
    given: bool = True


@dataclass(frozen=True)
class Checked:
    """An answer whose citations were checked. `removed` says of each that was taken out why."""

    text: str
    citations: tuple[Citation, ...]
    removed: tuple[str, ...]
    claims: int
    supported: int
    """How many of the claims have a source."""


@dataclass(frozen=True)
class _Word:
    term: int
    start: int
    end: int
    weight: float
    is_number: bool
    is_name: bool
    """A capital letter that no sentence's beginning asks for."""


def words(text: str) -> list[_Word]:
    """The words that carry meaning, with their places; names and numbers weigh twice."""
    found: list[_Word] = []
    for match in _WORD.finditer(text):
        surface = _POSSESSIVE.sub("", match[0])
        folded = fold(surface)
        number = any(letter.isdigit() for letter in surface)
        if not folded or (folded in _COMMON and not number):
            continue
        capital = surface[0].isupper()
        weight = 2.0 if capital or number else 1.0
        name = capital and _INSIDE.search(text, max(0, match.start() - 4), match.start()) is not None
        found.append(_Word(term_of(folded), match.start(), match.end(), weight, number, name))
    return found


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence, without the spaces around it. The end of a line ends a sentence too (a
    heading, an item of a list), unless the line was only wrapped there.
    """
    start = 0
    paragraph = width = 0
    for match in _END.finditer(text):
        if match[0] == "." and _ABBREVIATION.search(text, max(0, match.start() - 12), match.end()):
            continue
        if match[0] == "\n":
            if match.start() >= paragraph:
                paragraph, width = _paragraph(text, match.start())
            if _is_wrapped(text, match.start(), width):
                continue
        yield from _trimmed(text, start, match.end())
        start = match.end()
    yield from _trimmed(text, start, len(text))


_NARROWEST, _LONG_LINE = 60, 30
"""Columns: no text is wrapped at fewer than so many, and a line shorter than that is an item or a heading."""
_STARTS_ANEW = re.compile(r"[ \t]*(?:[-*•–#>|+=]|\d{1,3}[.)]\s|[([]?[a-zA-Z][.)]\s|\n)")


def _paragraph(text: str, at: int) -> tuple[int, int]:
    """(end, longest line) of the paragraph whose first line ends at a place."""
    begin = text.rfind("\n", 0, at) + 1
    end = text.find("\n\n", at)
    end = len(text) if end < 0 else end
    return end, max(len(line.rstrip()) for line in text[begin:end].split("\n"))


def _is_wrapped(text: str, at: int, width: int) -> bool:
    """Whether the line that ends at a place goes on in the next one: its next word would not have fitted into
    the longest line, or it is a long one and goes on with a small letter.
    """
    begin = text.rfind("\n", 0, at) + 1
    line, after = text[begin:at].rstrip(), text[at + 1 : at + 1 + width]
    following = after.split(None, 1)
    if not following or _STARTS_ANEW.match(after) or line.lstrip().startswith(("#", "|", "=")):
        return False
    word = following[0]
    full = width >= _NARROWEST and len(line) + 1 + len(word) > width
    return full or (len(line) >= _LONG_LINE and word[0].islower())


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield start, end


def locate(claim: str, passage: Passage, question: str = "") -> tuple[int, int] | None:
    """The characters of the passage's text that say the claim; None where it does not."""
    found = _best_place(words(claim), {word.term for word in words(question)}, words(question), passage)
    return None if found is None else found[1:]


def _best_place(
    claim: Sequence[_Word], asked: set[int], question: Sequence[_Word], passage: Passage
) -> tuple[float, int, int] | None:
    """(share of the claim, start, end)"""
    wanted = list(claim) or list(question)  # "yes" says what the question does
    if not wanted:
        return None
    title = {word.term for word in words(f"{passage.title} {passage.heading}")}
    held = title | {word.term for word in words(passage.text)}
    if any(word.is_number and word.term not in held and word.term not in asked for word in claim):
        return None
    names = {word.term for word in claim if word.is_name} - asked
    if len(names & held) < _NAMES * len(names):
        return None
    weights: dict[int, float] = {}
    for word in wanted:
        weight = word.weight if word.term not in asked else word.weight / 2
        weights[word.term] = max(weight, weights.get(word.term, 0.0))
    fresh = {term for term in weights if term not in asked}
    best: tuple[float, int, int] | None = None
    for start, end, terms in _windows(passage.text):
        share = _share(weights, terms | title, None)
        enough = share >= (_SHARED if fresh else _LEAST) and (
            not fresh or _share(weights, terms | title, fresh) >= _NEW
        )
        # The title alone is no statement, and of places that say as much the shortest is meant.
        if enough and (terms & weights.keys()) and (best is None or share > best[0] + 1e-9):
            best = (share, start, end)
    return best


def _share(weights: Mapping[int, float], terms: set[int], only: set[int] | None) -> float:
    counted = {term: weight for term, weight in weights.items() if only is None or term in only}
    return sum(weight for term, weight in counted.items() if term in terms) / sum(counted.values())


def _windows(text: str) -> Iterator[tuple[int, int, set[int]]]:
    """Places of one, two and three sentences with their terms, the short ones first."""
    spans = list(sentences(text))[:_MAX_SENTENCES]
    terms = [{word.term for word in words(text[start:end])} for start, end in spans]
    for width in (1, 2, 3):
        for first in range(len(spans) - width + 1):
            together: set[int] = set().union(*terms[first : first + width])
            yield spans[first][0], spans[first + width - 1][1], together


# Answers ---------------------------------------------------------------------------------------------------


def check(text: str, passages: Sequence[Passage], question: str) -> Checked:
    """Check each citation of an answer; numbers count `passages` from 1."""
    asked_words = words(question)
    asked = {word.term for word in asked_words}
    citations: dict[tuple[int, int, int], Citation] = {}
    removed: list[str] = []
    parts: list[str] = []
    claims = supported = 0
    for lead, claim, numbers in _claims(text, len(passages)):
        sources: list[int] = []
        claim_words = words(_ENUMERATED.sub("", claim))
        counts = bool(claim_words) or (claims == 0 and bool(claim.strip(" .,:;-*#\t\n")))
        claims += counts
        for number, clause in numbers if counts else ():
            if not 1 <= number <= len(passages):
                removed.append(f"[{number}]: there is no document {number}")
                continue
            passage = passages[number - 1]
            place = _best_place(claim_words, asked, asked_words, passage)
            if place is None and clause != claim:
                place = _best_place(words(_ENUMERATED.sub("", clause)), asked, asked_words, passage)
            if place is None:
                removed.append(f"[{number}]: document {number} does not say: {clause.strip()[:200]}")
            elif number not in sources:
                sources.append(number)
                _add(citations, number, passage, place, given=True)
        if counts and not sources and claims <= MAX_CLAIMS:
            found = _search(claim_words, asked, asked_words, passages)
            if found is not None:
                sources.append(found[0])
                _add(citations, found[0], passages[found[0] - 1], found[1], given=False)
        supported += bool(sources) and _numbers_stand(claim_words, asked, [passages[n - 1] for n in sources])
        parts.append(lead + _with_marks(claim, sources))
    return Checked("".join(parts).strip(), tuple(citations.values()), tuple(removed), claims, supported)


def _numbers_stand(claim: Sequence[_Word], asked: set[int], sources: Sequence[Passage]) -> bool:
    """Whether a claim whose parts have sources brings no number that none of them has."""
    numbers = {word.term for word in claim if word.is_number} - asked
    held = {
        word.term for source in sources for word in words(f"{source.title} {source.heading} {source.text}")
    }
    return numbers <= held


def _search(
    claim: Sequence[_Word], asked: set[int], question: Sequence[_Word], passages: Sequence[Passage]
) -> tuple[int, tuple[float, int, int]] | None:
    """The passage that says most of a claim. A claim without words of its own ("yes") gets none."""
    if not claim:
        return None
    found = [
        (number, place)
        for number, passage in enumerate(passages, 1)
        if (place := _best_place(claim, asked, question, passage)) is not None
    ]
    return max(found, key=lambda one: (one[1][0], -one[0])) if found else None


def _add(
    citations: dict[tuple[int, int, int], Citation],
    number: int,
    passage: Passage,
    place: tuple[float, int, int],
    *,
    given: bool,
) -> None:
    _, start, end = place
    quote = passage.text[start:end]
    made = Citation(number, passage, quote, passage.start + start, passage.start + end, given)
    citations.setdefault((number, start, end), made)


def _claims(text: str, count: int) -> Iterator[tuple[str, str, list[tuple[int, str]]]]:
    """(what stands before, a sentence without its marks, [(number of a mark, the part before the mark)]).
    Marks behind a full stop belong to the sentence before it; one inside of it may be of its own part alone.
    """
    plain, marks = _without_marks(text, count)
    spans = list(sentences(plain))
    at = 0
    for place, (start, end) in enumerate(spans):
        following = spans[place + 1][0] if place + 1 < len(spans) else len(plain) + 1
        numbers: list[tuple[int, str]] = []
        part = start
        while (
            marks and (marks[0][0] < following) and (marks[0][0] <= end or "\n" not in plain[end:following])
        ):
            where, these = marks.pop(0)
            clause = plain[part:where] if where < end else plain[start:end]
            part = max(part, min(where, end))
            numbers += [(number, clause if words(clause) else plain[start:end]) for number in these]
        yield plain[at:start], plain[start:end], numbers
        at = end


def _without_marks(text: str, count: int) -> tuple[str, list[tuple[int, list[int]]]]:
    """(text without marks, [(where each stood, its numbers)]). Round brackets with a number are a mark only
    where the word "document" or so stands in them.
    """
    pieces: list[str] = []
    marks: list[tuple[int, list[int]]] = []
    at = size = 0
    for match in _MARK.finditer(text):
        if not _SQUARE.match(match[0]) and not re.match(r"\((?:doc|pass|sour)", match[0], re.I):
            continue
        piece = text[at : match.start()]
        stripped = (
            piece.rstrip(" ")
            if text[match.end() : match.end() + 1] in (".", ",", ";", "!", "?", "", " ", "\n", "[")
            else piece
        )
        pieces.append(stripped)
        size += len(stripped)
        marks.append((size, _numbers(match[1], count)))
        at = match.end()
    pieces.append(text[at:])
    return "".join(pieces), marks


def _numbers(text: str, count: int) -> list[int]:
    found: list[int] = []
    for match in _RANGE.finditer(text):
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1) if first <= last <= first + count else (first, last)
    return found[:20]


def _with_marks(claim: str, sources: Sequence[int]) -> str:
    if not sources:
        return claim
    marks = "".join(f"[{number}]" for number in sources)
    end = re.search(r"[.!?。！？]+[\"'”’)\]]*$", claim)
    if end is None:
        return f"{claim} {marks}"
    return f"{claim[: end.start()]} {marks}{claim[end.start() :]}"
