"""The parts of `llmc bench --server`: numbers from records, arrivals, prompts, bytes, the knee's search."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmc.cli.load import arrivals, knee, prompts, runner, statistics
from llmc.cli.load.connection import Chunks, RequestFailed
from llmc.cli.load.http import Address, Events
from llmc.cli.load.prompts import WORDS
from llmc.cli.load.records import Arrival, Failure, Record
from llmc.ir.errors import InputError

# Numbers from records ---------------------------------------------------------------------------------------


def record(
    started: float, chunks: Sequence[float], tokens: int, *, prompt: int = 10, late: float = 0.0
) -> Record:
    return Record(
        Arrival(0.0, prompt, tokens),
        scheduled=started - late,
        started=started,
        ended=chunks[-1],
        chunks=list(chunks),
        prompt_tokens=prompt,
        output_tokens=tokens,
        counted=True,
    )


def failed(kind: str, detail: str = "") -> Record:
    return Record(Arrival(0.0, 10, 4), started=1.0, ended=2.0, failure=Failure(kind, detail))


def test_the_times_of_a_request() -> None:
    one = record(2.0, [2.5, 2.75, 3.5], tokens=5)
    assert (one.ttft, one.latency, one.itl) == (0.5, 1.5, [0.25, 0.75])
    # By the definition: (1.5 - 0.5) s over the 4 tokens after the first, though they came in two pieces.
    assert one.tpot == 0.25
    assert record(2.0, [2.5], tokens=1).tpot is None


def test_summary_of_known_records() -> None:
    records = [
        record(0.0, [0.5, 1.0, 1.5], tokens=3, prompt=7),
        record(1.0, [2.0, 2.25], tokens=2, prompt=11, late=0.004),
        record(1.5, [1.75], tokens=1, prompt=13),
        failed("http_429", "full"),
        failed("http_429", "still full"),
        failed("timeout"),
    ]
    found = statistics.summarize(records, 4.0, goodput={"ttft": 500, "tpot": 500})
    assert (found["completed"], found["failed"]) == (3, 3)
    assert found["failures"] == {
        "http_429": {"count": 2, "example": "full"},
        "timeout": {"count": 1, "example": ""},
    }
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (31, 6)
    assert found["request_throughput"] == 3 / 4
    assert found["output_throughput"] == 6 / 4
    assert found["total_token_throughput"] == 37 / 4
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (pytest.approx(1750 / 3), 500)
    assert found["std_ttft_ms"] == pytest.approx(np.std([500, 1000, 250]))
    assert found["p99_ttft_ms"] == pytest.approx(np.percentile([500, 1000, 250], 99))
    # Of two requests only: the third has one token.
    assert (found["mean_tpot_ms"], found["std_tpot_ms"]) == (375, 125)
    assert found["mean_itl_ms"] == pytest.approx((500 + 500 + 250) / 3)
    assert found["p50_e2el_ms"] == 1250
    # The second one's first token is late; the third one, of a single token, has a TPOT of 0.
    assert (found["good_requests"], found["request_goodput"]) == (2, 2 / 4)
    assert found["max_concurrent_requests"] == 2  # the third one starts as the first one ends
    assert found["max_output_tokens_per_s"] == 3  # between 1 and 2 s
    assert found["tokens_per_chunk"] == 1
    assert found["p99_client_lag_ms"] == pytest.approx(
        np.percentile([0, 4, 0, 1000, 1000, 1000], 99), rel=1e-6
    )


def test_a_limit_that_is_met_exactly_is_met() -> None:
    assert statistics.meets(record(0.0, [0.5, 1.0], tokens=2), {"ttft": 500, "tpot": 500, "e2el": 1000})
    assert not statistics.meets(record(0.0, [0.5, 1.0], tokens=2), {"e2el": 999})


def test_nothing_answered_is_no_number() -> None:
    found = statistics.summarize([failed("connect")], 2.0)
    assert found["completed"] == 0
    assert found["request_throughput"] == 0
    assert found["p95_ttft_ms"] is None and found["tokens_per_chunk"] is None
    one = statistics.summarize([record(0.0, [1.0], tokens=1)], 2.0)
    assert one["mean_tpot_ms"] is None and one["mean_itl_ms"] is None


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=30))
def test_peak_concurrency_is_the_most_that_any_moment_has(spans: list[tuple[int, int]]) -> None:
    records = [record(float(start), [float(start + length)], tokens=1) for start, length in spans]
    slow = max(
        sum(start <= moment < start + length for start, length in spans)
        for moment in {start for start, _ in spans}
    )
    assert statistics.peak_concurrency(records) == slow


@pytest.mark.parametrize(
    ("text", "limits"),
    [("ttft:2000,tpot:200", {"ttft": 2000, "tpot": 200}), (" e2el:1.5 ", {"e2el": 1.5})],
)
def test_goodput_limits(text: str, limits: dict[str, float]) -> None:
    assert statistics.parse_goodput(text) == limits


@pytest.mark.parametrize(
    "text", ["itl:3", "ttft", "ttft:x", "ttft:0", "ttft:-1", "ttft:nan", "ttft:1,ttft:2"]
)
def test_goodput_limits_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="is no limit; allowed: ttft:MILLISECONDS"):
        statistics.parse_goodput(text)


# Arrivals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 8.0, math.inf])
def test_random_arrivals_are_of_the_rate_and_repeat(burstiness: float) -> None:
    found = arrivals.random_arrivals(500, 4.0, 100, 20, burstiness=burstiness, seed=3)
    times = [arrival.at for arrival in found]
    assert times == sorted(times) and times[0] > 0
    assert times[-1] == pytest.approx(500 / 4.0)
    assert found == arrivals.random_arrivals(500, 4.0, 100, 20, burstiness=burstiness, seed=3)
    gaps = np.diff([0.0, *times])
    # The deviation of gaps over their mean is 1/√burstiness; 500 gaps are within a quarter of it.
    wanted = 0.0 if math.isinf(burstiness) else burstiness**-0.5
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(wanted, rel=0.25, abs=1e-9)


def test_an_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "conv.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9305900,396,0\r\n2023-11-16 18:15:48.6805900,9,5\r\n"
    )
    found = arrivals.read_trace(path, 10)
    assert [(a.at, a.prompt_tokens, a.output_tokens) for a in found] == [
        (0, 374, 44),
        (2, 9, 5),
        (4.25, 396, 1),
    ]
    assert [a.at for a in arrivals.stretched(found, 0.5)] == [0, 1, 2.125]
    assert arrivals.mean_rate(found) == 2 / 4.25
    cut, count = arrivals.clipped(found, 100)
    assert ([a.prompt_tokens for a in cut], count) == ([100, 9, 100], 2)
    assert len(arrivals.read_trace(path, 2)) == 2


def test_a_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500, "input_length": 700, "output_length": 6, "hash_ids": [0, 1]},
        {"timestamp": 3000, "input_length": 40, "output_length": 4, "hash_ids": [7]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert arrivals.read_trace(path, 10) == [Arrival(0, 700, 6, (0, 1)), Arrival(2.5, 40, 4, (7,))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b,c\n1,2,3\n", "is no trace that is known"),
        ("", "is no trace that is known"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,3,4\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,-3,4\n", "-3 tokens; allowed: 1 to"),
        ('{"timestamp": 1, "input_length": 3}\n', "line 1: there is no 'output_length'"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1e99}\n', "line 1"),
        ('{"timestamp": Infinity, "input_length": 3, "output_length": 1}\n', "timestamp is not finite"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1}\n[]\n', "line 2"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1}\n{"time', "line 2"),
        ("{" + " " * (1 << 20), "has a line of more than"),
    ],
)
def test_a_trace_that_is_none(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        arrivals.read_trace(path, 10)


def test_published_traces(shared_data: Path) -> None:
    azure = arrivals.read_trace(shared_data / "serving_traces/AzureLLMInferenceTrace_conv.csv", 1_000_000)
    assert len(azure) == 19_366
    assert 3_400 < azure[-1].at < 3_700  # an hour
    assert np.median([a.prompt_tokens for a in azure]) == 1020
    mooncake = arrivals.read_trace(shared_data / "serving_traces/mooncake_synthetic_trace.jsonl", 100)
    assert len(mooncake) == 100
    assert all(len(a.blocks) == -(-a.prompt_tokens // arrivals.BLOCK_TOKENS) for a in mooncake)


# Prompts ----------------------------------------------------------------------------------------------------


def test_random_prompts_have_the_length_and_repeat() -> None:
    made = prompts.RandomPrompts(WORDS, chat=True, seed=1, overhead=20)
    first = made.fields(0, Arrival(0, 120, 1))
    (message,) = first["messages"]
    assert message["role"] == "user" and len(message["content"].split()) == 100
    assert first == made.fields(0, Arrival(0, 120, 1))
    assert first != made.fields(1, Arrival(0, 120, 1))
    assert first != prompts.RandomPrompts(WORDS, chat=True, seed=2, overhead=20).fields(0, Arrival(0, 120, 1))
    assert len(made.fields(0, Arrival(0, 5, 1))["messages"][0]["content"].split()) == 1
    costly = prompts.RandomPrompts(WORDS, chat=False, tokens_per_word=2.0)
    assert len(costly.fields(0, Arrival(0, 100, 1))["prompt"].split()) == 50
    ids = prompts.RandomPrompts([5, 6, 7], chat=False).fields(0, Arrival(0, 100, 1))["prompt"]
    assert len(ids) == 100 and set(ids) == {5, 6, 7}


def test_equal_blocks_of_a_trace_are_equal_text() -> None:
    made = prompts.RandomPrompts(WORDS, chat=False)
    one = made.fields(0, Arrival(0, 1000, 1, (4, 5)))["prompt"].split()
    other = made.fields(9, Arrival(0, 1100, 1, (4, 6, 8)))["prompt"].split()
    assert len(one) == 1000 and len(other) == 1100
    assert one[:512] == other[:512]
    assert one[512:1000] != other[512:1000]
    # What a search for the knee asks next is not in the server's prefix cache, blocks neither.
    again = made.for_run(1).fields(0, Arrival(0, 1000, 1, (4, 5)))["prompt"].split()
    assert len(again) == 1000 and again[:16] != one[:16]
    assert again[:512] == made.for_run(1).fields(5, Arrival(0, 600, 1, (4, 9)))["prompt"].split()[:512]


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    path.write_text(json.dumps({"messages": messages, "id": 7}) + "\n\n" + json.dumps(messages) + "\n")
    read = prompts.read_prompts(path, chat=True, most=10)
    assert [read.fields(index, Arrival(0, 1, 1)) for index in range(3)] == [{"messages": messages}] * 3
    assert len(prompts.read_prompts(path, chat=True, most=1).rows) == 1
    with pytest.raises(InputError, match="line 1 has no prompt; write"):
        prompts.read_prompts(path, chat=False, most=10)
    path.write_text("{")
    with pytest.raises(InputError, match="line 1 is no JSON"):
        prompts.read_prompts(path, chat=True, most=10)
    path.write_text("\n")
    with pytest.raises(InputError, match="has no prompts"):
        prompts.read_prompts(path, chat=True, most=10)


# Bytes ------------------------------------------------------------------------------------------------------


def _split(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return (data[a:b] for a, b in pairwise(places))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 500), max_size=12))
def test_chunks_however_they_are_split(parts: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts)
    sent += b"0\r\nTrailer: x\r\n\r\n"
    chunks = Chunks()
    assert b"".join(chunks.feed(piece) for piece in _split(sent, cuts)) == b"".join(parts)
    assert chunks.done


@pytest.mark.parametrize(
    "data", [b"xyz\r\n", b"-5\r\nhello", b"3\r\nhello\r\n", b"fffffffff\r\n", b"0\r\n\r\nmore"]
)
def test_chunks_that_are_none(data: bytes) -> None:
    with pytest.raises(RequestFailed) as error:
        Chunks().feed(data)
    assert error.value.failure.kind == "malformed"


@given(st.lists(st.integers(0, 300), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
def test_events_however_they_are_split(cuts: list[int], end: bytes) -> None:
    lines = [
        b": ping",
        b"data: {}",
        b"",
        b'data:{"a": "\xc3\xa9"}',
        b"",
        b"event: x",
        b"data: [DONE]",
        b"",
        b"",
    ]
    events = Events()
    found = [event for piece in _split(end.join(lines), cuts) for event in events.feed(piece)]
    assert found == [b"{}", b'{"a": "\xc3\xa9"}', b"[DONE]"]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", Address("localhost", 8000, tls=False)),
        ("localhost:8000", Address("localhost", 8000, tls=False)),
        ("http://localhost:8000/v1/", Address("localhost", 8000, tls=False)),
        ("https://host/api/v1", Address("host", 443, tls=True, prefix="/api")),
        ("http://[::1]:9", Address("::1", 9, tls=False)),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://x:99999", "http://a b", "http://x/?q", "http://u:p@x"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="--server"):
        Address.parse(url)


# Timing of sending ------------------------------------------------------------------------------------------


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    running = 0
    seen: list[int] = []

    async def send(_: int, one: Record) -> None:
        nonlocal running
        running += 1
        seen.append(running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1
        one.ended = 1.0

    done = asyncio.run(runner.run(arrivals.at_once(20, 1, 1), send, concurrency=4))
    assert len(done.records) == 20 and not done.stopped
    assert max(seen) == 4 and seen[4:] == [4] * 16


def test_an_open_loop_waits_for_nobody() -> None:
    everyone = asyncio.Event()
    started: list[float] = []

    async def send(index: int, one: Record) -> None:
        one.started = time.perf_counter()
        started.append(one.started - one.scheduled)
        if index == 9:
            everyone.set()
        await everyone.wait()  # the first one ends only when the last one was sent
        one.ended = 1.0

    done = asyncio.run(runner.run(arrivals.random_arrivals(10, 500.0, 1, 1), send))
    assert len(done.records) == 10
    assert min(started) >= 0, "none is sent before it is due"


def test_a_run_can_be_stopped() -> None:
    cancelled: list[int] = []

    async def send(index: int, one: Record) -> None:
        if index == 0:
            one.ended = 1.0
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    watched: list[int] = []

    def watch(records: Sequence[Record]) -> bool:
        watched.append(len(records))
        return True

    done = asyncio.run(runner.run(arrivals.at_once(3, 1, 1), send, watch=watch))
    assert done.stopped and len(done.records) == 1
    assert sorted(cancelled) == [1, 2] and watched == [3]


def test_an_error_of_our_own_is_no_failed_request() -> None:
    async def send(index: int, one: Record) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(runner.run(arrivals.at_once(2, 1, 1), send))
    assert error.group_contains(ZeroDivisionError)


# The knee ---------------------------------------------------------------------------------------------------


def _search(capacity: float, start: float, highest: float = 1e9) -> tuple[float | None, list[float]]:
    async def trial(rate: float) -> knee.Trial:
        return knee.Trial(rate, rate <= capacity, rate, 1.0, 0, False)

    found, trials = asyncio.run(knee.find_knee(trial, start, highest))
    return found, [one.rate for one in trials]


@given(st.floats(0.05, 500), st.floats(0.5, 4))
def test_the_knee_is_found_within_its_precision(capacity: float, start: float) -> None:
    found, rates = _search(capacity, start)
    if capacity < start / 64:
        assert found is None and len(rates) == 7
    else:
        assert found is not None
        assert found <= capacity < found * knee.PRECISION
        assert len(rates) < 20


def test_the_knee_is_not_looked_for_beyond_what_the_requests_can_show() -> None:
    assert _search(1e9, 1.0, highest=5.0) == (5.0, [1, 2, 4, 5])
    assert _search(1e9, 8.0, highest=5.0) == (5.0, [5])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(0, 60), st.floats(0, 10))
def test_a_run_is_given_up_only_when_it_is_certain(values: list[float], known: int, limit: float) -> None:
    p95 = float(np.percentile(values, 95))
    if knee.too_many_late(values[:known], len(values), limit):
        assert p95 > limit
    if knee.too_many_late(values, len(values), limit) is False:
        rank = sorted(values)[int(0.95 * (len(values) - 1))]
        assert rank <= limit


def test_a_lost_request_holds_nothing() -> None:
    assert knee.holds([record(0, [1], 1)], 1000.0, 1000.0)
    assert not knee.holds([record(0, [1], 1), failed("http_429")], 1000.0, 1000.0)
    assert not knee.holds([record(0, [1], 1)], 1000.1, 1000.0)
    assert not knee.holds([], None, 1000.0)
