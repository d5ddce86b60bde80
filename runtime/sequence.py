"""One sequence as the scheduler sees it: its tokens, how many of them are in the cache, and the pages that
hold them.

No tensor library here: tokens and pages are `array("i")`, whose memory numpy can read without a copy.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable
from typing import Protocol


class Status(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """Holds no pages; new, or preempted and to be computed again."""
    RUNNING = "running"
    """Holds pages."""
    FINISHED = "finished"
    """Holds no pages and is no longer scheduled."""


class Adapted(Protocol):
    """What a sequence has to know of an adapter."""

    slot: int
    """Where its factors stand in the executor."""
    salt: bytes


class Sequence:
    """Tokens of one sequence (prompt, then generated) and its place in the cache.

    Invariants, checked by the tests: pages are held only while RUNNING; `block_table` has room for the
    `num_held` tokens whose keys and values are written and were not evicted; at least the last token is not
    computed yet, because the next token needs its logits.
    """

    __slots__ = (
        "adapter",
        "block_hashes",
        "block_table",
        "drafted",
        "evicted",
        "first_position",
        "num_computed",
        "num_prompt",
        "order",
        "restored",
        "salt",
        "saved",
        "score_end",
        "scored",
        "slots",
        "state_slot",
        "status",
        "tokens",
        "window_starts",
        "window_tables",
    )

    def __init__(
        self, prompt: Iterable[int], order: tuple[int, int] = (0, 0), *, slots: int = 1, salt: bytes = b""
    ):
        """`order`: (arrival number, choice), the smaller the older. `slots`: running sequences that it will
        become.

        `salt`: prefixes are shared only between sequences of the same salt (an adapter's name, a tenant).
        """
        self.tokens = array("i", prompt)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        # Computed tokens that are gone from the cache, behind the sinks (eviction.py): a later token's place
        # there, which is its position for the model, is its index less these.
        self.evicted = 0
        # What positions are counted from for the model (late_scaling.py); 0 nearly always.
        self.first_position = 0
        self.block_table = array("i")
        # Pages of the layers of each window, place by place as in `block_table`; those before `window_starts`
        # were given back, and their entries mean nothing.
        self.window_tables: list[array[int]] = []
        self.window_starts: list[int] = []
        self.block_hashes: list[bytes] = []
        self.order = order
        self.slots = slots
        self.salt = salt
        self.adapter = -1  # slot of the adapter that its tokens are computed with; -1 for none
        self.drafted = 0  # tokens at the end that are guesses, between two steps never any
        self.score_end = 0  # logits of all tokens before this one are wanted, not only the last one's
        self.scored = 0  # of those, how many were given
        self.state_slot = -1  # row of the state cache that it owns; -1 for none
        self.restored = False  # whether its prefix was looked for on disk (prefix_pages.py)
        self.saved = 0  # pages of its prompt that were looked at for keeping them there
        self.status = Status.WAITING

    def use(self, adapter: Adapted | None) -> None:
        """Compute the tokens with an adapter; before any of them is."""
        if adapter is not None:
            self.adapter, self.salt = adapter.slot, adapter.salt

    def count_from(self, first_position: int) -> None:
        """Count positions from another one, for a sequence that holds no pages: no prefix of it is known as
        one that was counted from 0.
        """
        assert self.status is not Status.RUNNING and not self.block_table
        self.first_position = first_position
        self.block_hashes.clear()
        self.restored, self.saved = False, 0

    @property
    def prefix_seed(self) -> bytes:
        """What the hashes of its prefixes begin with."""
        return self.salt + self.first_position.to_bytes(4, "little") if self.first_position else self.salt

    @property
    def remaining(self) -> int:
        """Tokens that are known but not in the cache yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.num_computed - self.evicted

    @property
    def to_score(self) -> int:
        """Tokens whose logits are wanted and were not given yet, besides the last token's."""
        return self.score_end - self.scored

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    def share_state(self, parent: Sequence) -> None:
        """Become a copy of `parent` apart from its order; the block manager counts the pages."""
        self.tokens = array("i", parent.tokens)
        self.num_prompt = parent.num_prompt
        self.num_computed = parent.num_computed
        self.evicted = parent.evicted
        self.first_position = parent.first_position
        self.block_table = array("i", parent.block_table)
        self.window_tables = [array("i", table) for table in parent.window_tables]
        self.window_starts = list(parent.window_starts)
        self.block_hashes = list(parent.block_hashes)
        self.salt = parent.salt
        self.adapter = parent.adapter
