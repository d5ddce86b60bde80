"""`llmc rag`: what each command prints, writes and leaves with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from llmc.cli import rag, reference
from llmc.cli.main import explain

from . import command_line
from .command_line import Capture
from .rag_documents import faked, rows, write


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of documents; the current directory is empty."""
    faked(monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    docs = write(
        tmp_path / "docs",
        engine="Analytical Engine\n\nThe Analytical Engine was designed by Charles Babbage in London.",
        babbage="Charles Babbage\n\nCharles Babbage was born in 1791. He worked with Ada Lovelace.",
        ada="Ada Lovelace\n\nAda Lovelace wrote the first program. Her father was Lord Byron.",
        byron="Lord Byron\n\nLord Byron was a poet who died at Missolonghi.",
    )
    (docs / "rows.jsonl").write_text(rows("Whales are mammals.", "Herrings are fish."))
    return docs


def run(capsys: Capture, *words: object) -> tuple[int, str, str]:
    return command_line.run(capsys, "rag", *words)


def run_json(capsys: Capture, *words: object, code: int = 0) -> dict[str, Any]:
    return command_line.run_json(capsys, "rag", *words, code=code)


def indexed(capsys: Capture, docs: Path) -> str:
    return run_json(capsys, "index", docs)["kb"]


# Index and sync --------------------------------------------------------------------------------------------


def test_index_makes_and_follows(capsys: Capture, docs: Path) -> None:
    first = run_json(capsys, "index", docs, "--graph", "fast")
    assert first["kb"] == "docs.kb"
    assert Path("docs.kb").is_file()
    assert (first["added"], first["documents"], first["embedder"]) == (6, 6, "fake-1")
    again = run_json(capsys, "index", docs)
    assert (again["added"], again["unchanged"], again["chunks_written"]) == (0, 6, 0)
    (docs / "byron.txt").unlink()
    code, out, err = run(capsys, "sync", docs)
    assert code == 0
    assert "1 deleted, 5 unchanged" in out
    assert run_json(capsys, "sync", "docs.kb")["unchanged"] == 5, "the folder is known"
    assert err == "" or "reading" in err


def test_index_says_what_was_left_out(capsys: Capture, docs: Path) -> None:
    (docs / "bad.pdf").write_bytes(b"%PDF-1.4 no more")
    (docs / "empty.txt").touch()
    (docs / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, err = run(capsys, "index", docs)
    assert code == 1
    assert "6 added, 1 failed" in out
    assert "left out: bad.pdf: " in err
    assert "1 files are empty, such as empty.txt" in err
    assert "not read, such as a.png" in err
    found = run_json(capsys, "index", docs, code=1)
    assert [one["document"] for one in found["failed"]] == ["bad.pdf"]
    assert found["documents"] == 6


def test_wrong_calls_of_index(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for words, said in (
        ([tmp_path / "none"], "holds no document that could be read"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([docs / "ada.txt"], "is a file"),
        ([docs, "--graph", "llm"], "--graph llm needs a model"),
        ([docs, "--graph", "slow"], "neither fast, llm, none nor a file of triples"),
        ([docs, "--model", "x.llmc"], "--model is for --graph llm"),
        ([docs, "-o", docs], "is a folder"),
        ([docs, "--store", "x.kb"], "is no URL of PostgreSQL"),
        ([docs, "-o", "a.kb", "--store", "postgresql://h/d"], "-o and --store"),
        ([docs, "--max-file-mb", "0"], "--max-file-mb"),
    ):
        code, out, err = run(capsys, "index", *words)
        assert (code, out) == (2, ""), words
        assert said in err
        assert err.count("\n") == 1
    assert os.listdir() == [], "a refused call leaves no store"
    kb = indexed(capsys, docs)
    other = write(tmp_path / "other", a="A text.")
    code, _, err = run(capsys, "index", other, "-o", kb)
    assert code == 2
    assert f"holds the documents of {docs}" in err
    assert f"llmc rag add {kb} {other}" in err


def test_estimate_writes_nothing(capsys: Capture, docs: Path) -> None:
    found = run_json(capsys, "index", docs, "--estimate")["estimate"]
    assert os.listdir() == []
    stats = run_json(capsys, "index", docs)
    assert (found["documents"], found["chunks"]) == (stats["documents"], stats["chunks"])
    code, out, _ = run(capsys, "index", docs, "--estimate")
    assert code == 0
    assert "6 of 5 files (5 sampled)" in out


def test_relations_from_a_file(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    triples = tmp_path / "triples.jsonl"
    row = {"title": "Ada Lovelace", "triples": [["Ada Lovelace", "daughter of", "Lord Byron"]]}
    triples.write_text(json.dumps(row) + "\n" + json.dumps({**row, "title": "Nobody"}) + "\n")
    found = run_json(capsys, "index", docs, "--graph", triples)["graph"]
    assert (found["rows"], found["triples"], found["chunks"]) == (2, 1, 1)
    assert len(found["unmatched"]) == 1
    assert run_json(capsys, "stats", "docs.kb")["triples"] == 1


# Documents -------------------------------------------------------------------------------------------------


def test_documents(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    kb = indexed(capsys, docs)
    extra = write(tmp_path / "extra", note="Note\n\nRemember the milk.")
    assert run_json(capsys, "add", kb, extra)["added"] == 1
    listed = run_json(capsys, "documents", kb)
    assert listed["count"] == 7
    assert [one["id"] for one in listed["documents"]][:3] == ["ada.txt", "babbage.txt", "byron.txt"]
    assert [
        one["id"]
        for one in run_json(capsys, "documents", kb, "--after", "byron.txt", "--limit", 1)["documents"]
    ] == ["engine.txt"]
    write(extra, note="Note\n\nForget the milk.")
    code, _, err = run(capsys, "update", kb, docs / "ada.txt", extra / "none.txt")
    assert (code, "has no document" in err) == (2, True)
    assert run_json(capsys, "update", kb, extra)["updated"] == 1
    shown = run_json(capsys, "show", kb, "extra/note.txt")
    assert "Forget" in shown["chunks"][0]["text"]
    chunk = shown["chunks"][0]["chunk"]
    code, out, _ = run(capsys, "show", kb, chunk)
    assert code == 0
    assert chunk in out and "extra/note.txt" in out
    assert run_json(capsys, "delete", kb, "rows.jsonl", "extra/")["deleted"] == 3
    code, _, err = run(capsys, "delete", kb, "ada.txt", "nothing.txt")
    assert (code, "has no document nothing.txt" in err) == (2, True)
    assert run_json(capsys, "show", kb, "ada.txt")["document"]["title"] == "Ada Lovelace"
    code, _, err = run(capsys, "show", kb, "nothing")
    assert code == 2


def test_stats_vacuum_dump(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    kb = indexed(capsys, docs)
    stats = run_json(capsys, "stats", docs)
    assert (stats["documents"], stats["chunks"], stats["folder"]) == (6, 6, str(docs))
    assert "embedder hash" in run(capsys, "stats", kb)[1]
    assert run_json(capsys, "vacuum", kb)["bytes"] <= stats["bytes"]
    code, out, _ = run(capsys, "dump", kb)
    assert code == 0
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert kinds.count("document") == 6
    assert len(run_json(capsys, "dump", kb)["lines"]) == len(kinds)
    assert run_json(capsys, "dump", kb, "-o", tmp_path / "dump.jsonl")["lines"] == len(kinds)
    assert (tmp_path / "dump.jsonl").read_text() == out


def test_the_graph_for_other_programs(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    kb = indexed(capsys, docs)
    graph = run_json(capsys, "export-graph", kb)
    ids = {node["id"] for node in graph["nodes"]}
    assert {edge["source"] for edge in graph["edges"]} | {edge["target"] for edge in graph["edges"]} <= ids
    passages = {node["id"]: node for node in graph["nodes"] if node["kind"] == "passage"}
    assert all(node["end"] > node["start"] for node in passages.values())
    labels = {node["label"] for node in graph["nodes"] if node["kind"] == "entity"}
    assert {"Ada Lovelace", "Lord Byron"} <= labels
    made = run_json(capsys, "export-graph", kb, "-o", tmp_path / "g.graphml")
    tree = ElementTree.parse(tmp_path / "g.graphml")
    space = "{http://graphml.graphdrawing.org/xmlns}"
    assert len(tree.findall(f".//{space}node")) == len(ids) == made["nodes"]
    keys = {key.get("id") for key in tree.findall(f"{space}key")}
    assert {data.get("key") for data in tree.findall(f".//{space}data")} <= keys
    code, out, _ = run(capsys, "export-graph", kb)
    assert code == 0
    assert out.startswith("<?xml")
    assert run(capsys, "export-graph", kb, "--json", "--format", "graphml")[0] == 2


def test_embedding_again(capsys: Capture, docs: Path) -> None:
    kb = indexed(capsys, docs)
    code, _, err = run(capsys, "query", kb, "Who?", "--embedder", "other")
    assert code == 2
    assert f"llmc rag embed {kb} --embedder other" in err
    found = run_json(capsys, "embed", kb, "--embedder", "other")
    assert (found["embedded"], found["embedder"]) == (6, "other-1")
    assert run_json(capsys, "embed", kb, "--embedder", "none")["embedder"] is None


# Queries ---------------------------------------------------------------------------------------------------


def test_query(capsys: Capture, docs: Path) -> None:
    kb = indexed(capsys, docs)
    found = run_json(
        capsys, "query", kb, "Where did the father of Ada Lovelace die?", "--top", 2, "--explain"
    )
    assert len(found["passages"]) == 2
    best = found["passages"][0]
    assert set(best) == {"document", "title", "heading", "text", "score", "span", "page", "chunk", "scores"}
    assert {one["document"] for one in found["passages"]} == {"ada.txt", "byron.txt"}
    code, out, err = run(
        capsys, "query", docs, "Who wrote the first program?", "--top", 1, "--mode", "keyword"
    )
    assert code == 0
    assert out.startswith("[1] Ada Lovelace  ada.txt:")
    assert "wrote the first program" in out
    assert "1 passages" in err


def test_text_of_documents_cannot_move_the_cursor(capsys: Capture, docs: Path) -> None:
    (docs / "evil.txt").write_text(
        "Evil\n\nZebras \x1b[2J\x1b]0;owned\x07 and \u202egnp.exe zebras. " + "Plain words. " * 99
    )
    kb = indexed(capsys, docs)
    code, out, _ = run(capsys, "query", kb, "zebras", "--top", 1)
    assert code == 0
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_many_questions(capsys: Capture, docs: Path, tmp_path: Path) -> None:
    kb = indexed(capsys, docs)
    file = tmp_path / "questions.jsonl"
    asked = [
        {"id": "q1", "question": "Who wrote the first program?", "gold_titles": "whatever"},
        {"_id": 7, "question": "Who designed the Analytical Engine?"},
        {"question": "What are whales?"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    results = run_json(capsys, "query", kb, "--questions", file, "--top", 3)["results"]
    assert [one["id"] for one in results] == ["q1", 7, 3]
    assert [one["question"] for one in results] == [row["question"] for row in asked]
    assert [one["passages"][0]["title"] for one in results] == ["Ada Lovelace", "Analytical Engine", "Row 0"]
    assert all(len(one["passages"]) <= 3 for one in results)
    fields = {"document", "title", "heading", "text", "score", "span", "page", "chunk"}
    assert set(results[0]["passages"][0]) == fields
    code, out, _ = run(capsys, "query", kb, "--questions", file)
    assert code == 0
    assert out.startswith("q1  Who wrote")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "a"}\n{"quest": "b"}\n', "row 2 has no text in 'question'"),
        ('{"question": "a"}\n\n{"question": ', "line 3 is not JSON"),
        ("", "holds no question"),
        ('{"question": "  "}\n', "row 1 has no text"),
        ("[1, 2]", "row 1 has no text"),
    ],
)
def test_bad_rows_are_named(text: str, said: str, capsys: Capture, docs: Path, tmp_path: Path) -> None:
    kb = indexed(capsys, docs)
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    code, out, err = run(capsys, "query", kb, "--questions", file)
    assert (code, out) == (2, "")
    assert said in err


def test_wrong_queries(capsys: Capture, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kb = indexed(capsys, docs)
    long = tmp_path / "long.txt"
    long.write_text("whales " * 20_000)
    for words, said in (
        ([kb], "no question was given"),
        ([kb, "   "], "no question was given"),
        ([kb, "a", "--questions", "b"], "not both"),
        ([kb, "a", "--iterative"], "--iterative needs --model"),
        ([kb, "a", "--mode", "best"], "'best' is not one of"),
        ([kb, "a", "--top", "0"], "--top"),
        (["nothing.kb", "a"], "nothing.kb does not exist"),
        ([tmp_path, "a"], "has not been indexed"),
    ):
        code, out, err = run(capsys, "query", *words)
        assert (code, out) == (2, ""), words
        assert said in err
    with long.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, _, err = run(capsys, "query", kb, "-")
    assert code == 2
    assert "more than 100,000 characters" in err
    long.write_text("whales " * 14_000)
    with long.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run_json(capsys, "query", kb, "-")["passages"][0]["document"] == "rows.jsonl#r0"


def test_a_damaged_store_is_one_line(capsys: Capture, docs: Path) -> None:
    Path("bad.kb").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    for words in (["query", "bad.kb", "a"], ["stats", "bad.kb"], ["index", docs, "-o", "bad.kb"]):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: bad.kb")
        assert err.count("\n") == 1


# The group -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rag.COMMANDS)
def test_every_command_has_help_and_json(name: str, capsys: Capture) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "--json" in out


def test_the_reference_has_every_command() -> None:
    page = reference.text()
    for name in rag.COMMANDS:
        assert f"## `llmc rag {name} " in page


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from llmc.cli.main import main; main(['rag', '--help'])\n"
        "heavy = {'numpy', 'scipy', 'igraph', 'sqlite3', 'tokenizers', 'lxml', 'pypdf', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('llmc.runtime')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("module", "extra"),
    [("igraph", "rag"), ("pypdf", "rag"), ("Stemmer", "rag"), ("psycopg", "postgres"), ("mcp", "tools")],
)
def test_what_to_install_is_named(module: str, extra: str) -> None:
    message, code = explain(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert code == 1
    assert f"pip install 'llmc[{extra}]'" in message


def test_an_index_that_is_killed_goes_on(docs: Path, capsys: Capture) -> None:
    """The command itself, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "llmc.cli.main",
        "rag",
        "index",
        str(docs),
        "--embedder",
        "none",
        "-o",
        "k.kb",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([*command[:-1], "fresh.kb"], check=True, capture_output=True)
    assert run(capsys, "dump", "k.kb")[1] == run(capsys, "dump", "fresh.kb")[1]
