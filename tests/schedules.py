"""Random schedules for the engine: whatever happens around a request, its tokens are those it gets alone.

Works with any batch invariant executor, the fake one or a compiled model:

    for seed in range(200):
        check_schedule(executor, facts, random_schedule(seed, facts, executor.page_size))
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor import Executor
from llmc.runtime.sampling_params import SamplingParams

Answers = dict[int, list[int]]
"""Choice → generated tokens."""


@dataclass(frozen=True)
class Job:
    """One request of a schedule."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    """Step at which it is added."""
    cancel: int | None = None
    """Steps after its arrival at which it is cancelled, if it still runs."""
    follow_up: tuple[int, ...] = ()
    """Tokens of a second turn: once it is done, prompt + answer + these are a new request."""


@dataclass(frozen=True)
class Schedule:
    """Requests, and an engine too small for them."""

    seed: int
    jobs: tuple[Job, ...]
    options: EngineOptions


@dataclass
class Outcome:
    """What a run gave."""

    answers: dict[str, Answers] = field(default_factory=dict)
    prompts: dict[str, tuple[tuple[int, ...], SamplingParams]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    events: Counter[str] = field(default_factory=Counter)


def _params(rng: random.Random, vocab: int, room: int) -> SamplingParams:
    params = SamplingParams(
        max_tokens=rng.randint(1, max(1, min(24, room))), n=rng.choice([1, 1, 1, 1, 2, 3])
    )
    kind = rng.random()
    if kind < 0.25:
        params = replace(params, temperature=1.0, seed=rng.randrange(2**32), top_p=rng.choice([1.0, 0.9]))
    elif kind < 0.35:
        params = replace(params, repetition_penalty=1.3, frequency_penalty=0.5)
    if rng.random() < 0.2:
        params = replace(params, stop_token_ids=(rng.randrange(vocab),), min_tokens=rng.randint(0, 1))
    return params


def random_schedule(seed: int, facts: ModelFacts, page_size: int, *, max_jobs: int = 12) -> Schedule:
    """Prompts with common beginnings, arrivals, cancels, several choices, second turns, and a cache that
    overflows.
    """
    rng = random.Random(seed)
    longest = min(facts.context_length - 2, 12 * page_size)
    bases = [tuple(rng.randrange(facts.vocab_size) for _ in range(longest)) for _ in range(3)]
    jobs: list[Job] = []
    for number in range(rng.randint(2, max_jobs)):
        shared = rng.choice(bases)[: rng.randint(0, longest - 1)]
        tail = tuple(rng.randrange(facts.vocab_size) for _ in range(rng.randint(1, max(1, page_size))))
        prompt = (shared + tail)[:longest]
        if jobs and rng.random() < 0.2:
            prompt = rng.choice(jobs).prompt
        jobs.append(
            Job(
                f"job{number}",
                prompt,
                _params(rng, facts.vocab_size, facts.context_length - len(prompt)),
                arrival=rng.choice([0, 0, rng.randint(0, 40)]),
                cancel=rng.randint(0, 12) if rng.random() < 0.2 else None,
                follow_up=bases[0][: rng.randint(1, page_size)] if rng.random() < 0.3 else (),
            )
        )
    largest = max(min(len(job.prompt) + (job.params.max_tokens or 0), facts.context_length) for job in jobs)
    sequences = rng.randint(3, 8)
    options = EngineOptions(
        max_sequences=sequences,
        max_batch_tokens=rng.randint(sequences, 64),
        kv_tokens=largest + rng.choice([0, page_size, 4 * page_size, 20 * page_size]),
        prefix_cache=rng.random() < 0.8,
    )
    return Schedule(seed, tuple(jobs), options)


def endless(schedule: Schedule, facts: ModelFacts, page_size: int) -> Schedule:
    """The same with answers that go on beyond the context, and a cache of one or two contexts."""
    rng = random.Random(schedule.seed)
    jobs = tuple(
        replace(job, params=replace(job.params, max_tokens=rng.randint(1, 2 * facts.context_length)))
        for job in schedule.jobs[:6]
    )
    tokens = facts.context_length + rng.choice([0, page_size, 8 * page_size, facts.context_length])
    sinks = rng.choice([0, 1, page_size, 2 * page_size + 1])
    return replace(
        schedule, jobs=jobs, options=replace(schedule.options, kv_tokens=tokens, sinks=sinks, speculate=4)
    )


class _Player:
    """An engine, the requests given to it, and what came out."""

    def __init__(self, executor: Executor, facts: ModelFacts, schedule: Schedule, check: bool) -> None:
        self.engine = Engine(executor, None, facts, schedule.options)
        self.outcome = Outcome()
        self.pending = sorted(schedule.jobs, key=lambda job: job.arrival)
        self.follow_ups = {job.name: job.follow_up for job in schedule.jobs if job.follow_up}
        self.to_cancel: dict[str, int] = {}
        self.unfinished: dict[str, int] = {}
        self.checking = check
        self.bound = facts.context_length + self.engine.blocks.page_size
        """Tokens of the pages that a sequence holds at most."""
        self.now = 0

    def check(self) -> None:
        if self.checking:
            self.engine.check()
            for sequence in self.engine.scheduler.running:
                assert len(sequence.block_table) * self.engine.blocks.page_size <= self.bound

    def add(self, name: str, prompt: tuple[int, ...], params: SamplingParams) -> None:
        self.engine.add_request(list(prompt), params, name)
        self.outcome.prompts[name] = (prompt, params)
        self.outcome.answers[name] = {choice: [] for choice in range(params.n)}
        self.unfinished[name] = params.n
        self.check()

    def arrive(self) -> None:
        while self.pending and self.pending[0].arrival <= self.now:
            job = self.pending.pop(0)
            self.add(job.name, job.prompt, job.params)
            if job.cancel is not None:
                self.to_cancel[job.name] = self.now + job.cancel

    def cancel(self) -> None:
        for name in [name for name, when in self.to_cancel.items() if when <= self.now]:
            del self.to_cancel[name]
            if self.engine.cancel(name):
                self.outcome.cancelled.add(name)
            self.check()

    def step(self) -> None:
        for output in self.engine.step():
            assert output.error is None, output.error
            name = output.request_id
            self.outcome.answers[name][output.index] += output.token_ids
            if output.finish_reason is not None:
                self.unfinished[name] -= 1
                if self.unfinished[name] == 0 and name in self.follow_ups:
                    self.second_turn(name)
        self.check()
        self.now += 1

    def second_turn(self, name: str) -> None:
        prompt, params = self.outcome.prompts[name]
        turn = prompt + tuple(self.outcome.answers[name][0]) + self.follow_ups[name]
        room = self.engine.limit - len(turn)
        if room > 0:
            self.add(f"{name}+", turn, replace(params, n=1, min_tokens=0, max_tokens=min(8, room)))


def run_schedule(executor: Executor, facts: ModelFacts, schedule: Schedule, *, check: bool = True) -> Outcome:
    """Play a schedule; with `check` the block manager's books are balanced after every operation."""
    player = _Player(executor, facts, schedule, check)
    while player.pending or player.engine.has_work:
        player.arrive()
        player.cancel()
        player.step()
        assert player.now < 20_000, "the engine does not come to an end"
    stats, outcome = player.engine.stats, player.outcome
    assert stats.pages_used == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    outcome.events.update(
        preempted=stats.preemptions,
        from_cache=stats.tokens_from_cache,
        cancelled=len(outcome.cancelled),
        forked=sum(params.n - 1 for _, params in outcome.prompts.values()),
        second_turns=sum(name.endswith("+") for name in outcome.prompts),
    )
    return outcome


def run_alone(
    executor: Executor,
    facts: ModelFacts,
    prompt: tuple[int, ...],
    params: SamplingParams,
    sinks: int | None = None,
) -> Answers:
    """The request in an engine of its own: one prompt in one step, room for everything, nothing cached
    before.
    """
    tokens = params.n * (facts.context_length + executor.page_size)
    options = EngineOptions(
        max_sequences=params.n,
        max_batch_tokens=max(facts.context_length, params.n),
        kv_tokens=tokens,
        prefix_cache=False,
        sinks=sinks,
    )
    engine = Engine(executor, None, facts, options)
    engine.add_request(list(prompt), params, "alone")
    answers: Answers = {choice: [] for choice in range(params.n)}
    while engine.has_work:
        for output in engine.step():
            answers[output.index] += output.token_ids
    return answers


def check_schedule(executor: Executor, facts: ModelFacts, schedule: Schedule) -> Counter[str]:
    """Assert that every request's tokens are those it gets alone, a cancelled one's a beginning of them.

    Returns how often things happened that might have broken it.
    """
    outcome = run_schedule(executor, facts, schedule)
    for name, (prompt, params) in outcome.prompts.items():
        alone = run_alone(executor, facts, prompt, params, schedule.options.sinks)
        for choice, tokens in outcome.answers[name].items():
            expected = alone[choice]
            if name in outcome.cancelled:
                expected = expected[: len(tokens)]
            assert tokens == expected, f"schedule {schedule.seed}, {name}, choice {choice}"
    return outcome.events
