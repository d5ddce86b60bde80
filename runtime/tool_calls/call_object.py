"""The parts that most formats have in common, read as they come: a call's arguments, and the JSON object
that names a function and holds its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Final

from .scanner import JsonValue, read_object, skip_space, text_of

MAX_NAME: Final = 64

Send = Callable[[str], None]
Begin = Callable[[str], Send]
"""Called with a call's name; gives what receives its arguments."""

_HARMLESS: Final = "type"  # {"type": "function", "name": …} is a form, too


def can_be_name(name: str) -> bool:
    """Whether a model's text can be meant as a function's name, be there such a function or not."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


class Arguments:
    """A call's arguments: an object, which is sent as it comes; or a string with an object's text in it, or
    null, which are sent as the object that they mean.

    Attributes:
        done: complete. failed: the next character cannot belong to it.
        begun: at least one character is there. is_object: an object has begun.
    """

    def __init__(self, send: Send, *, lenient: bool) -> None:
        """`lenient`: a string without an object in it is sent as it is, instead of failing."""
        self.done = self.failed = self.begun = self.is_object = False
        self._send = send
        self._lenient = lenient
        self._value = JsonValue()
        self._held: list[str] | None = None

    def push(self, text: str, at: int) -> int:
        """Read from text[at], at first what is no whitespace; returns where it stopped."""
        if not self.begun:
            self.begun = True
            self.is_object = text[at] == "{"
            if not self.is_object:
                self._held = []
                self.failed = text[at] not in '"n'
        if self.failed:
            return at
        pieces: list[str] = []
        at = self._value.push(text, at, pieces)
        if self._held is None:
            self._send("".join(pieces))
        else:
            self._held += pieces
        self.failed = self._value.failed
        if self._value.done:
            self._complete()
        elif self.failed and self._lenient:
            self.finish()
        return at

    def _complete(self) -> None:
        self.done = True
        if self._held is None:
            return
        whole = "".join(self._held)
        inner = "{}" if whole in ("null", '""') else read_object(text_of(self._held))
        if inner is None and not self._lenient:
            self.done, self.failed = False, True
            return
        self._held = [inner or whole]
        self.finish()
        self.is_object = True

    def finish(self) -> None:
        """What was held goes out as it is: the arguments have ended, complete or not."""
        if self._held is not None:
            self._send("".join(self._held))
            self._held = []


class _At(Enum):
    """Where in a call's object the text is."""

    OPEN = auto()
    FIRST_KEY = auto()
    NEXT_KEY = auto()
    KEY = auto()
    COLON = auto()
    BEFORE_VALUE = auto()
    NAME = auto()
    ARGUMENTS = auto()
    OTHER = auto()
    AFTER = auto()


class CallObject:
    """The object `{"name": …, "arguments": …}`.

    Where a marker has said that this is a call, the call begins with its complete name. Without one
    (`names` given), an answer that is some other JSON must stay text: the call begins when one of `names`
    and an object of arguments are there, and a key that a call does not have ends the attempt.
    What passes then is what a grammar can tell as well (`lark.loose_calls`).

    Attributes:
        done: the object is complete. failed: the next character cannot belong to it.
        begun: the call has begun. whole: its arguments are complete.
        raw: the text so far, to be given back where no call came of it; empty once it has begun.
    """

    def __init__(
        self,
        begin: Begin,
        names: frozenset[str] | None = None,
        keys: Sequence[str] = ("arguments", "parameters"),
        *,
        name_first: bool = False,
    ) -> None:
        """`keys`: the names that arguments may have; `name_first`: never before the function's name."""
        self.done = self.failed = self.begun = self.whole = False
        self.raw: list[str] = []
        self._begin = begin
        self._names = names
        self._keys = keys
        self._name_first = name_first
        self._at = _At.OPEN
        self._kind = _At.OTHER
        self._value = JsonValue()
        self._pieces: list[str] = []
        self._name: str | None = None
        self._arguments: Arguments | None = None
        self._typed = False
        self._held: list[str] = []  # arguments that wait for the name
        self._receive: Send = self._held.append

    def push(self, text: str, at: int) -> int:
        """Read from text[at]; returns where it stopped: at the end, behind the object, or where it failed."""
        begin = at
        while at < len(text) and not (self.done or self.failed):
            if self._at in (_At.KEY, _At.NAME, _At.OTHER):
                at = self._in_value(text, at)
            elif self._at is _At.ARGUMENTS:
                at = self._in_arguments(text, at)
            else:
                at = skip_space(text, at)
                if at < len(text) and self._between(text[at]):
                    at += 1
        if not self.begun:
            self.raw.append(text[begin:at])
        return at

    def send(self, text: str) -> None:
        """More of the arguments of a call that has begun, as it is."""
        self._receive(text)

    def finish(self) -> None:
        """The answer has ended within the object: what is there of its arguments is sent."""
        if self.begun and self._at is _At.ARGUMENTS and self._arguments is not None:
            self._arguments.finish()

    def _between(self, char: str) -> bool:
        """A character outside of keys and values; False where it is not taken."""
        match self._at:
            case _At.OPEN if char == "{":
                self._at = _At.FIRST_KEY
            case _At.FIRST_KEY | _At.NEXT_KEY if char == '"':
                self._new_value(_At.KEY)
                return False
            case _At.COLON if char == ":":
                self._at = _At.BEFORE_VALUE
            case _At.BEFORE_VALUE:
                self._new_value(self._kind)
                self.failed = self._kind is _At.NAME and char != '"'
                return False
            case _At.AFTER if char == ",":
                self._at = _At.NEXT_KEY
            case _At.AFTER | _At.FIRST_KEY if char == "}":
                self._close()
            case _:
                self.failed = True
        return not self.failed

    def _new_value(self, at: _At) -> None:
        self._at = at
        self._value = JsonValue()
        self._pieces = []
        if at is _At.ARGUMENTS:
            self._arguments = Arguments(self._deliver, lenient=self.begun)

    def _in_value(self, text: str, at: int) -> int:
        at = self._value.push(text, at, self._pieces)
        self.failed = self._value.failed
        if not self._value.done:
            return at
        if self._at is _At.KEY:
            self._has_key(text_of(self._pieces))
            return at
        if self._at is _At.NAME:
            self._has_name(text_of(self._pieces))
        elif self._names is not None:
            self.failed = self._pieces[0][:1] != '"' or self._is_escaped()
        self._at = _At.AFTER
        return at

    def _is_escaped(self) -> bool:
        return any("\\" in piece for piece in self._pieces)

    def _has_key(self, key: str) -> None:
        self._at = _At.COLON
        if key == "name" and self._name is None:
            self._kind = _At.NAME
        elif key in self._keys and self._arguments is None:
            self._kind = _At.ARGUMENTS
        else:
            self._kind = _At.OTHER
        if self._names is not None:
            late = self._name is not None or self._arguments is not None
            unknown = self._kind is _At.OTHER and (key != _HARMLESS or late or self._typed)
            early = self._kind is _At.ARGUMENTS and self._name is None and (self._name_first or self._typed)
            self.failed = unknown or early or self._is_escaped()
            self._typed = True if self._kind is _At.OTHER else self._typed

    def _has_name(self, name: str) -> None:
        known = can_be_name(name) if self._names is None else name in self._names
        if not known:
            self.failed = True
            return
        self._name = name
        if self._names is None or self._arguments is not None:
            self._try_begin()

    def _in_arguments(self, text: str, at: int) -> int:
        assert self._arguments is not None
        at = self._arguments.push(text, at)
        if self._arguments.is_object:
            self._try_begin()
        self.failed = self._arguments.failed
        if self._arguments.done:
            self.whole = True
            self._at = _At.AFTER
        return at

    def _close(self) -> None:
        if self._name is None:
            self.failed = True
            return
        if self._arguments is None:
            self._deliver("{}")
        self.done = self.whole = True
        self._try_begin()

    def _try_begin(self) -> None:
        if self._name is None or self.begun:
            return
        self.begun = True
        self.raw = []
        self._receive = self._begin(self._name)
        self._receive("".join(self._held))

    def _deliver(self, text: str) -> None:
        self._receive(text)
