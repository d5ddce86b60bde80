"""Measures of retrieval and answers against cases worked out by hand, and files of questions."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.cli.main import main
from llmc.ir.errors import InputError
from llmc.runtime.rag.answer import Answer
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
from llmc.runtime.rag.questions import Gold, Question, load_questions
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


# Files of questions --------------------------------------------------------------------------------------


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_our_own_rows(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl",
        {"question": "who?", "answer": "me", "gold": ["a.md", {"title": "T", "grade": 2}]},
        {"question": "what?", "id": 7, "answers": ["x", "y", "x"], "gold_documents": ["b.md"]},
        {"question": "where?", "_id": "w", "gold_titles": ["T", "T"], "gold_passages": ["some text"]},
        {"question": "when?", "answer": 1984},
    )
    assert load_questions(path) == [
        Question("1", "who?", ("me",), (Gold(name="a.md"), Gold(title="T", grade=2))),
        Question("7", "what?", ("x", "y"), (Gold(document="b.md"),)),
        Question("w", "where?", (), (Gold(title="T"), Gold(text="some text"))),
        Question("4", "when?", ("1984",)),
    ]
    assert [q.id for q in load_questions(path, limit=2)] == ["1", "7"]


def test_the_public_layouts(tmp_path: Path) -> None:
    hotpot = {
        "_id": "h",
        "question": "h?",
        "answer": "yes",
        "supporting_facts": [["One", 0], ["Two", 1], ["One", 2]],
        "context": [["One", ["s"]], ["Two", ["s"]], ["Three", ["s"]]],
        "type": "bridge",
    }
    musique = {
        "id": "m",
        "question": "m?",
        "answer": "a",
        "answer_aliases": ["b", "a"],
        "paragraphs": [
            {"idx": 0, "title": "T", "paragraph_text": "the first paragraph", "is_supporting": False},
            {"idx": 1, "title": "T", "paragraph_text": "the second paragraph", "is_supporting": True},
        ],
    }
    array = tmp_path / "array.json"
    array.write_text("\ufeff  " + json.dumps([hotpot, musique]), encoding="utf-8")
    expected = [
        Question("h", "h?", ("yes",), (Gold(title="One"), Gold(title="Two"))),
        Question("m", "m?", ("a", "b"), (Gold(title="T", text="the second paragraph"),)),
    ]
    assert load_questions(array) == expected
    assert load_questions(lines(tmp_path / "lines.json", hotpot, musique)) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 is no JSON object"),
        ({"q": "?"}, "no text in 'question'"),
        ({"question": "  "}, "no text in 'question'"),
        ({"question": "?" * 100_001}, "100,001 characters"),
        ({"question": "?", "id": [1]}, "'id' is neither"),
        ({"question": "?", "id": True}, "'id' is neither"),
        ({"question": "?", "answer": {"a": 1}}, "'answer' is no text"),
        ({"question": "?", "gold": 7}, "'gold' is not a list"),
        ({"question": "?", "gold": [7]}, "'gold' holds something else"),
        ({"question": "?", "gold": [{"name": "x"}]}, "an object in 'gold' has name"),
        ({"question": "?", "gold": [{"grade": 2}]}, "an object in 'gold' has grade"),
        ({"question": "?", "gold": [{"title": "x", "grade": 0}]}, "the grade 0 is no number above 0"),
        ({"question": "?", "gold": [{"title": "x", "grade": "high"}]}, "the grade 'high'"),
        ({"question": "?", "gold": [{"title": 5}]}, "'gold: title' holds"),
        ({"question": "?", "supporting_facts": [[]]}, "'supporting_facts' holds"),
        ({"question": "?", "paragraphs": ["x"]}, "'paragraphs' holds something else than objects"),
        ({"question": "?", "paragraphs": [{"is_supporting": True}]}, "'paragraph_text' holds"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", row)
    with pytest.raises(InputError) as caught:
        load_questions(path)
    assert message in str(caught.value) and "q.jsonl, row 1" in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no question"),
        (b"\n \n", "holds no question"),
        (b"[]", "holds no question"),
        (b'{"question": "a"}\n{"question": \n', "line 2 is not JSON"),
        (b'{"question": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (
            b'{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}',
            "row 2 has the id '1', and so has row 1",
        ),
    ],
)
def test_a_bad_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"q\.jsonl") as caught:
        load_questions(path)
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        load_questions(tmp_path)


def test_the_development_questions(shared_data: Path) -> None:
    def counts(path: str) -> Mapping[int, int]:
        questions = load_questions(shared_data / path)
        assert all(question.answers for question in questions)
        numbers = [len(question.gold) for question in questions]
        return {number: numbers.count(number) for number in sorted(set(numbers))}

    assert counts("hotpotqa500/questions.jsonl") == {2: 500}
    assert counts("twowiki_train/wikihop_train_preprocess.json") == {2: 408, 4: 92}
    musique = counts("musique_train/musique_train.json")
    assert sum(musique.values()) == 100 and set(musique) == {2, 3, 4}


# llmc rag eval -------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `llmc rag …` here: exit code, what it printed as JSON (or as text under "text"), stderr."""

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        code = main(["rag", *map(str, words)])
        printed = capsys.readouterr()
        shown = json.loads(printed.out) if "--json" in words else {"text": printed.out}
        return code, shown, printed.err

    return run


@pytest.fixture
def kb(tmp_path: Path, run: Run) -> Path:
    """A store of four documents."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in {
        "apple.md": "# Apples\n\nApples grow on trees in the orchard of Oslo.",
        "bread.md": "# Bread\n\nBread is baked by Ada in the mornings.",
        "cider.md": "# Cider\n\nCider is pressed from apples by Ada.",
        "dill.md": "# Dill\n\nDill is an herb.",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = tmp_path / "docs.kb"
    code, _, error = run("index", folder, "-o", path, "--embedder", "none", "--json")
    assert code == 0, error
    return path


QUESTIONS = (
    {"id": "a", "question": "Where do apples grow?", "answer": "Oslo", "gold": ["apple.md"]},
    {"id": "b", "question": "What does Ada press?", "answer": "cider", "gold": ["cider.md", "dill.md"]},
    {"id": "c", "question": "Nothing is known?", "answer": "no"},
)


def test_eval_measures_the_questions_that_have_gold(kb: Path, run: Run, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", *QUESTIONS)
    output = tmp_path / "runs" / "run.json"
    code, found, error = run("eval", kb, path, "--top", 1, "--mode", "keyword", "-o", output, "--json")
    assert code == 0, error
    assert found["count"] == 3 and found["metrics"]["recall@1"]["count"] == 2
    assert found["metrics"]["recall@1"]["mean"] == 0.75  # all of a, half of b
    assert found["metrics"]["mrr"]["mean"] == 1 and found["unknown_gold"] == []
    assert set(found["metrics"]) == {"recall@1", "precision@1", "mrr", "ndcg@1"}
    written = json.loads(output.read_text(encoding="utf-8"))
    assert [record["id"] for record in written["records"]] == ["a", "b", "c"]
    assert written["metrics"] == found["metrics"]
    assert written["records"][1]["gold"] == [
        {"name": "cider.md", "rank": 1},
        {"name": "dill.md", "rank": None},
    ]
    again = run("eval", kb, path, "--top", 1, "--mode", "keyword", "--json")[1]
    assert again["metrics"] == found["metrics"]


def test_eval_compares_with_an_earlier_run(kb: Path, run: Run, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", *QUESTIONS)
    output = tmp_path / "run.json"
    assert run("eval", kb, path, "--top", 4, "--at", 1, "--at", 4, "-o", output)[0] == 0
    code, found, _ = run("eval", kb, path, "--at", 1, "--compare", output, "--json")
    assert code == 0
    assert found["compared"]["metrics"]["recall@1"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "count": 2}
    assert "recall@4" not in found["compared"]["metrics"]
    text = run("eval", kb, path, "--at", 1, "--compare", output)[1]["text"]
    assert "difference" in text and "+0.000 to +0.000" in text
    code, _, error = run("eval", kb, path, "--limit", 1, "--compare", path)
    assert code == 2 and "is not a run of llmc rag eval" in error
    for records in ('[{"id": "a", "scores": {"mrr": NaN}}]', '[{"id": "a", "scores": {"mrr": "x"}}]', "7"):
        bad = tmp_path / "bad.json"
        bad.write_text(f'{{"records": {records}}}', encoding="utf-8")
        assert run("eval", kb, path, "--compare", bad)[0] == 2
    other = lines(tmp_path / "other.jsonl", {**QUESTIONS[0], "id": "other"})
    code, _, error = run("eval", kb, other, "--compare", output)
    assert code == 2 and "no question and measure in common" in error


def test_eval_shows_what_was_missed_and_what_cannot_be_found(kb: Path, run: Run, tmp_path: Path) -> None:
    wrong = {"id": "d", "question": "Who is\x1b[2J Ada?", "gold": ["nobody.md", {"title": "Bread"}]}
    path = lines(tmp_path / "q.jsonl", *QUESTIONS, wrong)
    code, found, _ = run("eval", kb, path, "--top", 1, "--show-misses", "--json")
    assert code == 0 and found["unknown_gold"] == [{"id": "d", "gold": ["nobody.md"]}]
    misses = {miss["id"]: miss for miss in found["misses"]}
    assert misses["b"]["missed"] == ["dill.md"] and misses["b"]["found"] == ["Cider"]
    assert "nobody.md" in misses["d"]["missed"] and "a" not in misses
    text = run("eval", kb, path, "--top", 1, "--show-misses")[1]["text"]
    assert "names no document of the store: nobody.md" in text
    assert "\x1b" not in text and "not among the first 1: dill.md" in text


def test_eval_scores_answers(kb: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def answer(_kb: object, _llm: object, question: str, **options: Any) -> Answer:
        asked.append((question, [one.document for one in options["passages"]]))
        known = {"Where do apples grow?": "in Oslo [1].", "What does Ada press?": "Cider [1][2]"}
        return Answer(known.get(question, "not there"), found=question in known)

    monkeypatch.setattr("llmc.runtime.loader.load", lambda *_, **__: contextlib.nullcontext(object()))
    monkeypatch.setattr("llmc.runtime.rag.answer.answer", answer)
    path = lines(tmp_path / "q.jsonl", *QUESTIONS)
    output = tmp_path / "run.json"
    code, found, error = run("eval", kb, path, "--model", "any.llmc", "-o", output, "--json")
    assert code == 0, error
    assert found["model"] == "any.llmc"
    assert found["metrics"]["exact match"]["mean"] == pytest.approx(1 / 3)
    assert found["metrics"]["f1"]["mean"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["metrics"]["f1"]["count"] == 3 and found["metrics"]["mrr"]["count"] == 2
    records = json.loads(output.read_text(encoding="utf-8"))["records"]
    assert [record["answer"] for record in records] == ["in Oslo .", "Cider", ""]
    assert "apple.md" in asked[0][1] and all(len(documents) <= 5 for _, documents in asked)


def test_eval_refuses_what_measures_nothing(kb: Path, run: Run, tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", {"question": "?", "answer": "!"})
    code, _, error = run("eval", kb, path)
    assert code == 2 and "has no gold" in error and "--model" in error
    code, _, error = run("eval", kb, lines(tmp_path / "q.jsonl", *QUESTIONS), "--top", 3, "--at", 5)
    assert code == 2 and "--at 5 needs --top 5" in error
    code, _, error = run("eval", tmp_path / "none.kb", path)
    assert code == 2 and "none.kb" in error
