"""Sequences that are computed again, scaled, once they outgrow what a model was made for; on a fake model
whose tokens depend on the kind of every cached token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llmc.ir.errors import InputError
from llmc.runtime.continuations import ContinuationScorer
from llmc.runtime.continuations import Request as Continuations
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.executor.base import StepInputs
from llmc.runtime.late_scaling import NEVER, LateScaling
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.sequence import Sequence

from .fake_executor import FakeExecutor, reference_logits
from .schedules import check_schedule, random_schedule

VOCAB, CONTEXT, ORIGINAL, OFFSET = 97, 80, 34, 100
FACTS = ModelFacts(VOCAB, CONTEXT, (3,), late_scaling=LateScaling(ORIGINAL, OFFSET))


class TwoKinds(FakeExecutor):
    """Positions from OFFSET on are those of scaled sequences."""

    def allocate_kv(self, num_pages: int) -> None:
        super().allocate_kv(num_pages)
        self.kinds = np.zeros((num_pages, self.page_size), np.int32)

    def copy_pages(self, src: Seq[int], dst: Seq[int]) -> None:
        super().copy_pages(src, dst)
        for source, destination in zip(src, dst, strict=True):
            self.kinds[destination] = self.kinds[source]

    def step(self, inputs: StepInputs) -> np.ndarray:
        kinds = np.where(inputs.positions >= OFFSET, OFFSET, 0).astype(np.int32)
        self.kinds[np.divmod(inputs.slot_mapping, self.page_size)] = kinds
        return super().step(replace(inputs, positions=inputs.positions - kinds))

    def _row(self, inputs: StepInputs, sequence: int, position: int) -> np.ndarray:
        count = position + 1
        pages = inputs.block_table[sequence, : -(-count // self.page_size)]
        kinds = self.kinds[pages].reshape(-1)[:count]
        assert len(set(kinds.tolist())) == 1, "queries meet keys of another kind"
        return logits_of(self.tokens[pages].reshape(-1)[:count], scaled=bool(kinds[0]))


def logits_of(tokens: Any, *, scaled: bool) -> np.ndarray:
    return reference_logits(np.array(tokens), np.arange(len(tokens)) + OFFSET * scaled, VOCAB)


def alone(prompt: Seq[int], count: int) -> list[int]:
    """Greedy tokens without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(tokens, scaled=len(tokens) > ORIGINAL).argmax()))
    return tokens[len(prompt) :]


def engine(**options: Any) -> Engine:
    given = {"kv_tokens": 800, "max_sequences": 4, "max_batch_tokens": 32, **options}
    return Engine(TwoKinds(), None, FACTS, EngineOptions(**given))


def answers(run: Engine, prompts: Seq[Seq[int]], params: SamplingParams) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        run.add_request(list(prompt), params, str(number))
    found: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while run.has_work:
        for output in run.step():
            found[output.request_id] += output.token_ids
    run.check()
    return list(found.values())


@pytest.mark.parametrize("length", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 60])
def test_a_sequence_is_scaled_from_the_first_token_that_it_needs(length: int) -> None:
    prompt = list(range(5, 5 + length))
    params = SamplingParams(max_tokens=CONTEXT - length, ignore_eos=True)
    for options in ({}, {"prefix_cache": False}, {"speculate": 5}, {"max_batch_tokens": 7}):
        assert answers(engine(**options), [prompt], params) == [alone(prompt, CONTEXT - length)], options


class Knows:
    """Guesses what the model will say."""

    def __init__(self, text: Seq[int]) -> None:
        self.text = list(text)

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        return [self.text[len(one.tokens) : len(one.tokens) + count] for one in sequences]


@pytest.mark.parametrize("length", [1, 20, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
def test_guesses_end_where_another_kind_begins(length: int) -> None:
    prompt = list(range(5, 5 + length))
    wanted = alone(prompt, CONTEXT - length)
    run = engine(speculate=5)
    run.speculator.drafter = Knows([*prompt, *wanted])
    assert answers(run, [prompt], SamplingParams(max_tokens=CONTEXT - length, ignore_eos=True)) == [wanted]
    assert run.counters.guesses_accepted > (CONTEXT - length) // 2


def test_an_answer_that_ends_before_is_never_computed_again() -> None:
    run = engine()
    prompt = list(range(5, 25))
    params = SamplingParams(max_tokens=ORIGINAL - 20 + 1, ignore_eos=True)  # nothing follows the last one
    assert answers(run, [prompt], params) == [alone(prompt, ORIGINAL - 20 + 1)]
    assert run.counters.tokens_computed == ORIGINAL


def test_prefixes_of_the_two_kinds_are_not_taken_for_each_other() -> None:
    run, prompt = engine(), list(range(5, 37))
    few = SamplingParams(max_tokens=2, ignore_eos=True)
    many = SamplingParams(max_tokens=20, ignore_eos=True)
    text = [*prompt, *range(40, 60)]  # begins in the same way, and is scaled from the start
    for _ in range(2):
        assert answers(run, [prompt], few) == [alone(prompt, 2)]
        assert answers(run, [text, prompt], many) == [alone(text, 20), alone(prompt, 20)]
    assert run.counters.tokens_from_cache > 100


def test_scores_are_of_one_kind() -> None:
    run = engine()
    for length in (ORIGINAL, ORIGINAL + 1):
        ids = list(range(5, 5 + length))
        found = np.concatenate([part.copy() for part in run.score(ids, 8)])
        for at in range(length):
            assert np.array_equal(found[at], logits_of(ids[: at + 1], scaled=length > ORIGINAL))


def test_continuations_are_scored_as_the_longest_of_them_is() -> None:
    context = list(range(5, 5 + ORIGINAL - 1))
    for more in ([7, 8], [7, 8, 9]):  # the last one is predicted only
        (found,) = ContinuationScorer(engine()).score([Continuations(context, [[7], more])])
        scaled = len(context) + len(more) - 1 > ORIGINAL
        for continuation, value in zip([[7], more], found, strict=True):
            wanted, tokens = 0.0, list(context)
            for token in continuation:
                row = logits_of(tokens, scaled=scaled).astype(np.float64)
                wanted += row[token] - np.log(np.exp(row).sum())
                tokens.append(token)
            assert value == pytest.approx(wanted, abs=1e-4)


def test_random_schedules_give_each_request_its_own_tokens() -> None:
    executor = TwoKinds()
    events: Counter[str] = Counter()
    for seed in range(60):
        schedule = random_schedule(seed, FACTS, executor.page_size)
        schedule = replace(schedule, options=replace(schedule.options, speculate=4 * (seed % 2)))
        events += check_schedule(executor, FACTS, schedule)
    for event in ("preempted", "from_cache", "cancelled", "forked", "second_turns"):
        assert events[event] > 10, events


def test_sinks_need_one_kind() -> None:
    with pytest.raises(InputError, match="turn by two kinds of frequencies") as raised:
        engine(sinks=4)
    assert f"at most {ORIGINAL} tokens" in str(raised.value.remedy)
    assert engine(sinks=4, context=32).limit == 32


def test_facts_that_make_no_sense_are_refused() -> None:
    model = {"context_length": 80, "rope_scaling": {"when": "needed", "original": 34, "offset": 80}}
    assert LateScaling.read(model) == LateScaling(34, 80)
    for key, value in (("offset", 79), ("original", 0), ("offset", "x")):
        facts = {**model["rope_scaling"], key: value}  # pyright: ignore[reportGeneralTypeIssues]
        with pytest.raises(ValueError):
            LateScaling.read({**model, "rope_scaling": facts})
    for other in (None, {}, {"type": "yarn", "factor": 4.0, "original": 34}):
        assert LateScaling.read({**model, "rope_scaling": other}) is NEVER
