"""The pure parts of benchmarks/rag.py: corpora, what is made of them, peers' programs and scores, tables."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from llmc.runtime.rag.embedder import Embedder
from llmc.runtime.rag.questions import load_questions

from benchmarks import rag, rag_peers
from benchmarks.environments import RAG
from benchmarks.rag_corpora import (
    CORPORA,
    DOCUMENTS,
    FORMS,
    QUESTIONS,
    Asked,
    Corpus,
    Extracted,
    document_ids,
    joined,
    mixed,
    paragraphs,
    write,
    write_triples,
)

from .conftest import ROOT

PASSAGES = [
    ("Ed Wood (film)", "Ed Wood is a film. It was made in 1994."),
    ("AC/DC", "AC/DC is a band. It comes from Sydney. It is loud."),
    ("ac/dc", "The same name in small letters."),
    ("...", "A title of which no name is left."),
]
TRIPLES = (("AC/DC", "comes from", "Sydney"), ("AC/DC", "is", "a band"))
CORPUS = Corpus(
    "small",
    PASSAGES,
    [Asked("q", "Where does the band come from?", "Sydney", (1, 0)), Asked("r", "When?", "1994", (0,))],
    [Extracted((), ()), Extracted(("AC/DC", "Sydney"), TRIPLES), Extracted((), ()), Extracted((), ())],
)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS)
def test_a_corpus_is_written_with_a_document_for_each_passage(form: str, tmp_path: Path) -> None:
    ids = write(CORPUS, form, tmp_path)
    assert ids == document_ids(CORPUS, form) and len(set(ids)) == len(PASSAGES)
    documents = tmp_path / DOCUMENTS
    if form == "jsonl":
        (file,) = documents.iterdir()
        got = {f"{file.name}#{row['id']}": (row["title"], row["text"]) for row in rows(file)}
        assert [got[id] for id in ids] == PASSAGES
    else:
        assert [(documents / id).read_text(encoding="utf-8").strip() for id in ids] == [
            text for _, text in PASSAGES
        ]
        assert sum(path.is_file() for path in documents.rglob("*")) == len(PASSAGES)
    first, second = load_questions(tmp_path / QUESTIONS)
    assert [gold.document for gold in first.gold] == [ids[1], ids[0]] and second.answers == ("1994",)


def test_titles_stand_in_names_only_where_they_should() -> None:
    assert document_ids(CORPUS, "named") == ["Ed Wood (film).txt", "AC DC.txt", "2/ac dc.txt", "passage.txt"]
    assert document_ids(CORPUS.untitled(), "untitled")[1] == "000001.txt"
    assert {title for title, _ in CORPUS.untitled().passages} == {""}


def test_triples_are_written_for_the_documents_that_have_some(tmp_path: Path) -> None:
    ids = document_ids(CORPUS, "jsonl")
    assert write_triples(CORPUS, ids, tmp_path / "t.jsonl") == 2
    assert rows(tmp_path / "t.jsonl") == [{"document": ids[1], "triples": [list(one) for one in TRIPLES]}]


def test_joined_pools_keep_each_passage_once_and_all_gold() -> None:
    other = Corpus("other", [("New", "text"), PASSAGES[1]], [Asked("s", "?", "", (1, 0))])
    pool = joined([CORPUS, other])
    assert pool.passages == [*PASSAGES, ("New", "text")]
    assert [asked.gold for asked in pool.questions] == [(1, 0), (0,), (1, 4)]


def test_mixed_passages_are_the_same_again_and_know_their_sources() -> None:
    pool = [(f"First{i} Last{i}", f"Begin{i} here. Middle{i} of it. End{i} is there.") for i in range(9)]
    made = list(mixed(pool, 200))
    assert made == list(mixed(pool, 200)) != list(mixed(pool, 200, seed=1))
    for one in made:
        first, last = one.title.split()
        assert first.startswith("First") and last.startswith("Last")
        counted = Counter(int(number) for number in re.findall(r"(?:Begin|Middle|End)(\d)", one.text))
        assert counted.total() == 3 and {source for source, _ in one.sources} == set(counted)
        assert sum(words for _, words in one.sources) == len(one.text.split())
    (named,) = mixed([("Ed Wood", "Ed Wood is a film.")], 1)
    assert named.text == f"{named.title} is a film."


def test_development_corpora_are_whole(shared_data: Path) -> None:
    sizes = {name: load(shared_data) for name, load in CORPORA.items()}
    assert {name: (len(c.passages), len(c.questions)) for name, c in sizes.items()} == {
        "hotpotqa": (4937, 500),
        "twowiki": (3112, 500),
        "musique": (1890, 100),
    }
    for corpus in sizes.values():
        assert len(set(corpus.passages)) == len(corpus.passages)
        assert all(2 <= len(asked.gold) <= 4 for asked in corpus.questions)
    extracted = sizes["musique"].extracted
    assert extracted is not None and len(extracted) == 1890
    assert sum(len(one.triples) for one in extracted) == 17_234
    every = joined(list(sizes.values()))
    assert (len(every.passages), len(every.questions)) == (9936, 1100)
    assert len(rag.pool(shared_data, 10_000).passages) == 10_000
    assert all(60 <= len(text.split()) <= 250 for _, text in paragraphs(shared_data))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jsonl", "untitled"])
def test_a_corpus_is_indexed_and_asked_by_commands(form: str) -> None:
    found = rag.ours(CORPUS, form, "none", None)
    assert found["index"]["documents"] == len(PASSAGES) and found["index"]["cpu_seconds"] > 0
    assert found["triples"]["graph"]["triples"] == 2 and found["triples"]["graph"]["unmatched"] == []
    assert set(found["modes"]) == {
        "keyword", "hybrid", "rrf", "graph", "auto", "graph, no embedder", "graph, triples of GPT-3.5"
    }  # fmt: skip
    for one in found["modes"].values():
        assert one["metrics"]["recall@10"]["mean"] == 1 and one["rss_bytes"] > 1_000_000
        assert set(one["recall@5"]) == {"q", "r"}


# Peers ---------------------------------------------------------------------------------------------------


def test_each_peer_has_a_program_and_pins() -> None:
    for tool in RAG.programs:
        assert RAG.program(tool).is_file()
        pins = [pin for pin in RAG.pins(tool) if not pin.startswith("--")]
        assert pins and all("==" in pin for pin in pins)
    assert RAG.alone("hipporag") == ["hipporag==2.0.0a4"] and RAG.alone("lightrag") == []
    assert RAG.alone("one", "# [one]\n# alone: a==1 b==2\n# [two]\n# alone: c==3\n") == ["a==1", "b==2"]


def test_scores_of_what_a_peer_found() -> None:
    run = rag_peers.scored(CORPUS, [[1, 3, 0]])
    assert run.values()["recall@2"] == {"q": 0.5} and run.values()["recall@5"] == {"q": 1.0}
    assert rag_peers.scored(CORPUS, [[], [0]]).values()["mrr"] == {"q": 0.0, "r": 1.0}
    twice = Corpus("twice", [PASSAGES[0], PASSAGES[0]], [Asked("q", "?", "", (1,))])
    assert rag_peers.scored(twice, [[0]]).values()["recall@2"] == {"q": 1.0}


class _Lengths:
    """An embedder whose vectors are lengths."""

    def embed_passages(self, texts: list[str]) -> np.ndarray:
        return np.asarray([[len(text), 1.0] for text in texts], np.float32)


def test_the_embedder_answers_as_openai_does() -> None:
    server = rag_peers.EmbeddingServer(cast(Embedder, _Lengths()))
    with server.running() as url:
        for given, lengths in ((["a", "bcd"], [1, 3]), ("ab", [2])):
            body = json.dumps({"model": "any", "input": given}).encode()
            with urllib.request.urlopen(urllib.request.Request(f"{url}/embeddings", body)) as response:
                data = json.load(response)["data"]
            assert [row["embedding"] for row in data] == [[length, 1.0] for length in lengths]
            assert [row["index"] for row in data] == list(range(len(lengths)))
    assert server.seconds > 0


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from protocol import Answer, Order, Watch, embed, serve

def run(order: Order) -> Answer:
    answer = Answer(note=order.mode)
    for question in order.questions:
        if question == "fail":
            raise ValueError("what a peer says")
        watch = Watch()
        answer.found.append([int(value) for value in embed(order, [question])[0]])
        answer.add_time(watch)
    return answer

serve(run, ("numpy", "no-such-package"))
"""


def test_a_peer_program_gets_its_order_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(RAG.folder)))
    tools = type(RAG)(RAG.requirements, tmp_path, {"fake": program.name})
    monkeypatch.setattr(rag_peers, "RAG", tools)
    corpus = Corpus("c", PASSAGES, [Asked("q", "?", "", (1,))])
    found = rag_peers.measure(
        corpus, "fake", "some mode", Path(sys.executable), cast(Embedder, _Lengths()), limit=1
    )
    assert found["recall@5"] == {"q": 1.0} and found["note"] == "some mode"
    assert found["versions"]["numpy"] and found["versions"]["no-such-package"] is None
    assert found["peak_rss_bytes"] > 1_000_000
    failing = Corpus("c", PASSAGES, [Asked("q", "fail", "", (1,))])
    with pytest.raises(RuntimeError, match=r"fake ended with 1[\s\S]*what a peer says"):
        rag_peers.measure(failing, "fake", "", Path(sys.executable), cast(Embedder, _Lengths()))


def test_tables_have_a_row_for_each_method() -> None:
    def one(recall: float) -> dict[str, Any]:
        metrics = {f"recall@{k}": {"mean": recall} for k in (2, 5, 10)}
        memory = {"rss_bytes": 123_400_000, "anonymous_bytes": 50_000_000, "index_seconds": 300.4}
        return {"metrics": metrics, "wall": {"p50_ms": 3.25, "p95_ms": 9.0}, **memory}

    modes = {"keyword": one(0.5), "graph": one(0.875)}
    form = {"modes": modes, "index": {"seconds": 12.3, "bytes": 5_400_000}}
    both = {"jsonl": form, "untitled": form}
    filled = {"chunks": 100_123, "seconds": 99.7, "store_bytes": 2_000_000}
    peer = {"versions": {"sentence-transformers": "6"}, "index_seconds": 200.0, "index_cpu_seconds": 399.0}
    record = {
        "machine": "a machine",
        "corpora": {
            "first": {"passages": 1890, "forms": {"jsonl": form}, "peers": {"peer": one(0.25)}},
            "second": {"passages": 20, "forms": both, "peers": {}},
        },
        "speed": {
            "passages": 10_000,
            "cores": 2,
            "llmc rag index": {"seconds": 100.4, "cpu_seconds": 190.0},
            "sentence-transformers": peer,
        },
        "scale": {
            "fill": filled,
            "first_open": {"open_seconds": 20.0, "peak_rss_bytes": 4e8},
            "modes": modes,
            "vectors": "sampled",
        },
    }
    text = rag.tables(record)
    assert "| graph | 88/88/88 | 88/88/88 | 3.2, 9.0 | 123 |" in text
    assert "| peer | 25/25/25 | – | 3.2, 9.0 | 123 |" in text
    assert "first (1,890)" in text and text.count("| keyword |") == 3
    assert "| Recall@2/5/10 in percent, the titles removed | second (20) |" in text
    assert "10,000 passages on 2 cores: 100 s (190 CPU s); sentence-transformers 6" in text
    assert "| 100,123 passages |" in text and "| graph | 3.2, 9.0 | 123 | 50 |" in text
    assert "first 12 s (5 MB), first peer 300 s, second 12 s (5 MB)." in text
    assert "in 20 s (at most 400 MB). Vectors: sampled." in text
    page = (ROOT / "docs/rag.md").read_text(encoding="utf-8")
    assert page.index(rag.BEGIN) < page.index(rag.END)


def test_each_method_is_compared_with_ours_over_the_same_questions() -> None:
    def one(*values: float) -> dict[str, Any]:
        return {"recall@5": {str(number): value for number, value in enumerate(values)}}

    forms = {name: {"modes": {"graph": one(1, 1, 1, 0), "hybrid": one(0, 1, 0, 0)}} for name in ("a", "b")}
    entry = {"forms": forms, "peers": {"peer": one(1, 1, 1, 0)}}
    rag._compare(entry)
    assert forms["a"]["modes"]["hybrid"]["graph_more_recall@5"]["mean"] == 0.5
    assert entry["peers"]["peer"]["graph_more_recall@5"]["p"] == 1
    assert "recall@5" not in json.dumps(entry).replace("graph_more_recall@5", "")
