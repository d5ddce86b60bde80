"""Threads that pause the engine leave room for its steps, whatever they do and however they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from llmc.runtime.async_engine import AsyncEngine
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.sampling_params import SamplingParams

from .fake_executor import generate_alone
from .test_runtime_async import PROMPT, _Gated, _wait_until

FACTS = ModelFacts(vocab_size=97, context_length=2000, eos_token_ids=())


@pytest.fixture
def gated() -> Iterator[tuple[AsyncEngine, _Gated]]:
    executor = _Gated()
    engine = AsyncEngine(Engine(executor, None, FACTS, EngineOptions(kv_tokens=4000)))
    yield engine, executor
    executor.gate.set()
    engine.close()


def test_threads_that_pause_in_turns_do_not_starve_generation(gated: tuple[AsyncEngine, _Gated]) -> None:
    engine, _ = gated
    over = threading.Event()
    pauses: list[int] = []

    def look() -> None:
        while not over.is_set():
            with engine.paused() as inner:
                if inner.has_work:
                    pauses.append(inner.counters.steps)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=60))
    tokens = [token for output in stream for token in output.token_ids]
    over.set()
    for thread in threads:
        thread.join()
    assert tokens == generate_alone(PROMPT, 60)
    assert pauses and len(set(pauses)) == len(pauses), "two pauses without a step between them"


def test_a_pause_follows_another_where_nothing_runs(gated: tuple[AsyncEngine, _Gated]) -> None:
    engine, _ = gated
    for _ in range(3):
        with engine.paused() as inner, engine.paused():
            assert not inner.has_work
    list(engine.stream_sync(PROMPT, SamplingParams(max_tokens=2)))
    for _ in range(3):
        with engine.paused() as inner:
            assert not inner.has_work
    with engine.paused() as inner:  # without the engine's thread nobody would take a step that is owed
        inner.add_request(PROMPT, SamplingParams(max_tokens=1))
    _wait_until(lambda: not engine.engine.has_work)


def test_work_that_only_a_pauser_gave_holds_up_no_other(gated: tuple[AsyncEngine, _Gated]) -> None:
    engine, _ = gated
    with engine.paused() as inner:  # no thread runs yet
        inner.add_request(PROMPT, SamplingParams(max_tokens=1))
    with engine.paused() as inner:
        inner.drop_all()


def test_a_closed_engine_holds_up_nobody(gated: tuple[AsyncEngine, _Gated]) -> None:
    engine, executor = gated
    executor.gate.clear()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=5))
    _wait_until(lambda: engine._stepping)
    entered = threading.Event()

    def look() -> None:
        with engine.paused():
            entered.set()

    waiting = threading.Thread(target=look)
    waiting.start()
    _wait_until(lambda: engine._pausing == 1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    _wait_until(lambda: engine._closed)
    executor.gate.set()
    for thread in (waiting, closing):
        thread.join(10)
        assert not thread.is_alive()
    assert entered.is_set() and list(stream)[-1].finish_reason == "cancelled"


def test_an_interrupted_wait_lets_the_steps_go_on(
    gated: tuple[AsyncEngine, _Gated], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, executor = gated
    executor.gate.clear()
    stream = engine.stream_sync(PROMPT, SamplingParams(max_tokens=5))
    _wait_until(lambda: engine._stepping)
    asked: list[bool] = []

    def interrupted() -> bool:
        if asked:  # the step is over, and the engine waits for this pause
            raise KeyboardInterrupt
        asked.append(True)
        executor.gate.set()
        return False

    monkeypatch.setattr(engine, "_may_pause", interrupted)
    with pytest.raises(KeyboardInterrupt), engine.paused():
        pass
    assert engine._pausing == 0
    assert [t for output in stream for t in output.token_ids] == generate_alone(PROMPT, 5)
