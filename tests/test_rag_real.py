"""Files of HotpotQA through the command line with the real MiniLM: what is found, and what a kill costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llmc
import pytest
from llmc.cli.main import main
from llmc.runtime.rag.knowledge import KnowledgeBase

from .models import real_model
from .rag_documents import dump
from .tvm_graphs import ISA

pytestmark = pytest.mark.slow

FILES = 320


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "minilm.llmc"
    llmc.compile(real_model("minilm"), out, targets=[f"tvm-cpu:isa={ISA}"], quant="int8", verdict=False)
    return out


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first passages as files, a title and a text in each."""
    folder = tmp_path_factory.mktemp("hotpot") / "docs"
    folder.mkdir()
    with (shared_data / "hotpotqa500" / "corpus.jsonl").open(encoding="utf-8") as lines:
        for number in range(FILES):
            row = json.loads(next(lines))
            (folder / f"{number:05}.txt").write_text(f"{row['title']}\n\n{row['text']}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def questions(shared_data: Path, folder: Path) -> list[dict[str, Any]]:
    """Those whose two passages are both among the files."""
    titles = {path.read_text(encoding="utf-8").split("\n", 1)[0] for path in folder.iterdir()}
    lines = (shared_data / "hotpotqa500" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if titles.issuperset(row["gold_titles"])]


def recall(results: list[dict[str, Any]], questions: list[dict[str, Any]]) -> float:
    found = [
        len(set(row["gold_titles"]) & {one["title"] for one in result["passages"]}) / 2
        for row, result in zip(questions, results, strict=True)
    ]
    return sum(found) / len(found)


def test_real_documents(
    folder: Path,
    minilm: Path,
    questions: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*words: object) -> dict[str, Any]:
        code = main(["rag", *map(str, words), "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    kb = tmp_path / "docs.kb"
    estimate = run("index", folder, "-o", kb, "--embedder", minilm, "--estimate")["estimate"]
    made = run("index", folder, "-o", kb, "--embedder", minilm)
    assert (made["documents"], made["failed"]) == (FILES, [])
    assert (estimate["documents"], estimate["chunks"]) == (FILES, made["chunks"])
    assert estimate["bytes"] == pytest.approx(run("vacuum", kb)["bytes"], rel=0.1)
    again = run("sync", kb)
    assert (again["unchanged"], again["chunks_written"]) == (FILES, 0)

    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    assert len(questions) > 25
    found = {
        mode: recall(run("query", kb, "--questions", file, "--top", 5, "--mode", mode)["results"], questions)
        for mode in ("keyword", "dense", "hybrid", "auto")
    }
    assert min(found.values()) > 0.7, found
    assert found["auto"] >= max(0.9, found["hybrid"]), found

    # Where a passage stands in its document is where its text stands.
    for result in run("query", kb, "--questions", file, "--top", 2)["results"][:10]:
        for passage in result["passages"]:
            document = (folder / passage["document"]).read_text(encoding="utf-8")
            start, end = passage["span"]
            assert document[start:end] == passage["text"]

    # Vectors do not depend on the batches, so that what a killed run ends with is the same.
    killed = tmp_path / "killed.kb"
    command = [sys.executable, "-m", "llmc.cli.main", "rag", "index", str(folder)]
    command += ["-o", str(killed), "--embedder", str(minilm)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if killed.exists():
            with KnowledgeBase.open(killed, embedder="none") as opened:
                if opened.store.counts()["documents"]:
                    break
        time.sleep(0.05)
    process.kill()
    process.wait()
    shutil.copytree(folder, tmp_path / "copy")
    with KnowledgeBase.open(killed, create=True, embedder=str(minilm)) as opened:
        before = opened.store.counts()["documents"]
        assert 0 < before <= FILES
        opened.sync(folder)
        with KnowledgeBase.open(kb, embedder="none") as whole:
            assert dump(opened) == dump(whole)
    # Nor on where the folder lies.
    with KnowledgeBase.open(tmp_path / "copy.kb", create=True, embedder=str(minilm)) as opened:
        opened.sync(tmp_path / "copy")
        with KnowledgeBase.open(kb, embedder="none") as whole:
            assert dump(opened) == dump(whole)
