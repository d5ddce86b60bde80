"""Pages of the KV cache: who holds them, which are free, and which still hold a prefix that may come again.

Paging and copy-on-write after Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (SOSP 2023), sections 4.2 to 4.4. A full page whose keys and values are written is found again
by the hash of its tokens chained to the hash of the page before it, so equal hashes mean equal prefixes.

A page is in exactly one of three states, hence `num_free + num_cached + num_used == num_pages` at any time:

    free     held by nobody, contents meaningless
    cached   held by nobody, contents known by hash; taken over by the next sequence with that prefix, and
             given up least recently used first when free pages run out
    used     held by `reference_count` > 0 sequences

These are the pages of the layers that see everything. Layers that see a window have pages of their own beside
them (`window_pages.py`), which never run out before these do: whoever plans counts these alone.

With an `Eviction` a sequence that fills its pages gives some back before it goes on (eviction.py). The pages
behind the gap are then its own, and known by no hash: their keys are turned to other positions.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from .eviction import Eviction
from .sequence import Sequence, Status
from .state_slots import StateSlots
from .window_pages import WindowPages


class BlockManager:
    """Counts references to pages. Holds no tensors: the executor owns the pages' contents."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_cache: bool = True,
        states: StateSlots | None = None,
        windows: Iterable[tuple[int, int]] = (),
        eviction: Eviction | None = None,
    ):
        """`states`: rows of a state cache, of which each sequence that holds pages owns one. Pages hold no
        states, so that a prefix cannot be shared then. `windows`: (tokens, pages) of each window that layers
        see: as many pages as there are here, or `most_pages`. `eviction`: what sequences give back when they
        are as long as that says; windows are then no longer than what stays, or see all of it.
        """
        assert states is None or not prefix_cache
        assert eviction is None or (states is None and eviction.capacity <= num_pages)
        self.eviction = eviction
        self.rotations: list[int] = []
        """Pages whose keys go back by `eviction.shift` positions before the next step, after all copies."""
        self.states = states
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: a page just freed is warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self.windows = [WindowPages(pages, page_size, window) for window, pages in windows]

    @property
    def num_free(self) -> int:
        """Pages held by nobody whose contents mean nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages held by nobody that a prefix may still claim."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def most_pages(self, tokens: int) -> int:
        """Pages that a sequence of this many tokens holds at a time at most."""
        pages = self.pages_for(tokens)
        return pages if self.eviction is None else min(pages, self.eviction.capacity)

    # Prefix cache ----------------------------------------------------------------------------------------

    def lookup(self, sequence: Sequence) -> list[int]:
        """Pages in use or cached that hold the longest known prefix of the sequence; takes none of them.

        At least one token is left out, because the logits of the last one are needed.
        """
        pages: list[int] = []
        if not self.prefix_cache:
            return pages
        for index in range(self._shareable(sequence)):
            page = self._page_of.get(self._block_hash(sequence, index))
            if page is None:
                break
            pages.append(page)
        length = -1
        while self.windows and length != len(pages):  # what one window's pages allow, another's may not
            length = len(pages)
            del pages[min(window.longest_prefix(pages) for window in self.windows) :]
        return pages

    def count_unused(self, pages: Iterable[int]) -> int:
        """How many of the pages no sequence holds now (taking them makes that many fewer available)."""
        return sum(self._references[page] == 0 for page in pages)

    def shareable_hash(self, sequence: Sequence, index: int) -> bytes | None:
        """Hash of the sequence's prefix up to the end of page `index`; None where that page can never be
        shared.
        """
        if not self.prefix_cache or index >= self._shareable(sequence):
            return None
        return self._block_hash(sequence, index)

    def _shareable(self, sequence: Sequence) -> int:
        """Pages at the sequence's beginning that may be others' too: full ones before its last token, and
        before any was evicted.
        """
        full = (len(sequence.tokens) - 1) // self.page_size
        return full if self.eviction is None else min(full, self.eviction.capacity)

    def prefix_hash(self, sequence: Sequence, index: int) -> bytes:
        """Hash of the sequence's tokens up to the end of page `index`, which must be full."""
        return self._block_hash(sequence, index)

    def find(self, block_hash: bytes) -> int | None:
        """The page with these contents; where nobody holds it, it is the last now to be given up."""
        page = self._page_of.get(block_hash)
        if page in self._cached:
            self._cached.move_to_end(page)
        return page

    def adopt(self, block_hash: bytes) -> int:
        """A page, cached from now on, whose contents the caller writes before the next step. One must be
        available, and none with these contents be there.
        """
        assert self.prefix_cache and not self.windows and block_hash not in self._page_of
        page = self._take()
        self._references[page] = 0
        self._page_of[block_hash], self._hash_of[page] = page, block_hash
        self._cached[page] = None
        return page

    def forget(self, page: int) -> None:
        """A page that was adopted holds nothing after all."""
        block_hash = self._hash_of[page]
        assert block_hash is not None and self._references[page] == 0
        del self._cached[page], self._page_of[block_hash]
        self._hash_of[page] = None
        self._free.append(page)

    def claim(self, sequence: Sequence, pages: list[int]) -> None:
        """Start the sequence on the pages that `lookup` found for it."""
        assert not sequence.block_table
        assert sequence.num_computed == sequence.evicted == 0
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
        sequence.block_table.extend(pages)
        sequence.num_computed = len(pages) * self.page_size
        claimed = [window.claim(pages) for window in self.windows]
        sequence.window_tables = [table for table, _ in claimed]
        sequence.window_starts = [first for _, first in claimed]

    def commit(self, sequence: Sequence, count: int) -> None:
        """Note that the next `count` tokens' keys and values are written; pages that became full can be found
        now, and those that lie before a window are given back.
        """
        first = sequence.num_computed // self.page_size
        sequence.num_computed += count
        if self.prefix_cache and not sequence.evicted:
            self._note_full(sequence, first)
        self._slide(sequence)

    def advance(self, sequence: Sequence, count: int) -> None:
        """`commit` for a sequence whose pages are not to be found again."""
        sequence.num_computed += count
        self._slide(sequence)

    def _slide(self, sequence: Sequence) -> None:
        for which, window in enumerate(self.windows):
            table, start = sequence.window_tables[which], sequence.window_starts[which]
            stop = window.first_seen(sequence.num_held)
            for index in range(start, stop):
                window.drop(table, index, keep=self._is_known(sequence.block_table[index]))
            sequence.window_starts[which] = max(start, stop)

    def _is_known(self, page: int) -> bool:
        return self._hash_of[page] is not None

    def _note_full(self, sequence: Sequence, first: int) -> None:
        for index in range(first, sequence.num_computed // self.page_size):
            page = sequence.block_table[index]
            block_hash = self._block_hash(sequence, index)
            # Another sequence may have computed the same prefix at the same time: the first one's page stays.
            if self._hash_of[page] is None and block_hash not in self._page_of:
                self._page_of[block_hash] = page
                self._hash_of[page] = block_hash

    def forget_hashes(self, sequence: Sequence) -> None:
        """Forget hashes of pages that reach beyond the sequence's tokens, of which some were taken away."""
        del sequence.block_hashes[len(sequence.tokens) // self.page_size :]

    def _block_hash(self, sequence: Sequence, index: int) -> bytes:
        hashes, size = sequence.block_hashes, self.page_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.prefix_seed
            block = sequence.tokens[start : start + size].tobytes()
            hashes.append(blake2b(block, digest_size=16, key=parent[:64]).digest())
        return hashes[index]

    # Allocation ------------------------------------------------------------------------------------------

    def pages_to_extend(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that `extend` would take: new ones, and copies of shared pages that would be written; less
        what an eviction gives back before. Tokens beyond `reach` need pages of those that go there.
        """
        num_tokens = min(num_tokens, self.reach(sequence))
        if self._evicts(sequence, num_tokens):
            return max(0, self.pages_for(num_tokens - sequence.num_computed) - self._gained(sequence))
        held = len(sequence.block_table)
        new = max(0, self.pages_for(num_tokens - sequence.evicted) - held)
        shared = sum(1 for index in self._written(sequence, num_tokens) if self._is_shared(sequence, index))
        return new + shared

    def room(self, sequence: Sequence) -> int:
        """Tokens that the sequence can have with the pages that are available now; to be computed at once."""
        start = sequence.num_computed
        if self._evicts(sequence, start + 1):
            pages = self.num_available + self._gained(sequence)
            return min(self.reach(sequence), start + max(0, pages) * self.page_size)
        copies = self.pages_to_extend(sequence, start + 1) if start % self.page_size else 0
        pages = len(sequence.block_table) + self.num_available - copies
        return min(self.reach(sequence), sequence.evicted + pages * self.page_size)

    def extend(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]]:
        """Give the sequence room for its first `num_tokens` tokens, of which those not computed yet are
        written next.

        Returns page copies (source, destination) to make before the step: a page that others hold too is
        copied first. The caller has made sure that `pages_to_extend` pages are available, and asks for no
        more tokens than `reach`.
        """
        assert num_tokens <= self.reach(sequence), "a chunk beyond an eviction"
        if self.states is not None and sequence.state_slot < 0:
            self.states.give(sequence)
        copies = self._evict(sequence) if self._evicts(sequence, num_tokens) else []
        for index in self._written(sequence, num_tokens):
            if self._is_shared(sequence, index):
                copies.append(self._copied(sequence, index))
        if self.windows and not sequence.window_tables:  # a sequence that claimed nothing
            sequence.window_tables = [array("i") for _ in self.windows]
            sequence.window_starts = [0 for _ in self.windows]
        for _ in range(self.pages_for(num_tokens - sequence.evicted) - len(sequence.block_table)):
            sequence.block_table.append(self._take())
            for window, table in zip(self.windows, sequence.window_tables, strict=True):
                window.add(table, sequence.block_table[-1])
        return copies

    def _copied(self, sequence: Sequence, index: int) -> tuple[int, int]:
        """(source, destination): a page of the sequence's own in place of one that it shares."""
        source = sequence.block_table[index]
        destination = self._take()
        self._references[source] -= 1
        sequence.block_table[index] = destination
        for which, window in enumerate(self.windows):
            if index >= sequence.window_starts[which]:
                window.copy(sequence.window_tables[which], index, destination, keep=self._is_known(source))
        return source, destination

    def forget_copies(self) -> None:
        """The step that was planned is not computed: its pages are others' by the next one."""
        self.rotations.clear()
        for window in self.windows:
            window.copies.clear()
            window.rotations.clear()

    def shrink(self, sequence: Sequence) -> None:
        """Give back the pages that hold none of the sequence's computed tokens."""
        while len(sequence.block_table) > self.pages_for(sequence.num_held):
            for window, table in zip(self.windows, sequence.window_tables, strict=True):
                window.drop(table, len(table) - 1, keep=False)
                table.pop()
            page = sequence.block_table.pop()
            self._references[page] -= 1
            assert self._references[page] == 0 and self._hash_of[page] is None, "only its own, new page"
            self._free.append(page)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Make `child` share all pages of `parent`, the last one too; whoever writes to a shared page copies
        it. Of a state cache the child owns a row of its own, a copy of the parent's.
        """
        child.share_state(parent)
        if self.states is not None and child.block_table:
            self.states.fork(parent, child)
        for page in child.block_table:
            self._references[page] += 1
        for which, table in enumerate(child.window_tables):
            self.windows[which].share(table, child.window_starts[which])

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's pages away. Known prefixes stay cached, their ends to be given up first."""
        for which, table in enumerate(sequence.window_tables):
            for index in range(len(table) - 1, sequence.window_starts[which] - 1, -1):
                self.windows[which].drop(table, index, keep=self._is_known(sequence.block_table[index]))
        sequence.window_tables, sequence.window_starts = [], []
        for page in reversed(sequence.block_table):
            self._drop(page)
        del sequence.block_table[:]
        sequence.num_computed = sequence.evicted = 0
        if self.states is not None and sequence.state_slot >= 0:
            self.states.take(sequence)

    def _written(self, sequence: Sequence, num_tokens: int) -> range:
        """Indices of pages that the sequence holds and that the tokens up to `num_tokens` write to."""
        held = len(sequence.block_table)
        end = self.pages_for(num_tokens - sequence.evicted)
        return range(sequence.num_held // self.page_size, min(held, end))

    def _is_shared(self, sequence: Sequence, index: int) -> bool:
        return self._references[sequence.block_table[index]] > 1

    def _drop(self, page: int) -> None:
        """One sequence fewer holds the page."""
        self._references[page] -= 1
        if self._references[page] == 0:
            if self._hash_of[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            block_hash = self._hash_of[page]
            assert block_hash is not None
            del self._page_of[block_hash]
            self._hash_of[page] = None
            for window in self.windows:
                window.forget(page)
        self._references[page] = 1
        return page

    # Eviction --------------------------------------------------------------------------------------------

    def reach(self, sequence: Sequence) -> int:
        """Tokens of the sequence up to which the next chunk may go: to where something is evicted again."""
        if self.eviction is None:
            return sys.maxsize
        gone = self.eviction.shift if sequence.num_held == self.eviction.tokens else 0
        return sequence.evicted + gone + self.eviction.tokens

    def _evicts(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence is full and to go on."""
        if self.eviction is None or num_tokens <= sequence.num_computed:
            return False
        return sequence.num_held == self.eviction.tokens

    def _gained(self, sequence: Sequence) -> int:
        """Pages that an eviction makes available, less the copies that it takes of shared ones that stay;
        below 0 where it takes more.
        """
        assert self.eviction is not None
        first, last = self.eviction.sinks, self.eviction.sinks + self.eviction.dropped
        table, count = sequence.block_table, self._references
        copies = sum(count[page] > 1 for page in table[last:]) if self.eviction.rotates else 0
        return sum(count[page] == 1 for page in table[first:last]) - copies

    def _evict(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Give back the pages between the sinks and the newest, which move up; the copies that this takes."""
        assert self.eviction is not None
        first, last = self.eviction.sinks, self.eviction.sinks + self.eviction.dropped
        for which, table in enumerate(sequence.window_tables):
            start = sequence.window_starts[which]
            assert start == 0 or start >= last, "a window that begins within what is evicted"
            for index in range(max(start, first), last):
                self.windows[which].drop(table, index, keep=self._is_known(sequence.block_table[index]))
            del table[first:last]
            sequence.window_starts[which] = max(0, start - (last - first))
        for page in reversed(sequence.block_table[first:last]):
            self._drop(page)
        del sequence.block_table[first:last]
        sequence.evicted += self.eviction.shift
        if not self.eviction.rotates:
            return []
        copies: list[tuple[int, int]] = []
        for index in range(first, len(sequence.block_table)):
            if self._is_shared(sequence, index):
                copies.append(self._copied(sequence, index))
            else:
                self._make_unknown(sequence, index)
            self.rotations.append(sequence.block_table[index])
            for which, window in enumerate(self.windows):
                if index >= sequence.window_starts[which]:
                    window.rotations.append(sequence.window_tables[which][index])
        return copies

    def _make_unknown(self, sequence: Sequence, index: int) -> None:
        """Let nobody find a page that this sequence alone holds: it is about to hold something else."""
        page = sequence.block_table[index]
        block_hash = self._hash_of[page]
        if block_hash is None:
            return
        del self._page_of[block_hash]
        self._hash_of[page] = None
        for which, window in enumerate(self.windows):
            if index < sequence.window_starts[which]:
                window.forget(page)

    # Checking --------------------------------------------------------------------------------------------

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books balance, given all sequences. For idle time and tests."""
        sequences = list(sequences)
        if self.states is not None:
            self.states.check(sequences)
        held: Counter[int] = Counter()
        for sequence in sequences:
            held.update(sequence.block_table)
            assert sequence.status is Status.RUNNING or not sequence.block_table, (
                "pages held while not running"
            )
            assert sequence.num_held <= len(sequence.block_table) * self.page_size, "tokens without a page"
            assert len(sequence.block_table) == self.most_pages(len(sequence.block_table) * self.page_size), (
                "more pages than an eviction leaves"
            )
            assert not sequence.evicted or not self._known_behind(sequence), "a turned page with a hash"
        assert all(self._references[page] == held[page] for page in range(self.num_pages)), "reference counts"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page was freed twice"
        assert len(free | cached | set(held)) == len(free) + len(cached) + len(held), "a page in two states"
        assert len(free) + len(cached) + len(held) == self.num_pages, "a page leaked"
        assert all(self._hash_of[page] is None for page in free), "a free page with a hash"
        assert all(self._hash_of[page] is not None for page in cached), "a cached page without a hash"
        by_page = {
            page: block_hash for page, block_hash in enumerate(self._hash_of) if block_hash is not None
        }
        assert {h: p for p, h in by_page.items()} == self._page_of, "hash table and pages disagree"
        for which, window in enumerate(self.windows):
            window.check(self._held(which, sequences), [*cached, *held])

    def _known_behind(self, sequence: Sequence) -> bool:
        """Whether a page behind the sinks can be found, although keys in it may have been turned."""
        assert self.eviction is not None
        table = sequence.block_table[self.eviction.sinks :]
        return self.eviction.rotates and any(self._is_known(page) for page in table)

    def _held(self, which: int, sequences: Iterable[Sequence]) -> list[tuple[int, int]]:
        """(page, twin) of every page of a window's layers that a sequence holds."""
        pairs: list[tuple[int, int]] = []
        for sequence in sequences:
            if not sequence.window_tables:
                assert not sequence.block_table, "pages without those of a window's layers"
                continue
            table, start = sequence.window_tables[which], sequence.window_starts[which]
            assert len(table) == len(sequence.block_table), "tables of two lengths"
            assert start == self.windows[which].first_seen(sequence.num_held), "not a window's pages"
            pairs += zip(table[start:], sequence.block_table[start:], strict=True)
        return pairs
