"""Log-likelihoods of continuations of a context: what multiple-choice tests are scored by.

A context is computed once for all of its continuations, and once for all contexts that begin with the same
pages (few-shot examples): its continuations are forks that share its pages. The last row of the context
predicts every first token, so continuations of one token, such as the letters A to D, cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import InputError, LlmcError
from .batch import build_inputs
from .engine import ContextLengthError, Engine
from .scheduler import Chunk
from .sequence import Sequence
from .window_plan import copy_window_pages

# Logits of one step, in elements: 2**24 float32 are 64 MB, and a normaliser needs another array of that size.
_LOGITS = 1 << 24
# Tokens that two contexts must share to be worth a step of their own: fewer are computed twice.
_WORTH_WAITING = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A context of at least one token id, and continuations of at least one each."""

    context: Seq[int]
    continuations: Seq[Seq[int]]

    @property
    def longest(self) -> int:
        """Tokens computed for the longest continuation: its last one is predicted only."""
        return len(self.context) + max(len(c) for c in self.continuations) - 1


@dataclass(slots=True)
class _Branch:
    """One sequence in work: the first token that is predicted is tokens[first], and what was found so far."""

    sequence: Sequence
    targets: list[int]
    first: int
    total: float = 0.0


@dataclass(slots=True)
class _Wave:
    """Requests computed together; `sums` has one list a request."""

    requests: list[Request] = field(default_factory=list)
    parents: list[Sequence] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)


class ContinuationScorer:
    """Scores over an engine that nobody steps meanwhile (`LLM.engine.paused()`)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows = max(16, min(engine.options.max_batch_tokens, _LOGITS // max(1, engine.facts.vocab_size)))
        """Rows of logits in a step at most."""

    def score(
        self, requests: Seq[Request], progress: Callable[[float], None] | None = None
    ) -> list[list[float]]:
        """log p(continuation | context) in nats, float64 sums: for each request one number a continuation.

        `progress` gets the share of the requests that is done. Raises ContextLengthError where a context with
        its longest continuation does not fit, LlmcError where the model's logits are not finite.
        """
        results: list[list[float]] = []
        for wave in self._waves(requests):
            try:
                self._first_tokens(wave)
                self._later_tokens(wave)
            finally:
                for parent in wave.parents:
                    self.engine.blocks.release(parent)
            results += wave.sums
            if progress is not None:
                progress(len(results) / len(requests))
        return results

    # Waves -----------------------------------------------------------------------------------------------

    def _waves(self, requests: Seq[Request]) -> Iterator[_Wave]:
        """Requests in order, as many at once as a step has room for; one whose context is mostly that of its
        neighbour waits, to find those pages computed.
        """
        wave, pages, tokens = _Wave(), 0, 0
        for request in requests:
            needed = self._pages(request)
            full = self._rows_of_state([*wave.requests, request]) > self._free_states()
            full |= not self._windows_hold([*wave.requests, request])
            full |= tokens + len(request.context) > self.engine.options.max_batch_tokens
            full |= len(wave.requests) == self.rows or pages + needed > self.engine.blocks.num_available
            if wave.requests and (full or _common(wave.requests[-1], request) >= _WORTH_WAITING):
                yield wave
                wave, pages, tokens = _Wave(), 0, 0
            self._make_room(request, needed)
            wave.requests.append(request)
            pages += needed
            tokens += len(request.context)
        if wave.requests:
            yield wave

    def _pages(self, request: Request) -> int:
        """Pages that a request holds at most."""
        blocks, context = self.engine.blocks, len(request.context)
        shared = context // blocks.page_size
        return blocks.pages_for(context) + sum(
            blocks.pages_for(context + len(c) - 1) - shared for c in request.continuations
        )

    def _make_room(self, request: Request, pages: int) -> None:
        engine = self.engine
        if request.longest > engine.limit or pages > engine.blocks.num_pages:
            raise ContextLengthError(
                f"a context of {len(request.context)} tokens with continuations takes {request.longest} "
                f"tokens and {pages} pages; the limits are {engine.limit} and {engine.blocks.num_pages}",
                remedy="shorten it or raise kv_tokens",
                prompt_tokens=request.longest,
                limit=engine.limit,
            )
        states = self._rows_of_state([request])
        if engine.blocks.states is not None and states > engine.blocks.states.count:
            raise InputError(
                f"a context with continuations takes {states} rows of the state cache, which has "
                f"{engine.blocks.states.count}",
                remedy=f"raise max_sequences to {states - 1}",
            )
        while pages > engine.blocks.num_available or states > self._free_states():
            if engine.scheduler.preempt_newest() is None:
                break
        while not self._windows_hold([request]):
            if engine.scheduler.preempt_newest() is None:
                raise InputError(
                    "a context with continuations takes more pages of a window's layers than there are",
                    remedy="raise max_sequences",
                )

    def _windows_hold(self, requests: Seq[Request]) -> bool:
        """Whether the requests' pages of the layers with a window are there: of each the window's, those of a
        step's tokens, and what its continuations write.
        """
        blocks, budget = self.engine.blocks, self.engine.options.max_batch_tokens
        for window in blocks.windows:
            needed = sum(
                window.each
                + blocks.pages_for(min(len(request.context), budget))
                + sum(blocks.pages_for(len(c)) + 2 for c in request.continuations)
                for request in requests
            )
            if window.num_pages < blocks.num_pages and needed > window.num_pages - window.num_used:
                return False
        return True

    def _rows_of_state(self, requests: Seq[Request]) -> int:
        """Rows of the state cache, where there is one, that requests own: at most contexts and forks."""
        if self.engine.blocks.states is None:
            return 0
        return sum(1 + sum(len(c) > 1 for c in request.continuations) for request in requests)

    def _free_states(self) -> int:
        states = self.engine.blocks.states
        return 0 if states is None else states.num_free

    # Steps -----------------------------------------------------------------------------------------------

    def _first_tokens(self, wave: _Wave) -> None:
        """Compute the contexts; their last rows predict every first token."""
        branches: list[_Branch] = []
        for request in wave.requests:
            parent = Sequence(request.context)
            parent.use(self.engine.adapters.get(None))
            self.engine.late_scaling.begin(parent, request.longest)
            wave.parents.append(parent)
            self.engine.blocks.claim(parent, self.engine.blocks.lookup(parent))
            branches.append(_Branch(parent, [], len(parent.tokens)))
            wave.sums.append([])
        for chunks, logits in self._steps(branches, all_rows=False):
            ends = [chunk.sequence for chunk in chunks if chunk.is_last]
            for parent, row in zip(ends, _log_softmax(logits), strict=True):
                number = next(i for i, one in enumerate(wave.parents) if one is parent)
                firsts = [c[0] for c in wave.requests[number].continuations]
                wave.sums[number] = [float(row[token]) for token in firsts]

    def _later_tokens(self, wave: _Wave) -> None:
        """Fork each context into its continuations, and compute what predicts their further tokens."""
        blocks = self.engine.blocks
        branches: list[_Branch] = []
        places: list[tuple[int, int]] = []
        try:
            for number, (request, parent) in enumerate(zip(wave.requests, wave.parents, strict=True)):
                for index, tokens in enumerate(request.continuations):
                    if len(tokens) > 1:
                        child = Sequence(())
                        blocks.fork(parent, child)
                        child.tokens.extend(tokens[:-1])
                        branches.append(_Branch(child, list(tokens), len(request.context)))
                        places.append((number, index))
                blocks.release(parent)  # a continuation that is alone then goes on in the context's page
            for chunks, logits in self._steps(branches, all_rows=True):
                self._add(chunks, logits, branches)
            for (number, index), branch in zip(places, branches, strict=True):
                wave.sums[number][index] += branch.total
        finally:
            for branch in branches:
                blocks.release(branch.sequence)

    def _add(self, chunks: Seq[Chunk[Sequence]], logits: np.ndarray, branches: Seq[_Branch]) -> None:
        of = {id(branch.sequence): branch for branch in branches}
        rows = _log_softmax(logits)
        start = 0
        for chunk in chunks:
            branch = of[id(chunk.sequence)]
            after = chunk.start + 1 - branch.first  # the row at position p predicts token p + 1
            targets = branch.targets[after : after + chunk.count]
            branch.total += float(rows[np.arange(start, start + chunk.count), targets].sum(dtype=np.float64))
            start += chunk.count

    def _steps(
        self, branches: Seq[_Branch], *, all_rows: bool
    ) -> Iterator[tuple[list[Chunk[Sequence]], np.ndarray]]:
        """Compute what is left of the sequences, a step of chunks at a time, with the rows asked for."""
        engine, blocks = self.engine, self.engine.blocks
        budget = self.rows if all_rows else engine.options.max_batch_tokens
        waiting = [branch.sequence for branch in branches]
        while waiting:
            chunks: list[Chunk[Sequence]] = []
            copies: list[tuple[int, int]] = []
            room = budget
            for sequence in waiting[: engine.options.max_sequences]:
                count = min(room, sequence.remaining)
                if not count:
                    break
                chunk = Chunk(sequence, sequence.num_computed, count)
                copies += blocks.extend(sequence, chunk.start + count)
                chunks.append(chunk)
                room -= count
            if copies:
                sources, destinations = zip(*copies, strict=True)
                engine.executor.copy_pages(sources, destinations)
            copy_window_pages(blocks, engine.executor)
            yield chunks, engine.executor.step(build_inputs(chunks, blocks.page_size, all_rows=all_rows))
            for chunk in chunks:
                blocks.commit(chunk.sequence, chunk.count)
            waiting = [sequence for sequence in waiting if sequence.remaining]


def _common(one: Request, other: Request) -> int:
    """Tokens with which two contexts both begin."""
    count = min(len(one.context), len(other.context))
    differs = np.flatnonzero(np.not_equal(one.context[:count], other.context[:count]))
    return int(differs[0]) if len(differs) else count


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities [R, vocab] float32, the normaliser summed in float64; it overwrites the
    logits. Raises LlmcError where one is NaN or infinite.
    """
    logits -= logits.max(axis=1, keepdims=True, initial=-np.inf)
    normaliser = np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64))
    if not np.isfinite(normaliser).all():
        raise LlmcError("the model's logits are not finite", remedy="the weights are damaged: compile again")
    logits -= normaliser.astype(np.float32)
    return logits
