"""Server-sent events that end when the client goes away, whatever phase the request is in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error, dumps
from .middleware import DIRECT
from .service import gone

DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event (HTML standard, "Server-sent events"): JSON on one line, as OpenAI's API sends it."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(data)}\n\n"


class ChoiceEvents:
    """Events of one answer that differ in their only choice: what stands around it is rendered once, since a
    server of many streams renders thousands a second.
    """

    def __init__(self, head: Mapping[str, Any], member: str, *, usage: bool) -> None:
        """`head`: the members before `choices`; with `usage`, one that is null stands behind. `member`: the
        member of a choice that holds new text, with %s for the text.
        """
        self._before = f"data: {dumps({**head, 'choices': []})[: -len(']}')]}"
        self._after = '],"usage":null}\n\n' if usage else "]}\n\n"
        before, after = self._before.replace("%", "%%"), self._after
        self._text = f'{before}{{"index":%d,{member},"logprobs":null,"finish_reason":null}}{after}'

    def event(self, choice: Mapping[str, Any]) -> str:
        """The event of a choice."""
        return f"{self._before}{dumps(choice)}{self._after}"

    def text(self, index: int, text: str) -> str:
        """The event of a choice that has new text, and nothing else."""
        return self._text % (index, encode_basestring_ascii(text))


class EventStream(Response):
    """Sends what `events` gives. A failure after the first byte becomes a last event that holds the error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], *, error_event: str | None = None) -> None:
        """`error_event`: name of the event that tells of a failure."""
        self.status_code = 200
        self.background = None
        self._events = events
        self._error_event = error_event
        # No proxy may hold events back or change them.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until the client has gone; `events` is closed in either case."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # Bodies go past the layers between, which have to do with the head of an answer only.
        sender = asyncio.ensure_future(self._send(scope.get(DIRECT, send)))
        watcher = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, watcher):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)
            await self._events.aclose()
        if not sender.cancelled():
            sender.result()

    async def _send(self, send: Send) -> None:
        try:
            async for text in self._events:
                await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})
        except (OSError, asyncio.CancelledError):  # the connection broke
            raise
        except Exception as error:  # noqa: BLE001  (headers are out: an event is the only way to say it)
            failure: ApiError = as_api_error(error)
            text = event(failure.body, self._error_event)
            await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
