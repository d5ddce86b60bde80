"""JSON read as it comes, in pieces that are cut anywhere.

The grammar is that of RFC 8259 with one kindness: control characters inside strings, which models write and
the RFC forbids, are escaped. What passes is always readable by a JSON parser.
"""

from __future__ import annotations

import json
import re
from enum import Enum, auto
from typing import Final

MAX_DEPTH: Final = 100
MAX_DIGITS: Final = 1000  # Python's own parser refuses integers of more than 4300
SPACE: Final = " \t\n\r"

_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')
_SPACES: Final = re.compile(r"[ \t\n\r]+")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")  # what a string's escapes may leave; no UTF-8 can hold it
_LITERALS: Final = {"t": "true", "f": "false", "n": "null"}
# State of a number and class of a character → state: "s" sign, "z" zero, "i" integer, "." point, "f"
# fraction, "e" exponent mark, "x" its sign, "d" its digits.
_NUMBER: Final = {
    "s0": "z", "s1": "i", "z.": ".", "ze": "e", "i0": "i", "i1": "i", "i.": ".", "ie": "e",
    ".0": "f", ".1": "f", "f0": "f", "f1": "f", "fe": "e",
    "e0": "d", "e1": "d", "e+": "x", "e-": "x", "x0": "d", "x1": "d", "d0": "d", "d1": "d",
}  # fmt: skip
_WHOLE: Final = "zifd"


def skip_space(text: str, at: int) -> int:
    """The position of the next character that is no JSON whitespace."""
    found = _SPACES.match(text, at)
    return found.end() if found else at


class _At(Enum):
    """What a value waits for."""

    VALUE = auto()
    FIRST_ITEM = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    AFTER = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    LITERAL = auto()


class JsonValue:
    """Recognises one JSON value, whose first character is the first one pushed."""

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._at = _At.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._rest = ""
        self._digits = 0

    def push(self, text: str, at: int, out: list[str]) -> int:
        """Read from text[at]; the value's text is appended to `out`.

        Returns where it stopped: at the text's end, behind the value (`done`; a number ends at the character
        after it), or at the first character that no value can have there (`failed`).
        """
        begin = at
        while at < len(text) and not (self.done or self.failed):
            if self._at is _At.STRING:
                plain = _PLAIN.match(text, at)
                if plain:
                    at = plain.end()
                    continue
                if text[at] < " ":
                    out += (text[begin:at], json.dumps(text[at])[1:-1])
                    at = begin = at + 1
                    continue
            if self._take(text[at]):
                at += 1
        out.append(text[begin:at])
        return at

    def _take(self, char: str) -> bool:
        """One character; False where it is not the value's."""
        match self._at:
            case _At.STRING:
                self._in_string(char)
            case _At.ESCAPE:
                self._in_escape(char)
            case _At.HEX:
                self._in_hex(char)
            case _At.NUMBER:
                return self._in_number(char)
            case _At.LITERAL:
                self._in_literal(char)
            case _:
                if char in SPACE and self._open:
                    return True
                self._between(char)
        return not self.failed

    def _between(self, char: str) -> None:
        match self._at:
            case _At.COLON if char == ":":
                self._at = _At.VALUE
            case _At.KEY | _At.FIRST_KEY if char == '"':
                self._is_key = True
                self._at = _At.STRING
            case _At.AFTER if char == ",":
                self._at = _At.KEY if self._open[-1] == "}" else _At.VALUE
            case _At.AFTER | _At.FIRST_KEY | _At.FIRST_ITEM if char == self._open[-1]:
                self._open.pop()
                self._ended()
            case _At.VALUE | _At.FIRST_ITEM:
                self._begin(char)
            case _:
                self.failed = True

    def _begin(self, char: str) -> None:
        if char in "{[":
            self._open.append("}" if char == "{" else "]")
            self._at = _At.FIRST_KEY if char == "{" else _At.FIRST_ITEM
            self.failed = len(self._open) > MAX_DEPTH
        elif char == '"':
            self._is_key = False
            self._at = _At.STRING
        elif char in _LITERALS:
            self._rest = _LITERALS[char][1:]
            self._at = _At.LITERAL
        elif char == "-" or "0" <= char <= "9":
            self._rest = "s" if char == "-" else "z" if char == "0" else "i"
            self._digits = 1
            self._at = _At.NUMBER
        else:
            self.failed = True

    def _ended(self) -> None:
        self.done = not self._open
        self._at = _At.AFTER

    def _in_string(self, char: str) -> None:
        if char == "\\":
            self._at = _At.ESCAPE
        elif self._is_key:
            self._at = _At.COLON
        else:
            self._ended()

    def _in_escape(self, char: str) -> None:
        self._rest = "...."
        self._at = _At.HEX if char == "u" else _At.STRING
        self.failed = char not in 'u"\\/bfnrt'

    def _in_hex(self, char: str) -> None:
        self.failed = char not in "0123456789abcdefABCDEF"
        self._rest = self._rest[1:]
        if not self._rest:
            self._at = _At.STRING

    def _in_number(self, char: str) -> bool:
        kind = "0" if char == "0" else "1" if "1" <= char <= "9" else char.replace("E", "e")
        state = _NUMBER.get(self._rest + kind)
        if state is not None:
            self._rest = state
            self._digits += 1
            self.failed = self._digits > MAX_DIGITS
            return not self.failed
        if self._rest in _WHOLE:
            self._ended()
        else:
            self.failed = True
        return False

    def _in_literal(self, char: str) -> None:
        if char != self._rest[0]:
            self.failed = True
            return
        self._rest = self._rest[1:]
        if not self._rest:
            self._ended()


def text_of(pieces: list[str]) -> str:
    """The text that a JSON string stands for; "" for another value."""
    value = json.loads("".join(pieces))
    return value if isinstance(value, str) else ""


def read_object(text: str) -> str | None:
    """The JSON text of an object that fills `text`, control characters escaped; None where it does not."""
    text = text.strip(SPACE)
    value, out = JsonValue(), list[str]()
    if not text.startswith("{") or value.push(text, 0, out) != len(text) or not value.done:
        return None
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", "".join(out))
