"""The sampler: each step against its definition, and no dependence on what else is in the batch."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.executor.base import Prepared
from llmc.runtime.sampler import SamplerRow, sample, uniform
from llmc.runtime.sampling_params import SamplingParams

VOCAB = 300


def _row(
    params: SamplingParams, *, seed: int = 7, prompt: list[int] | None = None, stops: tuple[int, ...] = ()
):
    return SamplerRow(params, array("i", prompt or [1]), seed=seed, choice=0, stops=stops)


def _logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def _prepare(logits: np.ndarray, scale: np.ndarray) -> Prepared:
    """What an executor does (`PreparesSampling`), in blocks of 64."""
    peak = logits.max(axis=1)
    best = np.where(np.isfinite(peak), logits.argmax(axis=1), -1).astype(np.int32)
    for row in np.flatnonzero((scale > 0) & (best >= 0)):
        logits[row] = np.exp2((logits[row] - peak[row]) * scale[row])
    blocks = logits[:, : logits.shape[1] // 64 * 64].reshape(len(logits), -1, 64)
    return Prepared(best, blocks.sum(axis=2), blocks.max(axis=2), 64)


def _draws(logits: np.ndarray, params: SamplingParams, count: int = 4000) -> Counter[int]:
    """Tokens drawn from one row; the executor's help changes none."""
    row = _row(params)
    drawn = [sample(logits.copy(), [row], [index])[0][0] for index in range(count)]
    for index in range(0, count, 7):
        assert sample(logits.copy(), [row], [index], prepare=_prepare)[0] == [drawn[index]]
    return Counter(drawn)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, [9, 4, 200]] = 5
    logits[1, [299, 0]] = 1
    assert sample(logits, [_row(SamplingParams())] * 2, [0, 0])[0] == [4, 0]


def test_nan_or_no_finite_logit_is_reported_for_its_row_alone():
    logits = _logits(0, 4)
    best = int(np.argmax(logits[3]))
    logits[0, 17] = np.nan
    logits[1] = -np.inf
    logits[2, 5] = np.inf
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0),
        SamplingParams(),
    ]
    rows = [_row(p) for p in params]
    assert sample(logits.copy(), rows, [0] * 4, prepare=_prepare)[0] == [-1, -1, -1, best]
    assert sample(logits, rows, [0] * 4)[0] == [-1, -1, -1, best]


def test_temperature_gives_the_softmax():
    logits = _logits(1, vocab=6)
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits[0].astype(np.float64) / temperature)
        expected /= expected.sum()
        drawn = _draws(logits, SamplingParams(temperature=temperature), 20_000)
        share = np.array([drawn[i] for i in range(6)]) / 20_000
        assert np.abs(share - expected).max() < 0.015


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_large_vocabulary_is_drawn_from_by_its_softmax(temperature: float):
    # Whole blocks of 256 (numpy's) and of 64 (`_prepare`'s), and tokens behind the last; some likely ones
    # stand at both ends.
    vocab = 313 * 64 + 17
    logits = _logits(11, vocab=vocab)
    logits[0, [0, vocab - 1, 5_000, 12_345, 20_040]] += 14
    expected = np.exp(logits[0].astype(np.float64) / temperature)
    expected /= expected.sum()
    count = 8_000
    drawn = _draws(logits, SamplingParams(temperature=temperature), count)
    seen = np.zeros(vocab)
    seen[list(drawn)] = np.array(list(drawn.values())) / count
    likely = np.argsort(-expected)[:8]
    assert np.abs(seen[likely] - expected[likely]).max() < 0.02  # four standard deviations of a half
    for part in np.array_split(np.arange(vocab), 7):
        assert abs(seen[part].sum() - expected[part].sum()) < 0.025


@given(seed=st.integers(0, 1000), k=st.integers(1, 40), vocab=st.sampled_from([VOCAB, 5003]))
@settings(deadline=None, max_examples=40)
def test_top_k_keeps_the_k_largest_and_the_lower_id_among_equals(seed: int, k: int, vocab: int):
    logits = np.round(_logits(seed, vocab=vocab))  # many ties
    allowed = set(sorted(range(vocab), key=lambda i: (-logits[0, i], i))[:k])
    drawn = _draws(logits, SamplingParams(temperature=1e4, top_k=k), 20 * k)
    assert set(drawn) <= allowed
    assert len(drawn) > 0.9 * k  # each is missed with a chance of e^-20


@given(
    seed=st.integers(0, 1000),
    p=st.floats(0.05, 0.99),
    k=st.sampled_from([0, 5, 50]),
    vocab=st.sampled_from([VOCAB, 5003]),
)
@settings(deadline=None, max_examples=40)
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, k: int, vocab: int):
    logits = _logits(seed, vocab=vocab)
    order = np.argsort(-logits[0], kind="stable")[: k or vocab]
    probability = np.exp(logits[0, order].astype(np.float64))
    probability /= probability.sum()
    count = int(np.searchsorted(np.cumsum(probability), p)) + 1
    drawn = _draws(logits, SamplingParams(temperature=1.0, top_p=p, top_k=k), 200)
    # One more where the sum hits p to within float32.
    assert set(drawn) <= set(order[: count + 1].tolist())


def test_top_p_looks_beyond_its_first_candidates_when_the_distribution_is_flat():
    logits = np.zeros((1, 5000), np.float32)
    drawn = _draws(logits, SamplingParams(temperature=1.0, top_p=0.5), 3000)
    assert max(drawn) < 2501
    assert max(drawn) > 2300
    assert len(drawn) > 1500


def test_min_p_is_relative_to_the_most_likely():
    logits = np.log(np.array([[0.5, 0.3, 0.1, 0.06, 0.04]], np.float32))
    drawn = _draws(logits, SamplingParams(temperature=1.0, min_p=0.19), 500)
    assert set(drawn) == {0, 1, 2}


def test_penalties_follow_their_formulas():
    logits = np.array([[2.0, -2.0, 1.0, 1.0, 0.5]], np.float32)
    row = _row(
        SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25), prompt=[0, 1]
    )
    for token in (2, 2, 3):
        row.note(token)
    work = logits.copy()
    sample(work, [row], [3])
    assert work[0].tolist() == [1.0, -4.0, 0.5 - 0.5 - 0.5, 0.5 - 0.5 - 0.25, 0.5]


def test_logit_bias_and_min_tokens():
    logits = _logits(3)
    best = int(np.argmax(logits))
    other = (best + 1) % VOCAB
    assert sample(logits.copy(), [_row(SamplingParams(logit_bias={other: 100.0}))], [0])[0] == [other]
    params = SamplingParams(min_tokens=2, max_tokens=5)
    row = _row(params, stops=(best,))
    tokens = [sample(logits.copy(), [row], [index])[0][0] for index in range(4)]
    assert best not in tokens[:2]
    assert tokens[2:] == [best, best]


def test_logprobs_are_of_the_unchanged_distribution():
    logits = _logits(4)
    expected = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    order = np.argsort(-logits[0], kind="stable")
    params = SamplingParams(logprobs=3, temperature=0.3, top_k=2, logit_bias={int(order[9]): 100.0})
    tokens, logprobs = sample(logits.copy(), [_row(params)], [0])
    assert tokens == [int(order[9])]
    found = logprobs[0]
    assert found is not None
    assert found.token_id == tokens[0]
    assert found.logprob == pytest.approx(expected[order[9]], abs=1e-5)
    assert [i for i, _ in found.top] == order[:3].tolist()
    assert [value for _, value in found.top] == pytest.approx(expected[order[:3]].tolist(), abs=1e-5)
    _, none_wanted = sample(logits.copy(), [_row(SamplingParams(logprobs=0))], [0])
    assert none_wanted[0] is not None
    assert none_wanted[0].top == ()


@given(seed=st.integers(0, 2**32), others=st.integers(0, 6), place=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_a_row_does_not_depend_on_its_batch(seed: int, others: int, place: int):
    rng = np.random.default_rng(seed)
    choices = [
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=1.1, top_k=20),
        SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, min_p=0.05, logprobs=2),
        SamplingParams(),
    ]
    params = [choices[i] for i in rng.integers(0, len(choices), others + 1)]
    logits = rng.normal(0, 2, (others + 1, 997)).astype(np.float32)
    place = min(place, others)
    rows = [_row(p, seed=int(rng.integers(0, 2**31))) for p in params]
    together = sample(logits.copy(), rows, [3] * len(rows))
    alone = sample(logits[place : place + 1].copy(), [rows[place]], [3])
    assert together[0][place] == alone[0][0]
    assert together[1][place] == alone[1][0]


def test_random_numbers_are_uniform_and_differ_by_seed_choice_and_index():
    numbers = np.array([uniform(5, 0, index) for index in range(20_000)])
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts, _ = np.histogram(numbers, 50, (0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 100  # chi-squared, 49 degrees of freedom
    assert (
        len({uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1), uniform(-1, 0, 0)}) == 5
    )


NAN, INF = float("nan"), float("inf")
BAD = {
    "n": [0, 129, 1.5, True],
    "max_tokens": [0, -1, "5"],
    "min_tokens": [-1, 300],
    "temperature": [-0.1, NAN, INF, 999999, "hot", None],
    "top_k": [-1, 1.5],
    "top_p": [0, -1, 1.01, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "repetition_penalty": [0, -1, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, 2.1, NAN],
    "logit_bias": [{-1: 1.0}, {VOCAB: 1.0}, {1: NAN}, {1: 101}, {1: "a"}, {"1": 1.0}, [1]],
    "seed": [1.5, 2**64, "x"],
    "stop": ["text", ("",), (1,), ("x" * 1025,), ("x",) * 65],
    "stop_token_ids": [(-1,), (VOCAB,), 5, ("a",)],
    "logprobs": [-1, 21],
    "prompt_logprobs": [-1, 21, True],
    "grammar": ["a+", {"type": "object"}],
    "sampler": ["no-repeat", 1],
    "adapter": [1, ("sql",)],
    "ignore_eos": [1, "yes"],
    "skip_special_tokens": [0, None],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_impossible_values_are_refused_by_name_with_what_is_allowed(name: str, value: object):
    with pytest.raises(InputError) as caught:
        replace(SamplingParams(), **{name: value}).validate(VOCAB)
    assert caught.value.message.startswith(name)
    assert caught.value.remedy.startswith("allowed: ")


def test_every_number_is_checked():
    unchecked = {field.name for field in fields(SamplingParams)} - set(BAD)
    assert not unchecked
    SamplingParams().validate(VOCAB)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    values=st.dictionaries(
        st.sampled_from([field.name for field in fields(SamplingParams)]), JSON, min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=1000)
def test_whatever_a_client_sends_is_refused_by_name_or_can_be_sampled(values: dict[str, object]):
    params = replace(SamplingParams(), **values)
    try:
        params.validate(VOCAB)
    except InputError as error:
        assert error.message.split(" ")[0].split("[")[0] in values  # noqa: PT017
        return
    tokens, _ = sample(_logits(1, 2), [_row(params), _row(params)], [0, 1])
    assert all(0 <= token < VOCAB for token in tokens)
