"""/v1/chat/completions, /v1/models and the tokenizer's endpoints, through the `openai` package."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator

import openai
import pytest
from llmc.runtime.server import ServerSettings

from .server_harness import RunningServer, fake_llm, serving

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed_with_their_facts(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.llmc["context_length"] == 400  # pyright: ignore[reportAttributeAccessIssue]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="served here; there are: tiny"):
        client.models.retrieve("gpt-5")


def test_an_answer_is_the_engines_own(client: openai.OpenAI, server: RunningServer):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12)
    own = server.models["tiny"].generate(HELLO, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == own.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own.prompt_tokens, 12)
    assert answer.usage.total_tokens == own.prompt_tokens + 12


def test_a_stream_reassembles_to_the_answer(client: openai.OpenAI):
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "n": 3, "temperature": 1.0, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    texts = ["", "", ""]
    reasons = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert reasons == dict.fromkeys(range(3), "length")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 120
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_async_client_and_many_requests_at_once(server: RunningServer):
    llm = server.models["tiny"]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"{number}"}], max_tokens=20, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    expected = [
        llm.generate([{"role": "user", "content": f"{number}"}], max_tokens=20).text for number in range(20)
    ]
    assert asyncio.run(all_of_them()) == expected


def test_stop_seed_bias_and_penalties_reach_the_sampler(client: openai.OpenAI, server: RunningServer):
    def text(**options) -> str:
        return (
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, **options)
            .choices[0]
            .message.content
            or ""
        )

    plain = text()
    stop = plain[5:7]
    assert text(stop=[stop]) == plain[: plain.index(stop)]
    assert text(temperature=1.0, seed=3) == text(temperature=1.0, seed=3) != text(temperature=1.0, seed=4)
    letter = server.models["tiny"].encode("Q")[0]
    assert text(logit_bias={str(letter): 100}) == "Q" * 30
    assert text(frequency_penalty=2.0) != plain
    assert text(extra_body={"top_k": 1, "temperature": 1.0}) == plain


def test_log_probabilities(client: openai.OpenAI, server: RunningServer):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0  # greedy: the chosen one is the likeliest
        assert entry.bytes == entry.top_logprobs[0].bytes
    said = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode(errors="replace")
    assert said == answer.choices[0].message.content
    own = server.models["tiny"].generate(HELLO, max_tokens=5, logprobs=3).choices[0]
    assert [entry.logprob for entry in logprobs.content] == pytest.approx([e.logprob for e in own.logprobs])
    streamed = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert entries == logprobs.content


def test_texts_in_parts_are_read_and_images_are_refused_by_name(client: openai.OpenAI):
    parts = [{"type": "text", "text": "Hello"}]
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=8
    )
    second = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8)
    assert first.choices[0].message.content == second.choices[0].message.content
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\]\.content\[1\] is of type 'image_url'"
    ) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [*parts, image]}])
    assert caught.value.param == "messages[0].content[1]"


def test_prompts_that_are_too_long_are_refused_with_both_counts_unless_cutting_is_asked_for(
    client: openai.OpenAI, server: RunningServer
):
    long = [{"role": "user", "content": "x" * 500}]
    with pytest.raises(openai.BadRequestError, match="context_length_exceeded") as caught:
        client.chat.completions.create(model="tiny", messages=long)
    error = caught.value.body
    assert isinstance(error, dict)
    tokens = len(server.models["tiny"].prompt_ids(long))
    assert (error["code"], error["prompt_tokens"], error["limit"]) == ("context_length_exceeded", tokens, 400)
    cut = client.chat.completions.create(
        model="tiny", messages=long, max_tokens=4, extra_body={"truncate_prompt_tokens": 100}
    )
    assert cut.usage is not None and cut.usage.prompt_tokens == 100


def test_tokens_of_texts_and_conversations(server: RunningServer):
    llm = server.models["tiny"]
    status, answer, _ = server.post("/tokenize", {"prompt": "héllo", "return_token_strs": True})
    assert (status, answer["tokens"]) == (200, llm.encode("héllo"))
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]})[1] == {"prompt": "héllo"}
    status, answer, _ = server.post("/tokenize", {"messages": HELLO})
    assert answer["tokens"] == llm.prompt_ids(HELLO)
    assert server.post("/tokenize", {})[0] == 400
    assert server.post("/detokenize", {"tokens": [10**6]})[0] == 400


def test_several_models_in_one_server():
    with RunningServer({"one": fake_llm(), "two": fake_llm()}) as server:
        body = {"messages": HELLO, "max_tokens": 3}
        status, answer, _ = server.post("/v1/chat/completions", body)
        assert (status, answer["error"]["param"]) == (400, "model")
        assert [m["id"] for m in server.get("/v1/models")[1]["data"]] == ["one", "two"]
        for name in ("one", "two"):
            status, answer, _ = server.post("/v1/chat/completions", {**body, "model": name})
            assert (status, answer["model"]) == (200, name)


def test_health_metrics_and_the_description(server: RunningServer):
    assert server.get("/health")[:2] == (200, {"status": "ok"})
    assert server.get("/ready")[:2] == (200, {"status": "ok"})
    server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 7})
    status, text, headers = server.get("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers['vllm:generation_tokens_total{model_name="tiny"}']) >= 7
    assert float(numbers['vllm:num_requests_running{model_name="tiny"}']) == 0
    assert float(numbers['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) >= 1
    finished = 'vllm:request_success_total{finished_reason="length",model_name="tiny"}'
    assert float(numbers[finished]) >= 1
    if sys.platform == "linux":
        assert float(numbers["process_resident_memory_bytes"]) > 1e7
    status, description, _ = server.get("/openapi.json")
    assert status == 200 and "/v1/chat/completions" in description["paths"]


def test_events_are_one_line_each_and_end_with_done(server: RunningServer):
    body = {"messages": HELLO, "max_tokens": 5, "stream": True}
    status, text, headers = server.post("/v1/chat/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-accel-buffering"] == "no"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_keys(server: RunningServer):
    with serving(settings=ServerSettings(api_keys=("s3cret", "other"))) as guarded:
        assert guarded.get("/v1/models")[0] == 401
        for wrong in ("Bearer s3cre", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cret2"):
            status, answer, headers = guarded.get("/v1/models", headers={"Authorization": wrong})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        for right in ("Bearer s3cret", "bearer other"):
            assert guarded.get("/v1/models", headers={"Authorization": right})[0] == 200
        assert guarded.get("/health")[0] == 200
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="s3cret")
        assert client.models.list().data[0].id == "tiny"
        client.close()


def test_other_hosts_and_origins_are_refused():
    settings = ServerSettings(allowed_hosts=("127.0.0.1",), allowed_origins=("https://mine.example",))
    with serving(settings=settings) as server:
        assert server.get("/health")[0] == 200
        assert server.get("/health", headers={"Host": "evil.example"})[1]["error"]["code"] == "wrong_host"
        evil = {"Origin": "https://evil.example"}
        assert server.get("/v1/models", headers=evil)[1]["error"]["code"] == "wrong_origin"
        mine = {"Origin": "https://mine.example"}
        assert server.get("/v1/models", headers=mine)[2]["access-control-allow-origin"] == mine["Origin"]
        status, _, headers = server.request("OPTIONS", "/v1/models", headers=mine)
        assert (status, headers["access-control-allow-origin"]) == (204, mine["Origin"])
        own = {"Origin": f"http://127.0.0.1:{server.port}"}
        assert server.get("/v1/models", headers=own)[0] == 200
