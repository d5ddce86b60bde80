"""The engine: requests in, tokens out. One `step` computes one ragged batch; docs/architecture.md, "The paged
step".

`Engine` is synchronous and belongs to one thread. `AsyncEngine` (async_engine.py) runs one in a thread of its
own.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from ..ir.errors import InputError
from .adapters import AdapterRegistry
from .batch import build_inputs
from .block_manager import BlockManager
from .engine_options import ContextLengthError, Counters, EngineOptions, EngineStats, ModelFacts
from .eviction_plan import plan_eviction, rotate_keys
from .executor.base import Executor, OwnMemory, PreparesSampling
from .generation import FinishReason, Generation, Request, StepOutput
from .grammar import MaskWorker
from .late_scaling import NEVER
from .memory import KvPlan, plan_kv_cache
from .prompt_ids import prompt_ids
from .sampler import Allowed, TokenLogprob, sample
from .sampling_params import SamplingParams
from .scheduler import Chunk, Plan, Scheduler
from .sequence import Sequence
from .speculation import Checked, Speculator
from .state_plan import allocate_states
from .tokenizer import Tokenizer
from .window_plan import allocate_windows, copy_window_pages, window_sizes

_log = logging.getLogger("llmc.runtime")

_LOGITS_BYTES = 64 << 20
"""Logits of a step at most, where prompts are scored."""
_ENDLESS = (1 << 31) - 1
"""Tokens of an answer that nobody bounds, where the context does not."""


@dataclass(slots=True)
class _Sampling:
    """Rows to sample after a step: which generation, its logits row, its choice."""

    generations: list[Generation] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    """For each that needs one, its row of the masks."""

    def add(self, generation: Generation, row: int, mask: int) -> None:
        """Sample a token for the generation."""
        self.generations.append(generation)
        self.rows.append(row)
        self.masks.append(mask)


class Engine:
    """Continuous batching over an executor.

    With an executor that is batch invariant, the tokens of a greedy or seeded request depend on the request
    alone: not on its neighbours, on chunking, on the prefix cache, or on preemption.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        facts: ModelFacts,
        options: EngineOptions | None = None,
    ):
        """Allocates the KV cache. `tokenizer` None: prompts are ids, and outputs have no text.

        Raises InputError where the options are impossible or the memory does not hold a cache.
        """
        options = options or EngineOptions()
        self.executor, self.tokenizer, self.facts, self.options = executor, tokenizer, facts, options
        options.check()
        self.context = self._context(options.context)
        self.late_scaling = facts.late_scaling if self.context > facts.late_scaling.original else NEVER
        states = allocate_states(executor, options)
        own = executor.free_bytes() if isinstance(executor, OwnMemory) else None  # states are taken from it
        self.kv: KvPlan = plan_kv_cache(
            page_size=executor.page_size,
            bytes_per_page=executor.kv_bytes_per_page,
            context=self.context,
            max_sequences=options.max_sequences,
            max_pages=executor.max_pages,
            kv_tokens=options.kv_tokens,
            kv_bytes=options.kv_cache_bytes,
            available=own,
            beside=0 if states is None or own is not None else states.bytes,
            windows=window_sizes(executor, options),
        )
        self.eviction = plan_eviction(options, facts, executor, self.kv, self.context)
        executor.allocate_kv(self.kv.pages)
        self.adapters = AdapterRegistry(executor)
        _log.info("%s", self.kv)
        cached = options.prefix_cache and states is None  # a page does not hold the state behind its tokens
        self.blocks = BlockManager(
            self.kv.pages,
            executor.page_size,
            prefix_cache=cached,
            states=states,
            windows=allocate_windows(executor, self.kv),
            eviction=self.eviction,
        )
        self.scheduler: Scheduler[Generation] = Scheduler(
            self.blocks,
            max_batch_tokens=options.max_batch_tokens,
            max_sequences=options.max_sequences,
            max_rows=_LOGITS_BYTES // (4 * max(1, executor.vocab_size)),
        )
        self._masks = MaskWorker(facts.vocab_size)
        self._prepare = executor.prepare_sampling if isinstance(executor, PreparesSampling) else None
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self.counters = Counters()
        self.speculator = Speculator(
            self.scheduler,
            self.counters,
            most=options.speculate,
            limit=self.limit if self.eviction is None else _ENDLESS,
            late=self.late_scaling,
            prepare=self._prepare,
        )

    def _context(self, wanted: int | None) -> int:
        most = self.facts.context_length
        if wanted is None:
            return most
        if not 0 < wanted <= most:
            raise InputError(
                f"context is {wanted}", remedy=f"allowed: 1 to {most}, the model's context length"
            )
        return wanted

    @property
    def limit(self) -> int:
        """Tokens of one sequence that the cache can have at a time: the context, or the cache where it is
        smaller. Without `sinks`, all that it can have.
        """
        return min(self.context, self.kv.tokens) if self.eviction is None else self.eviction.tokens

    # Requests --------------------------------------------------------------------------------------------

    def make_request(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Request:
        """Check a request without queueing it; reads nothing that changes, so any thread may call it.

        Raises InputError naming what is wrong, and ContextLengthError where the prompt does not fit.
        """
        params = params or SamplingParams()
        params.validate(self.facts.vocab_size)
        ids = prompt_ids(prompt, self.tokenizer, self.facts.vocab_size)
        room = self.limit - len(ids)
        if room < (0 if params.max_tokens == 0 else 1):
            source = "KV cache" if self.kv.tokens < self.context else "context"
            raise ContextLengthError(
                f"context_length_exceeded: the prompt has {len(ids)} tokens, the {source} holds {self.limit}"
                ", one of them for the answer",
                remedy=f"shorten the prompt to {self.limit - 1} tokens",
                prompt_tokens=len(ids),
                limit=self.limit,
            )
        if params.n > self.options.max_sequences:
            raise InputError(
                f"n is {params.n}", remedy=f"allowed: 1 to {self.options.max_sequences} (max_sequences)"
            )
        most = self._most_tokens(params, len(ids), room)
        request_id = request_id if request_id is not None else secrets.token_hex(8)
        adapter, eos = self.adapters.get(params.adapter), self.facts.eos_token_ids
        return Request(request_id, ids, params, max_tokens=most, eos=eos, adapter=adapter)

    def _most_tokens(self, params: SamplingParams, prompt: int, room: int) -> int:
        """Tokens that an answer may have. Raises InputError where more are asked for than the cache holds."""
        wanted = params.max_tokens
        if self.eviction is not None:  # the answer goes on when the cache is full
            return _ENDLESS if wanted is None else wanted
        most = self.context - prompt if wanted is None else min(wanted, self.context - prompt)
        if wanted is not None and most > room:
            raise InputError(
                f"the request can never fit: {prompt} prompt tokens and {most} more, the KV cache holds "
                f"{self.kv.tokens}",
                remedy=f"lower max_tokens to {room} or raise kv_tokens",
            )
        return min(most, room)

    def add_request(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a prompt (text or token ids); returns the request's id. Raises as `make_request` does."""
        request = self.make_request(prompt, params, request_id)
        self.submit(request)
        return request.id

    def submit(self, request: Request) -> None:
        """Queue a request that `make_request` checked. Raises InputError where its id is in use."""
        if request.id in self._requests:
            raise InputError(f"request id {request.id!r} is in use", remedy="choose another one")
        if request.adapter is not None and request.adapter.removed:
            raise InputError(f"adapter {request.adapter.name!r} was removed", remedy="ask for another one")
        request.arrival = next(self._arrivals)
        generation = Generation(request, self.tokenizer)
        self._requests[request.id] = request
        request.live.append(generation)
        self.late_scaling.begin(generation)
        self.scheduler.add(generation)

    def cancel(self, request_id: str) -> bool:
        """Drop a request at whatever phase; its pages are free at once.

        False where it is not known (any more).
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        for generation in request.live:
            self.scheduler.finish(generation)
        request.live.clear()
        return True

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter. Raises AdapterInUseError where a request uses it, InputError for an unknown
        name.
        """
        found = self.adapters.get(name)
        self.adapters.remove(name, sum(request.adapter is found for request in self._requests.values()))

    @property
    def has_work(self) -> bool:
        """Whether a `step` would do something."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def request_ids(self) -> list[str]:
        """Ids of the requests that are waiting or running."""
        return list(self._requests)

    @property
    def stats(self) -> EngineStats:
        """Pages, slots and counts now."""
        blocks, count = self.blocks, self.counters
        pages: dict[int, int] = {}
        size = blocks.page_size
        for generation in self.scheduler.running:
            for index, page in enumerate(generation.block_table):
                filled = min(size, max(0, generation.num_held - index * size))
                pages[page] = max(pages.get(page, 0), filled)
        return EngineStats(
            pages_total=blocks.num_pages,
            pages_used=blocks.num_used,
            pages_free=blocks.num_free,
            pages_cached=blocks.num_cached,
            slots_allocated=len(pages) * size,
            slots_filled=sum(pages.values()),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            steps=count.steps,
            tokens_computed=count.tokens_computed,
            tokens_generated=count.tokens_generated,
            tokens_from_cache=count.tokens_from_cache,
            preemptions=count.preemptions,
        )

    def check(self) -> None:
        """Raise AssertionError unless the block manager's books balance between two steps; cheap enough
        whenever the engine is idle.
        """
        windows = self.blocks.windows
        assert not any(window.copies or window.rotations for window in windows), "copies of no step"
        assert not self.blocks.rotations, "keys that were to be turned"
        self.blocks.check([*self.scheduler.running, *self.scheduler.waiting])

    # Steps -----------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Compute one batch; returns what it gave, at most one output a sequence.

        A sequence whose logits are broken (NaN) ends with `finish_reason="error"`; the others go on. If
        anything raises, every request is dropped, for none may stay half advanced, and the error passes on.
        """
        try:
            return self._step()
        except BaseException:
            self.drop_all()
            self.blocks.forget_copies()
            raise

    def _step(self) -> list[StepOutput]:
        self.late_scaling.send_back(self.scheduler)
        guessing = self.speculator.guess()
        plan = self.scheduler.schedule()
        self.speculator.cut(guessing, plan)
        self.counters.preemptions += len(plan.preempted)
        if not plan.chunks:
            return []
        for chunk in plan.chunks:
            if not chunk.sequence.started:
                self._note_start(chunk)
        logits, masks = self._execute_and_mask(plan)
        checked = self.speculator.check(plan, logits) if guessing else {}
        self.scheduler.commit(plan)
        for generation in guessing:
            self.blocks.shrink(generation)
        return self._sample(plan, logits, masks, checked)

    def _note_start(self, chunk: Chunk[Generation]) -> None:
        chunk.sequence.started = True
        chunk.sequence.request.cached_tokens = chunk.start
        self.counters.tokens_looked_up += chunk.sequence.num_prompt
        self.counters.tokens_from_cache += chunk.start

    def drop_all(self) -> list[str]:
        """Cancel everything; returns the ids of the requests that were dropped."""
        dropped = self.request_ids()
        for request_id in dropped:
            self.cancel(request_id)
        return dropped

    def _execute_and_mask(self, plan: Plan[Generation]) -> tuple[np.ndarray, np.ndarray | None]:
        """The step's logits, and the masks of the generations that need one, in the plan's order."""
        ending = [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        matchers = [g.matcher for g in ending if g.matcher is not None and g.needs_mask]
        making = self._masks.begin(matchers) if matchers else None
        try:
            logits = self._execute(plan)
        finally:
            # Waits whatever happens: matchers are one thread's at a time.
            masks = making.result() if making is not None else None
        return logits, masks

    def _execute(self, plan: Plan[Generation]) -> np.ndarray:
        if plan.copies:
            sources, destinations = zip(*plan.copies, strict=True)
            self.executor.copy_pages(sources, destinations)
        copy_window_pages(self.blocks, self.executor)
        rotate_keys(self.blocks, self.executor)
        inputs = build_inputs(plan.chunks, self.executor.page_size)
        self.counters.steps += 1
        self.counters.tokens_computed += len(inputs.token_ids)
        return self.executor.step(inputs)

    def _sample(
        self,
        plan: Plan[Generation],
        logits: np.ndarray,
        masks: np.ndarray | None,
        checked: dict[int, Checked],
    ) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        wanted = self._to_sample(plan.chunks, logits, checked, outputs)
        if not wanted.generations:
            return outputs
        if wanted.rows != list(range(len(logits))):
            # The choices of one prompt start from the same row, and some rows are no one's next token.
            logits = logits[wanted.rows]
        states = [generation.sampler for generation in wanted.generations]
        indices = [generation.num_generated for generation in wanted.generations]
        tokens, logprobs = sample(logits, states, indices, self._allowed(wanted, masks), self._prepare)
        for generation, token, logprob in zip(wanted.generations, tokens, logprobs, strict=True):
            outputs.append(self._advance(generation, [token], [logprob]))
        return outputs

    def _advance(
        self, generation: Generation, tokens: Seq[int], logprobs: Seq[TokenLogprob | None]
    ) -> StepOutput:
        output = generation.advance(tokens, logprobs)
        if output.finish_reason is not None:
            self._finish(generation)
        self.counters.tokens_generated += len(output.token_ids)
        return output

    def _allowed(self, wanted: _Sampling, masks: np.ndarray | None) -> list[Allowed] | None:
        """What grammars leave to each row; None where there are none."""
        if all(generation.matcher is None for generation in wanted.generations):
            return None
        allowed: list[Allowed] = []
        for generation, row in zip(wanted.generations, wanted.masks, strict=True):
            if generation.forced:
                allowed.append(generation.forced[0])
            else:
                allowed.append(masks[row] if masks is not None and generation.needs_mask else None)
        return allowed

    def _to_sample(
        self,
        chunks: Seq[Chunk[Generation]],
        logits: np.ndarray,
        checked: dict[int, Checked],
        outputs: list[StepOutput],
    ) -> _Sampling:
        """The generations whose next token this step gave, with the forks that begin here.

        Prompts that are scored take their rows of the logits; those that want nothing else end here.
        """
        wanted = _Sampling()
        row = mask = 0
        for chunk in chunks:
            generation = chunk.sequence
            if (known := checked.get(id(generation))) is not None:
                row += known.rows
                generation.drop_last(known.kept)  # they come again, one by one, each with its text
                outputs.append(self._advance(generation, known.tokens, known.logprobs))
                continue
            if chunk.scored:
                count = len(chunk.scored)
                generation.note_prompt(logits[row : row + count])
                row += count
            if not chunk.is_last:
                continue
            row += 1
            if not generation.request.max_tokens:
                outputs += generation.finish_scoring()
                self._finish(generation)
                continue
            wanted.add(generation, row - 1, mask)
            mask += generation.needs_mask
            for choice in range(1, generation.slots):
                child = generation.fork(choice)
                self.scheduler.fork(generation, child)
                generation.request.live.append(child)
                wanted.add(child, row - 1, wanted.masks[-1])
        return wanted

    def _finish(self, generation: Generation) -> None:
        self.scheduler.finish(generation)
        request = generation.request
        request.live.remove(generation)
        if not request.live:
            self._requests.pop(request.id, None)
        assert self.has_work or self.blocks.num_used == 0, "pages leaked"

    # Scoring ---------------------------------------------------------------------------------------------

    def score(
        self, ids: Seq[int], chunk: int | None = None, adapter: str | None = None
    ) -> Iterator[np.ndarray]:
        """Logits of every token of a text, a chunk of rows [c, vocab] float32 at a time, in order.

        With `sinks` a text may be longer than the context: tokens are evicted as from an answer, and a row is
        what the model says with those that are left.

        Uses pages of the same cache, taken from running sequences where none are left; they are given back
        when the iterator ends or is closed. Do not `step` in between: `list(engine.score(ids))` or an
        unbroken loop. `adapter` as in `SamplingParams`.
        """
        sequence = Sequence(self.scorable(ids))
        sequence.use(self.adapters.get(adapter))
        self.late_scaling.begin(sequence)
        return self._score(sequence, chunk or self.options.max_batch_tokens)

    def scorable(self, ids: Seq[int]) -> array[int]:
        """A text's token ids, checked. Raises ContextLengthError where they are too many, InputError where
        they are none.
        """
        prompt = prompt_ids(ids, self.tokenizer, self.facts.vocab_size)
        if len(prompt) > self.limit and self.eviction is None:
            raise ContextLengthError(
                f"context_length_exceeded: the text has {len(prompt)} tokens, the limit is {self.limit}",
                remedy="score it in shorter pieces",
                prompt_tokens=len(prompt),
                limit=self.limit,
            )
        return prompt

    def _score(self, sequence: Sequence, size: int) -> Iterator[np.ndarray]:
        total = len(sequence.tokens)
        if self.blocks.windows:  # whose pages are counted for steps of this size
            size = min(size, self.options.max_batch_tokens)
        while self.blocks.pages_to_extend(sequence, total) > self.blocks.num_available:
            victim = self.scheduler.preempt_newest()
            assert victim is not None, "the text fits in an empty cache"
        try:
            while (start := sequence.num_computed) < total:
                part = Chunk(sequence, start, min(start + size, total, self.blocks.reach(sequence)) - start)
                self.blocks.extend(sequence, start + part.count)
                rotate_keys(self.blocks, self.executor)
                yield self.executor.step(build_inputs([part], self.executor.page_size, all_rows=True))
                self.blocks.advance(sequence, part.count)
        finally:
            self.blocks.release(sequence)


__all__ = [
    "ContextLengthError",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "FinishReason",
    "ModelFacts",
    "StepOutput",
]
