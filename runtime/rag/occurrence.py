"""Whether a name stands in a text, as it is or nearly."""

from __future__ import annotations

import re
from collections import defaultdict

from .features.terms import fold, stem

_WORD = re.compile(r"[^\W_]+")
_SMALL_WORDS = "a an the of in on at by for to and or is was as with from his her its their"
_SMALL = frozenset(_SMALL_WORDS.split())
_NEARLY = 0.75
_MAX_WORDS = 20


class Words:
    """The folded, stemmed words of a text, with their places."""

    def __init__(self, text: str) -> None:
        self.list = _words(text)
        self.places: dict[str, list[int]] = defaultdict(list)
        for place, word in enumerate(self.list):
            self.places[word].append(place)


def occurs(name: str, words: Words) -> bool:
    """Whether a name's words stand in the text one behind the other; or, nearly: its numbers do, and of its
    other words three quarters, all within a sentence's length of each other.
    """
    wanted = [word for word in _words(name) if word not in _SMALL] or _words(name)
    if not wanted or len(wanted) > _MAX_WORDS:
        return False
    if any(word.isdigit() and word not in words.places for word in wanted):
        return False
    held = [word for word in wanted if word in words.places]
    if len(held) < _NEARLY * len(wanted) or len(held) < min(2, len(wanted)):
        return False
    rarest = min(held, key=lambda word: len(words.places[word]))
    reach = 4 * len(wanted) + 20
    return any(_around(held, place, reach, words) for place in words.places[rarest])


def count_of(name: str, words: Words) -> float:
    """How surely a name stands in the text: the share of its words that do."""
    wanted = [word for word in _words(name) if word not in _SMALL] or _words(name)
    return sum(word in words.places for word in wanted) / len(wanted) if wanted else 0.0


def _around(held: list[str], place: int, reach: int, words: Words) -> bool:
    near = set(words.list[max(0, place - reach) : place + reach + 1])
    return all(word in near for word in held)


def _words(text: str) -> list[str]:
    return [stem(word) for word in _WORD.findall(fold(text))]
