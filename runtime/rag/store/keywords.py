"""What a person types into a keyword search, taken apart: words, and "phrases" in double quotes.

Nothing in it is an operator: only runs of letters and digits reach a database, each as a string of its own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

MAX_CHARACTERS = 10_000
"""Of a query that is looked at: longer ones are a pasted document, of which the beginning says what it is."""
MAX_UNITS = 128
"""Different words and phrases of a query that are searched for."""

_MARKS = re.compile("[\u0300-\u036f]")
# Letters and digits, with the accents that no letter of Unicode's has in itself.
_WORD = re.compile("[^\\W_](?:[^\\W_]|[\u0300-\u036f])*")


@dataclass(frozen=True)
class Keywords:
    """`phrases` must each stand in a passage; `words` only rank it, unless there are no phrases: then at
    least one must stand there.
    """

    words: tuple[str, ...]
    phrases: tuple[tuple[str, ...], ...]


def parse_keywords(query: str) -> Keywords:
    """The words and phrases of a query, each once. A quotation mark without its partner is ignored."""
    words: dict[str, None] = {}
    phrases: dict[tuple[str, ...], None] = {}
    parts = query[:MAX_CHARACTERS].split('"')
    for number, part in enumerate(parts):
        found = tuple(words_of(part))
        quoted = number % 2 == 1 and number + 1 < len(parts)
        if quoted and len(found) > 1:
            phrases.setdefault(found[:MAX_UNITS])
        elif quoted and found:
            phrases.setdefault(found)
        else:
            words.update(dict.fromkeys(found))
    kept = tuple(phrases)[:MAX_UNITS]
    return Keywords(tuple(words)[: MAX_UNITS - len(kept)], kept)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits."""
    return _WORD.findall(unicodedata.normalize("NFC", text))


def fold(text: str) -> str:
    """Small letters without accents: words that differ only in them become one."""
    # NFD takes é apart into e and its accent, and Korean syllables into letters, which NFC joins again.
    bare = _MARKS.sub("", unicodedata.normalize("NFD", text.lower()))
    return unicodedata.normalize("NFC", bare)
