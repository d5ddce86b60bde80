"""The books of pages: nothing leaks, nothing is freed twice, counts match tables, after any sequence of
operations.
"""

from __future__ import annotations

import subprocess
import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.eviction import Eviction
from llmc.runtime.scheduler import Scheduler
from llmc.runtime.sequence import Sequence, Status

PAGE = 4


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of add, step, fork, cancel, finish and preempt, on few pages and with prompts that share
    beginnings.
    """

    lengths = 1  # what a sequence grows to, in caches
    rotated = 0

    def eviction(self, pages: int) -> Eviction | None:
        return None

    @initialize(
        pages=st.integers(4, 12), budget=st.integers(3, 20), most=st.integers(1, 3), cache=st.booleans()
    )
    def start(self, pages: int, budget: int, most: int, cache: bool) -> None:
        self.blocks = BlockManager(pages, PAGE, prefix_cache=cache, eviction=self.eviction(pages))
        self.scheduler: Scheduler[Sequence] = Scheduler(
            self.blocks, max_batch_tokens=budget, max_sequences=most
        )
        self.limit = pages * PAGE
        self.longest = self.limit * (1 if self.blocks.eviction is None else self.lengths)
        self.arrivals = 0
        self.finished: list[Sequence] = []

    def alive(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @rule(prefix=st.integers(0, 2), length=st.integers(1, 24), slots=st.integers(1, 3))
    def add(self, prefix: int, length: int, slots: int) -> None:
        prompt = [prefix] * min(length, self.limit - 1)
        slots = min(slots, self.scheduler.max_sequences)
        self.scheduler.add(Sequence(prompt, (self.arrivals, 0), slots=slots))
        self.arrivals += 1

    @rule(token=st.integers(0, 3))
    def step(self, token: int) -> None:
        before = {id(s): s.num_computed for s in self.scheduler.running}
        plan = self.scheduler.schedule()
        assert bool(plan.chunks) == bool(self.alive()), "no standstill while there is work"
        assert sum(chunk.count for chunk in plan.chunks) <= self.scheduler.max_batch_tokens
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        written: set[int] = set()
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.status is Status.RUNNING
            assert chunk.count > 0
            assert before.get(id(sequence), chunk.start) == chunk.start == sequence.num_computed
            assert chunk.start + chunk.count <= self.blocks.reach(sequence)
            for position in range(chunk.place, chunk.place + chunk.count):
                page = sequence.block_table[position // PAGE]
                assert self.blocks._references[page] == 1, "a page that others read is never written"
                written.add(page * PAGE + position % PAGE)
        assert len(written) == sum(chunk.count for chunk in plan.chunks), "no slot is written twice"
        for page in self.blocks.rotations:
            assert self.blocks._references[page] == 1 and self.blocks._hash_of[page] is None, (
                "others' keys turn"
            )
        assert len(set(self.blocks.rotations)) == len(self.blocks.rotations)
        self.rotated += len(self.blocks.rotations)
        self.blocks.rotations.clear()
        self.blocks.check(self.alive())
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.start + chunk.count == len(sequence.tokens):
                self.sample(sequence, token)

    def sample(self, sequence: Sequence, token: int) -> None:
        """What the engine does with logits: fork the choices asked for, then append a token to each."""
        children = [Sequence((), (sequence.order[0], i)) for i in range(1, sequence.slots)]
        for child in children:
            self.scheduler.fork(sequence, child)
        for number, member in enumerate([sequence, *children]):
            if len(member.tokens) >= self.longest:
                self.finish(member)
            else:
                member.tokens.append((token + number) % 4)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.finished.append(sequence)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        alive = self.alive()
        self.finish(alive[data.draw(st.integers(0, len(alive) - 1))])

    @rule()
    def preempt(self) -> None:
        self.scheduler.preempt_newest()

    @precondition(lambda self: self.finished)
    @rule()
    def finish_again(self) -> None:
        self.scheduler.finish(self.finished[-1])

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check(self.alive())
        blocks = self.blocks
        assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_pages
        for sequence in self.alive():
            assert sequence.remaining >= 1, "the last token's logits are still to come"

    def teardown(self) -> None:
        """Whatever state it was left in, the work comes to an end and gives every page back."""
        if not hasattr(self, "blocks"):
            return
        # Each sequence grows to the limit, and may be preempted and computed again some times on its way.
        for _ in range(sum(s.slots for s in self.alive()) * self.longest * 4):
            if not self.alive():
                break
            self.step(1)
        assert not self.alive()
        assert self.blocks.num_used == 0


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase


class EvictingMachine(SchedulerMachine):
    """The same with sequences that grow to three times the cache and give pages back on their way."""

    lengths = 3

    def eviction(self, pages: int) -> Eviction | None:
        return Eviction(PAGE, pages - pages % 3 // 2, sinks=pages % 3)


EvictingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestEvictingScheduler = EvictingMachine.TestCase


def _computed(blocks: BlockManager, tokens: list[int]) -> Sequence:
    sequence = Sequence(tokens)
    sequence.status = Status.RUNNING
    blocks.claim(sequence, blocks.lookup(sequence))
    blocks.extend(sequence, len(tokens))
    blocks.commit(sequence, len(tokens) - sequence.num_computed)
    return sequence


def test_a_prefix_is_shared_page_by_page_and_by_salt():
    blocks = BlockManager(20, PAGE)
    first = _computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5, 6, 7, 8, 0])) == list(first.block_table[:2])
    assert blocks.lookup(Sequence([1, 2, 3, 4, 0, 6, 7, 8, 0])) == list(first.block_table[:1])
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5, 6, 7, 8])) == list(first.block_table[:1])
    assert blocks.lookup(Sequence([0, 2, 3, 4, 5, 6, 7, 8])) == []
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5], salt=b"other tenant")) == []
    assert blocks.lookup(Sequence([5, 6, 7, 8, 9])) == [], "the same tokens after another beginning"


def test_pages_not_written_yet_are_not_found():
    blocks = BlockManager(20, PAGE)
    sequence = Sequence([1, 2, 3, 4, 5])
    sequence.status = Status.RUNNING
    blocks.extend(sequence, 5)
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5])) == []
    blocks.commit(sequence, 3)
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5])) == []
    blocks.commit(sequence, 1)
    assert blocks.lookup(Sequence([1, 2, 3, 4, 5])) == [sequence.block_table[0]]


def test_least_recently_used_pages_go_first_and_ends_before_beginnings():
    blocks = BlockManager(4, PAGE)
    old = _computed(blocks, [1] * 8 + [0])
    old_pages = list(old.block_table)
    blocks.release(old)
    assert (blocks.num_free, blocks.num_cached) == (2, 2)
    new = _computed(blocks, [2] * 12)  # takes the two free pages, then the end of the old prefix
    assert old_pages[1] in new.block_table
    assert blocks.lookup(Sequence([1] * 9)) == old_pages[:1]
    blocks.check([new])


def test_copy_on_write_copies_only_the_page_that_is_written_and_only_while_shared():
    blocks = BlockManager(10, PAGE)
    parent = _computed(blocks, [1, 2, 3, 4, 5, 6])
    child = Sequence(())
    blocks.fork(parent, child)
    child.status = Status.RUNNING
    shared = parent.block_table[1]
    parent.tokens.append(7)
    child.tokens.append(8)
    assert blocks.pages_to_extend(parent, 7) == 1
    copies = blocks.extend(parent, 7)
    assert copies == [(shared, parent.block_table[1])]
    assert parent.block_table[0] == child.block_table[0]
    assert blocks.extend(child, 7) == [], "the last holder writes in place"
    assert child.block_table[1] == shared
    blocks.check([parent, child])


def test_decoding_comes_first_and_a_long_prompt_cannot_stall_it():
    blocks = BlockManager(64, PAGE)
    scheduler: Scheduler[Sequence] = Scheduler(blocks, max_batch_tokens=8, max_sequences=4)
    decoding = Sequence([1, 2, 3], (0, 0))
    scheduler.add(decoding)
    scheduler.commit(scheduler.schedule())
    decoding.tokens.append(4)
    long, short = Sequence([5] * 60, (1, 0)), Sequence([6] * 3, (2, 0))
    scheduler.add(long)
    scheduler.add(short)
    plan = scheduler.schedule()
    assert (plan.chunks[0].sequence, plan.chunks[0].count) == (decoding, 1)
    assert sum(c.count for c in plan.chunks) <= 8
    scheduler.commit(plan)
    decoding.tokens.append(4)
    plan = scheduler.schedule()
    counts = {id(c.sequence): c.count for c in plan.chunks}
    assert counts[id(decoding)] == 1
    assert counts[id(long)] >= 3, "half of what is left"


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one():
    blocks = BlockManager(64, PAGE)
    scheduler: Scheduler[Sequence] = Scheduler(blocks, max_batch_tokens=16, max_sequences=4)
    long = Sequence([5] * 160, (0, 0))
    scheduler.add(long)
    scheduler.commit(scheduler.schedule())
    short = Sequence([6] * 6, (1, 0))
    scheduler.add(short)
    steps = 0
    while short.num_computed < 6:
        scheduler.commit(scheduler.schedule())
        steps += 1
    assert steps <= 2
    assert long.remaining > 100


def test_the_newest_sequence_is_preempted_and_keeps_its_tokens():
    blocks = BlockManager(4, PAGE, prefix_cache=False)
    scheduler: Scheduler[Sequence] = Scheduler(blocks, max_batch_tokens=16, max_sequences=2)
    old, new = Sequence([1] * 6, (0, 0)), Sequence([2] * 2, (1, 0))
    scheduler.add(old)
    scheduler.add(new)
    preempted: list[Sequence] = []
    for _ in range(8):
        plan = scheduler.schedule()
        preempted += plan.preempted
        scheduler.commit(plan)
        for chunk in plan.chunks:
            chunk.sequence.tokens.append(9)
    assert preempted
    assert set(map(id, preempted)) == {id(new)}
    assert new.tokens.tolist()[:3] == [2, 2, 9]


def test_the_books_need_no_tensor_library():
    code = (
        "import sys\nsys.modules['numpy'] = None\n"
        "import llmc.runtime.scheduler, llmc.runtime.block_manager, llmc.runtime.sequence\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_common_beginning_that_is_being_computed_is_waited_for_and_holds_up_nobody_else():
    blocks = BlockManager(64, PAGE)
    scheduler: Scheduler[Sequence] = Scheduler(blocks, max_batch_tokens=16, max_sequences=8)
    common = [7] * 32
    first, second = Sequence([*common, 1], (0, 0)), Sequence([*common, 2, 2], (1, 0))
    stranger = Sequence([5] * 4, (2, 0))
    for sequence in (first, second, stranger):
        scheduler.add(sequence)
    computed: dict[int, int] = {}
    while not all(sequence.remaining == 0 for sequence in (first, second, stranger)):
        plan = scheduler.schedule()
        for chunk in plan.chunks:
            computed[id(chunk.sequence)] = computed.get(id(chunk.sequence), 0) + chunk.count
        scheduler.commit(plan)
        if second.status is Status.WAITING:
            assert stranger.status is Status.RUNNING
    assert computed == {id(first): 33, id(second): 2, id(stranger): 4}
