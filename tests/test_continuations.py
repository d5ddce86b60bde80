"""Log-likelihoods of continuations against the model asked one text at a time, and their use of the cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import LlmcError
from llmc.runtime.continuations import ContinuationScorer, Request
from llmc.runtime.engine import ContextLengthError, Engine, EngineOptions, ModelFacts

from .fake_executor import FakeExecutor, reference_logits

VOCAB = 97


def engine(executor: FakeExecutor | None = None, *, pages: int = 64, batch: int = 24) -> Engine:
    options = EngineOptions(max_batch_tokens=batch, max_sequences=5, kv_tokens=4 * pages)
    return Engine(executor or FakeExecutor(vocab_size=VOCAB), None, ModelFacts(VOCAB, 256), options)


def alone(request: Request) -> list[float]:
    """Each continuation's tokens scored from its whole text."""
    sums: list[float] = []
    for continuation in request.continuations:
        tokens = np.array([*request.context, *continuation])
        total = 0.0
        for end in range(len(request.context), len(tokens)):
            row = reference_logits(tokens[:end], np.arange(end), VOCAB).astype(np.float64)
            total += row[tokens[end]] - np.log(np.exp(row).sum())
        sums.append(total)
    return sums


ids = st.integers(0, VOCAB - 1)
requests = st.builds(
    Request,
    st.lists(ids, min_size=1, max_size=40),
    st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=6),
    st.lists(ids, max_size=80),
    st.integers(5, 60),
    st.integers(64, 90),
)
def test_sums_are_those_of_each_text_alone(
    asked: list[Request], shots: list[int], batch: int, pages: int
) -> None:
    asked = [Request([*shots, *one.context], one.continuations) for one in asked]
    machine = engine(batch=batch, pages=pages)
    found = ContinuationScorer(machine).score(asked)
    for one, sums in zip(asked, found, strict=True):
        assert sums == pytest.approx(alone(one), rel=1e-5)
    machine.check()
    assert machine.blocks.num_used == 0, "every page was given back"


def test_a_context_is_computed_once_and_letters_cost_nothing() -> None:
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.keep_steps = True
    machine = engine(executor, batch=512)
    shots = list(range(1, 81))
    asked = [Request([*shots, 90 + i], [[1], [2], [3], [4]]) for i in range(3)]
    ContinuationScorer(machine).score(asked)
    computed = [len(step.token_ids) for step in executor.steps]
    assert computed == [81, 1, 1], "the second and third begin with the pages of the first"
    executor.steps.clear()
    ContinuationScorer(engine(executor, batch=512)).score([Request([5] * 6, [[1, 2, 3], [4, 5]])])
    assert [len(step.token_ids) for step in executor.steps] == [6, 3]
    assert [len(step.output_index) for step in executor.steps] == [1, 3], "no row that nobody asked for"


def test_short_contexts_share_a_step() -> None:
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.keep_steps = True
    ContinuationScorer(engine(executor, batch=40)).score([Request([i] * 8, [[1], [2]]) for i in range(5)])
    assert [len(step.token_ids) for step in executor.steps] == [40]


def test_what_does_not_fit_is_refused_before_it_runs() -> None:
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.keep_steps = True
    with pytest.raises(ContextLengthError, match="a context of 300 tokens") as caught:
        ContinuationScorer(engine(executor)).score([Request([1] * 300, [[1]])])
    assert (caught.value.prompt_tokens, caught.value.limit) == (300, 256)
    assert not executor.steps


def test_broken_logits_are_an_error_and_leak_nothing() -> None:
    executor = FakeExecutor(vocab_size=VOCAB)
    executor.nan_tokens = frozenset([7])
    machine = engine(executor)
    with pytest.raises(LlmcError, match="not finite"):
        ContinuationScorer(machine).score([Request([1, 2], [[3, 7, 4]])])
    assert machine.blocks.num_used == 0
