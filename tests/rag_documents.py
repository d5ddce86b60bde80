"""Documents, an embedder and kills for tests of ingesting."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.runtime.rag import embedder as embedder_module
from llmc.runtime.rag.ingest import SyncReport, count_words
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.store.sqlite import SqliteStore

DIMENSIONS = 16


class FakeEmbedder:
    """A text's vector is the sum of its words' random ones; counts what it is asked."""

    name, hash, dimensions, room = "fake", "fake-1", DIMENSIONS, 254

    def __init__(self, hash: str = "fake-1") -> None:
        self.hash = hash
        self.name = hash
        self.texts = 0
        self.calls = 0

    def embed_passages(self, texts: Sequence[str], progress: Any = None) -> np.ndarray:
        self.calls += 1
        self.texts += len(texts)
        return np.stack([self.embed_query(text) for text in texts])

    def embed_query(self, text: str) -> np.ndarray:
        vector = np.zeros(DIMENSIONS, np.float32)
        for word in sorted(set(re.findall(r"\w+", text.casefold()))) or [""]:
            seed = hashlib.sha256((self.hash + word).encode()).digest()[:8]
            vector += np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(DIMENSIONS)
        return vector / np.linalg.norm(vector)

    def count_tokens(self, text: str) -> int:
        return count_words(text)

    def close(self) -> None:
        pass


def faked(monkeypatch: pytest.MonkeyPatch) -> FakeEmbedder:
    """Whatever embedder is asked for: this one, or where the name says so, one with other vectors."""
    one = FakeEmbedder()

    def open_embedder(spec: str | None, **_: Any) -> FakeEmbedder | None:
        if spec in (None, "none"):
            return None
        return FakeEmbedder("other-1") if spec == "other" else one

    monkeypatch.setattr(embedder_module, "open_embedder", open_embedder)
    return one


def settle(folder: Path) -> None:
    """Gives all files a time of change that is long past, one by one different where contents are."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            past = 1_600_000_000_000_000_000 + int.from_bytes(
                hashlib.sha256(path.read_bytes()).digest()[:4], "big"
            )
            os.utime(path, ns=(past, past))


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    settle(folder)
    return folder


def rows(*texts: str) -> str:
    return "".join(
        json.dumps({"id": f"r{n}", "title": f"Row {n}", "text": text}) + "\n" for n, text in enumerate(texts)
    )


def dump(kb: KnowledgeBase) -> list[str]:
    return list(kb.store.dump())


def fresh(folder: Path, place: Path, **options: Any) -> list[str]:
    """The dump of a new store of the folder."""
    with KnowledgeBase.open(place, create=True, **options) as kb:
        kb.sync(folder)
        return dump(kb)


def counts(report: SyncReport) -> tuple[int, int, int, int, int]:
    return (report.added, report.updated, report.deleted, report.unchanged, len(report.failed))


def sync(place: Path, docs: Path) -> None:
    with KnowledgeBase.open(place, create=True) as kb:
        kb.sync(docs)


def killed(action: Callable[[], Any], *, at: int) -> bool:
    """Runs it in a process that kills itself at its `at`-th step: before, amid or behind a transaction.
    Whether it came to that.
    """
    child = os.fork()
    if not child:
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def stepping(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(self: Any, items: Any, *more: Any, **named: Any) -> Any:
                def each() -> Iterator[Any]:
                    for item in items:
                        yield item
                        step()

                step()
                found = real(self, items if isinstance(items, dict) else each(), *more, **named)
                step()
                return found

            return call

        try:
            for name in ("put", "delete", "touch", "set_vectors"):
                setattr(SqliteStore, name, stepping(getattr(SqliteStore, name)))
            action()
        except BaseException as error:  # noqa: BLE001  (a child that fails must not run the parent's tests)
            print(error, file=sys.stderr)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)
