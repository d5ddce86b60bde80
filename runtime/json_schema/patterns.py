"""Regular expressions of JSON schemas (ECMA-262) in the syntax that the grammar's compiler reads (Rust's).

The two agree on most of what is written, and differ quietly in the rest: a `[` inside a class opens another
class in Rust, `.` leaves out other line ends. What has no counterpart (look-around, references to groups) is
refused, and so is what is so large that compiling it, or following it, would take seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...ir.errors import InputError

MAX_LENGTH = 4096
_MAX_DEPTH = 32
_MAX_COST = 4000  # atoms after counted repeats are written out
_MAX_OPEN = 100  # repeats without an end: each may begin anywhere in what the one before it matched
_MAX_COUNT = 1_000_000

# What both ECMA-262 and Rust call white space, and what either does.
_SPACE = r"\t\n\x0B\f\r \u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}"
_ANY_SPACE = _SPACE + r"\u{85}\u{FEFF}\x1C-\x1F"
_LINE_ENDS = r"\n\r\u{2028}\u{2029}"
_SYNTAX = frozenset("^$\\.*+?()[]{}|/")
_CONTROLS = {"n": r"\n", "r": r"\r", "t": r"\t", "v": r"\x0B", "f": r"\f", "0": r"\x00"}
_WORDS = frozenset("dDwW")
_SETS = tuple("\\" + letter for letter in "sSdDwWpP")
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class PatternError(InputError):
    """A regular expression that is wrong, too large, or not regular."""


@dataclass(slots=True)
class _Size:
    """What a group costs so far, in atoms. A single atom that is repeated is counted, not written out, and
    costs one; where it is repeated again with what is around it, all is written out.
    """

    done: int = 0
    last: int = 0
    """Of the last atom or group, which a repeat may follow."""
    done_written: int = 0
    last_written: int = 0
    is_repeated: bool = False

    def add(self, cost: int, written: int) -> None:
        self.done += self.last
        self.done_written += self.last_written
        self.last, self.last_written = cost, written
        self.is_repeated = False

    def repeat(self, count: int) -> None:
        self.last = 1 if self.last_written == 1 else self.last_written * count
        self.last_written = min(self.last_written * count, _MAX_COUNT)
        self.is_repeated = True

    @property
    def total(self) -> int:
        return self.done + self.last

    @property
    def written(self) -> int:
        return self.done_written + self.last_written


class _Reader:
    """Goes through a pattern once, writing the other syntax."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.out: list[str] = []
        self.groups: list[_Size] = [_Size()]
        self.open_repeats = 0
        self.least: dict[int, int] = {}  # least count of each repeat outside of groups, by its place in `out`
        self.is_choice = False

    def read(self, *, is_search: bool) -> str:
        while self.place < len(self.text):
            char = self._next()
            if char == "\\":
                self._atom(self._escape())
            elif char == "[":
                self._atom(self._class())
            elif char == "(":
                self._open()
            elif char == ")":
                self._close()
            elif char in _REPEATS or (char == "{" and self._is_count()):
                self._repeat(char)
            elif char in "^$|":
                self.is_choice |= char == "|"
                self.out.append(char)
                self.groups[-1].add(0, 0)
            else:
                self._atom(rf"[^{_LINE_ENDS}]" if char == "." else _literal(char))
        if len(self.groups) > 1:
            raise self._error("has a group that is not closed")
        if is_search and not self.is_choice:
            # A search that may begin or end anywhere asks for the least count there; others cost the compiler
            # much.
            for place in (1, len(self.out) - 1):
                if place in self.least:
                    self.out[place] = f"{{{self.least[place]}}}"
        return "".join(self.out)

    def _error(self, what: str) -> PatternError:
        shown = self.text if len(self.text) <= 60 else self.text[:60] + "…"
        return PatternError(
            f"the pattern {shown!r} {what}",
            remedy="allowed: ECMA-262 without look-around, references and flags, of moderate size",
        )

    def _next(self) -> str:
        if self.place >= len(self.text):
            raise self._error("ends in the middle")
        self.place += 1
        return self.text[self.place - 1]

    def _take(self, text: str) -> bool:
        if self.text.startswith(text, self.place):
            self.place += len(text)
            return True
        return False

    def _atom(self, text: str) -> None:
        self.out.append(text)
        self.groups[-1].add(1, 1)
        self._check_cost()

    def _check_cost(self) -> None:
        if sum(size.total for size in self.groups) > _MAX_COST:
            raise self._error("is too large")

    # Groups and repeats ----------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._take("?"):
            named = self._take("<") or self._take("P<")
            if not self._take(":") and not (named and not self.text.startswith(("=", "!"), self.place)):
                raise self._error("looks around, or sets flags")
            if named:
                while self._next() != ">":
                    pass  # the name is not needed
        self.out.append("(?:")
        self.groups.append(_Size())
        if len(self.groups) > _MAX_DEPTH:
            raise self._error("is nested too deeply")

    def _close(self) -> None:
        if len(self.groups) == 1:
            raise self._error("closes a group that is not open")
        inner = self.groups.pop()
        self.out.append(")")
        self.groups[-1].add(max(1, inner.total), max(1, inner.written))
        self._check_cost()

    def _is_count(self) -> bool:
        """Whether the `{` before the place begins a count; ECMA-262 takes it for itself otherwise."""
        end = self.text.find("}", self.place)
        parts = self.text[self.place : end].split(",") if end > 0 else []
        return 0 < len(parts) < 3 and all(_is_number(p) for p in parts if p) and bool(parts[0])

    def _repeat(self, char: str) -> None:
        size = self.groups[-1]
        if not size.last or size.is_repeated:
            raise self._error(f"repeats nothing at {char!r}")
        if char == "{":
            end = self.text.index("}", self.place)
            low, _, high = self.text[self.place : end].partition(",")
            written = "{" + self.text[self.place : end] + "}"
            least = int(low[:12])  # longer ones are too large in any case
            most = least if "," not in written else int(high[:12]) if high else None
            self.place = end + 1
        else:
            written = char
            least, most = _REPEATS[char]
        if max(least, most or 0) > _MAX_COUNT or (most is not None and most < least):
            raise self._error("has a count that is too large, or runs backwards")
        if len(self.groups) == 1:
            self.least[len(self.out)] = least
        self.out.append(written + "?" * self._take("?"))
        self.open_repeats += most is None
        if self.open_repeats > _MAX_OPEN:
            raise self._error("is too large")
        size.repeat(max(1, least, most or 0))
        self._check_cost()

    # Atoms -----------------------------------------------------------------------------------------------

    def _escape(self) -> str:
        char = self._next()
        if char == "s":
            return f"[{_SPACE}]"
        if char == "S":
            return f"[^{_ANY_SPACE}]"
        if char in "bB":
            raise self._error(f"asks for a word boundary (\\{char})")
        return self._escaped(char, _literal)

    def _escaped(self, char: str, quote: Callable[[str], str]) -> str:
        """An escape that means the same in a class and outside of it."""
        if char in _WORDS:
            return "\\" + char
        if char == "0" and self.text[self.place : self.place + 1].isdigit():
            raise self._error("has an octal escape")
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            letter = self._next()
            if not (letter.isascii() and letter.isalpha()):
                raise self._error("has an unknown escape \\c")
            return f"\\x{ord(letter) % 32:02X}"
        if char in "xu":
            return quote(self._code(char))
        if char in "pP":
            end = self.text.find("}", self.place)
            name = self.text[self.place : end + 1]
            if not (name.startswith("{") and name[1:-1].replace("_", "").replace("=", "").isalnum()):
                raise self._error("has a wrong Unicode class")
            self.place = end + 1
            return f"\\{char}{name}"
        if char.isascii() and not char.isalnum():
            return quote(char)
        raise self._error(f"refers to a group, or has an unknown escape (\\{char})")

    def _code(self, kind: str) -> str:
        """The character of \\xHH, \\uHHHH, \\u{H…} or a pair of surrogates."""
        if kind == "u" and self._take("{"):
            end = self.text.find("}", self.place)
            digits, self.place = self.text[self.place : end], end + 1
        else:
            length = 2 if kind == "x" else 4
            digits, self.place = self.text[self.place : self.place + length], self.place + length
            if len(digits) != length:
                raise self._error("ends in the middle")
        if not 0 < len(digits) <= 6 or not all(c in "0123456789abcdefABCDEF" for c in digits):
            raise self._error(f"has a wrong escape \\{kind}")
        code = int(digits, 16)
        if 0xD800 <= code < 0xDC00 and self._take("\\u"):
            low = ord(self._code("u"))
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) if 0xDC00 <= low < 0xE000 else -1
        if not 0 <= code < 0x110000 or (0xD800 <= code < 0xDC00):
            raise self._error(f"has a wrong escape \\{kind}")
        return chr(code)

    def _class(self) -> str:
        negated = self._take("^")
        parts: list[str] = []
        begins_range = False  # whether a hyphen may follow what was read last, and mean a range
        while not self._take("]"):
            char = self._next()
            if char == "-" and begins_range and not self.text.startswith(("]", *_SETS), self.place):
                parts += ["-", self._member(self._next(), negated=negated)]
                begins_range = False
                continue
            begins_range = not (char == "\\" and self.text[self.place : self.place + 1] in "sSdDwWpP")
            parts.append(self._member(char, negated=negated))
        if not parts:
            return r"[\s\S]" if negated else r"[^\s\S]"
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def _member(self, char: str, *, negated: bool) -> str:
        return self._class_escape(negated=negated) if char == "\\" else _in_class(char)

    def _class_escape(self, *, negated: bool) -> str:
        char = self._next()
        if char == "s":
            return _ANY_SPACE if negated else _SPACE
        if char == "S":
            return f"[^{_SPACE}]" if negated else f"[^{_ANY_SPACE}]"
        if char == "b":
            return r"\x08"
        if char == "B":
            raise self._error("has an unknown escape \\B")
        return self._escaped(char, _in_class)


def _literal(char: str) -> str:
    if 0xD800 <= ord(char) < 0xE000:
        return char  # only the half of a pair, on its way to be joined
    if char in _SYNTAX:
        return "\\" + char
    return char if char.isprintable() or char == " " else f"\\u{{{ord(char):X}}}"


def _in_class(char: str) -> str:
    return "\\" + char if char in r"[]^&~-\/" else _literal(char)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def translated(pattern: str, *, is_search: bool = True) -> str:
    """The pattern in Rust's syntax, to be searched for, or to match from beginning to end.

     Matches what ECMA-262 (with the `u` flag off) says, or a little less where
    engines disagree about white space and line ends.

    Raises PatternError for what is not regular, wrong, or too large.
    """
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"a pattern has {len(pattern)} characters", remedy=f"allowed: up to {MAX_LENGTH}")
    return _Reader(pattern).read(is_search=is_search)
