"""Text of a growing token sequence: never half a character, and in the end exactly the decoding of all
tokens.

Also stop strings, which may begin in one token and end in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def byte_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def text_alone(self, token_id: int, *, skip_special_tokens: bool = True) -> str | None: ...


class StreamDecoder:
    """Decodes token by token.

    It decodes a window that begins with tokens whose text is out already, so that decoders which treat the
    first token differently (a stripped space) treat the same one in both. Text is held back while it ends in
    the middle of a character, and while the last token is a single byte: a decoder with byte fallback judges
    a run of bytes as a whole, and one bad byte at its end turns all of the run into U+FFFD.
    """

    def __init__(self, tokenizer: Decoder, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._window = 0  # the window's first token
        self._done = 0  # tokens whose text is out
        self._shown = ""  # text of the window that is out
        self._length = 0  # characters given out
        self._in_bytes = False  # the last token that is not left out is a single byte

    def fork(self) -> StreamDecoder:
        """A copy that goes on by itself."""
        other = StreamDecoder(self._tokenizer, skip_special_tokens=self._skip)
        other._ids = list(self._ids)
        other._window, other._done, other._shown = self._window, self._done, self._shown
        other._length, other._in_bytes = self._length, self._in_bytes
        return other

    def _decode(self, start: int, stop: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=self._skip)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain now, which may be empty."""
        whole = self._done == len(self._ids)
        self._ids.append(token_id)
        text = self._tokenizer.text_alone(token_id, skip_special_tokens=self._skip) if whole else None
        if text is not None:  # nearly every token of most models, and a window would be decoded twice
            self._window = self._done = len(self._ids)
            self._shown = ""
            self._length += len(text)
            return text
        if not (self._skip and token_id in self._tokenizer.special_ids):
            self._in_bytes = token_id in self._tokenizer.byte_ids
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._shown) :]
        # The window must keep a token that gave text: the one that a decoder would strip a space from.
        self._window, self._done = self._done, len(self._ids)
        self._shown = self._decode(self._window)
        self._length += len(new)
        return new

    def finish(self) -> str:
        """What is held back, once no token follows; U+FFFD for bytes that make no character."""
        text = self._decode(0)
        rest = text[self._length :]
        self._length = max(self._length, len(text))
        return rest


class StopStrings:
    """Lets text through until one of the stop strings occurs; holds back what may be the beginning of one."""

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def fork(self) -> StopStrings:
        """A copy that goes on by itself."""
        other = StopStrings(self._stops)
        other._held, other.found = self._held, self.found
        return other

    def push(self, text: str) -> str:
        """Add text; returns what can be shown. After a match `found` is set and all that follows is dropped.

        The match that is complete first counts, and among those the longest, so that the outcome does not
        depend on how the text was cut into pieces.
        """
        if not self._stops or self.found is not None:
            return text if self.found is None else ""
        held = self._held + text
        matches = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if matches:
            end, place = min(matches)
            self.found = held[place:end]
            self._held = ""
            return held[:place]
        keep = max(self._overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text held back, once none follows."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
