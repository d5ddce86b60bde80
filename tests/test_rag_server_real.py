"""/v1/rag/… on a real knowledge base, without an embedder; and `llmc serve --documents`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from llmc.cli.serve import _named_documents, _open, _settings
from llmc.ir.errors import InputError
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.server import ServerSettings

from .chromium import chromium, expect, watched_pages
from .server_harness import RunningServer, fake_llm, serving
from .web_documents import documents, file, search

ADA = "# Ada Lovelace\n\nAda Lovelace wrote the first program for the Analytical Engine, in London.\n"
BABBAGE = "# Charles Babbage\n\nCharles Babbage designed the Analytical Engine. He died in Marylebone.\n"


@pytest.fixture
def base(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(tmp_path / "notes.kb", create=True, embedder="none") as opened:
        yield opened


@pytest.fixture
def server(base: KnowledgeBase) -> Iterator[RunningServer]:
    settings = ServerSettings(documents_writable=True)
    with serving(fake_llm(context=4000, kv_tokens=8000), settings, {"notes": base}) as running:
        yield running


def upload(server: RunningServer, name: str, data: str | bytes, query: str = "") -> tuple[int, Any]:
    raw = data if isinstance(data, bytes) else data.encode()
    path = f"/v1/rag/documents?name={quote(name, safe='')}{query}"
    return server.request("POST", path, raw=raw, headers={"Content-Type": "application/octet-stream"})[:2]


def ids(server: RunningServer) -> list[str]:
    return [one["id"] for one in server.get("/v1/rag/documents")[1]["data"]]


def test_documents_are_added_found_read_and_deleted(server: RunningServer):
    assert upload(server, "people/ada.md", ADA)[0] == 201
    status, body = upload(server, "people/babbage.md", BABBAGE)
    assert status == 201 and body["documents"][0]["title"] == "Charles Babbage"
    assert upload(server, "people/ada.md", ADA)[0] == 409
    assert upload(server, "people/ada.md", ADA, "&replace=true")[0] == 201
    status, found, _ = server.post("/v1/rag/search", {"query": "Who died in Marylebone?", "explain": True})
    assert status == 200
    first = found["data"][0]
    assert first["document"] == "people/babbage.md"
    assert {first["text"][a:b] for a, b in first["matches"]} == {"died", "Marylebone"}
    assert first["scores"] and all(isinstance(score, float) for score in first["scores"].values())
    path = f"/v1/rag/documents/{quote('people/babbage.md', safe='')}?chunk={first['chunk']}"
    chunks = server.get(path)[1]["chunks"]
    assert first["text"] in [chunk["text"] for chunk in chunks if chunk["span"] == first["span"]]
    graph = server.get("/v1/rag/graph?focus=" + quote("people/ada.md", safe=""))[1]
    assert graph["nodes"][0]["document"] == "people/ada.md"
    assert "Analytical Engine" in [node["label"] for node in graph["nodes"]]
    assert server.request("DELETE", "/v1/rag/documents/people%2Fbabbage.md")[0] == 200
    found = server.post("/v1/rag/search", {"query": "Who died in Marylebone?"})[1]
    assert "people/babbage.md" not in [one["document"] for one in found["data"]]
    assert ids(server) == ["people/ada.md"]


def test_a_file_of_many_documents_and_files_that_are_none(server: RunningServer):
    rows = [
        json.dumps({"id": f"../r{at}", "title": f"T{at}", "text": f"Row {at} tells of Turin."})
        for at in range(3)
    ]
    status, body = upload(server, "rows.jsonl", "\n".join([*rows, "{broken"]))
    assert status == 201
    assert body["total"] == 3 and len(body["failed"]) == 1
    found = ids(server)
    assert len(found) == 3
    # A row's id may look like a step to another document: it is one name, and only that row goes.
    assert server.request("DELETE", f"/v1/rag/documents/{quote(found[0], safe='')}")[0] == 200
    assert ids(server) == found[1:]
    for name, data in (
        ("broken.pdf", b"%PDF-1.7 nothing follows"), ("white.txt", b" \n\t\n "),
        ("binary.txt", bytes(range(256)) * 9), ("broken.docx", b"PK\x03\x04 no archive"),
        ("broken.jsonl", b"{{{{"), ("deep.json", b"[" * 100_000),
    ):  # fmt: skip
        status, body = upload(server, name, data)
        assert status == 400, (name, body)
        assert body["error"]["message"] and "llmc-upload" not in body["error"]["message"], body
    assert ids(server) == found[1:]


def test_markup_in_documents_is_text(server: RunningServer):
    page = "<title>Page</title><body><script>alert(1)</script><p>Tower <b>bridge</b> &lt;script&gt;</p>"
    assert upload(server, "page.html", page)[0] == 201
    found = server.post("/v1/rag/search", {"query": "tower bridge"})[1]["data"][0]
    assert "alert" not in found["text"] and "<script>" in found["text"]


def test_reading_goes_on_while_documents_come(server: RunningServer):
    assert upload(server, "ada.md", ADA)[0] == 201
    wrong: list[Any] = []

    def ask() -> None:
        for _ in range(10):
            status, body, _ = server.post("/v1/rag/search", {"query": "Who wrote the first program?"})
            if status != 200 or "ada.md" not in [one["document"] for one in body["data"]]:
                wrong.append(body)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for at in range(10):
        assert upload(server, f"more/{at}.txt", f"Number {at}\n\nNothing of it matters.")[0] == 201
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(ids(server)) == 11


def test_an_answer_from_real_passages(server: RunningServer):
    upload(server, "ada.md", ADA)
    body = {"question": "Who wrote the first program?", "max_tokens": 8}
    status, found, _ = server.post("/v1/rag/answer", body)
    assert status == 200, found
    assert found["passages"][0]["document"] == "ada.md"
    assert found["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_the_page_on_real_documents(server: RunningServer):
    with chromium() as browser, watched_pages(browser, server.url) as open_page:
        page = open_page(reduced_motion="reduce")
        documents(page, "files")
        page.set_input_files(
            "#file-input", [file("ada.md", ADA), file("babbage.md", BABBAGE), file("x.pdf", "%PDF")]
        )
        expect(page.locator(".upload.failed")).to_have_count(1)
        expect(page.locator(".file-name")).to_have_text(["Ada Lovelace", "Charles Babbage"])
        page.click("#tab-search")
        search(page, "Who designed engines?")
        page.locator(".passage", has_text="Babbage designed").locator("button", has_text="Open").click()
        expect(page.locator("#reader .cited")).to_contain_text(
            "Charles Babbage designed the Analytical Engine."
        )
        page.keyboard.press("Escape")
        page.click("#tab-graph")
        expect(page.locator("#picture .node.document")).to_have_count(2)
        page.fill("#graph-form input", "Analytical Engine")
        page.click("#graph-form [type=submit]")
        expect(page.locator("#graph-list h3")).to_have_text("Analytical Engine")
        expect(page.locator(".neighbour")).to_have_count(2)


# llmc serve ----------------------------------------------------------------------------------------------


def test_names_of_knowledge_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert _named_documents(("notes.kb", "a=other.kb", "folder/", "b=postgresql://h/db?a=b")) == {
        "notes": "notes.kb", "a": "other.kb", "folder": "folder/", "b": "postgresql://h/db?a=b",
    }  # fmt: skip
    assert _named_documents(("postgresql://host/papers?sslmode=require",)) == {
        "papers": "postgresql://host/papers?sslmode=require"
    }
    with pytest.raises(InputError, match="llmc rag index"):
        _open("none.kb")
    for given in (("notes.kb", "x/notes.kb"), ("=x",), ("x=",)):
        with pytest.raises(InputError):
            _named_documents(given)


@pytest.mark.parametrize(
    ("given", "writable"),
    [
        ({}, True),
        ({"host": "0.0.0.0"}, False),
        ({"allowed_host": ("chat.example",)}, False),  # a proxy, with others behind it
        ({"allowed_host": ("LOCALHOST",)}, True),
        ({"cors_origin": ("https://a.example",)}, False),
        ({"host": "0.0.0.0", "documents_writable": True}, True),
        ({"documents_writable": False}, False),
    ],
)
def test_who_may_change_documents(given: dict[str, Any], writable: bool):
    options: dict[str, Any] = {
        "api_key": (), "allowed_host": (), "cors_origin": (), "host": "127.0.0.1", "max_body": 1 << 20,
        "request_timeout": 1.0, "drain_timeout": 1.0, "no_page": False, "documents_writable": None,
        "max_upload": 1 << 20, "allow_adapter_updates": None, "max_adapters": 64,
    }  # fmt: skip
    assert _settings({**options, **given}).documents_writable is writable
