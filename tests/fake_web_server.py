"""A server for tests of the web page: the page's own files, and an API that answers as a test tells it to.

It knows nothing of the engine, so what fails here is the page's. It keeps what it was asked, cuts a stream
where a test wants it cut, waits inside an answer until it may go on, and notices when the page hangs up.
"""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STATIC = Path(__file__).resolve().parent.parent / "runtime" / "server" / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The strictest policy under which the page works: what the real server sends, and no sink for markup."""

MODEL: dict[str, Any] = {
    "id": "qwen2.5-coder-0.5b-instruct",
    "object": "model",
    "llmc": {
        "quantization": "best-int4-g32",
        "context_length": 8192,
        "weight_bytes": 312_443_904,
        "target": "tvm-cpu",
        "isa": "avx512",
        "bits_per_weight": 4.625,
        "quality": {"ppl_increase_percent": 3.81, "kl": 0.0482, "top1_agreement": 0.912},
    },
}
OTHER_MODEL: dict[str, Any] = {"id": "smollm2-135m", "object": "model"}
ENCODER: dict[str, Any] = {"id": "bge-small", "object": "model", "llmc": {"chat": False}}


@dataclass(frozen=True)
class Refusal:
    """An answer that is no stream. `body` is sent as JSON, or as it is where it is text."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


def error(message: str, *, type: str = "invalid_request_error", **details: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": None, **details}}


class Gate:
    """In a script: the stream waits here until the test opens it, or the page hangs up."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()


@dataclass
class Raw:
    """In a script: bytes sent as they are."""

    data: bytes


class Cut:
    """In a script: the connection ends here, in the middle."""


Step = str | dict[str, Any] | Gate | Raw | Cut | float
"""What a script is made of: text of the answer, a whole chunk, …; a number is a pause in seconds."""


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """One chunk of a stream with these fields in its delta."""
    choice = {"index": 0, "delta": fields, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL["id"], "choices": [choice]}


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    counted: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    counted |= {"total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": cached}}
    return {**delta(), "choices": [], "usage": counted}


def says(*pieces: Step, prompt: int = 12, cached: int = 0) -> list[Step]:
    """The script of a whole answer: strings are pieces of its text."""
    count = sum(isinstance(piece, str) for piece in pieces)
    return [
        delta(role="assistant", content=""),
        *pieces,
        delta("stop"),
        usage(prompt, count, cached),
        Raw(_DONE),
    ]


def calls(*steps: Step) -> list[Step]:
    """The script of an answer that ends with tool calls."""
    return [delta(role="assistant"), *steps, delta("tool_calls"), usage(150, 20), Raw(_DONE)]


def call(index: int, name: str | None = None, arguments: str = "") -> dict[str, Any]:
    """A chunk of a tool call: its beginning where it has a name, else more of its arguments."""
    function: dict[str, Any] = {"arguments": arguments} | ({"name": name} if name else {})
    begun = {"id": f"call_{index}", "type": "function"} if name else {}
    return delta(tool_calls=[{"index": index, **begun, "function": function}])


_DONE = b"data: [DONE]\n\n"


class FakeServer:
    """`answers` are used up one a request, the last one stays; `requests` holds the bodies that came."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] | Refusal = [MODEL, OTHER_MODEL, ENCODER]
        self.answers: list[Sequence[Step] | Refusal] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()
        self.cut_every = 0  # bytes a write; 0: an event a write
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_answer(self) -> Sequence[Step] | Refusal:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def _events(script: Sequence[Step]) -> Iterator[bytes | Gate | Cut | float]:
    for step in script:
        if isinstance(step, Gate | Cut | float):
            yield step
        elif isinstance(step, Raw):
            yield step.data
        else:
            chunk = delta(content=step) if isinstance(step, str) else step
            yield b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, state: FakeServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = state


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.server.state.keys.append(self.headers.get("Authorization"))
            found = self.server.state.models
            self._answer(
                found if isinstance(found, Refusal) else Refusal(200, {"object": "list", "data": found})
            )
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
        path = STATIC / name
        if "/" in name or not path.is_file():
            self._answer(Refusal(404, error(f"no such path: {self.path}")))
            return
        self._send(200, path.read_bytes(), {"Content-Type": TYPES[path.suffix]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.state.requests.append(body)
        self.server.state.keys.append(self.headers.get("Authorization"))
        answer = self.server.state.next_answer()
        if isinstance(answer, Refusal):
            self._answer(answer)
            return
        try:
            self._stream(answer)
        except OSError:
            self.server.state.hung_up.set()
            self.close_connection = True

    def _answer(self, refusal: Refusal) -> None:
        text = refusal.body if isinstance(refusal.body, str) else json.dumps(refusal.body)
        self._send(refusal.status, text.encode(), {"Content-Type": "application/json", **refusal.headers})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Security-Policy": POLICY}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, script: Sequence[Step]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in _events(script):
            if isinstance(event, Gate):
                event.reached.set()
                self._wait(event)
            elif isinstance(event, float):
                time.sleep(event)
            elif isinstance(event, Cut):
                self.close_connection = True
                return
            else:
                size = self.server.state.cut_every or len(event)
                for at in range(0, len(event), size):
                    self._chunk(event[at : at + size])
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _wait(self, gate: Gate) -> None:
        """Until the gate opens. OSError where the page hangs up first: its socket can be read, at its end."""
        while not gate.opened.wait(0.01):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1):
                raise ConnectionResetError
