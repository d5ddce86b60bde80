"""/v1/rag/documents over HTTP: documents that come and go, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote

import pytest
from llmc.runtime.rag.store import BusyError
from llmc.runtime.server import ServerSettings

from .fake_knowledge import FakeKnowledge
from .rag_server_harness import ADA, BABBAGE, WRITABLE, ids, upload
from .server_harness import RunningServer, fake_llm, serving


@pytest.fixture
def base() -> FakeKnowledge:
    return FakeKnowledge(ada=ADA, babbage=BABBAGE)


@pytest.fixture
def server(base: FakeKnowledge) -> Iterator[RunningServer]:
    with serving(fake_llm(context=4000, kv_tokens=8000), WRITABLE, {"notes": base}) as running:
        yield running


def test_a_document_comes_and_goes(server: RunningServer):
    status, body = upload(server, "sub/sea.md", b"# Sea\n\nThe sea is deep.")
    assert status == 201, body
    assert [one["id"] for one in body["documents"]] == ["sub/sea.md"]
    assert ids(server) == ["ada.txt", "babbage.txt", "sub/sea.md"]
    assert server.post("/v1/rag/search", {"query": "deep"})[1]["data"][0]["document"] == "sub/sea.md"
    status, body, _ = server.request("DELETE", f"/v1/rag/documents/{quote('sub/sea.md', safe='')}")
    assert (status, body["deleted"]) == (200, True)
    assert ids(server) == ["ada.txt", "babbage.txt"]
    assert server.request("DELETE", "/v1/rag/documents/sub/sea.md")[0] == 404
    assert server.post("/v1/rag/search", {"query": "deep"})[1]["data"] == []


def test_deleting_takes_one_document_and_never_a_folder(server: RunningServer, base: FakeKnowledge):
    base.store.put("ada.txt/x", b"# inner")
    for id in ("ada.txt/", "", "/", "*", "ada", "%", "ada.txt%00"):
        assert server.request("DELETE", f"/v1/rag/documents/{quote(id, safe='')}")[0] == 404, id
    assert len(base.store.kept) == 3


def test_a_name_that_is_taken_is_not_written_over_unasked(server: RunningServer, base: FakeKnowledge):
    status, body = upload(server, "ada.txt", b"# Other")
    assert (status, body["error"]["code"]) == (409, "document_exists")
    assert base.store.kept["ada.txt"][0].title == "Ada"
    assert upload(server, "ada.txt", b"\xff\xfe\x81", "&replace=true")[0] == 400
    assert base.store.kept["ada.txt"][0].title == "Ada"
    assert upload(server, "ada.txt", b"# Other", "&replace=true")[0] == 201
    assert base.store.kept["ada.txt"][0].title == "Other"


def test_a_write_while_another_program_writes_may_be_tried_again(server: RunningServer, base: FakeKnowledge):
    def busy(*_: Any) -> Any:
        raise BusyError("/secret/place.kb: is being written by process 4711", remedy="wait")

    base.add_bytes = base.delete_document = busy  # type: ignore[method-assign]
    for method, path in (("POST", "/v1/rag/documents?name=new.txt"), ("DELETE", "/v1/rag/documents/ada.txt")):
        status, body, headers = server.request(
            method, path, raw=b"# New", headers={"Content-Type": "application/octet-stream"}
        )
        assert (status, body["error"]["code"]) == (409, "documents_busy")
        assert int(headers["retry-after"]) > 0
        assert "secret" not in json.dumps(body) and "4711" not in json.dumps(body)


@pytest.mark.parametrize(
    "name",
    [
        "../x.txt", "a/../../x.txt", "..\\x.txt", "/etc/x.txt", "C:\\x.txt", "a//x.txt", "./x.txt",
        "a/./x.txt", "x\0.txt", "x\n.txt", "x\u2028.txt", ".hidden.txt", ".ssh/x.txt", "a/.git/x.txt", "",
        " ", "a" * 300 + ".txt", "a/" * 3000 + "x.txt", "..", "%2e%2e/../x.txt",
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(server: RunningServer, base: FakeKnowledge, name: str):
    status, body = upload(server, name, b"text")
    assert status in (400, 415), body
    assert body["error"]["param"] == "name"
    assert len(base.store.kept) == 2


def test_what_is_no_document_is_refused(server: RunningServer, base: FakeKnowledge):
    assert upload(server, "x.exe", b"MZ")[0] == 415
    assert upload(server, "noending", b"x")[0] == 415
    status, body = upload(server, "x.txt", b"")
    assert (status, body["error"]["code"]) == (400, "empty_body")
    status, body = upload(server, "x.txt", b"\xff\xfe\x00\x81")
    assert (status, body["error"]["code"]) == (400, "unreadable_document")
    assert body["error"]["message"] == "is not text"
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x.txt"\r\n\r\nx\r\n--x--\r\n'
    status, body = upload(server, "x.txt", form, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status == 415 and "?name=" in body["error"]["message"]
    assert server.request("POST", "/v1/rag/documents", raw=b"x")[1]["error"]["param"] == "name"
    assert len(base.store.kept) == 2


def test_uploads_have_a_limit_of_their_own(server: RunningServer, base: FakeKnowledge):
    status, body = upload(server, "big.txt", b"x" * 20_001)
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    assert upload(server, "big.txt", b"x" * 20_000)[0] == 201
    # Without Content-Length: it is counted as it comes.
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/rag/documents?name=c.txt", iter([b"y" * 15_000] * 3), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert set(base.store.kept) == {"ada.txt", "babbage.txt", "big.txt"}


def test_reading_only_is_the_default(base: FakeKnowledge):
    with serving(None, ServerSettings(), {"notes": base}) as server:
        assert server.get("/v1/rag/knowledge")[1]["writable"] is False
        status, body = upload(server, "x.txt", b"text")
        assert (status, body["error"]["code"]) == (403, "read_only")
        assert server.request("DELETE", "/v1/rag/documents/ada.txt")[0] == 403
        assert server.post("/v1/rag/search", {"query": "Ada"})[0] == 200
    assert len(base.store.kept) == 2


def test_keys_and_origins_hold_for_documents_too(base: FakeKnowledge):
    settings = ServerSettings(documents_writable=True, api_keys=("secret",))
    with serving(None, settings, {"notes": base}) as server:
        for method, path in (
            ("GET", "/v1/rag/knowledge"), ("GET", "/v1/rag/documents"), ("GET", "/v1/rag/documents/ada.txt"),
            ("DELETE", "/v1/rag/documents/ada.txt"), ("POST", "/v1/rag/documents?name=x.txt"),
            ("POST", "/v1/rag/search"), ("POST", "/v1/rag/answer"), ("GET", "/v1/rag/graph"),
        ):  # fmt: skip
            assert server.request(method, path)[0] == 401, path
        key = {"Authorization": "Bearer secret"}
        assert upload(server, "x.txt", b"text", Origin="https://evil.example", **key)[0] == 403
        assert upload(server, "x.txt", b"text", **key)[0] == 201
