"""Peers of benchmarks/rag.py, each in an environment of its own, with our embedder behind OpenAI's API."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from llmc.runtime.rag.embedder import Embedder
from llmc.runtime.rag.evaluate import Evaluation, evaluate
from llmc.runtime.rag.questions import Gold, Question
from llmc.runtime.rag.types import Passage

from .environments import RAG
from .rag_corpora import Corpus

KS = (2, 5, 10)
MODEL = "text-embedding-all-MiniLM-L6-v2"
"""HippoRAG takes a name with text-embedding in it for one behind OpenAI's API."""

PEERS: Mapping[str, Sequence[str]] = {"lightrag": ("naive", "mix", "hybrid"), "hipporag": ("",)}
"""Modes that are measured of each; those other than naive need triples."""


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    p50, p95 = np.percentile(np.asarray(seconds) * 1000, [50, 95])
    return {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


class EmbeddingServer:
    """POST /v1/embeddings, by an embedder, one request at a time; `seconds` is what they took together."""

    def __init__(self, embedder: Embedder) -> None:
        self.seconds = 0.0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
                with lock:
                    began = time.perf_counter()
                    vectors = embedder.embed_passages(texts)
                    outer.seconds += time.perf_counter() - began
                data = [
                    {"object": "embedding", "index": index, "embedding": vector.tolist()}
                    for index, vector in enumerate(vectors)
                ]
                answer = {"object": "list", "data": data, "model": MODEL, "usage": _USAGE}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The address, while it answers."""
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self.url
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


_USAGE = {"prompt_tokens": 0, "total_tokens": 0}


def order_of(
    corpus: Corpus, url: str, mode: str, folder: Path, *, top: int, limit: int | None
) -> dict[str, Any]:
    """What a peer's program reads; see peers_rag/protocol.py."""
    extracted = [{"entities": one.entities, "triples": one.triples} for one in corpus.extracted or []]
    return {
        "folder": str(folder),
        "passages": corpus.passages,
        "questions": [asked.question for asked in corpus.questions[:limit]],
        "extracted": extracted or None,
        "url": url,
        "model": MODEL,
        "top": top,
        "mode": mode,
    }


def carry_out(tool: str, python: Path, order: Mapping[str, Any], cores: Sequence[int]) -> dict[str, Any]:
    """What the program answers; RuntimeError with the end of its output where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer, log = (Path(folder) / name for name in ("order.json", "answer.json", "log"))
        given.write_text(json.dumps(order), encoding="utf-8")
        with log.open("wb") as output:
            done = subprocess.run(
                [str(python), str(RAG.program(tool)), str(given), str(answer)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
                check=False,
            )
        if done.returncode:
            raise RuntimeError(
                f"{tool} ended with {done.returncode}: {log.read_text(errors='replace')[-3000:]}"
            )
        return json.loads(answer.read_text(encoding="utf-8"))


def measure(
    corpus: Corpus, tool: str, mode: str, python: Path, embedder: Embedder, *, limit: int | None = None
) -> dict[str, Any]:
    """A peer's recall, times and memory on a corpus, on one core; embedding of what is asked included."""
    server = EmbeddingServer(embedder)
    with server.running() as url, tempfile.TemporaryDirectory() as folder:
        order = order_of(corpus, url, mode, Path(folder), top=max(KS), limit=limit)
        print(f"$ {tool} {mode} on {corpus.name}", file=sys.stderr, flush=True)
        answer = carry_out(tool, python, order, [max(os.sched_getaffinity(0))])
    run = scored(corpus, answer["found"])
    return {
        "metrics": {
            name: {k: round(v, 5) for k, v in vars(i).items()} for name, i in run.intervals().items()
        },
        "recall@5": run.values()["recall@5"],
        "wall": percentiles(answer["seconds"]),
        "cpu": percentiles(answer["cpu_seconds"]),
        "index_seconds": round(answer["index_seconds"], 1),
        "index_cpu_seconds": round(answer["index_cpu_seconds"], 1),
        "embedding_seconds": round(server.seconds, 1),
        "rss_bytes": answer["bytes"],
        "peak_rss_bytes": answer["peak_bytes"],
        "versions": answer["versions"],
        "note": answer["note"],
    }


def scored(corpus: Corpus, found: Sequence[Sequence[int]]) -> Evaluation:
    """Our measures of what somebody found, as indices of passages for each of the first questions."""
    passages = [
        Passage(str(index), str(index), title, "", text, 0, len(text), None, 0.0)
        for index, (title, text) in enumerate(corpus.passages)
    ]
    # A passage that stands in a pool twice is found whichever of them is.
    first = {passage: index for index, passage in reversed(list(enumerate(corpus.passages)))}
    same = [first[passage] for passage in corpus.passages]
    questions = [
        Question(asked.id, asked.question, (), tuple(Gold(document=str(same[one])) for one in asked.gold))
        for asked in corpus.questions[: len(found)]
    ]
    answers = {
        asked.id: [passages[same[index]] for index in indices]
        for asked, indices in zip(corpus.questions, found, strict=False)
    }
    return evaluate(questions, lambda question: answers[question.id], ks=KS)
