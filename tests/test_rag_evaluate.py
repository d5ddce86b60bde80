"""Measures of retrieval and answers against cases worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.rag.evaluate import (
    Evaluation,
    compare,
    evaluate,
    exact_match,
    interval,
    ndcg_at,
    normalize_answer,
    reciprocal_rank,
    retrieval_scores,
    token_f1,
)
from llmc.runtime.rag.questions import Gold, Question
from llmc.runtime.rag.types import Passage


def passage(document: str, title: str = "", text: str = "", chunk: str = "") -> Passage:
    return Passage(chunk or document, document, title, "", text, 0, len(text), None, 1.0)


def found(*documents: str) -> list[Passage]:
    return [passage(one) for one in documents]


def gold(*documents: str) -> list[Gold]:
    return [Gold(document=one) for one in documents]


def scores(wanted: Sequence[Gold], passages: Sequence[Passage], *ks: int) -> dict[str, float]:
    return retrieval_scores(wanted, passages, ks)[0]


# Retrieval -----------------------------------------------------------------------------------------------


def test_binary_measures_by_hand() -> None:
    got = scores(gold("a", "b", "c"), found("x", "b", "y", "a", "z"), 1, 2, 4, 10)
    assert [got[f"recall@{k}"] for k in (1, 2, 4, 10)] == [0, 1 / 3, 2 / 3, 2 / 3]
    # Fewer than ten were found: of ten all the same.
    assert [got[f"precision@{k}"] for k in (1, 2, 4, 10)] == [0, 1 / 2, 2 / 4, 2 / 10]
    assert got["mrr"] == 1 / 2
    # b at rank 2 and a at rank 4, of three that could stand at 1, 2, 3.
    best = 1 + 1 / math.log2(3) + 1 / 2
    assert got["ndcg@4"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)
    assert got["ndcg@2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert got["ndcg@1"] == 0


def test_graded_gain_is_the_example_of_its_authors() -> None:
    # Järvelin & Kekäläinen 2002, section 2.1 with their G' = <3, 2, 3, 0, 0, 1, 2, 2, 3, 0>, in the form with
    # log2(1 + rank): 3/1 + 2/1.585 + 3/2 + 1/2.807 + 2/3 + 2/3.170 + 3/3.322.
    gains = [3.0, 2, 3, 0, 0, 1, 2, 2, 3, 0]
    terms = (3, 2 / 1.5849625, 3 / 2, 1 / 2.8073549, 2 / 3, 2 / 3.1699250, 3 / 3.3219281)
    ideal = [3.0, 3, 3, 2, 2, 2, 1]
    best = 3 + 3 / 1.5849625 + 3 / 2 + 2 / 2.3219281 + 2 / 2.5849625 + 2 / 2.8073549 + 1 / 3
    assert ndcg_at(gains, ideal, 10) == pytest.approx(sum(terms) / best)
    assert ndcg_at(sorted(gains, reverse=True), ideal, 10) == pytest.approx(1)


def test_grades_weigh_what_is_found_first() -> None:
    wanted = [Gold(document="good", grade=1), Gold(document="best", grade=3)]
    best = 3 + 1 / math.log2(3)
    assert scores(wanted, found("best", "good"), 2)["ndcg@2"] == pytest.approx(1)
    assert scores(wanted, found("good", "best"), 2)["ndcg@2"] == pytest.approx((1 + 3 / math.log2(3)) / best)
    assert scores(wanted, found("good", "best"), 2)["recall@2"] == 1


def test_chunks_of_one_document_gain_once() -> None:
    passages = [passage("a", chunk="1"), passage("a", chunk="2"), passage("b", chunk="3")]
    got = scores(gold("a", "b"), passages, 2, 3)
    assert got["recall@2"] == 1 / 2
    assert got["precision@2"] == 1
    assert got["ndcg@3"] == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))


def test_a_passage_that_holds_two_of_the_gold_gains_for_one() -> None:
    text = "one sentence of some length. another sentence of some length."
    wanted = [
        Gold(text="one sentence of some length."),
        Gold(text="another sentence of some length.", grade=2),
    ]
    got = scores(wanted, [passage("a", text=text)], 2)
    assert got["recall@2"] == 1
    assert got["ndcg@2"] == pytest.approx(2 / (2 + 1 / math.log2(3)))


def test_nothing_found_and_nothing_wanted() -> None:
    got = scores(gold("a"), [], 5)
    assert set(got.values()) == {0.0} and len(got) == 4
    assert retrieval_scores([], found("a"), [5]) == ({}, [])
    assert reciprocal_rank([]) == 0.0


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), max_size=15, unique=True),
    st.dictionaries(st.integers(0, 12), st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=6),
    st.integers(1, 15),
)
def test_measures_keep_their_bounds_and_grow_as_they_should(
    order: list[int], grades: dict[int, float], k: int
) -> None:
    wanted = [Gold(document=str(name), grade=grade) for name, grade in grades.items()]
    passages = found(*map(str, order))
    got = scores(wanted, passages, k, k + 1)
    assert all(0 <= value <= 1 + 1e-12 for value in got.values())
    assert got[f"recall@{k}"] <= got[f"recall@{k + 1}"]
    hits = len(grades.keys() & set(order[:k]))
    assert got[f"recall@{k}"] == hits / len(grades)
    assert got[f"precision@{k}"] == hits / k
    # The best order of what there is gets 1 where k covers it.
    best = sorted(grades, key=lambda name: -grades[name])
    assert scores(wanted, found(*map(str, best)), k)[f"ndcg@{k}"] == pytest.approx(1)
    # One of the gold moved to the front makes nothing worse.
    front = next(iter(grades))
    better = scores(wanted, found(str(front), *(str(one) for one in order if one != front)), k)
    if grades[front] == max(grades.values()):
        assert all(better[name] >= got[name] - 1e-12 for name in better)


# What fits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "fits"),
    [
        (Gold(name="notes/One.md"), True),
        (Gold(name="the title"), True),
        (Gold(name="  THE\n title "), True),
        (Gold(name="title"), False),
        (Gold(document="notes/one.md"), True),
        (Gold(document="The Title"), False),
        (Gold(title="The Title"), True),
        (Gold(title="notes/one.md"), False),
        (Gold(text="passage that is cited here,  \nand more of it"), True),
        (Gold(text="A passage that is cited here"), True),
        (Gold(text="a longer text. A passage that is cited here, and more of it! And so on."), True),
        (Gold(text="A passage"), False),  # too short to say which
        (Gold(title="The Title", text="A passage that is cited here"), True),
        (Gold(title="Another", text="A passage that is cited here"), False),
    ],
)
def test_what_counts_as_found(item: Gold, fits: bool) -> None:
    text = "A passage that is cited here, and more of it!"
    assert item.fits(passage("notes/one.md", "The Title", text)) is fits


def test_rows_of_a_file_and_letters_in_two_parts() -> None:
    assert Gold(name="7").fits(passage("corpus.jsonl#7"))
    assert Gold(name="corpus.jsonl#7").fits(passage("corpus.jsonl#7"))
    assert not Gold(name="7").fits(passage("corpus.jsonl#17"))
    assert Gold(title="Cafe\u0301").fits(passage("x", "Café"))


# Answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "match", "f1"),
    [
        # The definitions of evaluate-v1.1.py: case, punctuation, articles and spaces do not count.
        ("The  Cat.", ["cat"], 1, 1),
        ("an U.S. state", ["us State"], 1, 1),
        ("a.b", ["ab"], 1, 1),
        ("theatre", ["atre"], 0, 0),
        # 2 words of 3 are right, 2 of 4 wanted: p = 2/3, r = 1/2.
        ("big red dog", ["red dog runs away"], 0, 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)),
        # Words count as often as they stand: common is min(2, 1).
        ("no no way", ["no chance"], 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        # The best of several answers.
        ("Denver Broncos", ["Carolina", "The Denver Broncos", "Broncos"], 1, 1),
        # hotpot_evaluate_v1.py: yes, no and noanswer are right as a whole or not at all.
        ("yes it is", ["yes"], 0, 0),
        ("no", ["no one"], 0, 0),
        ("Yes.", ["yes"], 1, 1),
        ("noanswer", ["noanswer given"], 0, 0),
        # SQuAD 2.0: an empty answer is right where none is wanted.
        ("", [""], 1, 1),
        ("the", [""], 1, 1),
        ("", ["something"], 0, 0),
        ("anything", [], 0, 0),
    ],
)
def test_answers_by_the_official_definitions(answer: str, right: list[str], match: int, f1: float) -> None:
    assert exact_match(answer, right) == match
    assert token_f1(answer, right) == pytest.approx(f1)


def test_normalized_answer() -> None:
    assert normalize_answer("  The Quick, (brown) fox's\tden! ") == "quick brown foxs den"
    assert normalize_answer("a the an") == ""
    assert normalize_answer("naïve — “quoted”") == "naïve — “quoted”"  # ASCII punctuation only


words = st.lists(st.sampled_from(["red", "dog", "the", "yes", "no", "Ärger", "x."]), max_size=5).map(" ".join)


@given(words, words)
def test_f1_is_symmetric_and_1_exactly_for_the_same_words(one: str, other: str) -> None:
    assert 0 <= token_f1(one, [other]) <= 1
    assert token_f1(one, [other]) == token_f1(other, [one])
    assert token_f1(one, [one]) == exact_match(one, [one]) == 1
    if exact_match(one, [other]):
        assert token_f1(one, [other]) == 1


# Uncertainty ---------------------------------------------------------------------------------------------


def test_an_interval_is_near_the_normal_one_and_the_same_again() -> None:
    values = list(np.random.default_rng(3).random(400))
    got = interval(values)
    error = 1.96 * np.std(values) / 20
    assert got.mean == pytest.approx(np.mean(values)) and got.count == 400
    assert got.low == pytest.approx(got.mean - error, abs=error / 10)
    assert got.high == pytest.approx(got.mean + error, abs=error / 10)
    assert interval(values) == got
    assert interval(values, seed=1) != got
    assert interval(values, level=0.5).high < got.high


def test_intervals_of_one_value_and_of_equal_ones() -> None:
    assert interval([0.25]) == interval([0.25], seed=9)
    assert (interval([0.25]).low, interval([0.25]).high) == (0.25, 0.25)
    many = interval([1.0] * 50)
    assert (many.low, many.mean, many.high) == (1, 1, 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 5))
def test_an_interval_lies_within_the_values(values: list[float], seed: int) -> None:
    got = interval(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= got.low <= got.high <= max(values) + 1e-9


def test_blocks_of_resamples_are_all_drawn() -> None:
    values = [float(i % 7) for i in range(5000)]  # 838 rows fit into a block
    got = interval(values)
    error = 1.96 * np.std(values) / math.sqrt(5000)
    assert got.high - got.low == pytest.approx(2 * error, rel=0.05)


def test_a_paired_comparison_sees_what_two_intervals_do_not() -> None:
    random = np.random.default_rng(5)
    base = {str(i): float(value) for i, value in enumerate(random.random(200))}
    ours = {id: value + 0.02 + 0.01 * float(random.standard_normal()) for id, value in base.items()}
    one, other = interval(list(ours.values())), interval(list(base.values()))
    assert one.low < other.high  # they overlap widely
    got = compare(ours, base)
    assert got is not None and got.count == 200
    assert got.mean == pytest.approx(0.02, abs=0.003) and 0.015 < got.low < got.high < 0.025
    assert got.p < 0.001
    turned = compare(base, ours)
    assert turned is not None and turned.mean == -got.mean and turned.p == pytest.approx(got.p)


def test_comparisons_of_equal_and_of_other_questions() -> None:
    same = compare({"a": 1.0, "b": 0.0}, {"b": 0.0, "a": 1.0, "c": 1.0})
    assert same is not None and (same.mean, same.low, same.high, same.p, same.count) == (0, 0, 0, 1, 2)
    assert compare({"a": 1.0}, {"b": 1.0}) is None
    noise = np.random.default_rng(0).standard_normal(100)
    unclear = compare({str(i): float(v) for i, v in enumerate(noise)}, {str(i): 0.0 for i in range(100)})
    assert unclear is not None and unclear.low < 0 < unclear.high and unclear.p > 0.05


# Whole runs ----------------------------------------------------------------------------------------------


def test_a_run_measures_what_each_question_has() -> None:
    questions = [
        Question("1", "first?", ("Paris",), (Gold(document="a"), Gold(document="b"))),
        Question("2", "second?", (), (Gold(document="c"),)),
        Question("3", "third?", ("Rome",), ()),
    ]
    seen: list[tuple[str, float]] = []
    run = evaluate(
        questions,
        lambda question: found("a", "x", "b") if question.id == "1" else found("y"),
        ks=[2],
        answer=lambda question, passages: f"the {passages[0].document}1, Paris",
        progress=lambda phase, share: seen.append((phase, share)),
    )
    values = run.values()
    assert values["recall@2"] == {"1": 0.5, "2": 0.0}
    assert values["f1"] == {"1": pytest.approx(2 / 3), "3": 0.0}
    assert values["exact match"] == {"1": 0.0, "3": 0.0}
    assert run.intervals()["recall@2"].mean == 0.25
    assert [share for _, share in seen] == [0, 1 / 3, 2 / 3]
    first = run.records[0]
    assert first.ranks == (1, 3) and first.missed(2) == ["b"] and first.missed(3) == []
    written = json.loads(json.dumps(first.as_json()))
    assert written["gold"] == [{"name": "a", "rank": 1}, {"name": "b", "rank": 3}]
    assert written["passages"][0]["document"] == "a" and "text" not in written["passages"][0]
    assert run.records[1].answer is None and run.records[2].answer == "the y1, Paris"
    assert Evaluation().intervals() == {}
