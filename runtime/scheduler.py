"""Which tokens the next step computes: continuous batching with chunked prefill, admission and preemption.

Every step has a budget of tokens. Sequences that decode come first, one token each, so that a long prompt
never stalls them; what is left goes to prompts in chunks (Agrawal et al., "Taming Throughput-Latency Tradeoff
in LLM Inference with Sarathi-Serve", OSDI 2024, section 4). When pages run out, the newest sequence is
preempted: it gives its pages back, keeps its tokens, and is computed again later. The oldest sequence is
never preempted for another, so it always finishes, and hence all do.

No tensor library here.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from .block_manager import BlockManager
from .sequence import Sequence, Status

S = TypeVar("S", bound=Sequence)

_NONE = range(0)

# Prompts computed at the same time even if the first of them fills the budget: short ones overtake long ones.
_PROMPTS = 8
# Tokens of a prompt that a long one lets pass: a step of them takes little longer than one of a single token.
_QUICK = 64
# Waiting sequences looked at in a step: those that wait for another's prefix do not hold up the ones behind
# them.
_LOOK_AHEAD = 16
# Rows of logits of scored prompts that a step gives whatever `max_rows` says, or none would ever advance.
_FEW_ROWS = 16


@dataclass(slots=True)
class Chunk(Generic[S]):
    """Tokens `start .. start + count - 1` of a sequence, to be computed in this step."""

    sequence: S
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be sampled after this step."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def place(self) -> int:
        """Where the first of them goes in the cache."""
        return self.start - self.sequence.evicted

    @property
    def scored(self) -> range:
        """Tokens whose logits are wanted besides the last one's, as places in the sequence."""
        sequence = self.sequence
        if not sequence.drafted and sequence.scored >= sequence.score_end:
            return _NONE  # nearly always, and asked for twice a sequence and step
        end = self.start + self.count
        if sequence.drafted:
            return range(end - 1 - sequence.drafted, end - 1)
        return range(max(self.start, sequence.scored), min(end, sequence.score_end))


@dataclass(slots=True)
class Plan(Generic[S]):
    """One step: page copies to make first (source, destination), in order, then the chunks to compute."""

    chunks: list[Chunk[S]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[S] = field(default_factory=list)


class Prefixes(Protocol[S]):
    """Where prefixes are kept beside the cache (prefix_pages.py)."""

    def restore(self, sequence: S, /) -> None:
        """Put into the cache what is known of a sequence that begins now."""
        ...

    def save(self, chunks: list[Chunk[S]], /) -> None:
        """Look at what a step computed."""
        ...

    def close(self) -> None:
        """End it in order."""
        ...


def _by_age(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class Scheduler(Generic[S]):
    """Sequences that wait and sequences that run, both oldest first."""

    def __init__(
        self, blocks: BlockManager, *, max_batch_tokens: int, max_sequences: int, max_rows: int | None = None
    ):
        """`max_batch_tokens`: tokens a step computes at most; `max_sequences`: sequences that run at most;
        `max_rows`: rows of logits a step gives at most, where prompts are scored (but a few in any case).

        `max_sequences <= max_batch_tokens`, so that all running sequences fit in one decoding step.
        """
        assert 0 < max_sequences <= max_batch_tokens
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_rows = max_batch_tokens if max_rows is None else max_rows
        self._aside = False  # whether a long prompt waited in the step before
        self.prefixes: Prefixes[S] | None = None
        self.waiting: list[S] = []
        self.running: list[S] = []

    # Events ----------------------------------------------------------------------------------------------

    def add(self, sequence: S) -> None:
        """Queue a sequence. It must fit in the cache when it runs alone."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_by_age)

    def fork(self, parent: S, child: S) -> None:
        """Let `child` go on from the running `parent`'s tokens, sharing its pages."""
        assert parent.status is Status.RUNNING
        assert parent.slots > 1, "room for the child was not asked for"
        parent.slots -= 1
        self.blocks.fork(parent, child)
        child.status = Status.RUNNING
        insort(self.running, child, key=_by_age)

    def finish(self, sequence: S) -> None:
        """Take a sequence out at whatever stage it is; its pages are free afterwards."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        sequence.status = Status.FINISHED

    def preempt_newest(self) -> S | None:
        """Send the newest running sequence back to the queue; None if nothing runs."""
        if not self.running:
            return None
        victim = self.running[-1]
        self.preempt(victim)
        return victim

    def preempt(self, sequence: S) -> None:
        """Send a running sequence back to the queue."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self.add(sequence)

    def commit(self, plan: Plan[S]) -> None:
        """Note that the plan's chunks were computed."""
        for chunk in plan.chunks:
            self.blocks.commit(chunk.sequence, chunk.count)
        if self.prefixes is not None:
            self.prefixes.save(plan.chunks)

    # Planning --------------------------------------------------------------------------------------------

    def schedule(self) -> Plan[S]:
        """Plan the next step and give its sequences their pages.

        An empty plan means that nothing is left to do.
        """
        plan: Plan[S] = Plan()
        budget = self.max_batch_tokens - self._schedule_decodes(plan)
        prefills = [s for s in self.running if s.remaining > 1]
        if not plan.preempted:
            self._admit(prefills, budget)
        if prefills:
            self._schedule_prefills(plan, prefills, budget)
        return plan

    def _schedule_decodes(self, plan: Plan[S]) -> int:
        """One token for each decoding sequence, oldest first. Victims are newer, so not scheduled yet."""
        blocks = self.blocks
        for sequence in [s for s in self.running if s.remaining == 1]:
            length = len(sequence.tokens)
            while sequence.status is Status.RUNNING:
                if blocks.pages_to_extend(sequence, length) <= blocks.num_available:
                    plan.copies += blocks.extend(sequence, length)
                    plan.chunks.append(Chunk(sequence, length - 1, 1))
                    break
                self._preempt_into(plan)
        return len(plan.chunks)

    def _preempt_into(self, plan: Plan[S]) -> None:
        victim = self.preempt_newest()
        assert victim is not None
        plan.preempted.append(victim)

    def _admit(self, prefills: list[S], budget: int) -> None:
        """Move waiting sequences to running, in order, while their prompts fit beside what runs already."""
        blocks = self.blocks
        if not self.waiting or budget <= 0:
            return
        backlog = sum(s.remaining for s in prefills)
        slots = sum(s.slots for s in self.running)
        reserved = sum(blocks.pages_to_extend(s, len(s.tokens)) for s in self.running)
        for sequence in self.waiting[:_LOOK_AHEAD]:
            if backlog >= budget and len(prefills) >= _PROMPTS:
                break
            if self.running and slots + sequence.slots > self.max_sequences:
                break
            # A page that is found gives no logits.
            pages = [] if sequence.to_score else blocks.lookup(sequence)
            if not sequence.to_score and self._is_coming(sequence, len(pages), prefills):
                continue
            need = blocks.most_pages(len(sequence.tokens)) - len(pages) + blocks.count_unused(pages)
            # One page of slack a running sequence, or the newcomer would soon be preempted by their growth.
            slack = len(self.running)
            if self.running and reserved + need + slack > blocks.num_available:
                break
            if self.prefixes is not None and not sequence.to_score:
                self.prefixes.restore(sequence)  # the pages that it takes were counted as new ones
                pages = blocks.lookup(sequence)
            self.waiting.remove(sequence)
            blocks.claim(sequence, pages)
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_by_age)
            prefills.append(sequence)
            slots += sequence.slots
            reserved += blocks.most_pages(len(sequence.tokens)) - len(pages)
            backlog += sequence.remaining

    def _is_coming(self, sequence: S, index: int, prefills: list[S]) -> bool:
        """Whether a prompt that is being computed will give page `index` of the sequence: then waiting saves
        work. One that has computed it will not: with windows, what is needed beside the page is gone.
        """
        blocks = self.blocks
        wanted = blocks.shareable_hash(sequence, index)
        if wanted is None:
            return False
        end = (index + 1) * blocks.page_size
        return any(s.num_computed < end and blocks.shareable_hash(s, index) == wanted for s in prefills)

    def _schedule_prefills(self, plan: Plan[S], prefills: list[S], budget: int) -> None:
        """Answers that several tokens were added to at once, then the oldest prompt with half of the budget
        at least, then the shortest.

        So a long prompt always advances (at least every other step), and neither an answer nor a short prompt
        waits for its end.
        """
        prefills.sort(key=_by_age)
        answers = [s for s in prefills if s.num_computed >= s.num_prompt]
        prompts = [s for s in prefills if s.num_computed < s.num_prompt]
        room = budget // 2 if prompts else budget
        budget -= self._schedule_chunks(plan, [(s, room) for s in answers], room)
        if not prompts:
            return
        oldest, others = prompts[0], sorted(prompts[1:], key=lambda s: s.remaining)
        if self._step_aside(plan, oldest, others, budget):
            return
        others_want = sum(s.remaining for s in others)
        half = max(budget - others_want, budget - budget // 2)
        shares = [(oldest, budget if oldest.remaining <= budget else half), *((s, budget) for s in others)]
        self._schedule_chunks(plan, shares, budget)

    def _step_aside(self, plan: Plan[S], oldest: S, others: list[S], budget: int) -> bool:
        """Whether a long prompt waits for a step in which short ones are computed whole: they have waited for
        its last chunk already, and need not for another one. Never twice in a row.
        """
        quick = [s for s in others if s.remaining <= _QUICK]
        wanted = sum(s.remaining for s in quick)
        pages = sum(self.blocks.pages_to_extend(s, len(s.tokens)) for s in quick)
        self._aside = (
            not self._aside
            and 0 < wanted <= budget
            and oldest.remaining > 4 * _QUICK
            and pages <= self.blocks.num_available
        )
        if self._aside:
            self._schedule_chunks(plan, [(s, budget) for s in quick], budget)
        return self._aside

    def _schedule_chunks(self, plan: Plan[S], shares: list[tuple[S, int]], budget: int) -> int:
        """A chunk for each sequence, within its share and the pages that are left; the tokens that are
        planned.
        """
        blocks, left = self.blocks, budget
        rows = max(self.max_rows - len(plan.chunks), _FEW_ROWS)
        for sequence, share in shares:
            most = min(share, left)
            if sequence.to_score:
                most = min(most, max(0, sequence.scored - sequence.num_computed) + rows)
            count = self._chunk_size(sequence, most)
            while count == 0 and not plan.chunks and self.running[-1] is not sequence:
                self._preempt_into(plan)  # nothing else moves: make room for the oldest
                count = self._chunk_size(sequence, most)
            if count > 0 and sequence.status is Status.RUNNING:
                chunk = Chunk(sequence, sequence.num_computed, count)
                plan.copies += blocks.extend(sequence, chunk.start + count)
                plan.chunks.append(chunk)
                left -= count
                rows -= len(chunk.scored)
        return budget - left

    def _chunk_size(self, sequence: S, share: int) -> int:
        """Tokens of the sequence to compute: within its share and the pages available, not beyond where pages
        are evicted, and ending on a page if it can.
        """
        blocks = self.blocks
        if sequence.status is not Status.RUNNING:
            return 0
        start, total = sequence.num_computed, len(sequence.tokens)
        end = min(total, start + share, blocks.room(sequence))
        if end < total and end - end % blocks.page_size > start:
            end -= end % blocks.page_size
        return max(0, end - start)
