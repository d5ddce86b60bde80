"""How many tokens a second this client can read: its own limit, on the machine that it will run on.

    python -m llmc.cli.load.overhead

A server in a process of its own writes each token as an event of the usual size in a chunk of its own:
as fast as they are taken (`instant`), and one every 20 ms for each of 32 streams (`paced`), where hardly two
come in one read. Prints one JSON object; `cpu_us_per_token` is the processor time that the client takes.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from .answers import request_body, send
from .arrivals import at_once
from .http import Address, Client, run_loop
from .records import Record
from .runner import run
from .statistics import summarize

_TOKENS = 512
_CONCURRENCY = 32


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {"id": "chatcmpl-" + 32 * "0", "object": "chat.completion.chunk", "created": 1_800_000_000}
    data = b"data: " + json.dumps({**head, "model": "instant", "choices": choices, **more}).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _answer(tokens: int) -> tuple[bytes, bytes]:
    """(one token's bytes, what closes the stream)."""
    token = _event([{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}])
    end = _event([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}])
    usage = _event([], usage={"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1})
    return token, end + usage + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


async def _serve(tokens: int, pause: float, ready: Connection) -> None:
    token, end = _answer(tokens)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                length = int(request.lower().partition(b"content-length:")[2].split()[0])
                await reader.readexactly(length)
                writer.write(head)
                for _ in range(tokens):
                    writer.write(token)  # a write of its own each, as a server of tokens does it
                    await asyncio.sleep(pause)
                writer.write(end)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _server(tokens: int, pause: float, ready: Connection) -> None:
    asyncio.run(_serve(tokens, pause, ready))


async def _measure(port: int, requests: int, concurrency: int) -> dict[str, Any]:
    body = request_body("instant", {"messages": [{"role": "user", "content": "go"}]}, _TOKENS)

    async def one(_: int, record: Record) -> None:
        await send(client, "chat", body, record, timeout=60)

    async with Client(Address("127.0.0.1", port, tls=False)) as client:
        began = time.process_time()
        done = await run(at_once(requests, 1, _TOKENS), one, concurrency=concurrency)
        spent = time.process_time() - began
    result = summarize(done.records, done.duration)
    tokens = result["total_output_tokens"]
    return {
        "tokens": tokens,
        "failed": result["failed"],
        "tokens_per_s": round(tokens / done.duration),
        "cpu_us_per_token": round(1e6 * spent / max(1, tokens), 1),
    }


def measure(*, requests: int = 256, pause: float = 0.0) -> dict[str, Any]:
    """Reads `requests` answers of 512 tokens, 32 at a time; the server waits `pause` s between tokens."""
    context = multiprocessing.get_context("spawn")
    ready, there = context.Pipe(duplex=False)
    server = context.Process(target=_server, args=(_TOKENS, pause, there), daemon=True)
    server.start()
    there.close()  # so that a server that dies ends the wait for its port
    try:
        return run_loop(_measure(ready.recv(), requests, _CONCURRENCY))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    json.dump({"instant": measure(), "paced": measure(requests=_CONCURRENCY, pause=0.02)}, sys.stdout)
    sys.stdout.write("\n")
