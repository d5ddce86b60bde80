"""Rules of rewriting text before it is cut, as SentencePiece compiles them (`precompiled_charsmap`).

The first four bytes say how long a double array is, whose words of 32 bits are a trie over UTF-8; behind it
stand the texts that are written, each ending in a zero. A word holds where its children are (bits 10 to 30,
shifted by 8 where bit 9 is set), the byte that leads to it (bits 0 to 7), and whether a text ends here (bit
8), whose place is in the child for byte zero.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError

KEY: Final = "tokenizer.ggml.precompiled_charsmap"
_BYTES: Final = np.arange(1, 256, dtype=np.uint32)
_LABEL: Final = 0x800000FF
_LARGEST: Final = 8 << 20
"""Bytes of a trie; published ones have a quarter of a million."""
_NODES: Final = 4096  # that are checked at a time: each has 255 places for children
_DEEPEST: Final = 256
"""Bytes of the longest text that is rewritten."""
_COMPOSED: Final = {"e\u0301": "\u00e9", "\u304b\u3099": "\u304c", "\u1100\u1161": "\uac00"}


class CharsMap:
    """A charsmap, checked: whoever walks it stays inside.

    Args:
        data: as a GGUF file has it.
        source: the file's name, for errors.

    Raises InputError for one that is damaged.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self.data = data
        self._source = source
        (size,) = struct.unpack("<I", data[:4]) if len(data) >= 4 else (0,)
        if not 1024 <= size < len(data) - 4 or size % 1024 or size > _LARGEST:
            raise self._fail(f"a trie of {size} bytes in {len(data)}")
        self._words = np.frombuffer(data, "<u4", size // 4, 4)
        self._texts = data[4 + size :]
        try:
            self._texts.decode()
        except UnicodeDecodeError as error:
            raise self._fail(f"texts that are no UTF-8 ({error.reason})") from error
        if not self._texts.endswith(b"\0"):
            raise self._fail("a text that does not end")
        self._root = int(_base(self._words[:1])[0])
        self._check()

    def _fail(self, reason: str) -> InputError:
        return InputError(f"{self._source}: {KEY} has {reason}", remedy="download the file again")

    def _check(self) -> None:
        """Every node that can be reached has its children inside, and names a text where one ends."""
        seen = np.zeros(len(self._words), bool)
        level = np.array([self._root], np.uint32)
        for _ in range(_DEEPEST):
            if not len(level):
                return
            if int(level.max()) | 0xFF >= len(seen):
                raise self._fail("nodes outside of its trie")
            seen[level] = True
            below = [self._below(level[i : i + _NODES]) for i in range(0, len(level), _NODES)]
            level = np.unique(np.concatenate([nodes[~seen[nodes]] for nodes in below]))
        raise self._fail(f"rules for texts of more than {_DEEPEST} bytes")

    def _below(self, nodes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Their children, checked to be inside, and the texts of those where one ends."""
        at = nodes[:, None] ^ _BYTES
        held = self._words[at]
        found = (held & _LABEL) == _BYTES
        ends = (held[found] >> 8) & 1 == 1
        below = at[found] ^ _base(held[found])
        if len(below) and int(below.max()) >= len(self._words):
            raise self._fail("nodes outside of its trie")
        self._check_texts(self._words[below[ends]] & 0x7FFFFFFF)
        return below

    def _check_texts(self, places: np.ndarray[Any, Any]) -> None:
        texts = np.frombuffer(self._texts, np.uint8)
        if len(places) and int(places.max()) >= len(texts):
            raise self._fail("rules without a text")
        if np.any(texts[places] & 0xC0 == 0x80):
            raise self._fail("rules whose text begins within a character")

    def rewritten(self, text: str) -> str:
        """The text with the longest rule applied at each place, left to right."""
        raw, out, i = text.encode(), bytearray(), 0
        while i < len(raw):
            length, place = self._longest(raw, i)
            if length:
                out += self._texts[place : self._texts.index(b"\0", place)]
            else:
                length = 1 + sum(raw[i] >= first for first in (0xC0, 0xE0, 0xF0))
                out += raw[i : i + length]
            i += length
        return out.decode(errors="replace")

    def _longest(self, raw: bytes, start: int) -> tuple[int, int]:
        """How many bytes the longest rule takes, and where its text is."""
        node, length, place = self._root, 0, 0
        for i in range(start, len(raw)):
            node ^= raw[i]
            word = self._words[node : node + 1]
            if not raw[i] or int(word[0]) & _LABEL != raw[i]:
                break
            node ^= int(_base(word)[0])
            if int(word[0]) >> 8 & 1:
                length, place = i - start + 1, int(self._words[node]) & 0x7FFFFFFF
        return length, place

    @property
    def composes(self) -> bool:
        """Whether letters and the marks behind them become one character, as in Unicode's normal forms."""
        return all(self.rewritten(apart) == whole for apart, whole in _COMPOSED.items())


def _base(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (words >> np.uint32(10)) << ((words & np.uint32(512)) >> np.uint32(6))
