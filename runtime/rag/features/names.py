"""Names in running text, by rules: where they stand, and the folded form in which two names are compared.

A word is a name's when it begins with a capital letter. Words belong to one name when nothing but a space
(or a hyphen, an initial's full stop, an ampersand) stands between them; small connecting words ("of", "de",
"van") may stand between two capitalised ones. What the rules cannot know is left to the numbers: a name that
many passages carry weighs little.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .terms import MAX_WORD, fold


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONNECTING = _words(
    """
    of de la le les du des del della di da do dos van von der den ter ten the and for in on at to y e
    el al bin ibn und et zu zum no wa upon with
    """
)
SPLITTING = frozenset({"and", "in", "for", "on", "at", "to", "with", "et", "und"})
"""Connecting words that as often stand between two names as inside one: both readings are taken."""

FUNCTION_WORDS = _words(
    """
    a about above after again against all along also although am among an and another any are around as
    at be became because been before began being below between both but by can could did do does doing
    done down during each either else ever every few first for from further had has have having he her
    here hers herself him himself his how however i if in into is it its itself just last later latter
    many may me might more most much must my near neither no nor not now of off on once one only onto
    or other others our out over own per please same several shall she should since so some such than
    that the their theirs them themselves then there these they this those though three through
    throughout thus to together too two under unlike until up upon us very via was we were what when
    where whether which while who whom whose why will with within without would yes yet you your name
    named known called according based currently today list give tell
    """
)
DATES = _words(
    """
    january february march april may june july august september october november december monday
    tuesday wednesday thursday friday saturday sunday jan feb mar apr jun jul aug sep sept oct nov dec
    """
)
ABBREVIATIONS = _words(
    """
    st mt dr mr mrs ms jr sr prof gen col capt lt sgt rev hon ft no vs bros co inc ltd vol
    """
)

_TOKEN = re.compile(r"(?:[^\W\d_]\.){2,}|[^\W_]+(?:['’ʼ][^\W_]+)*")


class Token(NamedTuple):
    """A word with its place. `joined` says that the word before belongs to the same phrase: only a space, a
    hyphen or an initial's full stop lies between; `flowing`, that no sentence ended in between.
    """

    folded: str
    start: int
    end: int
    capital: bool
    number: bool
    joined: bool
    flowing: bool


def tokens_of(text: str) -> list[Token]:
    tokens: list[Token] = []
    end, previous = 0, ""
    for match in _TOKEN.finditer(text):
        surface = match.group()
        start, stop = match.span()
        after = stop
        if surface.isascii() and surface.isalnum():  # the usual case, without the function calls
            folded = surface.lower() if after - start <= MAX_WORD else surface[:MAX_WORD].lower()
        else:
            folded, stop = _folded(surface, start)
            if not folded:
                continue
        first = surface[0]
        number = first.isdigit()
        capital = first.isupper() or (not number and len(surface) > 1 and surface[1].isupper())
        gap = text[end:start]
        if not tokens:
            joined = flowing = False
        elif gap == " ":
            joined, flowing = previous != "'s", True
        else:
            joined, flowing = _gap(gap, previous, capital)
        tokens.append(Token(folded, start, stop, capital, number, joined, flowing))
        previous = folded if stop == after else "'s"  # a possessive ends the name: "Burton's Ed Wood"
        end = after
    return tokens


def _folded(surface: str, start: int) -> tuple[str, int]:
    """The folded word, and where it ends without a possessive."""
    stop = start + len(surface)
    lowered = fold(surface)
    if "." in lowered:
        return lowered.replace(".", "")[:MAX_WORD], stop
    for mark in "'’ʼ":
        if mark in lowered:
            if lowered.endswith(mark + "s"):
                stop -= 2
                lowered = lowered[:-2]
            lowered = lowered.replace(mark, "")
    return lowered[:MAX_WORD], stop


def _gap(gap: str, previous: str, capital: bool) -> tuple[bool, bool]:
    """(joined, flowing) of what lies between two words."""
    if gap in (" ", "-", "–", " & ", "\n", "‑"):
        return previous != "'s", True
    if gap in (". ", "."):
        short = previous in ABBREVIATIONS or len(previous) == 1
        return short, short or (gap == "." and not capital)
    if "\n\n" in gap or len(gap) > 6:
        return False, False
    return False, not any(c in ".!?;" for c in gap)


def key_of(words: list[str]) -> str:
    """Folded words as one name: initials together ("j k rowling", "j.k. rowling" → "jk rowling")."""
    out: list[str] = []
    initials = ""
    for word in words:
        if len(word) == 1 and word.isalpha():
            initials += word
            continue
        if initials:
            out.append(initials)
            initials = ""
        out.append(word)
    if initials:
        out.append(initials)
    return " ".join(out)


def name_key(name: str) -> str:
    """A whole name (a title, an argument) in the folded form, without a leading article."""
    name = name[:1000]
    if name.isascii() and name.replace(" ", "").isalnum():  # the usual case, without tokens
        words = [word[:MAX_WORD] for word in name.lower().split()]
    else:
        words = [token.folded for token in tokens_of(name)]
    if len(words) > 1 and words[0] in ("the", "a", "an"):
        words = words[1:]
    return key_of(words)


_PARENTHESIS = re.compile(r"\s*[(\[（][^()\[\]（）]*[)\]）]\s*$")


def title_keys(title: str) -> list[str]:
    """The names by which a title may be mentioned: itself, and without a closing parenthesis ("Ed Wood
    (film)")."""
    bare = _PARENTHESIS.sub("", title)
    keys = [name_key(title), *([name_key(bare)] if bare != title else [])]
    return [key for i, key in enumerate(keys) if key and key not in keys[:i]]
