"""Log probabilities of prompts: the same as a text's own scores, however the prompt is cut and whatever runs
beside it.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.engine import ContextLengthError, Engine, EngineOptions, ModelFacts
from llmc.runtime.generation import StepOutput
from llmc.runtime.llm import LLM
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.scheduler import Scheduler
from llmc.runtime.sequence import Sequence

from .fake_executor import FakeExecutor, generate_alone

FACTS = ModelFacts(vocab_size=97, context_length=64, eos_token_ids=(3,))
PROMPT = [10, 20, 30, 40, 50, 60, 70]


def make(executor: FakeExecutor | None = None, **options: object) -> Engine:
    sizes = {"kv_tokens": 256, "max_sequences": 8, "max_batch_tokens": 32, **options}
    return Engine(executor or FakeExecutor(), None, FACTS, EngineOptions(**sizes))


def finish(engine: Engine) -> dict[tuple[str, int], list[StepOutput]]:
    outputs: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return outputs


def scores(output: StepOutput) -> list[float | None]:
    return [entry.logprob if entry is not None else None for entry in output.prompt_logprobs]


def check(ids: list[int], output: StepOutput) -> None:
    expected = LLM(FakeExecutor(), engine=make()).token_logprobs(ids)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(ids)
    assert scores(output)[1:] == pytest.approx(expected.tolist(), abs=1e-9)
    assert [entry.token_id for entry in output.prompt_logprobs if entry is not None] == ids[1:]


def test_they_come_with_the_first_output_and_equal_the_texts_own_scores():
    engine = make()
    engine.add_request(PROMPT, SamplingParams(prompt_logprobs=3, max_tokens=4, ignore_eos=True), "a")
    outputs = finish(engine)["a", 0]
    check(PROMPT, outputs[0])
    assert not any(output.prompt_logprobs for output in outputs[1:])
    assert [t for output in outputs for t in output.token_ids] == generate_alone(PROMPT, 4)
    for entry in outputs[0].prompt_logprobs[1:]:
        assert entry is not None
        assert len(entry.top) == 3
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
        assert entry.logprob <= entry.top[0][1] + 1e-9


def test_a_request_for_no_token_only_scores():
    engine = make()
    engine.add_request(PROMPT, SamplingParams(prompt_logprobs=0, max_tokens=0, n=2), "a")
    found = finish(engine)
    for index in range(2):
        (output,) = found["a", index]
        assert (output.finish_reason, output.token_ids, output.generated_tokens) == ("length", [], 0)
        assert output.prompt_tokens == len(PROMPT)
        check(PROMPT, output)
        assert all(entry.top == () for entry in output.prompt_logprobs if entry is not None)
    assert engine.stats.tokens_generated == 0
    assert engine.blocks.num_used == 0


def test_a_text_that_fills_the_context_can_be_scored():
    ids = [(7 * i) % 90 for i in range(64)]
    engine = make()
    engine.add_request(ids, SamplingParams(prompt_logprobs=0, max_tokens=0), "a")
    check(ids, finish(engine)["a", 0][0])
    with pytest.raises(ContextLengthError):
        engine.add_request(ids, SamplingParams(prompt_logprobs=0, max_tokens=1))


def test_one_token_has_nothing_before_it():
    engine = make()
    engine.add_request([5], SamplingParams(prompt_logprobs=2, max_tokens=0), "a")
    assert finish(engine)["a", 0][0].prompt_logprobs == [None]


def test_no_tokens_are_refused_where_nothing_is_scored():
    with pytest.raises(InputError, match="max_tokens is 0"):
        make().add_request(PROMPT, SamplingParams(max_tokens=0))


def test_the_prefix_cache_is_not_read_but_filled():
    engine = make()
    engine.add_request(PROMPT * 3, SamplingParams(max_tokens=2), "first")
    finish(engine)
    engine.add_request(PROMPT * 3, SamplingParams(prompt_logprobs=1, max_tokens=1), "scored")
    (output,) = finish(engine)["scored", 0]
    check(PROMPT * 3, output)
    assert output.cached_tokens == 0
    engine.add_request(PROMPT * 3, SamplingParams(max_tokens=1), "again")
    assert finish(engine)["again", 0][0].cached_tokens > 0


def test_choices_and_log_probabilities_of_the_answer_go_with_them():
    engine = make()
    params = SamplingParams(prompt_logprobs=1, logprobs=1, n=3, temperature=1.0, seed=4, max_tokens=3)
    engine.add_request(PROMPT, params, "a")
    found = finish(engine)
    for index in range(3):
        check(PROMPT, found["a", index][0])
        assert all(len(output.logprobs) == 1 for output in found["a", index])


@given(
    texts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=1, max_size=6),
    scored=st.lists(st.booleans(), min_size=6, max_size=6),
    budget=st.integers(8, 40),
    kv_tokens=st.sampled_from([64, 72, 256]),
    rows=st.sampled_from([1, 20, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_they_do_not_depend_on_chunks_neighbours_or_preemption(
    texts: list[list[int]], scored: list[bool], budget: int, kv_tokens: int, rows: int
):
    engine = make(max_batch_tokens=budget, kv_tokens=kv_tokens)
    engine.scheduler.max_rows = rows
    for index, ids in enumerate(texts):
        top = 1 if scored[index] else None
        params = SamplingParams(prompt_logprobs=top, max_tokens=8, ignore_eos=True)
        engine.add_request(ids, params, str(index))
    found = finish(engine)
    for index, ids in enumerate(texts):
        outputs = found[str(index), 0]
        if scored[index]:
            check(ids, outputs[0])
        else:
            assert not outputs[0].prompt_logprobs
        assert [t for output in outputs for t in output.token_ids] == generate_alone(ids, 8)


def test_a_step_gives_a_limited_number_of_rows():
    blocks = BlockManager(64, 4)
    scheduler: Scheduler[Sequence] = Scheduler(blocks, max_batch_tokens=64, max_sequences=4, max_rows=20)
    sequences = [Sequence(range(50), (index, 0)) for index in range(2)]
    for sequence in sequences:
        sequence.score_end = 49
        scheduler.add(sequence)
    seen = [0, 0]
    while scheduler.waiting or scheduler.running:
        plan = scheduler.schedule()
        assert plan.chunks
        assert sum(len(chunk.scored) for chunk in plan.chunks) <= 20
        for chunk in plan.chunks:
            seen[chunk.sequence.order[0]] += len(chunk.scored)
            chunk.sequence.scored += len(chunk.scored)
        scheduler.commit(plan)
        for sequence in [s for s in scheduler.running if not s.remaining]:
            scheduler.finish(sequence)
    assert seen == [49, 49]
    blocks.check([])


def test_broken_logits_of_the_prompt_are_no_numbers():
    executor = FakeExecutor()
    executor.nan_tokens = frozenset({40})
    engine = make(executor)
    engine.add_request(PROMPT, SamplingParams(prompt_logprobs=0, max_tokens=1), "a")
    (output,) = finish(engine)["a", 0]
    assert output.finish_reason == "error"
    assert np.isnan(output.prompt_logprobs[4].logprob)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_choices_begin_at_the_prompts_last_row_however_many_rows_were_scored(length: int):
    # As many choices as rows of logits: counting them alone does not tell which row is whose.
    prompt = PROMPT[:length]
    engine = make()
    engine.add_request(prompt, SamplingParams(prompt_logprobs=0, n=3, max_tokens=4, ignore_eos=True), "a")
    outputs = finish(engine)
    for choice in range(3):
        tokens = [token for output in outputs["a", choice] for token in output.token_ids]
        assert tokens == generate_alone(prompt, 4)
