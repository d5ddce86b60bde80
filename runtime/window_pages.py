"""Pages of the layers that see a window only: as many a sequence as the window needs, whatever its length.

Such layers have pages of their own. A page of them stands beside a page of the other layers (its twin, which
`BlockManager` counts), for the same tokens of the same sequence, and is written in the same step. When a
sequence has moved on by a window, it gives the page back; its twin stays. So a twin may be without its page,
but never the other way round, and what there is to know of a page (its prefix's hash, whether it can be found
again) is known of its twin.

A page is free, cached (held by nobody; a prefix that ends within a window behind it may claim it with its
twin) or used, as in `BlockManager`.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

Copy = tuple[int, int]


def most_pages(window: int, page_size: int, *, max_sequences: int, max_batch_tokens: int) -> int:
    """Pages that all sequences together can hold at a time: of each those that its window touches, the last
    one of the tokens that it computes and the first one perhaps begun; one sequence more, which is scored.
    """
    return (max_sequences + 1) * _each(window, page_size) + -(-max_batch_tokens // page_size)


def _each(window: int, page_size: int) -> int:
    return (window - 1) // page_size + 3


class WindowPages:
    """Pages of the layers of one window, in tokens. Holds no tensors."""

    def __init__(self, num_pages: int, page_size: int, window: int) -> None:
        self.num_pages, self.page_size, self.window = num_pages, page_size, window
        self.each = _each(window, page_size)
        """Pages of one sequence at most, but for those of the tokens that a step computes."""
        self.copies: list[Copy] = []
        """Pages to copy before the next step, (source, destination)."""
        self.rotations: list[int] = []
        """Pages whose keys are turned back before the next step, as in `BlockManager.rotations`."""
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[int, int] = {}  # twin → page
        self._twin_of = [-1] * num_pages

    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages held by nobody that a prefix may still claim."""
        return len(self._cached)

    def first_seen(self, num_held: int) -> int:
        """Index of the first page that the token at place `num_held` sees."""
        return max(0, num_held - self.window + 1) // self.page_size

    def longest_prefix(self, twins: Sequence[int]) -> int:
        """How many of a prefix's first pages can be claimed: those behind which a whole window is there."""
        run = longest = 0
        for index, twin in enumerate(twins):
            run = run + 1 if twin in self._page_of else 0
            if run >= index + 1 - self.first_seen((index + 1) * self.page_size):
                longest = index + 1
        return longest

    def claim(self, twins: Sequence[int]) -> tuple[array[int], int]:
        """(table, index of the first page in it) of a sequence that begins on these twins."""
        first = self.first_seen(len(twins) * self.page_size)
        table = array("i", bytes(4 * first))
        for twin in twins[first:]:
            page = self._page_of[twin]
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1
            table.append(page)
        return table, first

    def add(self, table: array[int], twin: int) -> None:
        """A new page behind the last one."""
        table.append(self._take(twin))

    def copy(self, table: array[int], index: int, twin: int, *, keep: bool) -> None:
        """A page of the sequence's own for one that it shares and is about to write. `twin`: the new page's.
        `keep` as in `_drop`.
        """
        source = table[index]
        table[index] = self._take(twin)
        self._drop(source, keep)
        self.copies.append((source, table[index]))

    def share(self, table: array[int], first: int) -> None:
        """Another sequence holds the same pages."""
        for page in table[first:]:
            self._references[page] += 1

    def drop(self, table: array[int], index: int, *, keep: bool) -> None:
        """Give a page back; the table's entry means nothing then."""
        self._drop(table[index], keep)
        table[index] = 0

    def forget(self, twin: int) -> None:
        """The twin means nothing any more: a page that is cached with it is free."""
        page = self._page_of.get(twin)
        if page is not None:
            del self._cached[page]
            self._release(page)

    def _drop(self, page: int, keep: bool) -> None:
        """One sequence fewer holds the page. `keep`: after the last one others may claim it with its twin."""
        self._references[page] -= 1
        if self._references[page] == 0:
            if keep:
                self._cached[page] = None
            else:
                self._release(page)

    def _release(self, page: int) -> None:
        del self._page_of[self._twin_of[page]]
        self._twin_of[page] = -1
        self._free.append(page)

    def _take(self, twin: int) -> int:
        if not self._free:
            page, _ = self._cached.popitem(last=False)
            self._release(page)
        page = self._free.pop()
        self._references[page] = 1
        self._twin_of[page] = twin
        self._page_of[twin] = page
        return page

    def check(self, held: Iterable[tuple[int, int]], known: Iterable[int]) -> None:
        """Raise AssertionError unless the books balance, given (page, twin) of every page that a sequence
        holds, and the twins that are used or cached.
        """
        pairs = list(held)
        counts = Counter(page for page, _ in pairs)
        assert all(self._references[page] == counts[page] for page in range(self.num_pages)), "references"
        assert all(self._twin_of[page] == twin for page, twin in pairs), "a page beside another twin"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page was freed twice"
        assert len(free) + len(cached) + len(counts) == self.num_pages, "a page leaked"
        assert len(free | cached | set(counts)) == self.num_pages, "a page in two states"
        assert {page for page, twin in enumerate(self._twin_of) if twin >= 0} == cached | set(counts), "twins"
        twins = {twin: page for page, twin in enumerate(self._twin_of) if twin >= 0}
        assert twins == self._page_of, "twins and pages disagree"
        assert set(twins) <= set(known), "a page beside a twin that means nothing"
