"""Which pages a sequence gives back when its cache is full, so that it can go on without end.

After Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR 2024, arXiv:2309.17453),
section 3.2: the first tokens stay (nearly every head attends to them, whatever they say), the newest stay,
and positions are those within the cache. There one token goes for each that comes; here the cache fills, and
then the older half of what is not at the beginning goes at once, so that keys are turned to their new places
once in many tokens and no key is ever turned twice.

When that happens depends on nothing but the count of tokens: at `capacity`, and from then on after every
`dropped` pages. Chunks of a prompt and guesses end there, so a sequence's tokens are the same alone, in a
batch, cut in any way, and computed again.

No tensor library here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Eviction:
    """Numbers of pages of one sequence, all of the same `page_size` in tokens."""

    page_size: int
    capacity: int
    """Pages that it holds at most."""
    sinks: int
    """Pages at the beginning that stay."""
    rotates: bool = True
    """Whether keys hold positions, so that those behind the gap are turned back."""

    @property
    def dropped(self) -> int:
        """Pages that go at a time: those after the sinks and before the newest `kept`."""
        return self.capacity - self.sinks - self.kept

    @property
    def kept(self) -> int:
        """The newest pages, which move to the place after the sinks: at most half of what is not at the
        beginning, so that all of them go the next time.
        """
        return (self.capacity - self.sinks) // 2

    @property
    def shift(self) -> int:
        """Tokens that go at a time: positions by which the newest move."""
        return self.dropped * self.page_size

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that the cache holds at most."""
        return self.capacity * self.page_size


__all__ = ["Eviction"]
