"""`llmc rag` with its documents in PostgreSQL: the same as in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llmc.cli.main import main

from . import postgres
from .rag_documents import faked, rows, write


def test_a_server_instead_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int = 0) -> dict[str, Any]:
        found = main(["rag", *map(str, words), "--json"])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return json.loads(captured.out)

    docs = write(
        tmp_path / "docs",
        ada="Ada Lovelace\n\nAda Lovelace wrote the first program. Her father was Lord Byron.",
        byron="Lord Byron\n\nLord Byron was a poet who died at Missolonghi.",
    )
    (docs / "rows.jsonl").write_text(rows("Whales are mammals.", "Herrings are fish."))
    with postgres.server() as url:
        made = run("index", docs, "--store", url)
        assert (made["added"], made["bytes"]) == (4, None)
        run("index", docs)
        assert run("index", docs, "--store", url)["unchanged"] == 4
        assert run("dump", url)["lines"] == run("dump", docs)["lines"]
        (docs / "byron.txt").unlink()
        assert run("sync", url)["deleted"] == 1
        run("add", url, write(tmp_path / "more", byron="Lord Byron\n\nLord Byron was a poet."))
        assert run("documents", url)["count"] == 4
        found = run("query", url, "Who is the father of Ada Lovelace?", "--top", 2)
        assert found["passages"][0]["document"] == "ada.txt"
        assert run("embed", url, "--embedder", "other")["embedded"] == 4
        assert run("vacuum", url)["bytes"] is None
        assert run("stats", url)["embedder"] == "other-1"
        error = run("query", url, "Who?", "--embedder", "fake", code=2)["error"]
        assert "gives other vectors" in error
        assert run("query", "postgresql://nobody@127.0.0.1:1/none", "a", code=2)["exit_code"] == 2
