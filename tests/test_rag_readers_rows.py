"""Readers of many documents in one file: JSON lines, JSON, CSV."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.rag.readers import (
    ReadLimits,
    read_documents,
)
from llmc.runtime.rag.types import Text

from .reading import Read, body


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


# Rows.


def test_json_lines(read: Read) -> None:
    rows = [
        {"title": "A", "text": "Text of A.", "year": 1994, "url": "u", "nested": {"x": 1}},
        {"_id": "q7", "name": "B", "contents": ["One.", "Two.", " Three."]},
        {"id": 5, "heading": "C", "paragraph_text": "P"},
        {"id": 5, "passage": "Again"},
        "a text alone",
        {"a": {"b": [1, 2], "c": "x"}, "title": "D"},
        {"text": "Ed Wood\nHe made films."},
    ]
    documents = read.all("d/r.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [document.id for document in documents] == [
        f"d/r.jsonl#{row}" for row in ("0", "q7", "5", "5~2", "4", "5~3", "6")
    ]
    assert [(document.title, body(document)) for document in documents] == [
        ("A", "Text of A."),
        ("B", "One. Two. Three."),
        ("C", "P"),
        ("", "Again"),
        ("", "a text alone"),
        ("D", "a.b: 1\na.b: 2\na.c: x"),
        ("Ed Wood", "He made films."),
    ]
    assert documents[0].metadata == {"year": 1994, "url": "u"}
    assert not read.problems


def test_bad_rows_are_reported_and_skipped(read: Read) -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    strange = '{"text":"\\ud800\\u0000two"}'
    data = f'{{"text":"one"}}\n\nnot json\n{{"text":" "}}\n{deep}\n{strange}\n{{"text":"three'
    documents = read.all("r.jsonl", data)
    assert [(document.id, document.text) for document in documents] == [
        ("r.jsonl#0", "one"),
        ("r.jsonl#4", "\ufffd two"),
    ]
    assert [id for id, _ in read.problems] == ["r.jsonl#1", "r.jsonl#2", "r.jsonl#3", "r.jsonl#5"]
    assert "no valid JSON" in read.problems[0][1]
    assert read.problems[1][1] == "holds no text"
    assert "nested" in read.problems[2][1] or "200 levels" in read.problems[2][1]  # Python 3.13 parses deeper


def test_a_file_of_bad_rows_alone_is_an_error(read: Read) -> None:
    assert "holds no text" in read.error("r.jsonl", "no\nrows\n")
    assert len(read.problems) == 2


def test_ids_of_rows_stay_apart(read: Read) -> None:
    rows = [{"id": id, "text": "x"} for id in ("a", "a", "a~2", "a", "", 7, True, "x" * 500, "b\n c")]
    ids = [document.id for document in read.all("r.jsonl", "\n".join(map(json.dumps, rows)))]
    assert len(set(ids)) == len(rows)
    assert ids[:3] == ["r.jsonl#a", "r.jsonl#a~2", "r.jsonl#a~2~2"]
    assert ids[4:] == ["r.jsonl#4", "r.jsonl#7", "r.jsonl#6", "r.jsonl#7~2", "r.jsonl#b c"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["a", "a~2", "a~3", "a~2~2", "3", 3, None]), max_size=12))
def test_ids_of_rows_are_distinct_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory, own: list
) -> None:
    path = tmp_path_factory.getbasetemp() / "ids.jsonl"
    path.write_text("".join(json.dumps({"id": id, "text": "x"}) + "\n" for id in own) + '{"text": "x"}')
    ids = [document.id for document in read_documents(path, "ids.jsonl")]
    assert len(set(ids)) == len(own) + 1


def test_rows_are_streamed_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = json.dumps({"title": "T", "text": "x" * 90_000}).encode() + b"\n"
    with open(path, "wb") as file:
        for _ in range(30):
            file.write(row)
        file.write(b'{"text": "' + b"y" * 1_500_000 + b'"}\n')
        file.write(row)
    problems: list[tuple[str, str]] = []
    limits = ReadLimits(max_bytes=1_000_000)  # of a row: the file has more
    found = list(read_documents(path, "r.jsonl", limits, lambda id, why: problems.append((id, why))))
    assert len(found) == 31
    assert found[-1].id == "r.jsonl#31"
    assert problems == [("r.jsonl#30", "has more than 1 MB; --max-file-mb raises the limit")]
    few = list(
        read_documents(path, "r.jsonl", ReadLimits(max_rows=3), lambda id, why: problems.append((id, why)))
    )
    assert len(few) == 3
    assert problems[-1] == ("r.jsonl", "has more than 3 rows; those behind are left out")


def test_a_reader_gives_rows_before_it_has_read_all(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "one"}\n' * 2)
    rows: Iterator[Text] = read_documents(path, "r.jsonl")
    assert next(rows).text == "one"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([{"title": "A", "text": "a"}, {"title": "B", "text": "b"}], [("#0", "A", "a"), ("#1", "B", "b")]),
        ({"A": ["One.", " Two."], "B": ["b"]}, [("#A", "A", "One. Two."), ("#B", "B", "b")]),
        ({"A": "a", "B": "b"}, [("#A", "A", "a"), ("#B", "B", "b")]),
        ({"x": {"title": "A", "text": "a"}, "y": {"text": "b"}}, [("#x", "A", "a"), ("#y", "", "b")]),
        ({"v": 1, "docs": [{"title": "A", "text": "a"}]}, [("#0", "A", "a")]),
        ([["A", ["One.", "Two."]], ["B", ["b"]]], [("#0", "A", "One. Two."), ("#1", "B", "b")]),
        (["one", "two"], [("#0", "", "one"), ("#1", "", "two")]),
        ({"title": "A", "text": "a", "lang": "en"}, [("", "A", "a")]),
        ({"title": "A", "body": ["One.", "Two."]}, [("", "A", "One. Two.")]),
        ({"name": "pkg", "deps": {"x": "1"}}, [("", "pkg", "deps.x: 1")]),
        ("text", [("", "", "text")]),
        (12.5, [("", "", "12.5")]),
    ],
)
def test_json(read: Read, value: object, found: list[tuple[str, str, str]]) -> None:
    documents = read.all("a.json", json.dumps(value, indent=1))
    assert [(document.id, document.title, document.text) for document in documents] == [
        (f"a.json{id}", title, text) for id, title, text in found
    ]


def test_json_lines_and_json_under_each_others_name(read: Read) -> None:
    lines = '{"title": "A", "text": "a"}\n{"title": "B", "text": "b"}\n'
    assert [document.title for document in read.all("a.json", lines)] == ["A", "B"]
    array = json.dumps([{"title": "A", "text": "a"}, {"title": "B", "text": "b"}], indent=2)
    assert [document.title for document in read.all("a.jsonl", array)] == ["A", "B"]
    assert [document.title for document in read.all("a.jsonl", lines.encode("utf-16"))] == ["A", "B"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("[1, 2", "line 1"),
        ('[{"text": "a"}\n,\n}', "line 3"),
        ("[] x", "more text"),
        ("[1 2]", "expected"),
        ("9" * 10_000, "digits"),
        ("[]", "no text"),
        ("{}", "no text"),
        ("null", "no text"),
        ('{"a": [' + "[" * 300 + "]" * 300 + "]}", "no text"),
    ],
)
def test_json_that_is_none_or_hostile(read: Read, data: str, reason: str) -> None:
    assert reason in read.error("a.json", data)


def test_json_of_too_many_values_is_refused_before_it_is_parsed(read: Read) -> None:
    assert "JSON lines" in read.error("a.json", "[" + "[]," * 5_000_001 + "1]")


# Tables.


def test_csv_with_a_column_of_text(read: Read) -> None:
    documents = read.all("a.csv", 'Title,Text,year\nA,"One, two\nthree",1994\n\nB,,\nC,x,\n')
    assert [(document.id, document.title, document.text) for document in documents] == [
        ("a.csv#0", "A", "One, two\nthree"),
        ("a.csv#2", "C", "x"),
    ]
    assert documents[0].metadata == {"year": "1994"}
    assert read.problems == [("a.csv#1", "holds no text")]


def test_csv_without_one_is_read_as_lines(read: Read) -> None:
    document = read.one("a.csv", "name;age;\nBob;3;x\nAnn;;\n")
    assert document.id == "a.csv"
    assert document.text == "name: Bob; age: 3; column 3: x\nname: Ann"
    assert read.one("a.csv", "1,2\n3,4\n").text == "column 1: 1; column 2: 2\ncolumn 1: 3; column 2: 4"
    many = read.all("a.tsv", "name\tage\n" + "Bob\t3\n" * 1200)
    assert [document.id for document in many] == ["a.tsv#0", "a.tsv#500", "a.tsv#1000"]
    assert sum(document.text.count("\n") + 1 for document in many) == 1200


def test_csv_of_titles_and_facts(read: Read) -> None:
    document = read.one("a.csv", "title,director\nEd Wood,Tim Burton\n")
    assert (document.title, document.text) == ("Ed Wood", "director: Tim Burton")


def test_csv_with_long_fields_encodings_and_nuls(read: Read) -> None:
    assert len(read.one("a.csv", f"text\n{'x' * 300_000}\n").text) == 300_000
    assert read.one("a.csv", "text\nKöln\n".encode("cp1252")).text == "Köln"
    assert read.one("a.csv", "text\nKöln\n".encode("utf-16")).text == "Köln"
    assert read.one("a.csv", b"\xef\xbb\xbftext\nx\n").text == "x"
    assert read.one("a.csv", b"text\n" + b"x" * 70_000 + b"\0y\n").text.endswith("xy")
    assert "--max-file-mb" in read.error("a.csv", "text\n" + "x" * 2_000_000, ReadLimits.of_megabytes(1))
