"""Word sequences of a text that could be another document's title.

Which titles there are is not known when a chunk is written, and changes later; so a chunk keeps the hashes
of all its sequences that look like a name, and the snapshot compares them with the titles there are. A
sequence of one to eight words counts when it begins with a capital or a figure, at least half of its words
do, and none but a name's word ends it.
"""

from __future__ import annotations

import numpy as np

from .names import CONNECTING, FUNCTION_WORDS, Token
from .terms import hash_of

MAX_TITLE_WORDS = 8
MAX_SPANS = 4000


def spans_in(tokens: list[Token]) -> np.ndarray:
    """Hashes [m] uint64, ascending, distinct."""
    found: set[int] = set()
    solids = [token.capital or token.number for token in tokens]
    for first in range(len(tokens)):
        if not solids[first]:
            continue
        key, initials, solid = "", "", 0
        for index in range(first, min(first + MAX_TITLE_WORDS, len(tokens))):
            other = tokens[index]
            word = other.folded
            if index > first and not other.flowing:
                break
            # key_of, a word at a time
            if len(word) == 1 and word.isalpha():
                initials += word
            else:
                key, initials = f"{key} {initials} {word}" if initials else f"{key} {word}", ""
            solid += solids[index]
            if 2 * solid < index - first + 1 or word in (CONNECTING if index > first else FUNCTION_WORDS):
                continue
            whole = f"{key} {initials}" if initials else key
            found.add(hash_of(whole[1:]))
        if len(found) >= MAX_SPANS:
            break
    return np.array(sorted(found), np.uint64)
