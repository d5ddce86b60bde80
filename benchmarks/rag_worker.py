"""Our side of benchmarks/rag.py: each order runs in a process of its own.

python -m benchmarks.rag_worker ORDER.json ANSWER.json

{"do": "ask", "kb", "questions", "mode", "top"}    recall, seconds of each question, memory
{"do": "fill", "kb", "from", "count", "folder"}    a store of `count` passages: those of the store `from`,
                                                   and others made of them (`rag_corpora.mixed`)
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from llmc.runtime.rag.embedder import Embedder
from llmc.runtime.rag.evaluate import evaluate
from llmc.runtime.rag.ingest import passage_text
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.questions import Question, load_questions
from llmc.runtime.rag.types import Passage

from .peers_rag.protocol import Watch, resident_bytes
from .rag_corpora import DOCUMENTS, mixed
from .rag_peers import KS, percentiles

_WARM = 5  # questions asked first, and not counted in times


def memory() -> dict[str, int]:
    """Resident bytes now and at most; the part that maps files counts, though the kernel may take it back."""
    return {
        "rss_bytes": resident_bytes(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "anonymous_bytes": _status("RssAnon"),
    }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def ask(order: Mapping[str, Any]) -> dict[str, Any]:
    """Each question once, one after the other, embedding included."""
    questions = load_questions(Path(order["questions"]), order.get("limit"))
    seconds: list[float] = []
    cpu: list[float] = []
    watch = Watch()
    with KnowledgeBase.open(order["kb"], embedder=order.get("embedder", "auto")) as kb:
        for question in questions[:_WARM]:
            kb.search(question.question, top=order["top"], mode=order["mode"])
        opened = watch.seconds

        def search(question: Question) -> list[Passage]:
            began, began_cpu = time.perf_counter(), time.process_time()
            found = kb.search(question.question, top=order["top"], mode=order["mode"])
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - began_cpu)
            return found

        run = evaluate(questions, search, ks=KS)
        used = memory()
    metrics = {name: one for name, one in run.intervals().items() if not name.startswith("precision")}
    return {
        "metrics": {name: {k: round(v, 5) for k, v in vars(one).items()} for name, one in metrics.items()},
        "recall@5": run.values()["recall@5"],
        "open_seconds": round(opened, 3),
        "wall": percentiles(seconds),
        "cpu": percentiles(cpu),
        **used,
    }


class Sampled:
    """Stands where the embedder does while a large store is filled. A passage of the pool gets the vector
    that the pool's store has of it; one that was made of others theirs, weighed by the words that it took of
    each: to compute all would take half an hour. All else (tokens, name, hash) is the embedder's.
    """

    def __init__(
        self, embedder: Embedder, pool: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]
    ) -> None:
        self._embedder = embedder
        self._pool = pool
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)

    def embed_passages(self, texts: Sequence[str], progress: Any = None) -> np.ndarray:
        """By the whole text, or by its first line, which is the title."""
        vectors = [
            self._pool[text] if text in self._pool else self._made[text.partition("\n")[0]] for text in texts
        ]
        return np.stack(vectors).astype(np.float32)


def fill(order: Mapping[str, Any]) -> dict[str, Any]:
    """Write the passages as files, and index them."""
    documents = Path(order["folder"]) / DOCUMENTS
    documents.mkdir(parents=True)
    pool, sums = _pool_of(order["from"])
    passages = [(title, text) for title, text, _ in sums]
    taken = {title for title, _ in passages}
    made: dict[str, np.ndarray] = {}
    with (documents / "mixed.jsonl").open("w", encoding="utf-8") as file:
        for number, one in enumerate(mixed(passages, order["count"] - len(passages))):
            title = one.title if one.title not in taken else f"{one.title} {number}"
            vector = sum(words * sums[source][2] for source, words in one.sources)
            made[title] = np.asarray(vector / np.linalg.norm(vector), np.float16)
            row = {"id": f"{number:06d}", "title": title, "text": one.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    shutil.copy(Path(order["pool"]), documents)
    with KnowledgeBase.open(order["kb"], embedder=order.get("embedder", "auto"), create=True) as kb:
        assert kb.embedder is not None
        real = kb.embedder
        kb.embedder = cast(Embedder, Sampled(real, pool, made))
        watch = Watch()
        report = kb.sync(documents)
        kb.embedder = real
        return {
            "seconds": round(watch.seconds, 1),
            "cpu_seconds": round(watch.cpu_seconds, 1),
            "failed": len(report.failed),
            **{name: kb.store.counts()[name] for name in ("documents", "chunks")},
            "store_bytes": Path(order["kb"]).stat().st_size,
            **memory(),
        }


def _pool_of(location: str) -> tuple[dict[str, np.ndarray], list[tuple[str, str, np.ndarray]]]:
    """Vectors by what the embedder read, and (title, text, mean vector) of each document."""
    vectors: dict[str, np.ndarray] = {}
    documents: list[tuple[str, str, np.ndarray]] = []
    with KnowledgeBase.open(location, embedder="none") as kb:
        for document in kb.store.documents():
            chunks = list(kb.store.chunks(document=document.id))
            found = [chunk.vector for chunk in chunks if chunk.vector is not None]
            for chunk, vector in zip(chunks, found, strict=True):
                vectors[passage_text(chunk.title, chunk.heading, chunk.text)] = vector
            mean = np.mean(np.asarray(found, np.float32), axis=0)
            documents.append((document.title, " ".join(chunk.text for chunk in chunks), mean))
    return vectors, documents


def main() -> int:
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = {"ask": ask, "fill": fill}[order["do"]](order)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
