"""Sequences that outlive their cache: tokens are the same alone and in any company, memory is bounded, the
books balance; and what is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.drafters import PromptLookup
from llmc.runtime.engine import ContextLengthError, Engine, EngineOptions, ModelFacts
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.sequence import Sequence

from .fake_executor import FakeExecutor, reference_logits, stream_alone
from .schedules import check_schedule, endless, random_schedule
from .server_harness import RunningServer, fake_llm

VOCAB, CONTEXT = 97, 40
FACTS = ModelFacts(VOCAB, CONTEXT)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


def engine(executor: FakeExecutor | None = None, facts: ModelFacts = FACTS, **options: object) -> Engine:
    sizes = {"kv_tokens": 400, "max_sequences": 4, "max_batch_tokens": 32, "sinks": 3, **options}
    return Engine(executor or FakeExecutor(), None, facts, EngineOptions(**sizes))


def answers(run: Engine, prompts: Seq[Seq[int]], params: SamplingParams = LONG) -> list[list[list[int]]]:
    """Tokens of each prompt and choice, all together, the books checked after every step."""
    found: list[list[list[int]]] = [[[] for _ in range(params.n)] for _ in prompts]
    for number, prompt in enumerate(prompts):
        run.add_request(list(prompt), params, str(number))
    while run.has_work:
        for output in run.step():
            found[int(output.request_id)][output.index] += output.token_ids
        run.check()
        for sequence in run.scheduler.running:
            assert len(sequence.block_table) <= CONTEXT // run.blocks.page_size
    assert run.stats.pages_used == 0
    return found


@pytest.mark.parametrize("sinks", [0, 1, 4, 7])
def test_an_answer_goes_on_when_the_cache_is_full(sinks: int) -> None:
    prompt = [5, 9, 11, 40, 2]
    wanted = stream_alone(prompt, 150, capacity=CONTEXT, sinks=-(-sinks // 4) * 4)
    assert answers(engine(sinks=sinks, max_sequences=1, kv_tokens=CONTEXT), [prompt]) == [[wanted]]


def test_the_last_page_of_a_context_that_is_no_multiple_is_not_used() -> None:
    run = engine(context=CONTEXT - 1)
    assert run.limit == CONTEXT - 4
    wanted = stream_alone([7], 90, capacity=CONTEXT - 4, sinks=4)
    assert answers(run, [[7]], SamplingParams(max_tokens=90, ignore_eos=True)) == [[wanted]]


def test_an_answer_without_a_bound_goes_on_until_the_model_ends() -> None:
    wanted = stream_alone([8], 400, capacity=CONTEXT, sinks=4)
    stop = next(token for token in wanted[200:] if token not in wanted[:200])
    run = engine()
    run.add_request([8], SamplingParams(max_tokens=None, stop_token_ids=(stop,)), "a")
    tokens: list[int] = []
    while run.has_work:
        for output in run.step():
            tokens += output.token_ids
            reason = output.finish_reason
    assert (tokens, reason) == (wanted[: wanted.index(stop) + 1], "stop")


def test_random_schedules_give_each_request_its_own_tokens() -> None:
    facts = ModelFacts(VOCAB, 80, (3,))
    executor = FakeExecutor()
    events: Counter[str] = Counter()
    for seed in range(14):
        schedule = endless(random_schedule(seed, facts, executor.page_size), facts, executor.page_size)
        events += check_schedule(executor, facts, schedule)
    for event in ("preempted", "from_cache", "cancelled", "forked"):
        assert events[event] > 10, events


def test_choices_share_pages_until_their_keys_are_turned() -> None:
    prompt = list(range(10, 10 + CONTEXT - 6))
    alone = [
        answers(
            engine(), [prompt], SamplingParams(max_tokens=90, temperature=1.0, seed=seed, ignore_eos=True)
        )
        for seed in (1, 2)
    ]
    both = SamplingParams(max_tokens=90, temperature=1.0, seed=1, n=3, ignore_eos=True)
    for tokens in (CONTEXT, 2 * CONTEXT, 400):  # with preemption and without
        found = answers(engine(kv_tokens=tokens), [prompt], both)
        assert found[0][0] == alone[0][0][0] and len({tuple(one) for one in found[0]}) == 3
        assert found == answers(engine(), [prompt], both)


class Oracle:
    """Guesses what the model will say, and something wrong now and then."""

    def __init__(self, wanted: Seq[int]) -> None:
        self.wanted = list(wanted)

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        (sequence,) = sequences
        begin = len(sequence.tokens)
        guesses = self.wanted[begin : begin + count]
        if begin % 3 == 0 and guesses:
            guesses[-1] = (guesses[-1] + 1) % VOCAB
        return [guesses]


def test_guesses_do_not_cross_an_eviction() -> None:
    prompt = [5, 9, 11, 40, 2]
    wanted = stream_alone(prompt, 150, capacity=CONTEXT, sinks=4)
    run = engine(speculate=7)
    run.speculator.drafter = Oracle([*prompt, *wanted])
    assert answers(run, [prompt]) == [[wanted]]
    assert run.counters.guesses_accepted > 80
    assert isinstance(engine(speculate=7).speculator.drafter, PromptLookup)


def test_pages_that_were_turned_are_found_by_nobody() -> None:
    """A prompt whose first answer turned its newest half is computed again where it is not known any more."""
    prompt = list(range(10, 10 + CONTEXT - 4))
    wanted = [stream_alone(prompt, 150, capacity=CONTEXT, sinks=4)]
    run = engine(kv_tokens=CONTEXT)
    assert answers(run, [prompt]) == [wanted]
    assert answers(run, [prompt]) == [wanted]
    cold = engine(prefix_cache=False)
    assert answers(cold, [prompt, prompt]) == [wanted, wanted]
    warm = engine()
    assert answers(warm, [prompt]) == [wanted]
    run_first = warm.stats.tokens_from_cache
    assert answers(warm, [prompt, prompt]) == [wanted, wanted]
    assert warm.stats.tokens_from_cache > run_first  # what was not turned is still there


def test_a_step_that_fails_leaves_no_keys_to_turn() -> None:
    executor = FakeExecutor()
    run = engine(executor)
    run.add_request([7], LONG)
    while run.scheduler.running == [] or run.scheduler.running[0].num_computed < CONTEXT:
        run.step()
    executor.fail_next = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        run.step()
    run.check()
    assert answers(run, [[7]]) == [[stream_alone([7], 150, capacity=CONTEXT, sinks=4)]]


def test_texts_are_scored_beyond_the_context() -> None:
    text = [5, 9, *stream_alone([5, 9], 120, capacity=CONTEXT, sinks=4)]
    run = engine()
    rows = np.concatenate([part.copy() for part in run.score(text, 7)])
    assert rows.argmax(axis=1)[1:-1].tolist() == text[2:]
    whole = np.concatenate([part.copy() for part in run.score(text)])
    assert np.array_equal(rows, whole) and len(rows) == len(text)
    assert np.array_equal(rows[0], reference_logits(np.array([5]), np.array([0]), VOCAB))
    run.check()
    assert run.stats.pages_used == 0


def test_a_server_answers_beyond_the_context() -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 150}
    with RunningServer({"tiny": fake_llm(context=64, sinks=4)}) as server:
        status, answer, _ = server.post("/v1/chat/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] == 150
        assert answer["choices"][0]["finish_reason"] == "length"
        body["messages"] = [{"role": "user", "content": "x" * 80}]
        status, answer, _ = server.post("/v1/chat/completions", body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


# Refusals --------------------------------------------------------------------------------------------------


def test_without_sinks_all_is_as_before() -> None:
    run = engine(sinks=None)
    assert [len(one) for (one,) in answers(run, [[7, 8]])] == [CONTEXT - 2]
    with pytest.raises(ContextLengthError):
        next(run.score([1] * (CONTEXT + 1)))


def test_prompts_beyond_the_context_are_refused() -> None:
    with pytest.raises(ContextLengthError, match=rf"{CONTEXT} tokens, the context holds {CONTEXT}"):
        engine().add_request([1] * CONTEXT)


class HasStates(FakeExecutor):
    state_bytes = 4

    def allocate_states(self, count: int) -> None: ...

    def copy_state(self, src: int, dst: int) -> None: ...


class HasWindow(FakeExecutor):
    windows = (20,)
    window_bytes_per_page = (8,)

    def allocate_windows(self, pages: Seq[int]) -> None: ...

    def copy_window_pages(self, which: int, src: Seq[int], dst: Seq[int]) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": -1}, "sinks is -1"),
        ({"sinks": 33}, r"of a context of 40 tokens, 10 pages of 4, 9 would stay.*at least 44 tokens"),
        ({"kv_tokens": 30}, r"less than the context of 40 tokens.*at most 32 tokens"),
        ({"executor": HasStates()}, "recurrent states keep what would be evicted"),
        ({"executor": HasWindow()}, r"window of 20 tokens, and 16 tokens stay.*at least 52 tokens"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine(**options)  # type: ignore[arg-type]


def test_an_executor_that_turns_no_keys_serves_models_whose_keys_hold_no_position() -> None:
    class Unable:
        """Hides `rotate_keys`."""

        def __init__(self) -> None:
            self._executor = FakeExecutor()

        def __getattr__(self, name: str) -> object:
            if name == "rotate_keys":
                raise AttributeError(name)
            return getattr(self._executor, name)

    with pytest.raises(InputError, match="cannot turn the keys"):
        engine(Unable())  # type: ignore[arg-type]
    run = engine(Unable(), ModelFacts(VOCAB, CONTEXT, moves_keys=False))  # type: ignore[arg-type]
    tokens = answers(run, [[7], [7, 8]])
    again = answers(
        engine(Unable(), ModelFacts(VOCAB, CONTEXT, moves_keys=False), kv_tokens=CONTEXT), [[7], [7, 8]]
    )  # type: ignore[arg-type]
    assert tokens == again and [len(one) for (one,) in tokens] == [150, 150]
