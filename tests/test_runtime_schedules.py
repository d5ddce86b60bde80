"""Two hundred random schedules: tokens identical, bit for bit, to each request alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import FakeExecutor, generate_alone
from .schedules import check_schedule, random_schedule, run_alone

FACTS = ModelFacts(vocab_size=97, context_length=80, eos_token_ids=(3,))


def test_200_random_schedules_give_each_request_its_own_tokens():
    executor = FakeExecutor()
    events: Counter[str] = Counter()
    for seed in range(200):
        events += check_schedule(executor, FACTS, random_schedule(seed, FACTS, executor.page_size))
    # The schedules are only worth something if all of this happened, and often.
    assert events["preempted"] > 100, events
    assert events["from_cache"] > 1000, events
    assert events["cancelled"] > 50, events
    assert events["forked"] > 200, events
    assert events["second_turns"] > 100, events


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_other_page_sizes(page_size: int):
    executor = FakeExecutor(page_size=page_size)
    for seed in range(1000, 1010):
        check_schedule(executor, FACTS, random_schedule(seed, FACTS, page_size))


def test_alone_is_the_model_without_any_cache():
    prompt = (5, 9, 11, 40, 2, 2, 8)
    answers = run_alone(FakeExecutor(), FACTS, prompt, SamplingParams(max_tokens=30, ignore_eos=True))
    assert answers[0] == generate_alone(prompt, 30)


class _ForgetsCopies(FakeExecutor):
    def copy_pages(self, src, dst):
        pass


class _WritesOneSlotOff(FakeExecutor):
    def step(self, inputs):
        logits = super().step(inputs)
        if len(inputs.context_len) > 2:
            self.tokens[inputs.slot_mapping[0] // self.page_size] = 1
        return logits


@pytest.mark.parametrize("broken", [_ForgetsCopies, _WritesOneSlotOff])
def test_the_driver_notices_a_broken_executor(broken: type[FakeExecutor]):
    def play_all() -> None:
        executor = broken()
        for seed in range(200):
            check_schedule(executor, FACTS, random_schedule(seed, FACTS, executor.page_size))

    with pytest.raises(AssertionError, match="schedule"):
        play_all()


def test_a_warm_prefix_cache_changes_nothing_and_leaves_one_token_to_compute():
    executor = FakeExecutor()
    engine = Engine(executor, None, FACTS, EngineOptions(kv_tokens=160, max_sequences=4, max_batch_tokens=64))
    prompt = list(range(10, 30))  # five pages exactly
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    answers: list[list[int]] = []
    for _ in range(2):
        engine.add_request(prompt, params)
        answers.append([])
        while engine.has_work:
            for output in engine.step():
                answers[-1] += output.token_ids
                cached = output.cached_tokens
    assert answers[0] == answers[1] == generate_alone(prompt, 6)
    assert cached == 16  # four of five pages: the last token's logits are needed
    assert engine.stats.tokens_from_cache == 16


def test_step_inputs_are_what_the_interface_says():
    executor = FakeExecutor()
    executor.keep_steps = True
    engine = Engine(executor, None, FACTS, EngineOptions(kv_tokens=80, max_sequences=4, max_batch_tokens=9))
    engine.add_request(list(range(1, 8)), SamplingParams(max_tokens=2, ignore_eos=True))
    engine.add_request(list(range(21, 27)), SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_work:
        engine.step()
    first = executor.steps[0]
    assert first.query_start[-1] <= 9
    # The whole first prompt, and as much of the second as the budget leaves, its logits not wanted yet.
    assert first.token_ids.tolist() == [*range(1, 8), 21, 22]
    assert first.positions.tolist() == [*range(7), 0, 1]
    assert first.context_len.tolist() == [7, 2]
    assert first.output_index.tolist() == [6]
    assert first.block_table.shape == (2, 2)
    assert first.block_table[1, 1] == 0
    second = executor.steps[1]
    assert second.context_len.tolist() == [8, 6]
    assert second.output_index.tolist() == [0, 4]
    assert np.array_equal(second.query_start, [0, 1, 5])
