"""The parser of calls that are JSON without a marker of their own: what an answer begins with, or what
stands in a fenced block of code. Models that were taught markers write such calls, too, the small ones more
often than not.
"""

from __future__ import annotations

from typing import Final

from .call_object import CallObject
from .parser import ObjectParser
from .stream import find, starts

FENCE: Final = "```"
_TAG: Final = "json"


class LooseParser(ObjectParser):
    """See CallParser. A call is an object, several, or a list of them, at the beginning of the answer or
    behind `marker`; or objects at the beginning of a fenced block. They are calls of `names`; everything
    else is text.
    """

    def __init__(self, names: frozenset[str], key: str, *, marker: str = "") -> None:
        """`key`: what arguments are called."""
        self._names = names
        self._key = key
        self._in_fence = False
        super().__init__()
        self._marker = marker
        self._in_list = False
        self._separated = False
        self._state = self._before_call

    def _new_object(self) -> CallObject:
        return CallObject(self._out.begin, self._names, (self._key,), name_first=self._in_fence)

    def _text_markers(self) -> tuple[str, ...]:
        return (FENCE, self._marker) if self._marker else (FENCE,)

    def _in_text(self, text: str, at: int) -> int:
        position, marker = find(text, at, self._text_markers())
        self._out.content(text[at:position])
        if marker is None:
            return position
        self._in_list = self._in_fence = self._separated = False
        self._raw = [marker]
        self._found(marker)
        return position + len(marker)

    def _found(self, marker: str) -> None:
        """Go on behind a marker."""
        self._in_fence = marker == FENCE
        self._state = self._fenced if self._in_fence else self._before_call

    def _fenced(self, text: str, at: int) -> int:
        """Behind the three backticks: maybe what the block's language is called."""
        tagged = starts(text, at, _TAG)
        if tagged is None:
            return at
        self._state = self._in_block
        if tagged:
            self._raw.append(_TAG)
            return at + len(_TAG)
        return at

    def _in_block(self, text: str, at: int) -> int:
        at = self._spaces(text, at)
        if at < len(text):
            self._try_object(text[at])
        return at

    def _before_call(self, text: str, at: int) -> int:
        """At the answer's beginning, or behind a marker."""
        at = self._spaces(text, at)
        if at == len(text):
            return at
        if self._marker and self._marker not in self._raw:
            found = starts(text, at, self._marker)
            if found is None:
                return at
            if found:
                self._raw.append(self._marker)
                return at + len(self._marker)
        if text[at] == "[" and not self._in_list:
            self._in_list = True
            self._raw.append("[")
            return at + 1
        self._try_object(text[at])
        return at

    def _called(self, text: str, at: int) -> int:
        """Behind a call: a separator, another object, the end of the list or block, or text."""
        at = self._spaces(text, at)
        if at == len(text):
            return at
        fence = starts(text, at, FENCE) if self._in_fence else False
        if fence is None:
            return at
        if fence:
            self._raw = []
            self._state = self._in_text
            return at + len(FENCE)
        if text[at] in ";," and not self._separated:
            self._separated = True
            self._raw.append(text[at])
            return at + 1
        if text[at] == "]" and self._in_list:
            self._in_list = False
            self._raw = []
            return at + 1
        self._separated = False
        self._try_object(text[at])
        return at

    def _broken(self, text: str, at: int) -> int:
        position = super()._broken(text, at)
        ended = self._state == self._in_text and self._in_fence
        return position + len(FENCE) if ended else position

    def _ends(self) -> tuple[str, ...]:
        return (FENCE,) if self._in_fence else ()
