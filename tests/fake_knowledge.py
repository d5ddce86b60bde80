"""A knowledge base in memory, for tests of what stands on one: no embedder, no files, words as they are.

Paragraphs are chunks, capitalised words are entities. `gate` holds back searches and writes while closed.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmc.ir.errors import InputError
from llmc.runtime.rag.store.base import Settings
from llmc.runtime.rag.types import Chunk, Document, Features, Passage

_NAME = re.compile(r"\b[A-Z][a-z]+\b")
_NONE: Any = None


@dataclass
class Report:
    """What is read of `SyncReport`."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class FakeStore:
    location = "/secret/place.kb"
    cache_folder = "/secret/cache"

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Document, list[Chunk]]] = {}
        self.generation = 0

    @contextmanager
    def reading(self) -> Iterator[FakeStore]:
        yield self

    def settings(self) -> Settings:
        return Settings()

    def counts(self) -> dict[str, int]:
        return {"documents": len(self.kept), "chunks": sum(len(chunks) for _, chunks in self.kept.values())}

    def documents(self, after: str = "", limit: int | None = None) -> Iterator[Document]:
        ids = [id for id in sorted(self.kept) if id > after]
        yield from (self.kept[id][0] for id in ids[:limit])

    def document(self, id: str) -> Document | None:
        return self.kept[id][0] if id in self.kept else None

    def documents_of_path(self, path: str) -> list[Document]:
        return [document for document, _ in self.kept.values() if document.path == path]

    def chunks(self, ids: Sequence[str] | None = None, document: str | None = None) -> Iterator[Chunk]:
        of = [document] if document is not None else sorted(self.kept)
        found = [chunk for id in of if id in self.kept for chunk in self.kept[id][1]]
        yield from (chunk for chunk in found if ids is None or chunk.id in ids)

    def delete(self, ids: Sequence[str]) -> int:
        return sum(self.kept.pop(id, None) is not None for id in ids)

    def put(self, name: str, data: bytes) -> None:
        text = data.decode()
        digest = hashlib.sha256(data).hexdigest()
        title = text.split("\n", 1)[0].lstrip("# ")
        document = Document(name, name, title, "text/plain", digest, len(data), 1_700_000_000_000_000_000)
        features = Features(_NONE, _NONE, _NONE, _NONE)
        chunks: list[Chunk] = []
        for match in re.finditer(r"[^\n]+(?:\n[^\n]+)*", text):
            id = hashlib.sha256(f"{name} {match.start()}".encode()).hexdigest()[:32]
            place = (match.group(), match.start(), match.end(), None)
            chunks.append(Chunk(id, name, len(chunks), title, "", *place, 1, features))
        self.kept[name] = (document, chunks)


class FakeKnowledge:
    """What the server asks of `KnowledgeBase`."""

    def __init__(self, **documents: str) -> None:
        self.store = FakeStore()
        self.settings = Settings()
        self.embedder = None
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.searches: list[dict[str, Any]] = []
        for name, text in documents.items():
            self.store.put(f"{name}.txt", text.encode())

    def _wait(self) -> None:
        self.began.set()
        assert self.gate.wait(30)

    def stats(self) -> dict[str, Any]:
        return {"location": "/secret/place.kb", "folder": "/secret", "bytes": 1234, **self.store.counts()}

    def add_bytes(self, name: str, data: bytes) -> Report:
        self._wait()
        report = Report()
        try:
            data.decode()
        except UnicodeDecodeError:
            report.failed.append((name, "is not text"))
            return report
        self.store.put(name, data)
        report.added = 1
        return report

    def delete_document(self, id: str) -> bool:
        return self.store.delete([id]) > 0

    def search(self, question: str, **options: Any) -> list[Passage]:
        self._wait()
        if not question.strip():
            raise InputError("the question is empty", remedy="ask something")
        self.searches.append({"question": question, **options})
        words = set(re.findall(r"\w+", question.lower()))
        found: list[tuple[float, Chunk]] = []
        for chunk in self.store.chunks():
            shared = words & set(re.findall(r"\w+", chunk.text.lower()))
            if shared:
                found.append((len(shared), chunk))
        found.sort(key=lambda one: (-one[0], one[1].id))
        return [
            Passage(
                c.id, c.document, c.title, c.heading, c.text, c.start, c.end, c.page, score, {"bm25": score}
            )
            for score, c in found[: options["top"]]
        ]

    def graph_neighbours(self, focus: str, limit: int) -> dict[str, Any]:
        self._wait()
        names: dict[str, set[str]] = {}
        for id, (_, chunks) in self.store.kept.items():
            names[f"d:{id}"] = {f"e:{name.lower()}" for c in chunks for name in _NAME.findall(c.text)}
        focus = focus if focus.startswith(("d:", "e:")) or not focus else f"d:{focus}"
        edges = [(a, b) for a, found in sorted(names.items()) for b in sorted(found) if focus in ("", a, b)]
        ids = list(dict.fromkeys(id for edge in edges for id in edge))[:limit]
        nodes = [
            {
                "id": id,
                "kind": "document" if id[0] == "d" else "entity",
                "label": id[2:] if id[0] == "d" else id[2:].title(),
                "document": id[2:] if id[0] == "d" else None,
            }
            for id in ids
        ]
        return {"nodes": nodes, "edges": [{"source": a, "target": b, "kind": "names"} for a, b in edges]}

    def close(self) -> None:
        pass
