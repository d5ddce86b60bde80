"""Retrieval: how much of what answers a question is found, how fast and in what memory, beside the peers'.

    python -m benchmarks.rag [--corpora hotpotqa,twowiki,musique] [--forms jsonl,untitled] [--peers NAMES]
                             [--speed 10000 --model FOLDER] [--scale 100000] [--embedder ARTIFACT] [-o FILE]

The corpora are the pools of passages that come with the questions of three public data sets (rag_corpora.py).
Each is written to files, indexed by `llmc rag index`, and asked in each mode by `KnowledgeBase.search`; with
`untitled` the titles stand nowhere in the files. Where triples that a large model extracted are at hand
(musique), ours and the peers' graphs are measured with them too. A question is asked alone, on one core, the
embedding included. Peers get our embedder's vectors, from a server that this program runs; HippoRAG and
LightRAG get no language model (peers_rag/ says what each does without it).

--speed N: seconds to index N passages beside sentence-transformers that only embeds them, on all cores.
--scale N: times and memory with N passages (`rag_corpora.mixed`; their vectors are sampled, rag_worker.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmc.runtime.rag.embedder import Embedder, open_embedder
from llmc.runtime.rag.evaluate import compare

from .commands import SCRATCH, llmc, machine, report, shared_data, write_between
from .environments import RAG
from .rag_corpora import (
    CORPORA,
    DOCUMENTS,
    FORMS,
    QUESTIONS,
    Corpus,
    joined,
    paragraphs,
    write,
    write_triples,
)
from .rag_peers import KS, PEERS, carry_out, measure

MODES = ("keyword", "dense", "hybrid", "rrf", "graph", "auto")
BEGIN = "<!-- rag tables: begin -->"
END = "<!-- rag tables: end -->"
_SCALE_QUESTIONS = 200


def worker(order: Mapping[str, Any]) -> dict[str, Any]:
    """What rag_worker.py answers, from a process of its own."""
    cores = order.get("cores") or sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "order.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(order), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.rag_worker", str(given), str(answer)],
            check=True,
            cwd=Path(__file__).resolve().parent.parent,
            # Before any library counts them: numpy's makes its threads where it is imported.
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        return json.loads(answer.read_text(encoding="utf-8"))


def one_core() -> list[int]:
    """The core that questions are asked on."""
    return [max(os.sched_getaffinity(0))]


def index(folder: Path, kb: Path, embedder: str, *words: str | Path) -> dict[str, Any]:
    """`llmc rag index`: what it says of itself, with the CPU seconds of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = llmc("rag", "index", folder, "-o", kb, "--embedder", embedder, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kept = ("documents", "chunks", "bytes", "seconds", "graph")
    facts = {name: result[name] for name in kept if name in result}
    if isinstance(graph := facts.get("graph"), dict):
        graph.pop("file", None)  # where it lay for this run
    return {**facts, "cpu_seconds": round(cpu, 1)}


def ours(corpus: Corpus, form: str, embedder: str, limit: int | None) -> dict[str, Any]:
    """Every mode over one corpus in one form, and with its triples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = write(corpus if form != "untitled" else corpus.untitled(), form, folder)
        kb = folder / "store.kb"
        result: dict[str, Any] = {"index": index(folder / DOCUMENTS, kb, embedder), "modes": {}}
        order = {
            "do": "ask",
            "kb": str(kb),
            "questions": str(folder / QUESTIONS),
            "top": max(KS),
            "limit": limit,
            "embedder": embedder,
            "cores": one_core(),
        }
        for mode in MODES:
            if mode == "dense" and embedder == "none":
                continue
            result["modes"][mode] = worker({**order, "mode": mode})
            say(f"{corpus.name} {form} {mode}", result["modes"][mode])
        # `auto` is what people get: graph, less what it takes for a question about the whole.
        order["embedder"] = "none"
        result["modes"]["graph, no embedder"] = worker({**order, "mode": "graph"})
        if corpus.extracted is not None:
            triples = folder / "triples.jsonl"
            write_triples(corpus, ids, triples)
            result["triples"] = index(folder / DOCUMENTS, kb, embedder, "--graph", triples)
            mode = "graph, triples of GPT-3.5"
            result["modes"][mode] = worker({**order, "mode": "graph", "embedder": embedder})
            say(f"{corpus.name} {form} {mode}", result["modes"][mode])
    return result


def say(what: str, one: Mapping[str, Any]) -> None:
    """A line of progress."""
    recall = " ".join(f"{100 * one['metrics'][f'recall@{k}']['mean']:.1f}" for k in KS)
    times = f"p50 {one['wall']['p50_ms']} ms, {one['rss_bytes'] / 1e6:.0f} MB"
    print(f"{what}: recall@{','.join(map(str, KS))} {recall}, {times}", file=sys.stderr, flush=True)


def add_differences(methods: Mapping[str, dict[str, Any]], than: Mapping[str, Any]) -> None:
    """To each method how much more `than` has of recall@5, with its interval. What it was worked out from,
    question by question, is left out of what is kept.
    """
    for method in methods.values():
        if method is not than and (found := compare(than["recall@5"], method["recall@5"])):
            method["graph_more_recall@5"] = {name: round(value, 5) for name, value in vars(found).items()}
    for method in methods.values():
        if method is not than:
            del method["recall@5"]


# Peers ---------------------------------------------------------------------------------------------------


def peers(
    corpus: Corpus, tools: Sequence[str], pythons: Mapping[str, Path], embedder: Embedder, limit: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each peer and mode that has what it needs: without triples, search by vector only."""
    for tool in tools:
        for mode in PEERS[tool]:
            if corpus.extracted is None and mode != "naive":
                continue
            found = measure(corpus, tool, mode, pythons[tool], embedder, limit=limit)
            name = f"{tool} {mode}".strip()
            say(f"{corpus.name} {name}", found)
            yield name, found


def _compare(entry: dict[str, Any]) -> None:
    """Ours with everything beside each other method: in the same form, peers' in the first."""
    for number, form in enumerate(entry["forms"].values()):
        graph = form["modes"]["graph"]
        add_differences({**form["modes"], **(entry["peers"] if number == 0 else {})}, graph)
        del graph["recall@5"]


# Speed and scale -----------------------------------------------------------------------------------------


def pool(data: Path, count: int) -> Corpus:
    """The development passages in one pool, filled up with paragraphs."""
    every = joined([load(data) for load in CORPORA.values()])
    more = paragraphs(data)[: max(0, count - len(every.passages))]
    return replace(every, passages=[*every.passages, *more])


def speed(corpus: Corpus, count: int, embedder: str, model: Path, python: Path) -> dict[str, Any]:
    """Seconds to index `count` passages, and of sentence-transformers to embed them, one after the other."""
    cores = sorted(os.sched_getaffinity(0))
    part = replace(corpus, passages=corpus.passages[:count], questions=[])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(part, "jsonl", folder)
        mine = index(folder / DOCUMENTS, folder / "store.kb", embedder)
    order = {"folder": "", "passages": part.passages, "model": str(model), "threads": len(cores)}
    theirs = carry_out("sentence-transformers", python, order, cores)
    kept = ("index_seconds", "index_cpu_seconds", "peak_bytes", "versions", "note")
    peer = {name: theirs[name] for name in kept}
    return {
        "passages": len(part.passages),
        "cores": len(cores),
        "llmc rag index": mine,
        "sentence-transformers": peer,
        "ratio": round(mine["seconds"] / peer["index_seconds"], 3),
    }


def scale(corpus: Corpus, count: int, embedder: str) -> dict[str, Any]:
    """A store of `count` passages, and what asking it takes in each mode."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(corpus, "jsonl", folder)
        small, kb = folder / "pool.kb", folder / "store.kb"
        index(folder / DOCUMENTS, small, embedder)
        documents = next((folder / DOCUMENTS).iterdir())
        order = {
            "do": "fill",
            "from": str(small),
            "pool": str(documents),
            "kb": str(kb),
            "folder": str(folder / "large"),
            "count": count,
            "embedder": embedder,
        }
        result: dict[str, Any] = {"passages": count, "fill": worker(order), "modes": {}}
        asking = {
            "do": "ask",
            "kb": str(kb),
            "questions": str(_some_questions(folder, _SCALE_QUESTIONS)),
            "top": max(KS),
            "embedder": embedder,
            "cores": one_core(),
        }
        # The first to open the store derives what is searched, and keeps it beside the store.
        first = worker({**asking, "mode": "graph", "limit": 1})
        result["first_open"] = {name: first[name] for name in ("open_seconds", "peak_rss_bytes")}
        for mode in MODES:
            result["modes"][mode] = worker({**asking, "mode": mode})
            say(f"{count} passages, {mode}", result["modes"][mode])
            del result["modes"][mode]["recall@5"]
    result["vectors"] = "real for the pool's passages; those made of them have theirs, weighed by words taken"
    return result


def _some_questions(folder: Path, count: int) -> Path:
    """Every n-th of the questions."""
    lines = (folder / QUESTIONS).read_text(encoding="utf-8").splitlines()
    path = folder / "some.jsonl"
    path.write_text("\n".join(lines[:: max(1, len(lines) // count)][:count]) + "\n", encoding="utf-8")
    return path


# Tables --------------------------------------------------------------------------------------------------


def tables(record: Mapping[str, Any]) -> str:
    """Markdown: recall in percent and times of each method, a table for each form; then speed and scale."""
    corpora: Mapping[str, Any] = record["corpora"]
    forms = dict.fromkeys(form for one in corpora.values() for form in one["forms"])
    parts = [_form_table(form, corpora) for form in forms]
    parts.append(_index_text(corpora))
    if "speed" in record:
        parts.append(_speed_text(record["speed"]))
    if "scale" in record:
        parts.append(_scale_table(record["scale"]))
    parts.append(f"{record['machine']}. Questions one at a time on one core, the embedding included.")
    return "\n\n".join(parts) + "\n"


def _form_table(form: str, corpora: Mapping[str, Any]) -> str:
    names = [name for name in corpora if form in corpora[name]["forms"]]
    methods = {
        name: {
            **corpora[name]["forms"][form]["modes"],
            **(corpora[name]["peers"] if form == FORMS[0] else {}),
        }
        for name in names
    }
    rows = dict.fromkeys(method for name in names for method in methods[name])
    title = "Recall@2/5/10 in percent" + (", the titles removed" if form == "untitled" else "")
    sizes = [f"{name} ({corpora[name]['passages']:,})" for name in names]
    return "\n".join(
        [
            f"| {' | '.join([title, *sizes, 'p50, p95 ms', 'MB'])} |",
            "|" + "---|" * (len(names) + 3),
            *(_row(method, [methods[name].get(method) for name in names]) for method in rows),
        ]
    )


def _row(method: str, found: Sequence[Mapping[str, Any] | None]) -> str:
    cells = [method]
    for one in found:
        recalls = [] if one is None else [f"{100 * one['metrics'][f'recall@{k}']['mean']:.0f}" for k in KS]
        cells.append("/".join(recalls) or "–")
    there = [one for one in found if one is not None]
    slowest = max(there, key=lambda one: one["wall"]["p50_ms"])
    cells.append(f"{slowest['wall']['p50_ms']:.1f}, {slowest['wall']['p95_ms']:.1f}")
    cells.append(f"{max(one['rss_bytes'] for one in there) / 1e6:.0f}")
    return f"| {' | '.join(cells)} |"


def _index_text(corpora: Mapping[str, Any]) -> str:
    """What indexing took, ours in the first form and the peers'."""
    found: list[str] = []
    for name, one in corpora.items():
        for form in list(one["forms"].values())[:1]:
            mine = form["index"]
            found.append(f"{name} {mine['seconds']:.0f} s ({mine['bytes'] / 1e6:.0f} MB)")
        found += [f"{name} {peer} {theirs['index_seconds']:.0f} s" for peer, theirs in one["peers"].items()]
    return f"Indexing on all cores, peers on one, embedding included: {', '.join(found)}."


def _speed_text(speed: Mapping[str, Any]) -> str:
    mine, peer = speed["llmc rag index"], speed["sentence-transformers"]
    version = peer["versions"]["sentence-transformers"]
    return (
        f"Indexing {speed['passages']:,} passages on {speed['cores']} cores: {mine['seconds']:.0f} s "
        f"({mine['cpu_seconds']:.0f} CPU s); sentence-transformers {version} to embed them in float32 and no "
        f"more: {peer['index_seconds']:.0f} s ({peer['index_cpu_seconds']:.0f} CPU s)."
    )


def _scale_table(scale: Mapping[str, Any]) -> str:
    lines = [
        f"| {scale['fill']['chunks']:,} passages | p50, p95 ms | MB resident | of it not mapped from files |",
        "|---|---|---|---|",
    ]
    for mode, one in scale["modes"].items():
        times = f"{one['wall']['p50_ms']:.1f}, {one['wall']['p95_ms']:.1f}"
        memory = f"{one['rss_bytes'] / 1e6:.0f} | {one['anonymous_bytes'] / 1e6:.0f}"
        lines.append(f"| {mode} | {times} | {memory} |")
    fill, first = scale["fill"], scale["first_open"]
    lines += [
        "",
        f"Written in {fill['seconds']:.0f} s without embedding ({fill['store_bytes'] / 1e6:.0f} MB); opened "
        f"for the first time, which derives what is searched, in {first['open_seconds']:.0f} s "
        f"(at most {first['peak_rss_bytes'] / 1e6:.0f} MB). Vectors: {scale['vectors']}.",
    ]
    return "\n".join(lines)


def _words(text: str) -> list[str]:
    return [] if text in ("", "none") else text.split(",")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpora", type=_words, default=list(CORPORA))
    parser.add_argument("--forms", type=_words, default=["jsonl", "untitled"], help=", ".join(FORMS))
    parser.add_argument("--peers", type=_words, default=list(PEERS), help="or none")
    parser.add_argument(
        "--speed", type=int, metavar="N", help="passages to index beside sentence-transformers"
    )
    parser.add_argument("--scale", type=int, metavar="N", help="passages of a large store")
    parser.add_argument("--embedder", default="auto", help="as llmc rag index takes it")
    parser.add_argument("--model", type=Path, help="Hugging Face folder for sentence-transformers")
    parser.add_argument("--limit", type=int, help="questions of each corpus")
    parser.add_argument("--cache", type=Path, default=SCRATCH, help="where environments are kept")
    RAG.add_option(parser)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--page", type=Path, help="write the tables between its marks (docs/rag.md)")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    data = shared_data()
    given = dict(RAG.named(text) for text in arguments.peer_python)
    wanted = [*arguments.peers, *(["sentence-transformers"] if arguments.speed else [])]
    pythons = {tool: RAG.python_of(tool, given, arguments.cache.absolute()) for tool in wanted}
    record: dict[str, Any] = {"machine": machine(), "embedder": arguments.embedder, "corpora": {}}
    for name in arguments.corpora:
        corpus = CORPORA[name](data)
        entry: dict[str, Any] = {
            "passages": len(corpus.passages),
            "questions": len(corpus.questions),
            "forms": {
                form: ours(corpus, form, arguments.embedder, arguments.limit) for form in arguments.forms
            },
            "peers": {},
        }
        if arguments.peers:
            embedder = open_embedder(arguments.embedder)
            assert embedder is not None, "peers need vectors"
            with embedder:
                entry["peers"] = dict(peers(corpus, arguments.peers, pythons, embedder, arguments.limit))
        _compare(entry)
        record["corpora"][name] = entry
    if arguments.speed:
        if arguments.model is None:
            sys.exit("error: --speed needs --model FOLDER, which sentence-transformers loads")
        record["speed"] = speed(
            pool(data, arguments.speed),
            arguments.speed,
            arguments.embedder,
            arguments.model,
            pythons["sentence-transformers"],
        )
    if arguments.scale:
        record["scale"] = scale(pool(data, 10_000), arguments.scale, arguments.embedder)
    report(record, arguments.output)
    if arguments.page is not None:
        write_between(tables(record), arguments.page, BEGIN, END)
    else:
        print(tables(record), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
