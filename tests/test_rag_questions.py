"""Files of questions, and `llmc rag eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from llmc.cli.main import main
from llmc.ir.errors import InputError
from llmc.runtime.rag.answer import Answer
from llmc.runtime.rag.questions import Gold, Question, load_questions

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
