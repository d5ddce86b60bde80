"""What the parsers of all formats are made of: content, markers, and the numbering of calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from .base import CallArguments, CallBegin, Content, Event, new_call_id
from .scanner import SPACE


def starts(text: str, at: int, marker: str) -> bool | None:
    """Whether `marker` stands at text[at]; None where the text ends before that is certain."""
    if text.startswith(marker, at):
        return True
    return None if marker.startswith(text[at : at + len(marker)]) and len(text) - at < len(marker) else False


def find(text: str, at: int, markers: Sequence[str]) -> tuple[int, str | None]:
    """The first of `markers` from text[at] on: its position and itself. (position, None) where the text's end
    may be the beginning of one; the position is the text's end where it is not.
    """
    found = [(position, marker) for marker in markers if (position := text.find(marker, at)) >= 0]
    first = min(found, default=(len(text), None), key=lambda one: one[0])
    if first[1] is not None:
        return first
    longest = max((len(marker) for marker in markers), default=1) - 1
    for position in range(max(at, len(text) - longest), len(text)):
        if any(starts(text, position, marker) is None for marker in markers):
            return position, None
    return len(text), None


class EventStream:
    """Collects the events of a parser: content without the whitespace around calls, and numbered calls.

    Whitespace that stands between the beginning, calls and the end with nothing else is dropped, and so is
    the one line break between text and the call that follows or precedes it: templates write it there.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._events: list[Event] = []
        self._space: list[str] = []  # held: it may belong to a marker
        self._blank = True  # nothing but whitespace since the beginning, or since the last call

    def content(self, text: str) -> None:
        """Text that is certainly not part of a call."""
        if not text:
            return
        if self._blank:
            inner = text.lstrip(SPACE)
            self._space.append(text[: len(text) - len(inner)])
            if not inner:
                return
            space = "".join(self._space)
            text = (space.removeprefix("\n") if self.calls else space) + inner
            self._blank = False
        else:
            text = "".join(self._space) + text
        self._space = ["\n"] if text.endswith("\n") else []
        self._events.append(Content(text.removesuffix("\n")))

    def begin(self, name: str) -> Callable[[str], None]:
        """A call begins; the result takes the pieces of its arguments."""
        self._space = []
        self._blank = True
        index = self.calls
        self.calls += 1
        self._events.append(CallBegin(index, new_call_id(), name))
        return lambda text: self._events.append(CallArguments(index, text))

    def closed(self) -> None:
        """A closing marker: the whitespace between the call and it belongs to neither."""
        if self._blank:
            self._space = []

    def finish(self) -> None:
        if not (self._blank and self.calls):
            self._events.append(Content("".join(self._space)))
        self._space = []

    def take(self) -> list[Event]:
        """The events since the last call of this, neighbours joined."""
        events, self._events = self._events, []
        joined: list[Event] = []
        for (kind, index), group in itertools.groupby(events, _kind):
            if kind is CallBegin:
                joined += group
                continue
            text = "".join(one.text for one in group if not isinstance(one, CallBegin))
            if text:
                joined.append(Content(text) if kind is Content else CallArguments(index, text))
        return joined


def _kind(event: Event) -> tuple[type[Event], int]:
    return type(event), -1 if isinstance(event, Content) else event.index
