"""docs/rag.md and examples/rag say commands that exist, and those of the example do what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from llmc.cli.main import llmc, main
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.questions import load_questions

from .conftest import ROOT

PAGES = (ROOT / "docs/rag.md", ROOT / "examples/rag/README.md")
EXAMPLE = ROOT / "examples" / "rag"


def commands(page: Path) -> list[list[str]]:
    """The words behind `$ llmc` of each line of a console."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ llmc ")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one(page: Path) -> None:
    found = commands(page)
    assert len(found) >= 8
    for words in found:
        command: click.Command = llmc
        context = click.Context(llmc)
        while isinstance(command, click.Group):
            named = command.get_command(context, words[0])
            assert named is not None, words
            command, words = named, words[1:]
        command.make_context(command.name, list(words))  # fails on an option or a choice that is none


def test_modes_and_routes_that_are_described_are_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    from llmc.cli.rag import COMMANDS
    from llmc.cli.rag_options import MODES

    assert set(re.findall(r"^\| `(\w+)` \| (?:words|vectors|both|communities|`graph`)", text, re.M)) == set(
        MODES
    )
    assert all(re.search(rf"`(?:llmc rag )?{name}\b", text) for name in COMMANDS)


def test_the_example_runs_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = [words for words in commands(EXAMPLE / "README.md") if "MODEL.llmc" not in words]
    for words in run:
        words = [word.replace("examples/rag", str(EXAMPLE)) for word in words]
        if words[:2] == ["rag", "index"]:
            words += ["--embedder", "none"]  # whether one is at hand differs from machine to machine
        code = main([*words, "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        found = json.loads(printed.out)
        if words[1] == "index":
            assert found["documents"] == 11 and not found["failed"]
        elif words[1] == "eval":
            assert found["unknown_gold"] == [] and found["metrics"]["recall@5"]["mean"] >= 0.9
    with KnowledgeBase.open("lighthouse.kb", embedder="none") as kb:
        assert "things/visitor_book.txt" not in {document.id for document in kb.store.documents()}


def test_the_example_holds_the_answers() -> None:
    for question in load_questions(EXAMPLE / "questions.jsonl"):
        files = [path for path in (EXAMPLE / "documents").rglob("*") if path.is_file()]
        text = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in files).casefold()
        assert any(answer.casefold() in text for answer in question.answers) or question.id in (
            "crack",
            "flash",
        )
