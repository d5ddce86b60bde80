"""An engine in a thread of its own, for callers in other threads and in event loops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from collections.abc import Sequence as Seq

from ..ir.errors import DeviceError, LlmcError
from .engine import Engine
from .generation import Request, StepOutput
from .sampling_params import SamplingParams

_log = logging.getLogger("llmc.runtime")

Sink = Callable[[StepOutput], None]


class QueueFullError(LlmcError):
    """More requests wait than the engine accepts; try again later."""


class Ticket:
    """A request that was handed in, and which of its choices are unfinished.

    Changed by the engine's thread only.
    """

    __slots__ = ("request", "sink", "unfinished")

    def __init__(self, request: Request, sink: Sink):
        self.request = request
        self.sink = sink
        self.unfinished = set(range(request.params.n))

    @property
    def id(self) -> str:
        """Id of the request."""
        return self.request.id


class AsyncEngine:
    """Runs an `Engine` in a thread that starts with the first request.

    Submitting never waits for a step: requests are checked in the caller's thread, put into an inbox, and
    taken up between steps. A stream that is closed or whose consumer is cancelled cancels its own request and
    no other, even if another one has taken over its id.
    """

    def __init__(self, engine: Engine, *, max_waiting: int | None = None):
        """`max_waiting`: requests that may be unfinished before QueueFullError; None: any number."""
        self.engine = engine
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._tickets: dict[str, Ticket] = {}
        self._thread: threading.Thread | None = None
        self._pauser: int | None = None  # the thread that has the engine for itself, and how often it asked
        self._pauses = 0
        self._pausing = 0  # threads that wait for it; they come before the next step, unless one is owed
        self._owed = False  # whether requests wait for a step since the last pause
        self._stepping = False
        self._closed = False
        self._touched: list[AsyncStream] = []

    @property
    def alive(self) -> bool:
        """Whether it takes requests: it was not closed, and its thread has not failed."""
        return not self._closed

    @property
    def num_unfinished(self) -> int:
        """Requests that were handed in and are not over."""
        return len(self._tickets)

    # Callers' side ---------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Seq[int],
        params: SamplingParams | None,
        sink: Sink,
        request_id: str | None = None,
    ) -> Ticket:
        """Queue a prompt; `sink` gets its outputs, called from the engine's thread.

        Raises InputError where the request is wrong, QueueFullError where too many wait.
        """
        ticket = Ticket(self.engine.make_request(prompt, params, request_id), sink)
        with self._changed:
            self._refuse_if_ended()
            if self.max_waiting is not None and len(self._tickets) >= self.max_waiting:
                raise QueueFullError(
                    f"{len(self._tickets)} requests are unfinished, the limit is {self.max_waiting}",
                    remedy="try again later",
                )
            if ticket.id in self._tickets:
                raise LlmcError(f"request id {ticket.id!r} is in use", remedy="choose another one")
            self._tickets[ticket.id] = ticket
            self._post(lambda: self._start(ticket))
        return ticket

    def cancel(self, which: str | Ticket) -> None:
        """End a request, named by id or ticket; its sink gets `finish_reason="cancelled"` for each open
        choice.

        Nothing happens where it is over already.
        """
        with self._changed:
            ticket = self._tickets.get(which) if isinstance(which, str) else which
            if ticket is not None and self._tickets.get(ticket.id) is ticket and not self._closed:
                self._post(lambda: self._cancel(ticket))

    def open_stream(self) -> AsyncStream:
        """A stream for the running event loop, to which requests are `add`ed."""
        return AsyncStream(self, asyncio.get_running_loop())

    async def stream(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        """Outputs as they come, until every choice is finished. Raises the request's error where it fails."""
        stream = self.open_stream()
        stream.add(prompt, params, request_id)
        try:
            while outputs := await stream.take():
                for output in outputs:
                    if output.error is not None:
                        raise output.error
                    yield output
        finally:
            stream.close()

    def stream_sync(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Stream:
        """As `stream`, for a thread that may wait.

        The request is queued now, not at the first output asked for.
        """
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        return Stream(self, self.submit(prompt, params, outputs.put, request_id), outputs)

    @contextlib.contextmanager
    def paused(self) -> Generator[Engine]:
        """The engine for the calling thread alone, between two steps; requests wait meanwhile. Between two
        pauses they advance by a step, whoever pauses.
        """
        caller = threading.get_ident()
        with self._changed:
            self._refuse_if_ended()
            if self._pauser != caller:
                self._pausing += 1
                try:
                    self._changed.wait_for(self._may_pause)
                finally:
                    self._pausing -= 1
                    self._changed.notify_all()  # where the wait was interrupted, steps may go on
                self._pauser = caller
            self._pauses += 1
        try:
            yield self.engine
        finally:
            with self._changed:
                self._pauses -= 1
                if not self._pauses:
                    self._pauser = None
                    self._owed = self._thread is not None and self._has_work()
                self._changed.notify_all()

    def _may_pause(self) -> bool:
        return self._pauser is None and not self._stepping and (self._closed or not self._owed)

    def _has_work(self) -> bool:
        return bool(self._inbox or self.engine.has_work)

    def close(self) -> None:
        """Cancel what runs and end the thread. Streams that are open end with `finish_reason="cancelled"`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _refuse_if_ended(self) -> None:
        if self._closed:
            raise LlmcError("the engine is closed", remedy="load the artifact again")
        # The thread closes the engine before it ends; where it is gone otherwise, this process is a fork.
        if self._thread is not None and not self._thread.is_alive():
            raise LlmcError(
                "the engine's thread stayed in the process that was forked",
                remedy="load the artifact after the fork",
            )

    def _post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine's thread; the condition is held."""
        self._inbox.append(command)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)
            thread.start()  # fails where the process may have no more threads
            self._thread = thread
        self._changed.notify_all()

    # The engine's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        failure: LlmcError | None = None
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001  (told to every stream, and logged with its trace)
            _log.exception("the engine's thread ends")
            failure = LlmcError(
                f"the engine stopped: {error!r}", remedy="load the artifact again; this is a bug"
            )
        with self._changed:
            self._closed = True
            self._stepping = False
            tickets = list(self._tickets.values())
            self._changed.notify_all()
        for ticket in tickets:  # nobody may wait for an output that never comes
            self.engine.cancel(ticket.id)
            self._end(ticket, failure)
        self._wake_streams()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()
                self._changed.wait_for(self._may_go_on)
                if self._closed:
                    return
                self._stepping, self._owed = True, False
                commands, self._inbox = self._inbox, []
            for command in commands:
                command()
            if self.engine.has_work:
                self._step()
            self._wake_streams()

    def touch(self, stream: AsyncStream) -> None:
        """Note that a stream has outputs that its loop does not know of; from the engine's thread."""
        self._touched.append(stream)

    def _wake_streams(self) -> None:
        """Tell each event loop once of all its streams: waking one costs a system call."""
        touched, self._touched = self._touched, []
        for loop in {stream.loop for stream in touched}:
            streams = [stream for stream in touched if stream.loop is loop]
            try:
                loop.call_soon_threadsafe(_wake_all, streams)
            except RuntimeError:  # the loop is closed: its consumers are gone
                for stream in streams:
                    stream.close()

    def _may_go_on(self) -> bool:
        free = self._pauser is None and (self._owed or not self._pausing)
        return self._closed or (free and self._has_work())

    def _start(self, ticket: Ticket) -> None:
        try:
            self.engine.submit(ticket.request)
        except LlmcError as error:
            self._end(ticket, error)

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.get(ticket.id) is ticket:
            self.engine.cancel(ticket.id)
            self._end(ticket, None)

    def _end(self, ticket: Ticket, error: LlmcError | None) -> None:
        """Tell the sink that the unfinished choices are over: failed with an error, cancelled without."""
        for choice in sorted(ticket.unfinished):
            reason = "cancelled" if error is None else "error"
            self._deliver(ticket, StepOutput(ticket.id, choice, finish_reason=reason, error=error))

    def _step(self) -> None:
        running = self.engine.request_ids()
        try:
            outputs = self.engine.step()
        except DeviceError:
            raise  # no other step will do better: the engine stops, and says so
        except Exception as error:  # noqa: BLE001  (whatever an executor raises ends its requests, not the server)
            failure = error if isinstance(error, LlmcError) else LlmcError(f"the step failed: {error!r}")
            for request_id in running:
                self._end(self._tickets[request_id], failure)
            return
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                self._deliver(ticket, output)

    def _deliver(self, ticket: Ticket, output: StepOutput) -> None:
        if output.finish_reason is not None:
            ticket.unfinished.discard(output.index)
            if not ticket.unfinished:
                with self._changed:
                    self._tickets.pop(ticket.id, None)
        try:
            ticket.sink(output)
        except Exception:  # noqa: BLE001  (a sink is the caller's code)
            # The consumer is gone (its event loop is closed) or broken: its request ends, the others go on.
            _log.debug("the sink of request %s failed", ticket.id, exc_info=True)
            self.cancel(ticket)


def _note(output: StepOutput, unfinished: set[int]) -> None:
    """Strike a finished choice off; raise the error of one that failed."""
    if output.error is not None:
        raise output.error
    if output.finish_reason is not None:
        unfinished.discard(output.index)


def _wake_all(streams: Seq[AsyncStream]) -> None:
    for stream in streams:
        stream.wake()


class AsyncStream:
    """The outputs of one or several requests, for an event loop, in batches: all that came since it last
    looked.

    Outputs are handed over by the engine's thread. Waking a loop costs a system call, so a stream wakes it
    once for all that came until the loop looks. Closing the stream, or forgetting it, cancels its requests.
    """

    def __init__(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.tickets: list[Ticket] = []
        self.loop = loop
        self._engine = engine
        self._arrived: list[StepOutput] = []
        self._unfinished = 0
        self._waiter: asyncio.Future[None] | None = None
        self._told = False
        self._interruption: Exception | None = None
        self._lock = threading.Lock()

    def add(
        self, prompt: str | Seq[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> Ticket:
        """Queue a request whose outputs come here. Raises as `AsyncEngine.submit` does."""
        ticket = self._engine.submit(prompt, params, self._deliver, request_id)
        self.tickets.append(ticket)
        self._unfinished += ticket.request.params.n
        return ticket

    def _deliver(self, output: StepOutput) -> None:
        """The sink: called from the engine's thread."""
        with self._lock:
            self._arrived.append(output)
            told, self._told = self._told, True
        if not told:
            self._engine.touch(self)

    def wake(self) -> None:
        """There are outputs; in the event loop."""
        with self._lock:
            self._told = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[StepOutput]:
        """The next outputs, at least one; none once every choice has ended. A choice that failed ends with an
        output that holds its error.
        """
        if not self._unfinished:
            return []
        while not self._arrived or self._interruption is not None:
            if self._interruption is not None:
                raise self._interruption
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        with self._lock:
            outputs, self._arrived = self._arrived, []
        self._unfinished -= sum(output.finish_reason is not None for output in outputs)
        return outputs

    def interrupt(self, error: Exception) -> None:
        """Let whoever waits for outputs get `error` instead; to be called in the event loop."""
        self._interruption = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Cancel what is not over."""
        tickets, self.tickets = self.tickets, []
        self._unfinished = 0
        for ticket in tickets:
            self._engine.cancel(ticket)

    def __del__(self) -> None:
        self.close()


class Stream(Iterator[StepOutput]):
    """The outputs of one request, for a thread that may wait.

    Closing it, or forgetting it, cancels the request.
    """

    def __init__(self, engine: AsyncEngine, ticket: Ticket, outputs: queue.SimpleQueue[StepOutput]):
        self.request_id = ticket.id
        self.owner: object = None  # kept alive while the stream is
        self._engine = engine
        self._ticket = ticket
        self._outputs = outputs
        self._unfinished = set(range(ticket.request.params.n))

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
            self._engine.cancel(self._ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
