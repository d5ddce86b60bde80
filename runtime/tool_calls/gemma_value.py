"""Arguments as Gemma's function-calling models write them, turned into JSON as they come.

    {city:<escape>Graz<escape>,days:[1,2],options:{metric:true}}

Keys are bare, or quoted like strings; strings stand between quoting tokens, with no escapes in them; the
rest is as in JSON. https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Final

from .call_object import Send
from .scanner import MAX_DEPTH, MAX_DIGITS, skip_space
from .stream import find, starts

MAX_BARE: Final = 1000

_BARE: Final = re.compile(r"[^,:{}\[\]]+")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# "None" is what a template makes of null.
_WORDS: Final = {"true": "true", "false": "false", "null": "null", "None": "null"}


class _At(Enum):
    """What is expected."""

    OPEN = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    FIRST_ITEM = auto()
    BARE = auto()
    STRING = auto()
    AFTER = auto()


_KEYS: Final = (_At.FIRST_KEY, _At.KEY)
_VALUES: Final = (_At.VALUE, _At.FIRST_ITEM)


class GemmaArguments:
    """The object of a call's arguments.

    Attributes:
        done: complete. failed: the next character cannot belong to it.
    """

    def __init__(self, send: Send, quote: str) -> None:
        """`send` gets the JSON text; `quote` is the text of the token around strings."""
        self.done = self.failed = False
        self._send = send
        self._quote = quote
        self._at = _At.OPEN
        self._open: list[str] = []
        self._bare = ""
        self._is_key = False

    def push(self, text: str, at: int) -> int:
        """Read from text[at]; returns where it stopped. Short of the end without `done` or `failed`, what
        is left may be the beginning of a quoting token.
        """
        while at < len(text) and not (self.done or self.failed):
            before = at, self._at
            if self._at is _At.STRING:
                at = self._in_string(text, at)
            elif self._at is _At.BARE:
                at = self._in_bare(text, at)
            else:
                at = skip_space(text, at)
                if at < len(text):
                    at = self._between(text, at)
            if (at, self._at) == before:
                break
        return at

    def finish(self, rest: str) -> None:
        """The answer has ended within it; `rest` was left by `push`."""
        self._send(_escaped(rest) if self._at is _At.STRING else self._bare + rest)
        self._bare = ""

    def _in_string(self, text: str, at: int) -> int:
        position, quote = find(text, at, (self._quote,))
        self._send(_escaped(text[at:position]))
        if quote is None:
            return position
        self._send('"')
        self._at = _At.COLON if self._is_key else _At.AFTER
        return position + len(quote)

    def _in_bare(self, text: str, at: int) -> int:
        found = _BARE.match(text, at)
        end = found.end() if found else at
        self._bare += text[at:end]
        self.failed = len(self._bare) > MAX_BARE
        if self.failed:
            self.finish("")
        elif end < len(text):
            word = self._bare.strip()
            is_number = _NUMBER.fullmatch(word) and len(word) <= MAX_DIGITS
            literal = word if is_number else _WORDS.get(word)
            self._send(_quoted(word) if self._is_key or literal is None else literal)
            self._bare = ""
            self._at = _At.COLON if self._is_key else _At.AFTER
        return end

    def _between(self, text: str, at: int) -> int:
        """A character outside of words and strings."""
        char = text[at]
        if self._at in _KEYS or self._at in _VALUES:
            quoted = starts(text, at, self._quote)
            if quoted is None:
                return at
            if quoted:
                self._is_key = self._at in _KEYS
                self._send('"')
                self._at = _At.STRING
                return at + len(self._quote)
        match self._at:
            case _At.OPEN if char == "{":
                self._begin(char)
            case _At.VALUE | _At.FIRST_ITEM if char in "{[":
                self._begin(char)
            case _At.FIRST_KEY | _At.FIRST_ITEM | _At.AFTER if char == self._open[-1]:
                self._close()
            case _At.COLON if char == ":":
                self._send(": ")
                self._at = _At.VALUE
            case _At.AFTER if char == ",":
                self._send(", ")
                self._at = _At.KEY if self._open[-1] == "}" else _At.VALUE
            case _At.FIRST_KEY | _At.KEY | _At.VALUE | _At.FIRST_ITEM if _BARE.match(char):
                self._is_key = self._at in _KEYS
                self._at = _At.BARE
                return at
            case _:
                self.failed = True
        return at if self.failed else at + 1

    def _begin(self, char: str) -> None:
        if len(self._open) == MAX_DEPTH:
            self.failed = True
            return
        self._send(char)
        self._open.append("}" if char == "{" else "]")
        self._at = _At.FIRST_KEY if char == "{" else _At.FIRST_ITEM

    def _close(self) -> None:
        self._send(self._open.pop())
        self._at = _At.AFTER
        self.done = not self._open


def is_bare(key: str) -> bool:
    """Whether a key can be written without quotes."""
    return _BARE.fullmatch(key) is not None and key == key.strip() and len(key) <= MAX_BARE


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _quoted(text)[1:-1]


def write_value(value: object, quote: str) -> str:
    """A JSON value as these models write it, keys in the order of Jinja's dictsort."""
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]).lower())
        inner = ",".join(f"{key}:{write_value(one, quote)}" for key, one in items)
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{','.join(write_value(one, quote) for one in value)}]"
    return json.dumps(value)
