"""Multiple choice: files, prompts, tokens and metrics as lm-evaluation-harness has them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from llmc.cli.main import main
from llmc.cli.mcq import (
    Encoder,
    Question,
    Task,
    accuracies,
    evaluate,
    log_likelihoods,
    picks,
    pooled,
    prepare,
    read_tasks,
)
from llmc.ir.errors import InputError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.llm import LLM
from llmc.runtime.tokenizer import Tokenizer

from .fake_executor import FakeExecutor, reference_logits
from .models import BOS, VOCAB_SIZE, tiny_tokenizer

ROW = {"query": "Question: What is wet?", "choices": ["fire", "the river"], "gold": 1}
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture
def llm() -> LLM:
    executor = FakeExecutor(page_size=4, vocab_size=VOCAB_SIZE)
    options = EngineOptions(kv_tokens=2048, max_batch_tokens=64, max_sequences=8)
    facts = ModelFacts(VOCAB_SIZE, 256)
    return LLM(executor, engine=Engine(executor, Tokenizer(tiny_tokenizer()), facts, options))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Files ---------------------------------------------------------------------------------------------------


def test_a_jsonl_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {"context": "As is: ", "choices": ["x", "yé"], "gold": 0}, ROW)
    path.write_text("\ufeff\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    (task,) = read_tasks(path, limit=2)
    assert task.questions == [
        Question("Question: What is wet?\nAnswer:", ("fire", "the river"), 1, f"{path}:2"),
        Question("As is: ", ("x", "yé"), 0, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2 is not JSON"),
        ("[" * 100_000, ":2 is not JSON"),
        ("[1]", ":2 is not a JSON object"),
        ('{"choices": ["a", "b"], "gold": 0}', ":2 has no text 'query' or 'context'"),
        ('{"context": "", "choices": ["a", "b"], "gold": 0}', ":2 has no text"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', ":2: 'choices' is no list of two or more texts"),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', ":2: 'choices'"),
        ('{"query": "q", "choices": ["a", 3], "gold": 0}', ":2: 'choices'"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', ":2: 'gold' is 2; allowed: 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', ":2: 'gold' is true"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', ":2: 'gold' is -1"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError) as caught:
        read_tasks(path)
    assert f"{path}{said}" in str(caught.value)


def test_what_is_no_text_or_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1 is not UTF-8"):
        read_tasks(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        read_tasks(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"--shots 2: .* has no examples"):
        read_tasks(write(tmp_path / "c.jsonl", ROW), shots=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no test/SUBJECT_test"):
        read_tasks(tmp_path / "empty")


def mmlu(folder: Path) -> Path:
    (folder / "test").mkdir()
    (folder / "dev").mkdir()
    (folder / "test" / "a_b_test.csv").write_text(HEADER + '" Why, ""x""?\nTwo lines",p,q,r,s,2\n')
    (folder / "test" / "c_test.csv").write_text("No header?,1,2,3,4,D\nTwo?,1,2,3,4,A\n")
    for name in ("a_b", "c"):
        (folder / "dev" / f"{name}_dev.csv").write_text(HEADER + "E1,1,2,3,4,0\nE2,5,6,7,8,B\nE3,1,2,3,4,1\n")
    return folder


def test_mmlu_prompts(tmp_path: Path) -> None:
    first, second = read_tasks(mmlu(tmp_path), shots=2)
    assert (first.subject, second.subject) == ("a_b", "c")
    (question,) = first.questions
    assert question.context == (
        "The following are multiple choice questions (with answers) about a b.\n\n"
        "E1\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n"
        "E2\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: B\n\n"
        'Why, "x"?\nTwo lines\nA. p\nB. q\nC. r\nD. s\nAnswer:'
    )
    assert (question.choices, question.gold) == (("A", "B", "C", "D"), 2)
    assert [one.gold for one in second.questions] == [3, 0]
    assert len(read_tasks(tmp_path, limit=1)[1].questions) == 1
    (alone,) = read_tasks(tmp_path / "test" / "c_test.csv", shots=1)
    assert alone.questions[1].context.endswith("Answer: A\n\nTwo?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("q,1,2,3,4\n", r"a_test\.csv:2 has 5 columns"),
        ("q,1,2,3,4,E\n", r"a_test\.csv:2: answer 'E'; allowed: 0 to 3"),
        ('q,1,"2"x,3,4,1\n', r"a_test\.csv:2 is not CSV"),
        ('"q,1,2,3,4,1\n', r"a_test\.csv:2 is not CSV"),
    ],
)
def test_a_bad_csv_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a_test.csv").write_text(HEADER + line)
    with pytest.raises(InputError, match=said):
        read_tasks(tmp_path)


def test_shots_that_are_not_there(tmp_path: Path) -> None:
    folder = mmlu(tmp_path)
    with pytest.raises(InputError, match=r"--shots 4: .*a_b_dev\.csv has 3 examples; ask for 3"):
        read_tasks(folder, shots=4)
    (folder / "dev" / "c_dev.csv").unlink()
    with pytest.raises(InputError, match=r"c_dev\.csv does not exist"):
        read_tasks(folder, shots=1)


# Tokens --------------------------------------------------------------------------------------------------


def test_tokens_of_a_choice_are_those_that_it_adds(llm: LLM) -> None:
    encoder = Encoder(llm)
    before, after = encoder.pair("The river was", " wide")
    assert before == llm.encode("The river was")
    assert before + after == llm.encode("The river was wide")
    spaced = encoder.pair("The river was  ", "wide")
    assert spaced[0] == before, "spaces at the end belong to the choice"
    assert spaced[0] + spaced[1] == llm.encode("The river was  wide")


def test_a_text_that_begins_with_bos_gets_no_second_one(llm: LLM) -> None:
    bos = llm.encode("")[0]
    fake = SimpleNamespace(
        encode=llm.encode,
        decode=llm.decode,
        context_length=256,
        artifact=SimpleNamespace(model={"bos_token_id": bos, "context_length": 256}),
    )
    encoder = Encoder(cast("LLM", fake))
    assert (
        encoder.ids(f"{BOS}One") == llm.encode("One") == [bos, *llm.encode("One", add_special_tokens=False)]
    )


def test_a_text_too_long_loses_its_beginning(llm: LLM) -> None:
    words = "one two three four five " * 40
    question = Question(words.strip(), ("six", "six seven eight nine"), 0, "f:1")
    short, long = Encoder(llm).requests(question)
    whole = llm.encode(f"{words.strip()} six")
    assert (
        len(short.context) + len(short.continuations[0])
        == 257
        == len(long.context) + len(long.continuations[0])
    )
    assert [*short.context, *short.continuations[0]] == whole[-257:]
    with pytest.raises(InputError, match="f:1: context and choice have"):
        Encoder(llm).requests(Question("x", ("y", words), 0, "f:1"))


def test_log_likelihoods_are_sums_over_the_choices_tokens(llm: LLM) -> None:
    questions = [
        Question("The river was", ("wide", "slow and the boats", "grain"), 0, "f:1"),
        Question("One, two,", ("three", "four, five"), 0, "f:2"),
    ]
    (prepared,) = prepare(llm, [Task("f", questions)])
    for question, sums in zip(questions, log_likelihoods(llm, prepared), strict=True):
        for choice, found in zip(question.choices, sums, strict=True):
            context = llm.encode(question.context)
            tokens = np.array(llm.encode(f"{question.context} {choice}"))
            total = 0.0
            for end in range(len(context), len(tokens)):
                row = reference_logits(tokens[:end], np.arange(end), VOCAB_SIZE).astype(np.float64)
                total += row[tokens[end]] - np.log(np.exp(row).sum())
            assert found == pytest.approx(total, rel=1e-5)


# Metrics -------------------------------------------------------------------------------------------------


def test_the_best_choice_by_three_lengths() -> None:
    question = Question("q", ("ab", "éééé", "abcdef"), 0, "f:1")
    assert picks(question, [-3.0, -4.0, -6.6]) == (0, 1, 1)
    assert picks(question, [-3.0, -4.8, -6.6]) == (0, 2, 1), "characters and bytes differ"
    assert picks(question, [-1.0, -1.0, -9.0])[0] == 0, "the first of equals"


def test_accuracies_and_their_errors() -> None:
    questions = [Question("q", ("a", "bb"), gold, "f:1") for gold in (0, 0, 1, 1)]
    found = accuracies(questions, [[-1.0, -1.5]] * 4)
    assert found["acc"] == found["acc_norm"] == 0.5
    assert found["acc_stderr"] == pytest.approx((0.25 * 4 / 3) ** 0.5 / 2)
    assert accuracies(questions[:1], [[-1.0, -1.5]])["acc_stderr"] is None


def test_subjects_are_weighted_by_their_questions() -> None:
    questions = [Question("q", ("a", "b"), 0, "f:1")] * 4
    parts = [
        accuracies(questions[:2], [[-1.0, -2.0], [-2.0, -1.0]]),
        accuracies(questions, [[-1.0, -2.0]] * 3 + [[-2.0, -1.0]]),
    ]
    found = pooled(parts)
    assert found["questions"] == 6
    assert found["acc"] == pytest.approx(4 / 6)
    variance = (1 * parts[0]["acc_stderr"] ** 2 * 2 + 3 * parts[1]["acc_stderr"] ** 2 * 4) / (6 - 2)
    assert found["acc_stderr"] == pytest.approx((variance / 6) ** 0.5)


def test_a_folder_is_reported_by_subject(llm: LLM, tmp_path: Path) -> None:
    shares: list[float] = []
    found = evaluate(llm, prepare(llm, read_tasks(mmlu(tmp_path))), shares.append)
    assert [part["subject"] for part in found["subjects"]] == ["a_b", "c"]
    assert found["questions"] == 3
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert found["acc"] == pytest.approx(sum(p["acc"] * p["questions"] for p in found["subjects"]) / 3)


# The command ---------------------------------------------------------------------------------------------


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    artifact = tmp_path / "a.llmc"
    words = ["compile", str(tiny_folder("llama")), "-o", str(artifact), "--target", "null"]
    assert main(words) == 0
    capsys.readouterr()
    file = write(tmp_path / "a.jsonl", ROW, {**ROW, "gold": 0})
    words = ["eval", str(artifact), "--mcq", str(file), "--mcq", str(mmlu(tmp_path)), "--shots", "0"]
    assert main([*words, "--against", str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["mcq"]
    assert (first["file"], first["questions"]) == (str(file), 2)
    # The null target's logits are all alike: a tie takes the first choice.
    assert first["acc"] == first["against"]["acc"] == 0.5
    assert second["questions"] == 3
    assert found["accuracy"] == pytest.approx((first["acc"] + second["acc"]) / 2)
    assert main([*words, "--limit", "1"]) == 0
    assert "acc_norm" in capsys.readouterr().out
    for missing in (["eval", str(artifact)], [*words, "--shots", "9"]):
        assert main(missing) == 2
        assert "error: " in capsys.readouterr().err
