"""A server in this process, on a port of its own, for tests that speak HTTP to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from typing import Any

from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.llm import LLM
from llmc.runtime.server import ServerSettings, create_app
from llmc.runtime.server.run import Server, listen

from .fake_executor import FakeExecutor
from .test_runtime_detokenizer import byte_level

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class GatedExecutor(FakeExecutor):
    """Waits before each step while its gate is closed."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size)
        self.gate = threading.Event()
        self.gate.set()

    def step(self, inputs: Any) -> Any:
        assert self.gate.wait(30)
        return super().step(inputs)


def fake_llm(*, context: int = 400, max_waiting: int | None = None, **options: Any) -> LLM:
    """A model that answers with letters that follow from the context alone; any byte is a token."""
    tokenizer = byte_level()
    executor = GatedExecutor(tokenizer.vocab_size)
    facts = ModelFacts(tokenizer.vocab_size, context, ())
    engine = Engine(executor, tokenizer, facts, EngineOptions(**{"kv_tokens": 2000, **options}))
    return LLM(executor, engine=engine, template=ChatTemplate(TEMPLATE), max_waiting=max_waiting)


class RunningServer:
    """A server that runs in a thread."""

    def __init__(
        self,
        models: Mapping[str, LLM],
        settings: ServerSettings | None = None,
        knowledge: Mapping[str, Any] | None = None,
    ) -> None:
        import uvicorn

        self.models = models
        self.app = create_app(models, settings, knowledge)
        self.service = self.app.state.service
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1
        )
        self.server = Server(config, self.service)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[self._listener])

        asyncio.run(serve())

    def terminate(self) -> None:
        """What SIGTERM does, which only a process's main thread can receive."""
        self.loop.call_soon_threadsafe(self.server.handle_exit, signal.SIGTERM, None)

    def join(self) -> None:
        """Wait until it has ended by itself."""
        self._thread.join(20)
        assert not self._thread.is_alive()

    def __enter__(self) -> RunningServer:
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        for llm in self.models.values():
            if isinstance(llm.executor, GatedExecutor):
                llm.executor.gate.set()
        self.server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        for llm in self.models.values():
            llm.close()

    # Plain HTTP, for what no client would send ------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        raw: bytes | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers by lower-case name)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
            found = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text), found
        except ValueError:
            return answer.status, text, found

    def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any, dict[str, str]]:
        """POST a JSON body."""
        return self.request("POST", path, body, **options)

    def get(self, path: str, **options: Any) -> tuple[int, Any, dict[str, str]]:
        """GET a path."""
        return self.request("GET", path, **options)

    def open_raw(self, path: str, body: Any, *, read_until: bytes | None = None) -> socket.socket:
        """Send a POST and leave the connection open, after having read as far as `read_until`."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        seen = b""
        while read_until is not None and read_until not in seen:
            part = connection.recv(65536)
            assert part, seen
            seen += part
        return connection

    def idle(self) -> bool:
        """Whether no request is left anywhere, and every page is free."""
        for llm in self.models.values():
            with llm.engine.paused() as engine:
                engine.check()
                if llm.engine.num_unfinished or engine.has_work or engine.stats.pages_used:
                    return False
        return True


@contextlib.contextmanager
def serving(
    llm: LLM | None = None,
    settings: ServerSettings | None = None,
    knowledge: Mapping[str, Any] | None = None,
) -> Iterator[RunningServer]:
    """A server of one model, called "tiny"; `knowledge` bases by name."""
    with RunningServer({"tiny": llm if llm is not None else fake_llm()}, settings, knowledge) as server:
        yield server


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition; fails where it never holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.005)
