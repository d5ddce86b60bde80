"""What a server must survive: bad bodies, full queues, clients that leave, deadlines, faults, SIGTERM."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmc.runtime.server import ServerSettings

from .server_harness import GatedExecutor, RunningServer, fake_llm, serving, wait_until

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


def _gate(server: RunningServer) -> threading.Event:
    executor = server.models["tiny"].executor
    assert isinstance(executor, GatedExecutor)
    return executor.gate


# Bad bodies ----------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": -1}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, None),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"stop": 7}, "stop"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, None),
    ({"frequency_penalty": 5}, "frequency_penalty"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"functions": []}, "functions"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"model": 3}, "model"),
    ({"tools": [{"type": "function"}]}, None),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, None),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools[1].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, None),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, None),
    ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, None),
    ({"structured_outputs": {"grammar": "start: ("}}, None),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[json.dumps(change)[:60] for change, _ in BAD])
def test_a_bad_body_is_refused_naming_the_field(
    server: RunningServer, change: dict[str, Any], param: str | None
):
    status, answer, _ = server.post(CHAT, {"messages": HELLO, "max_tokens": 2, **change})
    assert status == 400, answer
    error = answer["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"] and error["code"]
    if param is not None:
        assert error["param"] == param, error
    assert server.idle()


RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 10_000 + b"}",
    b"[" * 60_000,
    b'{"a":' * 60_000,
    b'{"messages": [{"role": "user", "content": ' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
]


@pytest.mark.parametrize("raw", RAW, ids=[repr(raw[:30]) for raw in RAW])
def test_bodies_that_are_no_json_object_are_refused(server: RunningServer, raw: bytes):
    status, answer, _ = server.request("POST", CHAT, raw=raw)
    assert status == 400, answer
    assert answer["error"]["param"]
    assert server.idle()


def test_bodies_that_are_too_large(server: RunningServer):
    with serving(settings=ServerSettings(max_body_bytes=2000)) as small:
        status, answer, _ = small.post(CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")
        chunks = b"".join(b"3e8\r\n" + b"x" * 1000 + b"\r\n" for _ in range(5))
        with socket.create_connection(("127.0.0.1", small.port), timeout=10) as raw:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            raw.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]


def test_paths_and_methods_that_are_not_there(server: RunningServer):
    assert server.get("/v1/nothing")[1]["error"]["code"] == "not_found"
    status, answer, _ = server.get(CHAT)
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    status, answer, _ = server.post(CHAT, {"model": "gpt-5", "messages": HELLO})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "tiny" in answer["error"]["message"]
    assert server.post("/v1/embeddings", {"input": "x"})[0] == 400
    assert server.get("/v1/responses/resp_1")[0] == 404


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
_FIELDS = (
    "model", "stream", "n", "temperature", "top_p", "stop", "presence_penalty", "frequency_penalty",
    "logit_bias", "seed", "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "messages",
    "max_tokens", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
    "parallel_tool_calls", "chat_template_kwargs", "structured_outputs", "stream_options",
    "truncate_prompt_tokens",
)  # fmt: skip


@pytest.mark.slow
def test_a_thousand_bad_bodies_beside_a_good_stream(server: RunningServer):
    """Only 4xx (or, by luck, 200), each with its cause; the stream's text is what it would be alone."""
    good = {"messages": HELLO, "max_tokens": 300, "stream": True}
    alone = server.models["tiny"].generate(HELLO, max_tokens=300).text
    found: list[str] = []
    ended = threading.Event()

    def stream() -> None:
        while not ended.is_set():
            _, text, _ = server.post(CHAT, good)
            events = [
                json.loads(e.removeprefix("data: ")) for e in text.split("\n\n") if e.startswith("data: {")
            ]
            found.append("".join(e["choices"][0]["delta"].get("content", "") for e in events))

    thread = threading.Thread(target=stream)
    thread.start()
    seen: set[int] = set()

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(_FIELDS), _json, min_size=1, max_size=3))
    def bad(change: dict[str, Any]) -> None:
        body = {"messages": HELLO, "max_tokens": 2, **change}
        status, answer, _ = server.post(CHAT, body)
        seen.add(status)
        assert status in (200, 400, 404), (body, answer)
        if status != 200:
            assert answer["error"]["message"] and "internal" not in answer["error"]["message"]

    try:
        bad()
    finally:
        ended.set()
        thread.join()
    assert 400 in seen
    assert found and set(found) == {alone}
    wait_until(server.idle)


# Clients that leave ---------------------------------------------------------------------------------------


def test_disconnects_in_every_phase_free_all_pages_and_leave_neighbours_alone():
    llm = fake_llm(max_sequences=4, max_batch_tokens=16, kv_tokens=1600)
    rng = random.Random(1)
    with serving(llm) as server:
        expected = llm.generate(HELLO, max_tokens=200).text
        for round_number in range(50):
            gate = _gate(server)
            gate.clear()
            connections = []
            for number in range(10):  # 4 run, 6 wait; prompts of several chunks are in their prefill
                body: dict[str, Any] = {
                    "messages": [{"role": "user", "content": "y" * rng.randrange(1, 100) + str(number)}],
                    "max_tokens": 100,
                    "stream": bool(number % 2),
                    "n": 1 + number % 2,
                }
                connections.append(server.open_raw(CHAT, body))
            if round_number % 3:
                gate.set()
                time.sleep(rng.random() * 0.02)
            rng.shuffle(connections)
            for connection in connections:
                connection.close()
            gate.set()
            if round_number % 10 == 0:
                _, answer, _ = server.post(CHAT, {"messages": HELLO, "max_tokens": 200})
                assert answer["choices"][0]["message"]["content"] == expected
        wait_until(server.idle)
        wait_until(lambda: server.service.active == 0)
        text = server.get("/metrics")[1]
        assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"}' in text


# Backpressure ---------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back():
    with serving(fake_llm(max_sequences=2, max_waiting=3)) as server:
        _gate(server).clear()
        body = {"messages": HELLO, "max_tokens": 5}
        waiting = [server.open_raw(CHAT, body) for _ in range(3)]
        engine = server.models["tiny"].engine
        wait_until(lambda: engine.num_unfinished == 3)
        status, answer, headers = server.post(CHAT, body)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        status, answer, _ = server.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2})
        assert status == 429
        assert server.get("/health")[0] == 200
        _gate(server).set()
        for connection in waiting:
            assert b"200" in connection.recv(4096)
            connection.close()
        wait_until(server.idle)
        assert server.post(CHAT, body)[0] == 200


def test_a_request_that_takes_too_long_ends_and_frees_its_pages():
    with serving(settings=ServerSettings(request_seconds=0.2)) as server:
        _gate(server).clear()
        status, answer, _ = server.post(CHAT, {"messages": HELLO, "max_tokens": 5})
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        status, text, _ = server.post(CHAT, {"messages": HELLO, "max_tokens": 5, "stream": True})
        assert status == 200 and '"code":"deadline_exceeded"' in text and "[DONE]" not in text
        _gate(server).set()
        wait_until(server.idle)


def test_a_step_that_fails_ends_its_requests_and_not_the_server(server: RunningServer):
    executor = server.models["tiny"].executor
    assert isinstance(executor, GatedExecutor)
    executor.fail_next = RuntimeError("a kernel broke")
    status, answer, _ = server.post(CHAT, {"messages": HELLO, "max_tokens": 5})
    assert (status, answer["error"]["code"]) == (500, "engine_error")
    assert server.post(CHAT, {"messages": HELLO, "max_tokens": 5})[0] == 200
    assert server.get("/health")[0] == 200


def test_an_engine_that_is_gone_is_not_healthy():
    llm = fake_llm()
    with serving(llm) as server:
        llm.close()
        assert server.get("/health")[:2] == (503, {"status": "failed", "models": ["tiny"]})
        assert server.post(CHAT, {"messages": HELLO, "max_tokens": 5})[0] == 500


def test_going_down_finishes_what_runs_and_refuses_what_is_new():
    with serving() as server:
        _gate(server).clear()
        body = {"messages": HELLO, "max_tokens": 20}
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(server.post(CHAT, body)))
        thread.start()
        wait_until(lambda: server.service.active == 1)
        server.terminate()
        wait_until(lambda: server.service.draining)
        status, answer, headers = server.post(CHAT, body)
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert headers["retry-after"]
        assert server.get("/health")[0] == 200
        assert server.get("/ready")[0] == 503
        _gate(server).set()
        thread.join(20)
        assert answers[0][0] == 200
        assert answers[0][1]["choices"][0]["finish_reason"] == "length"
        server.join()
