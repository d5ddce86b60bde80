"""/v1/rag/… over HTTP: documents that come and go, searching, answers, and what a server must survive."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.rag import answer as answering
from llmc.runtime.rag.answer import Answer, Citation, Said, Searched, Step
from llmc.runtime.server import ServerSettings
from llmc.runtime.server.rag_wire import matches

from .fake_knowledge import FakeKnowledge
from .rag_server_harness import ADA, BABBAGE, WRITABLE, upload
from .server_harness import RunningServer, fake_llm, serving, wait_until


@pytest.fixture
def base() -> FakeKnowledge:
    return FakeKnowledge(ada=ADA, babbage=BABBAGE)


@pytest.fixture
def server(base: FakeKnowledge) -> Iterator[RunningServer]:
    with serving(fake_llm(context=4000, kv_tokens=8000), WRITABLE, {"notes": base}) as running:
        yield running


# Reading --------------------------------------------------------------------------------------------------


def test_knowledge_tells_what_there_is_and_not_where(server: RunningServer):
    status, body, _ = server.get("/v1/rag/knowledge")
    assert status == 200
    assert [one["id"] for one in body["data"]] == ["notes"]
    assert body["data"][0]["documents"] == 2
    assert body["data"][0]["stats"]["bytes"] == 1234
    assert body["writable"] is True and body["max_upload_bytes"] == 20_000
    assert "secret" not in json.dumps(body)


def test_documents_come_in_pages(server: RunningServer):
    status, body, _ = server.get("/v1/rag/documents?limit=1")
    assert status == 200
    assert [one["id"] for one in body["data"]] == ["ada.txt"]
    assert (body["has_more"], body["total"]) == (True, 2)
    assert body["data"][0]["bytes"] == len(ADA) and body["data"][0]["modified"] == 1_700_000_000
    body = server.get("/v1/rag/documents?limit=1&after=ada.txt")[1]
    assert [one["id"] for one in body["data"]] == ["babbage.txt"]
    assert body["has_more"] is False


def test_a_document_is_its_text_with_spans(server: RunningServer):
    status, body, _ = server.get("/v1/rag/documents/ada.txt")
    assert status == 200
    assert [chunk["ordinal"] for chunk in body["chunks"]] == [0, 1, 2]
    for chunk in body["chunks"]:
        start, end = chunk["span"]
        assert ADA[start:end] == chunk["text"]
    assert body["has_more"] is False


def test_a_document_opens_around_a_chunk(server: RunningServer, base: FakeKnowledge):
    base.store.put("long.txt", "\n\n".join(f"Part {at}" for at in range(100)).encode())
    chunk = base.store.kept["long.txt"][1][50].id
    body = server.get(f"/v1/rag/documents/long.txt?chunk={chunk}&limit=9")[1]
    assert body["first"] == 47 and body["has_more"] is True
    assert [one["ordinal"] for one in body["chunks"]] == list(range(47, 56))
    body = server.get("/v1/rag/documents/long.txt?first=95&limit=9")[1]
    assert [one["text"] for one in body["chunks"]] == [f"Part {at}" for at in range(95, 100)]
    assert server.get("/v1/rag/documents/ada.txt?chunk=" + chunk)[1]["first"] == 0  # another's chunk


def test_what_is_not_there_is_said(server: RunningServer):
    for path in ("/v1/rag/documents/none.txt", "/v1/rag/documents/", "/v1/rag/documents/..%2Fada.txt"):
        status, body, _ = server.get(path)
        assert status == 404, path
        assert body["error"]["code"] in ("document_not_found", "not_found")
    status, body, _ = server.get("/v1/rag/documents?knowledge=other")
    assert (status, body["error"]["param"]) == (404, "knowledge")
    assert "notes" in body["error"]["message"]
    for query in ("limit=0", "limit=x", "limit=100000", "after=" + "a" * 10_000):
        assert server.get(f"/v1/rag/documents?{query}")[0] == 400, query


def test_a_server_without_documents_says_so():
    with serving() as server:
        assert server.get("/v1/rag/knowledge")[1]["data"] == []
        status, body, _ = server.post("/v1/rag/search", {"query": "x"})
        assert (status, body["error"]["code"]) == (404, "no_documents")


def test_of_several_one_is_named(base: FakeKnowledge):
    other = FakeKnowledge(sea="# Sea\n\nThe sea is deep.")
    with serving(None, WRITABLE, {"notes": base, "other": other}) as server:
        status, body, _ = server.post("/v1/rag/search", {"query": "sea"})
        assert (status, body["error"]["param"]) == (400, "knowledge")
        found = server.post("/v1/rag/search", {"query": "sea", "knowledge": "other"})[1]
        assert [one["document"] for one in found["data"]] == ["sea.txt", "sea.txt"]
        assert server.get("/v1/rag/documents?knowledge=other")[1]["total"] == 1


# Searching ------------------------------------------------------------------------------------------------


def test_search_gives_passages_with_their_places(server: RunningServer, base: FakeKnowledge):
    body = {
        "query": "who designed the Engine?",
        "top": 2,
        "mode": "keyword",
        "explain": True,
        "per_document": 3,
    }
    status, found, _ = server.post("/v1/rag/search", body)
    assert status == 200
    first = found["data"][0]
    assert first["document"] == "babbage.txt"
    start, end = first["span"]
    assert BABBAGE[start:end] == first["text"]
    assert [first["text"][a:b] for a, b in first["matches"]] == ["designed", "Engine"]
    assert first["scores"] == {"bm25": 3.0}
    asked = {
        "question": "who designed the Engine?",
        "top": 2,
        "mode": "keyword",
        "per_document": 3,
        "explain": True,
    }
    assert base.searches == [asked]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "query"),
        ({"query": ""}, "query"),
        ({"query": "   "}, None),
        ({"query": "x" * 100_000}, "query"),
        ({"query": 5}, "query"),
        ({"query": "x", "top": 0}, "top"),
        ({"query": "x", "top": 10**9}, "top"),
        ({"query": "x", "top": True}, "top"),
        ({"query": "x", "mode": "magic"}, "mode"),
        ({"query": "x", "per_document": -1}, "per_document"),
        ({"query": "x", "more": 1}, "more"),
        ([], "body"),
    ],
)
def test_bad_searches_are_refused_by_name(server: RunningServer, body: Any, param: str | None):
    status, answer, _ = server.post("/v1/rag/search", body)
    assert status == 400
    assert answer["error"]["param"] == param


def test_words_of_a_question_are_found_in_their_forms():
    def found(question: str, text: str) -> list[str]:
        return [text[a:b] for a, b in matches(question, text)]

    assert found("Which films did she direct?", "She directed a film; directing films.") == [
        "directed", "film", "directing", "films",
    ]  # fmt: skip
    assert found("Zoë's café", "ZOE went to the Café") == ["ZOE", "Café"]
    assert found("what is the", "what is the") == []
    assert found("東京タワー", "私は東京に住む") == ["東京"]
    assert found("😀 tower", "😀😀 the Tower") == ["Tower"]
    assert len(matches("a1", "a1 " * 10_000)) == 500


# Answers --------------------------------------------------------------------------------------------------


def scripted(
    monkeypatch: pytest.MonkeyPatch, text: str = "It was Babbage [1].", gate: threading.Event | None = None
):
    """Puts a script in the model's place, which searches as it does. Returns what happened to the scripts."""
    closed: list[str] = []

    def stream_answer(kb: Any, llm: Any, question: str, **options: Any):
        answering.checked_question(question)

        def events():
            try:
                passages = tuple(
                    kb.search(question, top=options["top"], mode=options["mode"], per_document=1)
                )
                yield Searched(question, passages)
                for word in ("It ", "was ", "Babbage [9]."):
                    assert gate is None or gate.wait(30)
                    yield Said(word)
                first = passages[0]
                start = first.text.index("Charles")
                place = (first.start + start, first.start + start + 15)
                cited = Citation(1, first, first.text[start : start + 15], *place)
                steps = (Step(question, tuple(p.chunk for p in passages)),)
                yield Answer(
                    text,
                    (cited,),
                    passages,
                    True,
                    True,
                    steps,
                    ("[9]: there is no document 9",),
                    50,
                    7,
                    "stop",
                )
            except GeneratorExit:
                closed.append(question)
                raise

        return events()

    monkeypatch.setattr(answering, "stream_answer", stream_answer)
    return closed


QUESTION = {"question": "Who designed the Engine in London?", "top": 3}


def test_an_answer_cites_places_of_documents(server: RunningServer, monkeypatch: pytest.MonkeyPatch):
    scripted(monkeypatch)
    status, body, _ = server.post("/v1/rag/answer", QUESTION)
    assert status == 200
    assert body["object"] == "rag.answer"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "It was Babbage [1]."}
    cited = body["citations"][0]
    start, end = cited["span"]
    assert BABBAGE[start:end] == cited["quote"] == "Charles Babbage"
    assert (cited["number"], cited["document"]) == (1, "babbage.txt")
    assert [one["number"] for one in body["passages"]] == [1, 2, 3]
    assert body["passages"][0]["chunk"] == cited["chunk"]
    assert (body["found"], body["supported"], body["removed"]) == (
        True,
        True,
        ["[9]: there is no document 9"],
    )
    assert body["usage"] == {"prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57}
    assert body["searches"] == [QUESTION["question"]]


def stream_of(server: RunningServer, body: Any) -> list[Any]:
    status, text, headers = server.post("/v1/rag/answer", {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" or "error" in lines[-1]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_an_answer_streams_passages_then_text_then_citations(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
):
    scripted(monkeypatch)
    events = stream_of(server, QUESTION)
    assert events[0]["passages"][0]["document"] == "babbage.txt"
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert said == "It was Babbage [9]."
    last = events[-1]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["content"] == "It was Babbage [1]."
    assert last["citations"][0]["quote"] == "Charles Babbage"
    assert last["usage"]["completion_tokens"] == 7
    assert {event["object"] for event in events} == {"rag.answer.chunk"}
    assert len({event["id"] for event in events}) == 1


def test_an_answer_by_the_model_itself(server: RunningServer):
    status, body, _ = server.post("/v1/rag/answer", {**QUESTION, "max_tokens": 8})
    assert status == 200, body
    assert body["usage"]["completion_tokens"] <= 8
    assert isinstance(body["choices"][0]["message"]["content"], str)
    assert len(body["passages"]) >= 1
    wait_until(server.idle)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "question"), ({"question": ""}, "question"), ({"question": "x" * 30_000}, "question"),
        ({"question": "x", "model": "none"}, "model"), ({"question": "x", "knowledge": "none"}, "knowledge"),
        ({"question": "x", "max_tokens": 0}, "max_tokens"), ({"question": "x", "top": 1000}, "top"),
        ({"question": " "}, None), ({"question": "x", "max_tokens": 4096}, None),
        ({"question": "x", "messages": []}, "messages"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_questions_are_refused_before_anything_runs(
    server: RunningServer, base: FakeKnowledge, body: Any, param: str | None, stream: bool
):
    status, answer, _ = server.post("/v1/rag/answer", {**body, "stream": stream})
    assert status in (400, 404)
    assert param is None or answer["error"]["param"] == param
    assert base.searches == []


def test_errors_of_a_store_do_not_tell_where_it_lies(server: RunningServer, base: FakeKnowledge):
    def search(*_: Any, **__: Any):
        place = base.store.location
        raise InputError(f"{place}: is of another version", remedy=f"renew it: llmc rag sync {place}")

    base.search = search
    status, body, _ = server.post("/v1/rag/search", {"query": "London"})
    assert (status, body["error"]["code"]) == (400, "invalid_value")
    assert body["error"]["message"] == "notes: is of another version; renew it: llmc rag sync notes"
    assert stream_of(server, QUESTION)[-1]["error"]["message"] == body["error"]["message"]


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(server: RunningServer, base: FakeKnowledge):
    def search(*_: Any, **__: Any):
        raise RuntimeError("secret path /tmp/x")

    base.search = search
    events = stream_of(server, QUESTION)
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)


def test_a_client_that_leaves_ends_its_answer(server: RunningServer, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    closed = scripted(monkeypatch, gate=gate)
    connection = server.open_raw("/v1/rag/answer", {**QUESTION, "stream": True}, read_until=b"passages")
    connection.close()
    wait_until(lambda: server.service.active == 0)
    gate.set()
    wait_until(lambda: closed == [QUESTION["question"]])


def test_a_client_that_leaves_before_its_turn_changes_nothing(server: RunningServer, base: FakeKnowledge):
    base.gate.clear()
    first = threading.Thread(target=upload, args=(server, "one.txt", b"first"))
    first.start()
    assert base.began.wait(20)
    data = b"POST /v1/rag/documents?name=two.txt HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\n\r\nsecond"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(data)
    wait_until(lambda: server.service.active == 2)
    connection.close()
    wait_until(lambda: server.service.active == 1)
    base.gate.set()
    first.join(20)
    assert upload(server, "three.txt", b"third")[0] == 201  # written after the second's turn
    assert set(base.store.kept) == {"ada.txt", "babbage.txt", "one.txt", "three.txt"}


def test_too_many_that_wait_are_refused_and_reading_goes_on(server: RunningServer, base: FakeKnowledge):
    base.gate.clear()
    statuses: list[int] = []

    def search() -> None:
        statuses.append(server.post("/v1/rag/search", {"query": "Ada"})[0])

    threads = [threading.Thread(target=search) for _ in range(70)]
    for thread in threads:
        thread.start()
    wait_until(lambda: 429 in statuses)
    assert server.get("/health")[0] == 200
    base.gate.set()
    for thread in threads:
        thread.join(30)
    assert set(statuses) == {200, 429}
    assert server.get("/v1/rag/documents")[0] == 200


def test_a_deadline_ends_a_search():
    base = FakeKnowledge(ada=ADA)
    with serving(None, ServerSettings(request_seconds=0.2), {"notes": base}) as server:
        base.gate.clear()
        status, body, _ = server.post("/v1/rag/search", {"query": "Ada"})
        base.gate.set()
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


# The graph ------------------------------------------------------------------------------------------------


def test_the_graph_around_a_node(server: RunningServer):
    body = server.get("/v1/rag/graph")[1]
    assert {"d:ada.txt", "d:babbage.txt", "e:london"} <= {node["id"] for node in body["nodes"]}
    body = server.get("/v1/rag/graph?focus=e%3Alondon")[1]
    assert {(edge["source"], edge["target"]) for edge in body["edges"]} == {
        ("d:ada.txt", "e:london"), ("d:babbage.txt", "e:london"),
    }  # fmt: skip
    assert {node["kind"] for node in body["nodes"]} == {"document", "entity"}
    assert len(server.get("/v1/rag/graph?limit=3")[1]["nodes"]) == 3
    known = {node["id"] for node in body["nodes"]}
    assert all(edge["source"] in known and edge["target"] in known for edge in body["edges"])
    assert server.get("/v1/rag/graph?focus=nobody")[0] == 404
    assert server.get("/v1/rag/graph?limit=1000")[0] == 400
