"""Entities by rules: capitalised spans, trimmed of function words, dates and bare numbers.

"In July 1994 the University of Oxford and Tim Burton's Ed Wood" → "university of oxford and tim burton", its
two parts, and "ed wood". Of a span with a word that may as well stand between two names ("and", "in", "for"),
the parts are entities too; of one that begins with a number ("2018 Winter Olympics", but "1994 Tim Burton"),
so is the rest.
"""

from __future__ import annotations

from ..types import Mention
from .names import CONNECTING, DATES, FUNCTION_WORDS, SPLITTING, Token, key_of

MAX_MENTIONS = 400
"""A chunk has a few hundred words; more names than this is a table or an index, and no evidence of
anything."""
_MAX_NAME_WORDS = 12


def mentions_in(text: str, tokens: list[Token]) -> tuple[Mention, ...]:
    """Entities in the text's order; one that stands there twice is there twice."""
    found: list[Mention] = []
    for span in _spans(tokens):
        found += [_mention(text, part) for part in _readings(span)]
        if len(found) >= MAX_MENTIONS:
            break
    return tuple(found[:MAX_MENTIONS])


def _spans(tokens: list[Token]) -> list[list[Token]]:
    """Maximal runs of capitalised words and numbers, with connecting words between two of them."""
    spans: list[list[Token]] = []
    current: list[Token] = []
    waiting: list[Token] = []
    for token in tokens:
        solid = token.capital or token.number
        if current and not token.joined:
            spans.append(current)
            current, waiting = [], []
        if solid:
            current = [*current, *waiting, token] if current else [token]
            waiting = []
        elif current and token.folded in CONNECTING and len(waiting) < 2:
            waiting.append(token)
        elif current:
            spans.append(current)
            current, waiting = [], []
    if current:
        spans.append(current)
    return spans


def _readings(span: list[Token]) -> list[list[Token]]:
    """The whole, then the parts where they are another reading of it."""
    whole = _trimmed(span)
    if not whole:
        return []
    readings = [whole] if len(whole) <= _MAX_NAME_WORDS else []
    parts: list[list[Token]] = [[]]
    for token in whole:
        if token.folded in SPLITTING and not token.capital:
            parts.append([])
        else:
            parts[-1].append(token)
    if len(parts) > 1:
        readings += [part for part in map(_trimmed, parts) if part and len(part) <= _MAX_NAME_WORDS]
    if whole[0].number and len(whole) > 1:
        rest = _trimmed(whole[1:])
        if rest and len(rest) <= _MAX_NAME_WORDS:
            readings.append(rest)
    return readings


def _trimmed(span: list[Token]) -> list[Token]:
    """Without function words, months and days at its ends; nothing if no name is left."""
    start, end = 0, len(span)
    while start < end and (span[start].folded in FUNCTION_WORDS or span[start].folded in DATES):
        start += 1
    while end > start and (span[end - 1].folded in FUNCTION_WORDS or span[end - 1].folded in DATES):
        end -= 1
    kept = span[start:end]
    if not any(token.capital and token.folded not in DATES for token in kept):
        return []
    if len(kept) == 1 and len(kept[0].folded) == 1:
        return []
    return kept


def _mention(text: str, tokens: list[Token]) -> Mention:
    start, end = tokens[0].start, tokens[-1].end
    return Mention(key_of([token.folded for token in tokens]), text[start:end], start, end)
