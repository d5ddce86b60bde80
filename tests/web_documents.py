"""What tests of the page's documents share: a server with a few, the way to the view, answers by a script."""

from __future__ import annotations

import re
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import pytest
from llmc.runtime.rag import answer as answering
from llmc.runtime.rag.answer import Answer, Citation, Said, Searched
from llmc.runtime.rag.citations import check
from llmc.runtime.server import ServerSettings

from .chromium import expect
from .fake_knowledge import FakeKnowledge
from .server_harness import RunningServer, fake_llm, serving

ADA = "# Ada Lovelace\n\nAda Lovelace was born in London.\n\nShe wrote the first program for the Engine."
BABBAGE = "# Charles Babbage\n\nCharles Babbage designed the Engine in London.\n\nBabbage met Ada in 1833."
TURIN = "# Turin\n\nIn Turin Menabrea heard Babbage and wrote about the Engine."


def three_documents() -> FakeKnowledge:
    return FakeKnowledge(ada=ADA, babbage=BABBAGE, turin=TURIN)


def serving_documents(base: Any) -> AbstractContextManager[RunningServer]:
    """A server that may change them."""
    settings = ServerSettings(documents_writable=True, max_upload_bytes=20_000)
    return serving(fake_llm(), settings, {"notes": base})


def documents(page: Any, tab: str = "search") -> None:
    page.click("#documents")
    page.click(f"#tab-{tab}")
    expect(page.locator(f"#view-{tab}")).to_be_visible()


def search(page: Any, text: str) -> None:
    page.fill("#query", text)
    page.click("#search-form [type=submit]")


def file(name: str, text: str | bytes) -> dict[str, Any]:
    data = text if isinstance(text, bytes) else text.encode()
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    *words: str,
    text: str = "",
    found: bool = True,
    gate: threading.Event | None = None,
    checked: bool = False,
) -> list[dict[str, Any]]:
    """Puts a script in the model's place. Each [n] of `text` cites the n-th passage's second half, or with
    `checked` the real check finds the sources; then the words come as slowly as a model's.
    """
    asked: list[dict[str, Any]] = []

    def stream_answer(kb: Any, llm: Any, question: str, **options: Any):
        asked.append({"question": question, **options})
        passages = tuple(kb.search(question, top=options["top"], mode=options["mode"], per_document=1))
        yield Searched(question, passages)
        for word in words:
            assert gate is None or gate.wait(30)
            time.sleep(0.025 if checked else 0)
            yield Said(word)
        cited: list[Citation] = []
        for number in map(int, re.findall(r"\[(\d)\]", text)):
            if number > len(passages):
                continue
            one = passages[number - 1]
            half = len(one.text) // 2
            cited.append(Citation(number, one, one.text[half:], one.start + half, one.end))
        if checked:
            real = check(text, passages, question)
            yield Answer(real.text, real.citations, passages, True, True, (), (), 412, len(words), "stop")
            return
        yield Answer(text, tuple(cited), passages, found, found, (), (), 40, len(words), "stop")

    monkeypatch.setattr(answering, "stream_answer", stream_answer)
    return asked
