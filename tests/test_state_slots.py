"""Rows of the state cache: each is one sequence's or free, whatever is added, forked, preempted, ended; and
the engine's answers over a model with a state are those that each request gets alone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.continuations import ContinuationScorer, Request
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor.base import StepInputs, check_step
from llmc.runtime.memory import plan_kv_cache
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.sequence import Sequence, Status
from llmc.runtime.state_slots import StateSlots

from .fake_executor import FakeExecutor
from .schedules import check_schedule, random_schedule

FACTS = ModelFacts(vocab_size=97, context_length=80, eos_token_ids=(3,))
_MIX = 0x9E3779B97F4A7C15


class RecurrentExecutor(FakeExecutor):
    """Its "model" is a hash that goes on from token to token: what it answers depends on its state alone,
    which lies in a row of the state cache between two steps.
    """

    state_bytes = 8

    def __init__(self) -> None:
        super().__init__()
        self.states = np.zeros(0, np.uint64)

    def allocate_states(self, count: int) -> None:
        self.states = np.full(count, 12345, np.uint64)  # whatever a row holds before means nothing

    def copy_state(self, src: int, dst: int) -> None:
        self.states[dst] = self.states[src]

    def step(self, inputs: StepInputs) -> np.ndarray:
        check_step(inputs, num_pages=10**6, page_size=self.page_size, vocabulary=97, states=len(self.states))
        super().step(inputs)
        assert inputs.state_slot is not None
        behind: list[int] = []
        for b, slot in enumerate(inputs.state_slot.tolist()):
            rows = range(inputs.query_start[b], inputs.query_start[b + 1])
            state = 1 if inputs.context_len[b] == len(rows) else int(self.states[slot])
            for t in rows:
                state = (state ^ (int(inputs.token_ids[t]) + 7)) * _MIX % 2**64
                state ^= state >> 29
                behind.append(state)
            self.states[slot] = state
        return np.array([_logits(behind[i]) for i in inputs.output_index], np.float32).reshape(-1, 97)


def _logits(state: int) -> np.ndarray:
    values = (np.arange(97, dtype=np.uint64) + np.uint64(1)) * np.uint64(state | 1)
    return (values >> np.uint64(40)).astype(np.float32) / np.float32(2**21) - np.float32(4)


def test_random_schedules_give_each_request_its_own_tokens() -> None:
    executor = RecurrentExecutor()
    events: Counter[str] = Counter()
    for seed in range(60):
        events += check_schedule(executor, FACTS, random_schedule(seed, FACTS, executor.page_size))
    assert events["preempted"] > 20, events
    assert events["cancelled"] > 10, events
    assert events["forked"] > 50, events
    assert events["from_cache"] == 0, "a page holds no state: its prefix is no one else's"


class _ForgetsStates(RecurrentExecutor):
    def copy_state(self, src: int, dst: int) -> None:
        pass


def test_the_driver_notices_an_executor_that_forgets_to_copy() -> None:
    def play() -> None:
        executor = _ForgetsStates()
        for seed in range(60):
            check_schedule(executor, FACTS, random_schedule(seed, FACTS, executor.page_size))

    with pytest.raises(AssertionError, match="schedule"):
        play()


@given(st.lists(st.tuples(st.sampled_from("aefr"), st.integers(0, 5)), max_size=60))
def test_rows_never_leak(history: list[tuple[str, int]]) -> None:
    copies: list[tuple[int, int]] = []
    states = StateSlots(6, lambda source, target: copies.append((source, target)))
    blocks = BlockManager(64, 4, prefix_cache=False, states=states)
    running: list[Sequence] = []
    for what, which in history:
        if what == "a" and len(running) < 6:
            one = Sequence(range(9))
            one.status = Status.RUNNING
            blocks.claim(one, blocks.lookup(one))
            blocks.extend(one, 1 + which)
            running.append(one)
        elif running:
            one = running[which % len(running)]
            if what == "e":
                blocks.extend(one, min(9, one.num_computed + 2))
                blocks.commit(one, min(2, 9 - one.num_computed))
            elif what == "f" and len(running) < 6:
                child = Sequence(())
                blocks.fork(one, child)
                child.status = Status.RUNNING
                assert child.state_slot != one.state_slot
                assert copies.pop() == (one.state_slot, child.state_slot)
                running.append(child)
            elif what == "r":
                blocks.release(one)
                running.remove(one)
        blocks.check(running)
        assert states.num_free == 6 - len(running)
    for one in running:
        blocks.release(one)
    blocks.check([])


def test_a_row_that_leaked_is_noticed() -> None:
    states = StateSlots(2, lambda source, target: None)
    blocks = BlockManager(4, 4, prefix_cache=False, states=states)
    one = Sequence(range(3))
    one.status = Status.RUNNING
    blocks.extend(one, 3)
    one.state_slot = 0 if one.state_slot else 1
    with pytest.raises(AssertionError, match="leaked, or has two owners"):
        blocks.check([one])


def _engine(**options: int) -> Engine:
    sizes = {"kv_tokens": 400, "max_sequences": 4, "max_batch_tokens": 16, **options}
    return Engine(RecurrentExecutor(), None, FACTS, EngineOptions(**sizes))


def test_speculation_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="recurrent layers, whose state does not go back"):
        _engine(speculate=2)


def test_prompt_that_is_scored_owns_a_row_while_it_is() -> None:
    engine = _engine(max_sequences=1)
    engine.add_request(list(range(10, 20)), SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    ids = list(range(10, 50))
    rows = np.concatenate(list(engine.score(ids, 7)))
    engine.check()
    state, wanted = 1, []
    for token in ids:
        state = (state ^ (token + 7)) * _MIX % 2**64
        state ^= state >> 29
        wanted.append(_logits(state))
    assert np.array_equal(rows, np.stack(wanted))
    while engine.has_work:
        engine.step()
    assert engine.blocks.states is not None
    assert engine.blocks.states.num_free == 2


def test_continuations_fork_the_state_of_their_context() -> None:
    engine = _engine()
    requests = [Request(list(range(5, 5 + n)), [[9, 8, 7], [4], [1, 2]]) for n in (3, 11, 6)]
    sums = ContinuationScorer(engine).score(requests)
    engine.check()
    alone = [
        ContinuationScorer(_engine()).score([Request(r.context, [c])])[0][0]
        for r in requests
        for c in r.continuations
    ]
    assert np.allclose(np.concatenate(sums), alone, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"takes 7 rows of the state cache, which has 5"):
        ContinuationScorer(engine).score([Request([1, 2], [[i, i] for i in range(6)])])
    engine.check()


def test_states_are_counted_before_the_pages() -> None:
    sizes = {"page_size": 16, "bytes_per_page": 100, "context": 1600, "max_sequences": 8}
    plan = plan_kv_cache(**sizes, available=10_000, beside=9_000)
    assert plan.pages == 6  # 60 % of what is left
    with pytest.raises(InputError, match="the states of 8 sequences take"):
        plan_kv_cache(**sizes, available=10_000, beside=10_001)


@pytest.mark.parametrize("slots", [None, [0], [1, 1], [0, 3], [-1, 0]])
def test_rows_that_are_not_there_are_refused(slots: list[int] | None) -> None:
    one = np.arange(2, dtype=np.int32)
    step = StepInputs(
        token_ids=one,
        positions=np.zeros(2, np.int32),
        slot_mapping=one,
        query_start=np.arange(3, dtype=np.int32),
        context_len=np.ones(2, np.int32),
        block_table=np.zeros((2, 1), np.int32),
        output_index=one,
        state_slot=None if slots is None else np.array(slots, np.int32),
    )
    with pytest.raises(InputError, match="state"):
        check_step(step, num_pages=4, page_size=16, vocabulary=None, states=3)
