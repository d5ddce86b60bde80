"""What the parsers of all formats are made of."""

from __future__ import annotations

from collections.abc import Callable

from .base import Event
from .call_object import CallObject, Send
from .scanner import skip_space
from .stream import EventStream, find


class StreamParser:
    """The loop of a parser: text that a state cannot decide on yet waits for more.

    A state is a method that reads from `text[at]` and returns where it stopped; `self._state` is then the
    one to go on with. Stopping short of the end without another state means that more text is needed: what
    waits is shorter than a marker, so that the work grows with the text alone.
    """

    def __init__(self) -> None:
        self._out = EventStream()
        self._state: Callable[[str, int], int] = self._in_text
        self._waits = ""

    def push(self, text: str) -> list[Event]:
        """See CallParser."""
        text = self._waits + text
        at = 0
        while at < len(text):
            state = self._state
            stopped = state(text, at)
            if stopped == at and self._state == state:
                break
            at = stopped
        self._waits = text[at:]
        return self._out.take()

    def finish(self) -> list[Event]:
        """See CallParser."""
        waits, self._waits = self._waits, ""
        self._ended(waits)
        self._out.finish()
        return self._out.take()

    def _in_text(self, text: str, at: int) -> int:
        raise AssertionError("a parser says what content is")

    def _ended(self, rest: str) -> None:
        """The answer ended in this state, `rest` undecided."""
        raise AssertionError("a parser says what its end means")


class ObjectParser(StreamParser):
    """A parser of calls that are JSON objects: what a format adds is where they stand.

    `_raw` holds what may yet turn out to be text: a marker and what followed it, until a call has begun.
    `_rest` takes what follows in a call whose arguments are no JSON.
    """

    def __init__(self) -> None:
        super().__init__()
        self._raw: list[str] = []
        self._object = self._new_object()
        self._rest: Send = self._raw.append

    def _new_object(self) -> CallObject:
        return CallObject(self._out.begin)

    def _spaces(self, text: str, at: int) -> int:
        after = skip_space(text, at)
        if after > at:
            self._raw.append(text[at:after])
        return after

    def _try_object(self, char: str) -> None:
        """An object begins here, or what came was text."""
        if char == "{":
            self._object = self._new_object()
            self._state = self._in_object
        else:
            self._give_back()

    def _give_back(self) -> None:
        """No call came of it: it was text."""
        self._out.content("".join([*self._raw, *self._object.raw]))
        self._raw = []
        self._object = self._new_object()
        self._state = self._in_text

    def _in_object(self, text: str, at: int) -> int:
        at = self._object.push(text, at)
        if self._object.failed and not self._object.begun:
            self._give_back()
        elif self._object.failed and not self._object.whole:
            self._raw = []
            self._rest = self._object.send
            self._state = self._broken
        elif self._object.failed or self._object.done:
            self._raw = []
            self._state = self._called
        return at

    def _called(self, text: str, at: int) -> int:
        """Behind a call."""
        raise AssertionError("a format says what follows a call")

    def _ends(self) -> tuple[str, ...]:
        """Markers that end a call whose arguments are no JSON."""
        return ()

    def _broken(self, text: str, at: int) -> int:
        """In arguments that are no JSON: they are the call's as they are."""
        position, marker = find(text, at, self._ends())
        self._rest(text[at:position])
        if marker is not None:
            self._state = self._in_text
        return position

    def _ended(self, rest: str) -> None:
        if self._state == self._broken:
            self._rest(rest)
            return
        if self._state == self._in_object and self._object.begun:
            self._object.finish()
        elif self._state != self._in_text:
            self._give_back()
        self._out.content(rest)
