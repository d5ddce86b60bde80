"""Words as retrieval sees them: accents folded, stemmed, hashed.

A term is the stem of a folded word (Porter2, the Snowball project's "english"; of "Mexican" that of its
place, demonyms.py), hashed to 64 bits with BLAKE2b, which is the same on every machine and in every process.
Scripts without spaces between words (Chinese, Japanese, Thai …) give pairs of neighbouring characters, the
usual stand-in for words there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from .demonyms import OTHER_WORDS, PLACE_OF

MAX_WORD = 64
"""Characters of a word that count: a 10,000-character "word" is data that slipped in, not a word."""

_WORD = re.compile(r"[^\W_]+(?:['’ʼ][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’ʼ]s?$")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_OTHER_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ß": "ss", "æ": "ae", "œ": "oe", "ı": "i"}
)

_MAX_CACHED = 200_000
_term_hashes: dict[str, int] = {}
_stemmer: Any = None


def fold(text: str) -> str:
    """Lower case without accents: "Håkan Šimić" and "hakan simic" are one."""
    lowered = text.lower()
    if lowered.isascii():
        return lowered
    parts = unicodedata.normalize("NFKD", lowered)
    return "".join(c for c in parts if not unicodedata.combining(c)).translate(_OTHER_LETTERS)


def words_of(text: str) -> list[str]:
    """Folded words in order, possessives removed; pairs of characters where a script has no spaces."""
    words: list[str] = []
    for match in _WORD.finditer(fold(text)):
        word = match.group()
        if word.isalnum() and word.isascii():  # the usual case
            words.append(word if len(word) <= MAX_WORD else word[:MAX_WORD])
            continue
        if not word.isascii() and _UNSPACED.search(word):
            words += _pairs(word)
            continue
        if "'" in word or "’" in word or "ʼ" in word:
            word = _POSSESSIVE.sub("", word)
            for mark in "'’ʼ":
                word = word.replace(mark, "")
        if word:
            words.append(word[:MAX_WORD])
    return words


def _pairs(word: str) -> list[str]:
    word = word[: MAX_WORD * 64]
    return [word] if len(word) == 1 else [word[i : i + 2] for i in range(len(word) - 1)]


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def term_of(word: str) -> int:
    """The hash of a folded word's stem."""
    found = _term_hashes.get(word)
    if found is None:
        found = hash_of(stem(word if word in OTHER_WORDS else PLACE_OF.get(word, word)))
        if len(_term_hashes) >= _MAX_CACHED:
            _term_hashes.clear()
        _term_hashes[word] = found
    return found


@cache
def _place_hashes() -> dict[int, int]:
    return {hash_of(word): hash_of(place) for word, place in PLACE_OF.items()}


def entity_hash(name: int) -> int:
    """Of the hash of a folded name that of the entity that it names: of "mexican" that of "mexico". Names of
    documents stay what they are; a passage that mentions either names the same entity."""
    return _place_hashes().get(name, name)


def stem(word: str) -> str:
    global _stemmer
    if _stemmer is None:
        import Stemmer

        _stemmer = Stemmer.Stemmer("english", 0)  # no cache of its own: ours keeps the hash
    return _stemmer.stemWord(word)


def counted(words: Iterable[str]) -> dict[int, int]:
    """How often each term stands in a text."""
    counts: dict[int, int] = {}
    for word in words:
        term = _term_hashes.get(word) or term_of(word)
        counts[term] = counts.get(term, 0) + 1
    return counts


def term_arrays(title: str, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms [n] uint64 ascending; how often each stands in the title and in the text, [n] uint16."""
    in_title, in_text = counted(words_of(title)), counted(words_of(text))
    terms = sorted(in_title.keys() | in_text.keys())
    most = np.iinfo(np.uint16).max
    return (
        np.array(terms, np.uint64),
        np.array([min(in_title.get(t, 0), most) for t in terms], np.uint16),
        np.array([min(in_text.get(t, 0), most) for t in terms], np.uint16),
    )
