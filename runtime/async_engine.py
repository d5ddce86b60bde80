"""An engine in a thread of its own, for callers in other threads and in event loops."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from collections.abc import Sequence as Seq

from ..ir.errors import LlmcError
from .engine import Engine
from .generation import Request, StepOutput
from .sampling_params import SamplingParams

Sink = Callable[[StepOutput], None]


class QueueFullError(LlmcError):
    """More requests wait than the engine accepts; try again later."""


class AsyncEngine:
    """Runs an `Engine` in a thread that starts with the first request.

    Submitting never waits for a step: requests are checked in the caller's thread, put into an inbox, and
    taken up between steps. A stream that is closed or whose consumer is cancelled cancels its request.
    """

    def __init__(self, engine: Engine, *, max_waiting: int | None = None):
        """`max_waiting`: requests that may be unfinished at a time before QueueFullError; None: any number.
        """
        self.engine = engine
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._sinks: dict[str, tuple[Sink, set[int]]] = {}  # request id → sink, choices that are unfinished
        self._thread: threading.Thread | None = None
        self._exclusive = threading.Lock()
        self._pausing = False
        self._stepping = False
        self._closed = False

    # Callers' side ---------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None,
        sink: Sink,
        request_id: str | None = None,
    ) -> str:
        """Queue a prompt; `sink` gets its outputs, called from the engine's thread. Returns the request's id.

        Raises InputError where the request is wrong, QueueFullError where too many wait.
        """
        request = self.engine.make_request(prompt, params, request_id)
        with self._changed:
            self._refuse_if_closed()
            if self.max_waiting is not None and len(self._sinks) >= self.max_waiting:
                raise QueueFullError(
                    f"{len(self._sinks)} requests are unfinished, the limit is {self.max_waiting}",
                    remedy="try again later",
                )
            if request.id in self._sinks:
                raise LlmcError(f"request id {request.id!r} is in use", remedy="choose another one")
            self._sinks[request.id] = (sink, set(range(request.params.n)))
            self._post(lambda: self._start_request(request))
        return request.id

    def cancel(self, request_id: str) -> None:
        """End a request; its stream gets `finish_reason="cancelled"`.

        Nothing happens where it is over already.
        """
        with self._changed:
            if request_id in self._sinks and not self._closed:
                self._post(lambda: self._cancel(request_id))

    async def stream(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        """Outputs as they come, until every choice is finished. Raises the request's error where it fails."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[StepOutput] = asyncio.Queue()

        def deliver(output: StepOutput) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        request_id = self.submit(prompt, params, deliver, request_id)
        unfinished = set(range(params.n if params is not None else 1))
        try:
            while unfinished:
                output = await outputs.get()
                _note(output, unfinished)
                yield output
        finally:
            self.cancel(request_id)

    def stream_sync(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Stream:
        """As `stream`, for a thread that may wait.

        The request is queued now, not at the first output asked for.
        """
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        submitted = self.submit(prompt, params, outputs.put, request_id)
        return Stream(self, submitted, outputs, params.n if params is not None else 1)

    @contextlib.contextmanager
    def paused(self) -> Generator[Engine]:
        """The engine for the caller alone, between two steps; requests wait meanwhile."""
        with self._exclusive:
            with self._changed:
                self._refuse_if_closed()
                self._pausing = True
                self._changed.wait_for(lambda: not self._stepping)
            try:
                yield self.engine
            finally:
                with self._changed:
                    self._pausing = False
                    self._changed.notify_all()

    def close(self) -> None:
        """Cancel what runs and end the thread. Streams that are open end with `finish_reason="cancelled"`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise LlmcError("the engine is closed", remedy="load the artifact again")

    def _post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine's thread; the condition is held."""
        self._inbox.append(command)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # The engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()
                self._changed.wait_for(self._may_go_on)
                if self._closed:
                    break
                self._stepping = True
                commands, self._inbox = self._inbox, []
            for command in commands:
                command()
            if self.engine.has_work:
                self._step()
        for request_id in list(self._sinks):
            self._cancel(request_id)

    def _may_go_on(self) -> bool:
        return self._closed or (not self._pausing and bool(self._inbox or self.engine.has_work))

    def _start_request(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except LlmcError as error:
            self._fail(request.id, error)

    def _cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        self._end(request_id, "cancelled", None)

    def _fail(self, request_id: str, error: LlmcError) -> None:
        self._end(request_id, "error", error)

    def _end(self, request_id: str, reason: str, error: LlmcError | None) -> None:
        """Tell a request's sink that its unfinished choices are over."""
        entry = self._sinks.get(request_id)
        for choice in sorted(entry[1]) if entry is not None else []:
            finish = "cancelled" if reason == "cancelled" else "error"
            self._deliver(StepOutput(request_id, choice, finish_reason=finish, error=error))

    def _step(self) -> None:
        running = self.engine.request_ids()
        try:
            outputs = self.engine.step()
        except Exception as error:  # noqa: BLE001  (whatever an executor raises ends its requests, not the server)
            failure = error if isinstance(error, LlmcError) else LlmcError(f"the step failed: {error!r}")
            for request_id in running:
                self._fail(request_id, failure)
            return
        for output in outputs:
            self._deliver(output)

    def _deliver(self, output: StepOutput) -> None:
        entry = self._sinks.get(output.request_id)
        if entry is None:
            return
        sink, unfinished = entry
        if output.finish_reason is not None:
            unfinished.discard(output.index)
            if not unfinished:
                with self._changed:
                    del self._sinks[output.request_id]
        sink(output)


def _note(output: StepOutput, unfinished: set[int]) -> None:
    """Strike a finished choice off; raise the error of one that failed."""
    if output.error is not None:
        raise output.error
    if output.finish_reason is not None:
        unfinished.discard(output.index)


class Stream(Iterator[StepOutput]):
    """The outputs of one request, for a thread that may wait.

    Closing it, or forgetting it, cancels the request.
    """

    def __init__(
        self, engine: AsyncEngine, request_id: str, outputs: queue.SimpleQueue[StepOutput], choices: int
    ):
        self.request_id = request_id
        self.owner: object = None  # kept alive while the stream is
        self._engine = engine
        self._outputs = outputs
        self._unfinished = set(range(choices))

    def __next__(self) -> StepOutput:
        """The next output. Raises the request's error where it failed."""
        if not self._unfinished:
            raise StopIteration
        output = self._outputs.get()
        try:
            _note(output, self._unfinished)
        except LlmcError:
            self.close()
            raise
        return output

    def close(self) -> None:
        """Cancel the request, unless it is over; no output follows."""
        if self._unfinished:
            self._unfinished.clear()
            self._engine.cancel(self.request_id)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
