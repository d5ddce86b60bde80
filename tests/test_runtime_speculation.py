"""Guesses of the next tokens: the same answers as without them, whatever guesses, whatever runs beside."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.drafters import DraftModel, Patience, PromptLookup
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.sequence import Sequence

from .fake_executor import FakeExecutor, generate_alone

VOCAB = 97
FACTS = ModelFacts(VOCAB, 400, (5,))


class Oracle:
    """Guesses the fake model's own tokens, and a wrong one after `right` of them."""

    def __init__(self, right: int) -> None:
        self.right = right

    def propose(self, sequences: Seq[Sequence], count: int) -> list[list[int]]:
        found = []
        for sequence in sequences:
            tokens = generate_alone(list(sequence.tokens), count)
            if self.right < count:
                tokens[self.right] = (tokens[self.right] + 1) % VOCAB
            found.append(tokens)
        return found


def _engine(drafter=None, *, speculate: int = 4, kv_tokens: int = 2000, **options) -> Engine:
    options = {"max_sequences": 8, "max_batch_tokens": 64, **options}
    engine = Engine(
        FakeExecutor(), None, FACTS, EngineOptions(kv_tokens=kv_tokens, speculate=speculate, **options)
    )
    if drafter is not None:
        engine.speculator.drafter = drafter
    return engine


def _run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[list[int]]]:
    found = {name: [[] for _ in range(params.n)] for name, (_, params) in requests.items()}
    for name, (prompt, params) in requests.items():
        engine.add_request(prompt, params, name)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id][output.index] += output.token_ids
        for sequence in engine.scheduler.running:
            assert sequence.drafted == 0
        engine.check()
    assert engine.stats.pages_used == 0
    return found


@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_guesses_that_are_right_save_steps_and_wrong_ones_cost_no_token(right: int):
    engine = _engine(Oracle(right))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    found = _run(engine, {"a": ([1, 2, 3], params)})
    assert found["a"][0] == generate_alone([1, 2, 3], 60)
    assert engine.counters.guesses_accepted <= engine.counters.tokens_guessed
    if right == 4:
        assert engine.counters.steps <= 1 + 60 // 5 + 1
    if right == 0:
        assert engine.counters.guesses_accepted == 0
        assert engine.counters.tokens_guessed < 4 * 20, "a sequence whose guesses are wrong waits"


def test_sampling_with_a_seed_gives_the_same_tokens():
    params = SamplingParams(
        max_tokens=80, temperature=0.8, seed=3, top_k=20, logprobs=2, n=2, ignore_eos=True
    )
    plain = _run(_engine(speculate=0), {"a": ([1, 2, 3], params)})
    assert _run(_engine(Oracle(4)), {"a": ([1, 2, 3], params)}) == plain


def test_the_end_of_the_answer_inside_of_a_guess():
    tokens = generate_alone([1, 2, 3], 60)
    stop = tokens[6]
    first = tokens.index(stop)
    params = SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
    assert _run(_engine(Oracle(4)), {"a": ([1, 2, 3], params)})["a"][0] == tokens[: first + 1]
    for most in range(1, 12):
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        assert _run(_engine(Oracle(4)), {"a": ([1, 2, 3], params)})["a"][0] == tokens[:most]


def test_the_contexts_end():
    facts = ModelFacts(VOCAB, 40, ())
    engine = Engine(FakeExecutor(), None, facts, EngineOptions(kv_tokens=400, speculate=4))
    engine.speculator.drafter = Oracle(4)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    assert _run(engine, {"a": ([1, 2, 3], params)})["a"][0] == generate_alone([1, 2, 3], 37)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(60, 400), st.integers(0, 4), st.integers(1, 15))
def test_any_mix_under_any_pressure_gives_what_each_gives_alone(seed, kv_tokens, right, speculate):
    rng = random.Random(seed)
    requests = {}
    for number in range(rng.randrange(1, 7)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 25))]
        requests[str(number)] = (prompt, SamplingParams(max_tokens=rng.randrange(1, 30), ignore_eos=True))
    engine = _engine(Oracle(right), speculate=speculate, kv_tokens=kv_tokens, max_batch_tokens=32)
    found = _run(engine, requests)
    for name, (prompt, params) in requests.items():
        assert found[name][0] == generate_alone(prompt, params.max_tokens)


def test_what_needs_the_tokens_before_it_is_not_guessed():
    for params in (
        SamplingParams(max_tokens=20, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=20, logit_bias={3: 5.0}, ignore_eos=True),
    ):
        engine = _engine(Oracle(4))
        plain = _run(_engine(speculate=0), {"a": ([1, 2, 3], params)})
        assert _run(engine, {"a": ([1, 2, 3], params)}) == plain
        assert engine.counters.tokens_guessed == 0


def test_a_draft_model_that_is_the_model_is_always_right():
    draft = Engine(FakeExecutor(), None, FACTS, EngineOptions(kv_tokens=2000, max_sequences=8))
    engine = _engine(DraftModel(draft, VOCAB))
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    prompts = {str(i): ([i, i + 1, 7], params) for i in range(3)}
    found = _run(engine, prompts)
    assert {name: tokens[0] for name, tokens in found.items()} == {
        name: generate_alone(prompt, 50) for name, (prompt, _) in prompts.items()
    }
    assert engine.counters.guesses_accepted == engine.counters.tokens_guessed > 0
    with pytest.raises(InputError, match="the draft model has 97 tokens, the model 100"):
        DraftModel(draft, 100)


def test_prompt_lookup_takes_the_latest_place_of_the_longest_match():
    def guess(tokens: list[int], count: int = 3) -> list[int]:
        return PromptLookup().propose([Sequence(tokens)], count)[0]

    assert guess([1, 2, 3, 9, 8, 7, 1, 2, 3]) == [9, 8, 7]
    assert guess([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3]) == [9, 5, 2], (
        "three tokens count more than two that are nearer"
    )
    assert guess([2, 3, 9, 2, 3, 8, 7, 2, 3]) == [8, 7, 2], "the latest of equals"
    assert guess([4, 4, 4, 4]) == [4]
    assert guess([1, 2, 3, 4]) == []
    assert guess([1]) == guess([1, 2]) == []


def test_patience_doubles_while_guesses_are_wrong():
    patience = Patience()
    pauses = []
    for _ in range(7):
        patience.note(0)
        pauses.append(sum(1 for _ in itertools.takewhile(lambda _: not patience.ready(), itertools.count())))
    assert pauses == [2, 4, 8, 16, 32, 32, 32]
    patience.note(1)
    assert patience.ready()
