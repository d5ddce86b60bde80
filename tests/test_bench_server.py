"""`llmc bench --server` against a scripted server: counts, failures, lengths, what the command says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.cli.load import overhead, plot, session
from llmc.cli.load.connection import RequestFailed
from llmc.cli.load.http import Address, Client
from llmc.cli.load.prompts import WORDS
from llmc.cli.load.session import Load
from llmc.cli.main import main
from llmc.ir.errors import InputError, LlmcError

# A scripted server ------------------------------------------------------------------------------------------


@dataclass
class Script:
    """What a fake server does: request number i does `faults.get(i)`, counted without the short ones that ask
    for one token and no stream.
    """

    faults: dict[int, str] = field(default_factory=dict)
    key: str | None = None
    tokenize: str | None = None  # "vllm", "llama.cpp" or None
    usage: bool = True
    overhead: int = 7
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gone: int = 0
    polls: int = 0

    def app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.routing import Route

        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
                Route("/v1/completions", self.answer, methods=["POST"]),
                Route("/tokenize", self.tokens, methods=["POST"]),
                Route("/health", self.health),
            ]
        )

    async def models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        self.keys.append(request.headers.get("authorization"))
        if self.key is not None and self.keys[-1] != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": "fake"}]})

    async def health(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        self.polls += 1
        return JSONResponse({})

    async def tokens(self, request: Any) -> Any:
        """Every word is a token, but "about" is two, and the ids say which word it was."""
        from starlette.responses import JSONResponse

        text = (await request.json()).get({"vllm": "prompt", "llama.cpp": "content"}.get(self.tokenize or ""))
        if text is None:
            return JSONResponse({"error": "no"}, 404 if self.tokenize is None else 400)
        found = [index for word in text.split() for index in self._word(word)]
        return JSONResponse({"tokens": found})

    @staticmethod
    def _word(word: str) -> list[int]:
        return [1000, 1001] if word == "before" else [WORDS.index(word)]

    async def answer(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        body = await request.json()
        if not body.get("stream"):
            used = {"prompt_tokens": self.count(body), "completion_tokens": 1}
            return JSONResponse({"choices": [], **({"usage": used} if self.usage else {})})
        fault = self.faults.get(len(self.bodies), "")
        self.bodies.append(body)
        if fault.startswith("http_"):
            error = {"error": {"message": f"refused with {fault}"}}
            return JSONResponse(error, int(fault.removeprefix("http_")))
        return StreamingResponse(self.stream(body, fault), media_type="text/event-stream")

    def count(self, body: dict[str, Any]) -> int:
        """Tokens of a prompt: ids, or words ("before" is two) and what the template adds."""
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return len(prompt)
        if prompt is None:
            prompt = body["messages"][0]["content"]
            return self.overhead + sum(len(self._word(word)) for word in prompt.split())
        return sum(len(self._word(word)) for word in prompt.split())

    async def stream(self, body: dict[str, Any], fault: str) -> Any:
        try:
            if fault == "hang":
                await asyncio.sleep(60)
            if "messages" in body:
                yield _chunk(body, None)
            for index in range(0 if fault == "silent" else body["max_tokens"]):
                if index == 2 and fault:
                    if fault == "broken":
                        raise ConnectionAbortedError
                    yield _FAULTS[fault]
                    return
                yield _chunk(body, f"w{index} ")
                await asyncio.sleep(0)
            yield _chunk(body, "", finish_reason="length")
            if self.usage and fault != "silent":
                used = {"prompt_tokens": self.count(body), "completion_tokens": body["max_tokens"]}
                yield _event({"choices": [], "usage": used})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _chunk(body: dict[str, Any], text: str | None, **more: Any) -> bytes:
    """A piece of an answer; None opens a message."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": None, **more}
    if "messages" not in body:
        choice["text"] = text
    elif text is None:
        choice["delta"] = {"role": "assistant", "content": ""}
    else:
        choice["delta"] = {"content": text} if text else {}
    return _event({"choices": [choice]})


_FAULTS = {
    "error_event": _event({"error": {"message": "out of pages", "code": 500}}),
    "garbage": b"data: {not json\n\n",
    "cut": b": the end\n\n",
}


@dataclass(frozen=True)
class Running:
    url: str
    script: Script


@pytest.fixture
def scripted() -> Iterator[Any]:
    import uvicorn

    stack: list[tuple[Any, threading.Thread]] = []

    def start(**options: Any) -> Running:
        script = Script(**options)
        config = uvicorn.Config(
            script.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        # asyncio switches Nagle's algorithm off only where a socket's protocol is named.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        stack.append((server, thread))
        return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", script)

    yield start
    for server, thread in stack:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def _quiet(*_: Any) -> None:
    pass


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("tokenize", [None, "vllm", "llama.cpp"])
def test_a_run_counts_what_the_server_did(endpoint: str, tokenize: str | None, scripted: Any) -> None:
    server = scripted(tokenize=tokenize)
    load = Load(
        server.url,
        num_requests=12,
        concurrency=3,
        prompt_tokens=50,
        output_tokens=5,
        endpoint=endpoint,
        health=True,
    )
    result, records = session.bench(load, _quiet)
    assert (result["model"], result["completed"], result["failed"]) == ("fake", 12, 0)
    assert result["total_output_tokens"] == 60 and result["other_length"] == 0
    if tokenize is not None:
        assert result["total_input_tokens"] == 600  # each prompt is as long as asked for
    else:
        # No prompt is of one word's cost: "before" is two tokens and the others one.
        assert result["total_input_tokens"] == pytest.approx(600, rel=0.05)
    assert all(len(one.chunks) == 5 for one in records), (
        "neither the opening nor the closing chunk is a token"
    )
    assert all(one.started <= one.chunks[0] <= one.chunks[-1] <= one.ended for one in records)
    assert result["max_concurrent_requests"] <= 3
    assert result["health"]["failed"] == 0 and result["health"]["polls"] >= 1
    assert server.script.polls >= result["health"]["polls"]
    sent = server.script.bodies
    assert len(sent) == 12
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in sent)
    assert isinstance(sent[0].get("prompt"), list) == (endpoint == "completions" and tokenize is not None)


def test_runs_of_one_seed_ask_the_same(scripted: Any) -> None:
    asked: list[list[str]] = []
    for seed in (1, 1, 2):
        server = scripted()
        session.bench(Load(server.url, num_requests=4, prompt_tokens=30, output_tokens=1, seed=seed), _quiet)
        asked.append(sorted(json.dumps(body) for body in server.script.bodies))
    assert asked[0] == asked[1] != asked[2]


def test_every_failure_is_counted_by_its_kind(scripted: Any) -> None:
    faults = {
        0: "http_429", 1: "http_429", 2: "http_500", 3: "error_event", 4: "garbage", 5: "cut", 6: "broken",
        7: "hang", 8: "silent",
    }  # fmt: skip
    server = scripted(faults=faults)
    load = Load(server.url, num_requests=12, concurrency=1, prompt_tokens=20, output_tokens=4, timeout=0.5)
    result, records = session.bench(load, _quiet)
    counts = {kind: what["count"] for kind, what in result["failures"].items()}
    assert counts == {
        "http_429": 2, "http_500": 1, "error_event": 1, "malformed": 1, "disconnected": 2, "timeout": 1,
    }  # fmt: skip
    assert (result["completed"], result["failed"]) == (4, 8)
    assert result["failures"]["http_429"]["example"] == "refused with http_429"
    assert result["failures"]["error_event"]["example"] == "out of pages"
    # An answer of which nothing can be shown has its one time where it ended.
    assert (len(records[8].chunks), records[8].output_tokens, records[8].counted) == (1, 1, False)
    assert result["usage_missing"] == 1 and result["other_length"] == 1


def test_a_server_that_counts_nothing(scripted: Any) -> None:
    server = scripted(usage=False)
    result, _ = session.bench(Load(server.url, num_requests=3, output_tokens=6), _quiet)
    assert (result["usage_missing"], result["total_output_tokens"], result["total_input_tokens"]) == (
        3,
        18,
        0,
    )


def test_a_trace_on_a_server(scripted: Any, tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    rows = [f"2023-11-16 18:15:{46 + second}.0,{30 + second},{2 + second}" for second in range(4)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    server = scripted(tokenize="vllm")
    load = Load(server.url, trace=path, rate=50.0, max_prompt_tokens=32, goodput={"ttft": 60_000.0})
    result, records = session.bench(load, _quiet)
    assert result["arrivals"] == {
        "kind": "trace",
        "file": "conv.csv",
        "time_scale": pytest.approx(0.02),
        "request_rate": pytest.approx(50.0),
        "clipped_prompts": 1,
    }
    assert sorted(one.prompt_tokens for one in records) == [30, 31, 32, 32]
    assert sorted(one.output_tokens for one in records) == [2, 3, 4, 5]
    assert result["good_requests"] == 4
    starts = sorted(one.scheduled for one in records)
    assert np.diff(starts) == pytest.approx([0.02] * 3)


def test_the_knee_of_a_server_that_refuses(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(session, "SHORTEST_TRIAL_SECONDS", 0.1)
    server = scripted(faults=dict.fromkeys(range(8, 100), "http_429"))
    load = Load(server.url, num_requests=8, rate=99.0, prompt_tokens=8, output_tokens=2, knee_ms=30_000.0)
    result, _ = session.bench(load, _quiet)
    found = result["knee"]
    # Not more than 8 requests in 0.1 s: a run that is shorter shows nothing.
    assert [(row["request_rate"], row["holds"]) for row in found["trials"]] == [(80.0, True)]
    assert (found["request_rate"], found["bounded"]) == (80.0, False)
    assert result["completed"] == 8
    result, records = session.bench(load, _quiet)
    assert result["knee"]["request_rate"] is None and not records
    assert [row["holds"] for row in result["knee"]["trials"]] == [False] * 7


def test_cancelled_requests_leave_the_server(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(session, "SHORTEST_TRIAL_SECONDS", 0.01)
    server = scripted(faults=dict.fromkeys(range(40), "hang"))
    load = Load(server.url, num_requests=4, rate=256.0, prompt_tokens=8, output_tokens=2, knee_ms=50.0)
    result, records = session.bench(load, _quiet)
    assert result["knee"]["request_rate"] is None and not records
    trials = result["knee"]["trials"]
    assert all(row["stopped"] and not row["holds"] and row["p95_ttft_ms"] is None for row in trials)
    end = time.monotonic() + 10
    while server.script.gone < len(server.script.bodies) and time.monotonic() < end:
        time.sleep(0.01)
    assert server.script.gone == len(server.script.bodies) > 0


def test_a_connection_that_was_kept_too_long_is_no_failure() -> None:
    """The server closes every connection after one answer without saying so."""
    served = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def both() -> list[tuple[int, bytes]]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(Address("127.0.0.1", port, tls=False)) as client:
            return [await client.fetch("GET", "/health") for _ in range(3)]

    assert asyncio.run(both()) == [(200, b"ok")] * 3
    assert served == 3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK\r\n", "disconnected"),
        (b"SSH-2.0-x\r\n\r\n", "malformed"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nmore", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nless", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "disconnected"),
        (b"HTTP/1.1 200 OK\r\n" + b"x" * 200_000, "malformed"),
    ],
)
def test_answers_that_are_none(answer: bytes, kind: str) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(reply, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Client(Address("127.0.0.1", port, tls=False)) as client:
            await client.fetch("GET", "/v1/models")

    with pytest.raises(RequestFailed) as error:
        asyncio.run(ask())
    assert error.value.failure.kind == kind


# The command ------------------------------------------------------------------------------------------------


def test_the_command_prints_one_object(scripted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = scripted(tokenize="vllm")
    words = ["bench", "--server", server.url, "--num-requests=5", "--output-tokens=3", "--prompt-tokens=20"]
    words += ["--request-rate=100", "--goodput=ttft:60000", "--api-key=k3y", "--health", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["arrivals"] == {"kind": "random", "request_rate": 100.0, "burstiness": 1.0}
    assert (result["completed"], result["total_input_tokens"], result["good_requests"]) == (5, 100, 5)
    assert server.script.keys == ["Bearer k3y"]
    wanted = {f"{name}_{metric}_ms" for name in ("mean", "p99") for metric in ("ttft", "tpot", "itl", "e2el")}
    assert wanted < set(result)
    assert "k3y" not in json.dumps(result)


def test_the_command_for_a_person(scripted: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    server = scripted(faults={1: "http_429"})
    picture = tmp_path / "run.svg"
    words = ["bench", "--server", server.url, "--num-requests=6", "--output-tokens=3", f"--plot={picture}"]
    assert main([*words, "--concurrency=2"]) == 0
    said = capsys.readouterr().out
    assert "2 at a time" in said and "TTFT" in said and "refused with http_429" in said
    assert picture.read_text().startswith("<?xml") and "TPOT" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pass an ARTIFACT or --server URL, one of them"),
        (["a.llmc", "--server=http://x"], "pass an ARTIFACT or --server URL, one of them"),
        (["--server=http://x", "--threads=2", "--profile"], "--profile, --threads: only for an ARTIFACT"),
        (["a.llmc", "--seed=2"], "--seed: only for --server"),
        (
            ["--server=http://x", "--concurrency=2", "--request-rate=3"],
            "--concurrency and --request-rate are two",
        ),
        (["--server=http://x", "--concurrency=2", "--find-knee"], "--find-knee looks for a rate"),
        (
            ["--server=http://x", "--concurrency=2", "--concurrency=3"],
            "--concurrency was given more than once",
        ),
        (["--server=http://x", "--time-scale=2"], "--time-scale stretches a --trace"),
        (["--server=http://x", "--request-rate=0"], "'0' is no number above 0"),
        (["--server=http://x", "--goodput=speed:1"], "'speed:1' is no limit"),
        (["--server=http://x", "--plot=run.txt"], "allowed: a name that ends in .svg"),
        (["--server=ftp://x"], "is no address of a server"),
        (["--server=http://x", "--api-key=schlüssel"], "--api-key holds characters that no HTTP header may"),
    ],
)
def test_calls_that_are_wrong(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["bench", f"--server=http://127.0.0.1:{port}"]) == 1
    assert "does not answer: connect" in capsys.readouterr().err


def test_a_server_that_takes_calls_and_says_nothing() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(LlmcError, match=r"does not answer: timeout: no end after 0\.2 s"),
    ):
        session.bench(Load(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2), _quiet)


def test_a_key_is_missing(scripted: Any) -> None:
    with pytest.raises(LlmcError, match="/v1/models answers 401: wrong key; pass --api-key"):
        session.bench(Load(scripted(key="k3y").url), _quiet)


def test_no_request_comes_through(scripted: Any) -> None:
    server = scripted(faults=dict.fromkeys(range(3), "http_500"))
    with pytest.raises(LlmcError, match="3 times http_500: refused with http_500"):
        session.bench(Load(server.url, num_requests=3), _quiet)


def test_the_clients_own_cost_can_be_measured() -> None:
    found = overhead.measure(requests=3)
    assert (found["tokens"], found["failed"]) == (3 * 512, 0)
    assert found["cpu_us_per_token"] > 0


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--plot needs matplotlib"):
        plot.check(tmp_path / "x.svg")
