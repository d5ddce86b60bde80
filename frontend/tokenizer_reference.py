"""A slow, plain encoder of GGUF tokenizers, written from llama.cpp's rules alone.

It shares no code with the tokenizers library, so that ids which agree between the two were not made wrong by
the same mistake. Used at compile time on the hard strings, and by tests.
"""

from __future__ import annotations

import heapq
import math
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import Final

import numpy as np
import regex

from .tokenizer_rules import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, GGUFTokenizer

_WHITE: Final = frozenset(map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028,
                                    0x2029, 0x202F, 0x205F, 0x3000]))  # fmt: skip
"""Unicode's property White_Space."""


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in shown}
    hidden = (byte for byte in range(256) if byte not in table)
    table.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return [table[byte] for byte in range(256)]


class ReferenceEncoder:
    """Ids of a text as llama.cpp gives them with `parse_special`."""

    def __init__(self, tokenizer: GGUFTokenizer) -> None:
        self._t = tokenizer
        self._id_of = {token: i for i, token in enumerate(tokenizer.tokens)}
        self._alphabet = byte_alphabet()

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self._t.merges)))}

    @cached_property
    def _splits(self) -> list[regex.Pattern[str]]:
        return [regex.compile(one) for one in self._t.splits]

    @cached_property
    def _special(self) -> list[tuple[str, int]]:
        return [(self._t.tokens[i], i) for i in self._t.special_ids()]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; with `add_special`, the begin and end tokens that the file asks for."""
        t = self._t
        ids: list[int] = [t.bos] if add_special and t.add_bos and t.bos is not None else []
        after_special = True
        for piece in self._fragments(text):
            if isinstance(piece, int):
                ids.append(piece)
                after_special = True
                continue
            if t.kind == "bpe":
                ids += self._bpe(piece)
            elif t.kind == "spm":
                ids += self._spm(" " + piece if t.space_prefix and after_special else piece, self._cost)
            elif t.kind == "ranked":
                ids += self._ranked(piece)
            elif t.kind == "unigram":
                ids += self._unigram(piece)
            else:
                ids += self._wordpiece(piece)
            after_special = False
        if add_special and t.add_eos and t.eos is not None:
            ids.append(t.eos)
        return ids

    def _fragments(self, text: str) -> list[str | int]:
        """Text and special ids in turn; each special token is searched in what the longer ones left."""
        parts: list[str | int] = [text] if text else []
        for token, token_id in self._special:
            if token not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for i, rest in enumerate(part.split(token)):
                    cut += [token_id] if i else []
                    cut += [rest] if rest else []
            parts = cut
        return parts

    def _bpe(self, text: str) -> list[int]:
        pieces = [text]
        for pattern in self._splits:
            pieces = [part for piece in pieces for part in _cut(pattern, piece)]
        ids: list[int] = []
        for piece in pieces:
            word = "".join(self._alphabet[byte] for byte in piece.encode())
            if self._t.whole_pieces and word in self._id_of:
                ids.append(self._id_of[word])
                continue
            for symbol in _merge(list(word), self._rank):
                if symbol in self._id_of:
                    ids.append(self._id_of[symbol])
                else:
                    ids += [self._id_of[one] for one in symbol if one in self._id_of]
        return ids

    def _rank(self, left: str, right: str) -> float | None:
        return self._ranks.get((left, right))

    def _ranked(self, text: str) -> list[int]:
        ids: list[int] = []
        for line in _cut(self._splits[0], text):
            if line[0] == "\n" and line in self._id_of:
                ids.append(self._id_of[line])
            else:
                ids += self._spm(line, self._rank)
        return ids

    def _spm(self, text: str, cost: Callable[[str, str], float | None]) -> list[int]:
        ids: list[int] = []
        for symbol in _merge(list(text.replace(" ", "\u2581")), cost):
            if symbol in self._id_of:
                ids.append(self._id_of[symbol])
                continue
            for byte in symbol.encode():
                found = self._id_of.get(f"<0x{byte:02X}>", self._t.unk)
                ids += [found] if found is not None else []
        return ids

    def _cost(self, left: str, right: str) -> float | None:
        found = self._id_of.get(left + right)
        if found is None or self._t.types[found] in (CONTROL, UNKNOWN):
            return None
        return -float(self._t.scores[found])

    def _unigram(self, text: str) -> list[int]:
        """The cut with the best sum of scores; a character that is no token alone may be unknown, and unknown
        ones in a row are one.
        """
        t, text = self._t, self._spaced(text)
        best: list[tuple[float, int, int]] = [(0.0, -1, 0), *[(-math.inf, -1, 0)] * len(text)]
        for start in range(len(text)):
            total, alone = best[start][0], False
            for end in range(start + 1, min(len(text), start + self._longest) + 1):
                found = self._pieces.get(text[start:end])
                if found is None:
                    continue
                alone |= end == start + 1
                score = total + (0.0 if t.types[found] == USER_DEFINED else float(t.scores[found]))
                if score > best[end][0]:
                    best[end] = (score, found, start)
            if not alone and t.unk is not None and total + self._unknown > best[start + 1][0]:
                best[start + 1] = (total + self._unknown, t.unk, start)
        ids: list[int] = []
        end = len(text)
        while end > 0:
            _, found, end = best[end]
            if not (ids and ids[-1] == found == t.unk):
                ids.append(found)
        return ids[::-1]

    def _spaced(self, text: str) -> str:
        """The text that "unigram" cuts: rewritten, with its spaces as tokens have them."""
        t = self._t
        text = text if t.charsmap is None else t.charsmap.rewritten(text)
        if t.merge_spaces:
            text = "".join(f" {word}" for word in text.split(" ") if word)
        elif t.space_prefix and text.strip(" "):
            text = f" {text}"
        return text.replace(" ", "\u2581")

    @cached_property
    def _pieces(self) -> dict[str, int]:
        types = (NORMAL, USER_DEFINED, UNUSED)
        return {token: i for i, token in enumerate(self._t.tokens) if token and self._t.types[i] in types}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces), default=0)

    @cached_property
    def _unknown(self) -> float:
        """The score of a character that is unknown: 10 below the lowest, in float32 as llama.cpp has it."""
        lowest = self._t.scores[self._t.types == NORMAL].min()
        return float(np.float32(lowest) - np.float32(10))

    def _wordpiece(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in _basic_words(text, self._t.lowercase, self._t.strip_accents):
            spelled = "\u2581" + word
            start, found = 0, list[int]()
            while start < len(spelled):
                for end in range(len(spelled), start, -1):
                    if spelled[start:end] in self._id_of:
                        found.append(self._id_of[spelled[start:end]])
                        start = end
                        break
                else:
                    found = [self._t.unk] if self._t.unk is not None else []
                    break
            ids += found
        return ids


def _cut(pattern: regex.Pattern[str], text: str) -> list[str]:
    """Matches and what lies between them, in order."""
    parts: list[str] = []
    position = 0
    for match in pattern.finditer(text):
        if match.end() == match.start():
            continue
        parts += [text[position : match.start()]] if match.start() > position else []
        parts.append(match.group())
        position = match.end()
    return parts + ([text[position:]] if position < len(text) else [])


def _merge(symbols: list[str], cost: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours, cheapest first and leftmost among equals, until no pair has a cost."""
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            price = cost(symbols[left], symbols[right])
            if price is not None:
                heapq.heappush(queue, (price, left, right, symbols[left], symbols[right]))

    for i in range(len(symbols) - 1):
        offer(i, i + 1)
    while queue:
        _, left, right, a, b = heapq.heappop(queue)
        if symbols[left] != a or symbols[right] != b or after[left] != right:
            continue  # one of the two was merged meanwhile
        symbols[left], symbols[right] = a + b, ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in symbols if symbol]


def _basic_words(text: str, lowercase: bool, strip_accents: bool) -> list[str]:
    """The words that pieces make: without controls, punctuation and Han alone; with `strip_accents` without
    marks, and of a composed character the first.
    """
    words: list[str] = [""]
    gone = ("Cc", "Cf", "Co", "Cs")
    for char in text:
        char = unicodedata.normalize("NFD", char)[0] if strip_accents else char
        category = unicodedata.category(char)
        if char in _WHITE:
            words.append("")
        elif char in "\0\ufffd" or category in gone or (strip_accents and category.startswith("M")):
            continue
        elif category.startswith("P") or (char.isascii() and category.startswith("S")) or _is_han(ord(char)):
            words += [char.lower() if lowercase else char, ""]
        else:
            words[-1] += char.lower()[0] if lowercase else char
    return [word for word in words if word]


def _is_han(code: int) -> bool:
    spans = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
             (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))  # fmt: skip
    return any(first <= code <= last for first, last in spans)
