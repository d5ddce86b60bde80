"""Pages of layers that see a window: the books under any sequence of operations, what is given back and when,
which prefixes can be claimed.

`WindowMachine` runs the machine of test_runtime_blocks.py with windows beside it, as many pages for each as
`most_pages` says or as the other layers have. Beside the books it keeps what each page would hold, written
and copied as an executor would: a token that is computed must find its whole window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.eviction import Eviction
from llmc.runtime.executor import StepInputs
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.scheduler import Plan, Scheduler
from llmc.runtime.sequence import Sequence, Status
from llmc.runtime.window_pages import most_pages

from .fake_executor import FakeExecutor
from .test_runtime_blocks import PAGE, SchedulerMachine

Content = dict[tuple[int, int], tuple[tuple[int, ...], int]]
"""(page, offset) → the tokens up to the one whose keys stand there, and the position that they hold."""


class WindowMachine(SchedulerMachine):
    """The scheduler over pages of two windows."""

    sinks = 0

    @initialize(
        pages=st.integers(4, 40),
        budget=st.integers(3, 20),
        most=st.integers(1, 3),
        cache=st.booleans(),
        windows=st.sampled_from([(1,), (2,), (5,), (9,), (3, 8), (4, 1), (200,)]),
    )
    def start(self, pages: int, budget: int, most: int, cache: bool, windows: tuple[int, ...]) -> None:
        sizes = [
            (w, min(pages, most_pages(w, PAGE, max_sequences=most, max_batch_tokens=budget))) for w in windows
        ]
        self.blocks = BlockManager(
            pages, PAGE, prefix_cache=cache, windows=sizes, eviction=self.eviction(pages)
        )
        self.scheduler: Scheduler[Sequence] = Scheduler(
            self.blocks, max_batch_tokens=budget, max_sequences=most
        )
        self.limit = pages * PAGE
        self.longest = self.limit * (1 if self.blocks.eviction is None else self.lengths)
        self.arrivals = 0
        self.finished: list[Sequence] = []
        self.contents: list[Content] = [{} for _ in windows]
        schedule = self.scheduler.schedule
        self.scheduler.schedule = lambda: self.computed(schedule())  # type: ignore[method-assign]

    def computed(self, plan: Plan[Sequence]) -> Plan[Sequence]:
        """Copy, write and read as an executor would."""
        for which, window in enumerate(self.blocks.windows):
            content = self.contents[which]
            copied = {(t, o): content.get((s, o), ((), 0)) for s, t in window.copies for o in range(PAGE)}
            window.copies.clear()
            content.update(copied)
            assert len(set(window.rotations)) == len(window.rotations)
            for slot in [(page, offset) for page in window.rotations for offset in range(PAGE)]:
                assert self.blocks.eviction is not None and window._references[slot[0]] == 1
                content[slot] = content[slot][0], content[slot][1] - self.blocks.eviction.shift
            window.rotations.clear()
            written: set[tuple[int, int]] = set()
            for chunk in plan.chunks:
                tokens, table = chunk.sequence.tokens.tolist(), chunk.sequence.window_tables[which]
                for place in range(chunk.place, chunk.place + chunk.count):
                    slot = table[place // PAGE], place % PAGE
                    assert slot not in written, "two tokens in one slot"
                    written.add(slot)
                    content[slot] = tuple(tokens[: place + chunk.sequence.evicted + 1]), place
            for chunk in plan.chunks:
                tokens, table = chunk.sequence.tokens.tolist(), chunk.sequence.window_tables[which]
                for place in range(chunk.place, chunk.place + chunk.count):
                    for seen in range(max(0, place - window.window + 1), place + 1):
                        gone = chunk.sequence.evicted if seen // PAGE >= self.sinks else 0
                        found = content.get((table[seen // PAGE], seen % PAGE))
                        assert found == (tuple(tokens[: seen + gone + 1]), seen), "another token's keys"
        return plan

    @rule(length=st.integers(20, 90))
    def add_long(self, length: int) -> None:
        self.add(0, length, 1)


WindowMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWindows = WindowMachine.TestCase


class EvictingWindowMachine(WindowMachine):
    """The same with sequences that grow to twice the cache: windows that what stays fills, and one that sees
    all that is in the cache.
    """

    lengths = 2

    def eviction(self, pages: int) -> Eviction | None:
        self.sinks = pages % 3
        found = Eviction(PAGE, pages, self.sinks)
        return found if found.kept * PAGE >= 9 else None

    @rule(length=st.integers(20, 90))
    def add_long(self, length: int) -> None:
        self.add(1, length, 2)


EvictingWindowMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=30, deadline=None)
TestEvictingWindows = EvictingWindowMachine.TestCase


def _running(tokens: list[int]) -> Sequence:
    sequence = Sequence(tokens)
    sequence.status = Status.RUNNING
    return sequence


def _computed(blocks: BlockManager, tokens: list[int], chunk: int = PAGE) -> Sequence:
    sequence = _running(tokens)
    blocks.claim(sequence, blocks.lookup(sequence))
    while sequence.num_computed < len(tokens):
        count = min(chunk, len(tokens) - sequence.num_computed)
        blocks.extend(sequence, sequence.num_computed + count)
        blocks.commit(sequence, count)
    return sequence


@pytest.mark.parametrize("window", [1, 2, 4, 5, 7, 8, 9, 100])
def test_a_sequence_holds_a_window_whatever_its_length(window: int) -> None:
    blocks = BlockManager(60, PAGE, windows=[(window, 60)], prefix_cache=False)
    sequence = _computed(blocks, list(range(200)), chunk=8)
    pages = blocks.windows[0]
    assert blocks.num_used == 50
    # The next token sees itself and window - 1 before it.
    first = max(0, 200 - window + 1) // PAGE
    assert sequence.window_starts == [first] and pages.num_used == 50 - first
    assert pages.num_used <= (window - 1) // PAGE + 2
    blocks.check([sequence])
    blocks.release(sequence)
    assert pages.num_used == 0 and pages.num_cached == 0


def test_few_pages_are_enough_for_a_long_prompt() -> None:
    most = most_pages(8, PAGE, max_sequences=1, max_batch_tokens=16)
    blocks = BlockManager(1000, PAGE, windows=[(8, most)])
    sequence = _computed(blocks, [i % 7 for i in range(4000)], chunk=16)
    assert most == 2 * 4 + 4
    assert blocks.num_used == 1000 and blocks.windows[0].num_used <= 3
    blocks.check([sequence])


def test_a_prefix_is_claimed_where_a_whole_window_of_it_is_there() -> None:
    blocks = BlockManager(40, PAGE, windows=[(6, 40)])
    first = _computed(blocks, list(range(33)))
    twins = list(first.block_table)
    assert blocks.lookup(_running([*range(32), 99])) == twins[:8]
    second = _running([*range(32), 99])
    blocks.claim(second, blocks.lookup(second))
    assert second.window_starts == [6], "the next token, number 32, sees from number 27 on, in page 6"
    assert first.window_starts == [7] and second.window_tables[0][7] == first.window_tables[0][7]
    assert blocks.windows[0].num_used == 3
    blocks.check([first, second])
    # Pages that were given back can be claimed while nobody else took them.
    assert blocks.lookup(_running([*range(16), 99])) == twins[:4]


def test_a_prefix_whose_window_is_gone_is_claimed_up_to_where_it_is_there() -> None:
    most = most_pages(4, PAGE, max_sequences=1, max_batch_tokens=PAGE)
    blocks = BlockManager(60, PAGE, windows=[(4, most)])
    first = _computed(blocks, list(range(100, 161)))
    blocks.release(first)
    assert blocks.num_cached == 15 and blocks.windows[0].num_cached < 15
    assert len(blocks.lookup(_running(list(range(100, 161))))) == 15, "the last window stayed longest"
    assert blocks.lookup(_running([*range(100, 108), 1])) == [], "the first one went"
    blocks.check([])


def test_a_fork_shares_the_window_and_copies_what_it_writes() -> None:
    blocks = BlockManager(20, PAGE, windows=[(6, 20)])
    parent = _computed(blocks, [1, 2, 3, 4, 5, 6])
    child = _running([])
    blocks.fork(parent, child)
    shared = parent.window_tables[0][1]
    parent.tokens.append(7)
    child.tokens.append(8)
    blocks.extend(parent, 7)
    assert blocks.windows[0].copies == [(shared, parent.window_tables[0][1])]
    blocks.windows[0].copies.clear()
    blocks.extend(child, 7)
    assert not blocks.windows[0].copies and child.window_tables[0][1] == shared
    blocks.check([parent, child])


def test_pages_of_guesses_are_given_back() -> None:
    blocks = BlockManager(20, PAGE, windows=[(6, 20)])
    sequence = _computed(blocks, [1, 2, 3])
    blocks.extend(sequence, 11)
    blocks.commit(sequence, 1)
    blocks.shrink(sequence)
    assert len(sequence.window_tables[0]) == len(sequence.block_table) == 1
    blocks.check([sequence])


class WindowedExecutor(FakeExecutor):
    """Notes which pages of a window's layers it is told to copy; its first copy of the others fails."""

    windows, window_bytes_per_page = (8,), (16,)

    def __init__(self) -> None:
        super().__init__(page_size=PAGE)
        self.copied: list[tuple[int, int]] = []
        self.fails = True

    def allocate_windows(self, pages: Any) -> None:
        """There are no tensors here."""

    def copy_pages(self, src: Any, dst: Any) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("no memory")
        super().copy_pages(src, dst)

    def copy_window_pages(self, which: int, src: Any, dst: Any) -> None:
        self.copied += zip(src, dst, strict=True)

    def step(self, inputs: StepInputs) -> np.ndarray:
        return super().step(dataclasses.replace(inputs, windows=None))


def test_copies_of_a_step_that_failed_are_not_made_by_the_next() -> None:
    executor = WindowedExecutor()
    engine = Engine(executor, None, ModelFacts(97, 200, ()), EngineOptions(kv_tokens=400))
    forked = SamplingParams(n=2, max_tokens=4, temperature=1.0, seed=1)
    engine.add_request([1, 2, 3, 4, 5, 6], forked)
    engine.step()  # the two choices share the prompt's second page, and both write to it next
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    engine.check()
    engine.add_request([7, 8, 9], SamplingParams(max_tokens=3))
    while engine.has_work:
        engine.step()
    assert executor.copied == []
    engine.add_request([1, 2, 3, 4, 5, 6], forked)
    while engine.has_work:
        engine.step()
    assert len(executor.copied) == 1
    engine.check()
