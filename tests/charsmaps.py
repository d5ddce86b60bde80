"""Charsmaps as SentencePiece compiles them, of a few rules, for tests."""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterable
from itertools import product

import numpy as np


def compiled(rules: dict[str, str]) -> bytes:
    """The rules as a double array and texts. Each node has 256 words of its own, each text a word of those
    that only hold texts; so the array is large, and simple.
    """
    texts, places = b"", dict[str, int]()
    for text in dict.fromkeys(rules.values()):
        places[text] = len(texts)
        texts += text.encode() + b"\0"
    prefixes = {b""} | {raw[:i] for raw in map(str.encode, rules) for i in range(1, len(raw) + 1)}
    inner = sorted({raw[:-1] for raw in prefixes if raw})
    blocks = {raw: 256 * (i + 1) for i, raw in enumerate(inner)}
    ends = {raw.encode(): text for raw, text in rules.items()}
    leaves = [raw for raw in prefixes if raw and raw not in blocks]
    spare = 256 * (len(inner) + 1)
    blocks |= {raw: spare + i for i, raw in enumerate(leaves)}
    words = np.zeros(spare + -(-len(leaves) // 256) * 256, np.uint32)
    words[0] = blocks[b""] << 10
    for raw in prefixes - {b""}:
        at = blocks[raw[:-1]] ^ raw[-1]
        offset = at ^ blocks[raw]
        assert offset < 1 << 21
        words[at] = raw[-1] | (raw in ends) << 8 | offset << 10
        if raw in ends:
            words[blocks[raw]] = places[ends[raw]] | 1 << 31
    return struct.pack("<I", words.nbytes) + words.tobytes() + texts


def composing(texts: Iterable[str]) -> dict[str, str]:
    """Of the characters of texts, what SentencePiece's rule "nmt_nfkc" has: compatible forms, and letters and
    their marks as one; spaces of any kind are one, controls are nothing.
    """
    chars = {char for text in texts for form in (text, unicodedata.normalize("NFD", text)) for char in form}
    rules = {char: unicodedata.normalize("NFKC", char) for char in chars}
    apart = {unicodedata.normalize("NFD", char): char for text in texts for char in _composed(text)}
    for long in list(apart):
        for end in range(2, len(long) + 1):
            whole = unicodedata.normalize("NFC", long[:end])
            if len(whole) == 1:
                first = unicodedata.normalize("NFC", long[: end - 1])
                rules |= {long[:end]: whole, first + long[end - 1]: whole}
    alike: dict[str, list[str]] = {}
    for char, text in rules.items():
        if len(char) == 1:
            alike.setdefault(text, []).append(char)
    for key, whole in list(rules.items()):
        if len(key) > 1:  # any of its characters may be one that is compatible with it
            rules |= {"".join(one): whole for one in product(*(alike.get(c, [c]) for c in key))}
    rules |= dict.fromkeys("\t\n\r\f\u00a0\u1680\u2000\u200b\u200e\u2028\u3000\ufeff", " ")
    rules |= dict.fromkeys(map(chr, [*range(1, 9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]), "")
    return {key: text for key, text in rules.items() if key != text and key != "\0"}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text) + text) + "\u00e9\u304c\uac00"
