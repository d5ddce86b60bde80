"""The engine's thread: streams, cancelling by leaving, backpressure, faults that do not end the service."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import threading
import time

import pytest
from llmc.ir.errors import DeviceError, InputError, LlmcError
from llmc.runtime.async_engine import AsyncEngine, QueueFullError
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import FakeExecutor, generate_alone

FACTS = ModelFacts(vocab_size=97, context_length=2000, eos_token_ids=())
PROMPT = [10, 20, 30, 40, 50]


class _Gated(FakeExecutor):
    """Waits before every step while the gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def step(self, inputs):
        assert self.gate.wait(10)
        return super().step(inputs)


@pytest.fixture
def service():
    executor = _Gated()
    options = EngineOptions(kv_tokens=4000, max_sequences=8, max_batch_tokens=64)
    engine = AsyncEngine(Engine(executor, None, FACTS, options), max_waiting=5)
    yield engine, executor
    executor.gate.set()
    engine.close()


def _wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.002)


def _idle(engine: AsyncEngine) -> bool:
    with engine.paused() as inner:
        inner.check()
        return not engine.num_unfinished and not inner.has_work and inner.stats.pages_used == 0


def test_no_thread_before_the_first_request(service):
    engine, _ = service
    names = {thread.name for thread in threading.enumerate()}
    assert "llmc-engine" not in names
    list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=2)))
    assert "llmc-engine" in {thread.name for thread in threading.enumerate()}


def test_streams_of_threads_and_of_an_event_loop_at_the_same_time(service):
    engine, _ = service
    found: dict[int, list[int]] = {}

    def in_thread(number: int) -> None:
        stream = engine.stream_sync([*PROMPT, number], SamplingParams(max_tokens=20))
        found[number] = [token for output in stream for token in output.token_ids]

    async def in_loop(number: int) -> None:
        found[number] = []
        async for output in engine.stream([*PROMPT, number], SamplingParams(max_tokens=20)):
            found[number] += output.token_ids

    async def both() -> None:
        await asyncio.gather(in_loop(3), in_loop(4))

    threads = [threading.Thread(target=in_thread, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    asyncio.run(both())
    for thread in threads:
        thread.join()
    assert found == {number: generate_alone([*PROMPT, number], 20) for number in (1, 2, 3, 4)}


def test_wrong_requests_are_refused_in_the_callers_thread_and_do_not_wait_for_a_step(service):
    engine, executor = service
    executor.gate.clear()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(InputError, match="top_p is -1"):
        engine.stream_sync(PROMPT, SamplingParams(top_p=-1))
    with pytest.raises(InputError, match="the prompt is empty"):
        engine.stream_sync([])
    executor.gate.set()
    assert [t for o in stream for t in o.token_ids] == generate_alone(PROMPT, 3)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_leaving_a_stream_cancels_its_request_and_no_other(service, after: int):
    engine, _ = service
    other = engine.stream_sync([*PROMPT, 9], SamplingParams(max_tokens=60))
    with engine.stream_sync(PROMPT, SamplingParams(max_tokens=1900)) as stream:
        for _ in range(after):
            next(stream)
    assert [t for o in other for t in o.token_ids] == generate_alone([*PROMPT, 9], 60)
    _wait_until(lambda: _idle(engine))


def test_a_forgotten_stream_cancels_its_request(service):
    engine, _ = service
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=1900))
    next(stream)
    del stream
    gc.collect()
    _wait_until(lambda: _idle(engine))


def test_a_cancelled_task_cancels_its_request(service):
    engine, _ = service

    async def main() -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in engine.stream(PROMPT, SamplingParams(max_tokens=1900)):
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    _wait_until(lambda: _idle(engine))


def test_cancel_from_outside_ends_all_choices_of_the_stream(service):
    engine, executor = service
    executor.gate.clear()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=1900, n=3, temperature=1.0), "r")
    engine.cancel("r")
    executor.gate.set()
    last = {output.index: output.finish_reason for output in stream}
    assert last == {0: "cancelled", 1: "cancelled", 2: "cancelled"}
    engine.cancel("r")
    _wait_until(lambda: _idle(engine))


def test_too_many_requests_are_refused_and_room_comes_back(service):
    engine, executor = service
    executor.gate.clear()
    streams = [engine.stream_sync(PROMPT, SamplingParams(max_tokens=2)) for _ in range(5)]
    with pytest.raises(QueueFullError, match="5 requests are unfinished"):
        engine.stream_sync(PROMPT)
    executor.gate.set()
    for stream in streams:
        list(stream)
    assert list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=1)))


def test_a_step_that_raises_ends_its_requests_and_the_service_goes_on(service):
    engine, executor = service
    with engine.paused():
        streams = [engine.stream_sync(PROMPT, SamplingParams(max_tokens=4)) for _ in range(2)]
        executor.fail_next = RuntimeError("kernel")
    for stream in streams:
        with pytest.raises(LlmcError, match="kernel"):
            list(stream)
        assert list(stream) == []
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=4))
    assert [t for o in stream for t in o.token_ids] == generate_alone(PROMPT, 4)


def test_a_forked_process_is_told_that_it_has_no_engine(service, monkeypatch: pytest.MonkeyPatch):
    """After a fork only the calling thread exists in the child: a request would wait for ever."""
    engine, _ = service
    list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=2)))
    assert engine._thread is not None
    with monkeypatch.context() as patch:
        patch.setattr(engine._thread, "is_alive", lambda: False)
        with pytest.raises(LlmcError, match=r"was forked; load the artifact after the fork"):
            engine.submit(PROMPT, None, lambda _: None)
    assert list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=2)))


def test_an_id_in_use_is_refused(service):
    engine, executor = service
    executor.gate.clear()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=2), "r")
    with pytest.raises(LlmcError, match="in use"):
        engine.stream_sync(PROMPT, SamplingParams(max_tokens=2), "r")
    executor.gate.set()
    assert len(list(stream)) == 2


def test_pausing_holds_requests_back_until_it_ends(service):
    engine, executor = service
    executor.keep_steps = True
    with engine.paused() as inner:
        stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=3))
        rows = sum(len(part) for part in inner.score(PROMPT))
        assert rows == 5
        assert len(executor.steps) == 1
    assert [t for o in stream for t in o.token_ids] == generate_alone(PROMPT, 3)


def test_closing_ends_open_streams(service):
    engine, _ = service
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=1900))
    next(stream)
    engine.close()
    *_, last = stream
    assert last.finish_reason == "cancelled"
    engine.close()
    with pytest.raises(LlmcError, match="closed"):
        engine.stream_sync(PROMPT)


def test_an_old_stream_does_not_cancel_a_new_request_of_its_id(service):
    engine, _ = service
    old = engine.stream_sync(PROMPT, SamplingParams(max_tokens=1), "r")
    _wait_until(lambda: _idle(engine))  # it is over, but nobody has looked yet
    new = engine.stream_sync(PROMPT, SamplingParams(max_tokens=30), "r")
    old.close()
    assert [t for o in new for t in o.token_ids] == generate_alone(PROMPT, 30)


def test_a_consumer_that_fails_ends_its_request_alone(service):
    engine, _ = service

    def fail(output) -> None:
        raise RuntimeError("no loop")

    engine.submit(PROMPT, SamplingParams(max_tokens=1900), fail)
    stream = engine.stream_sync([*PROMPT, 1], SamplingParams(max_tokens=20))
    assert [t for o in stream for t in o.token_ids] == generate_alone([*PROMPT, 1], 20)
    _wait_until(lambda: _idle(engine))


def test_a_fault_of_the_engine_itself_ends_every_stream(service, monkeypatch: pytest.MonkeyPatch):
    engine, _ = service

    def broken(request) -> None:
        raise AssertionError("a bug")

    with engine.paused() as inner:
        monkeypatch.setattr(inner, "submit", broken)
        streams = [engine.stream_sync(PROMPT, SamplingParams(max_tokens=4)) for _ in range(2)]
    for one in streams:
        with pytest.raises(LlmcError, match="the engine stopped"):
            list(one)
    with pytest.raises(LlmcError, match="closed"):
        engine.stream_sync(PROMPT)


def test_device_that_has_failed_ends_the_engine(service, monkeypatch: pytest.MonkeyPatch):
    """Each step after it would fail; other errors end their step's requests alone."""
    engine, executor = service

    def lost(inputs) -> None:
        raise DeviceError("an illegal address", remedy="start again")

    monkeypatch.setattr(executor, "step", lost)
    with pytest.raises(LlmcError, match=r"the engine stopped: .*illegal address"):
        list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=4)))
    with pytest.raises(LlmcError, match="closed"):
        engine.stream_sync(PROMPT)


def test_pausing_twice_in_one_thread(service):
    engine, _ = service
    with engine.paused() as outer, engine.paused() as inner:
        assert outer is inner
    assert list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=1)))


def test_many_threads_that_come_and_go():
    """Threads submit, read a while, and leave or stay; what was read is right, all pages come back."""
    executor = FakeExecutor()
    options = EngineOptions(kv_tokens=400, max_sequences=6, max_batch_tokens=48)
    engine = AsyncEngine(Engine(executor, None, FACTS, options))
    wrong: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for turn in range(6):
            prompt = [*PROMPT[: rng.randint(1, 5)], number, turn]
            count = rng.randint(1, 60)
            with engine.stream_sync(prompt, SamplingParams(max_tokens=count)) as stream:
                leave = rng.choice([None, rng.randint(0, count)])
                tokens = [t for output in itertools.islice(stream, leave) for t in output.token_ids]
            if tokens != generate_alone(prompt, count)[:leave]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    _wait_until(lambda: _idle(engine))
    engine.close()
