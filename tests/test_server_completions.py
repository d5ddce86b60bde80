"""/v1/completions and /v1/responses, through the `openai` package."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from .server_harness import RunningServer, serving


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_prompts_as_texts_and_as_ids_give_the_engines_own_answers(
    client: openai.OpenAI, server: RunningServer
):
    llm = server.models["tiny"]
    texts = ["abc", "xyz"]
    expected = [llm.generate(text, max_tokens=9).text for text in texts]
    ids = [llm.encode(text) for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=9)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage is not None and answer.usage.completion_tokens == 18
    for single in (texts[0], ids[0]):
        assert (
            client.completions.create(model="tiny", prompt=single, max_tokens=9).choices[0].text
            == expected[0]
        )


def test_choices_are_numbered_prompt_by_prompt_and_streams_reassemble(client: openai.OpenAI):
    options = {
        "model": "tiny",
        "prompt": ["abc", "xyz"],
        "max_tokens": 9,
        "n": 2,
        "temperature": 1.0,
        "seed": 1,
    }
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_the_default_is_sixteen_tokens(client: openai.OpenAI):
    answer = client.completions.create(model="tiny", prompt="abc")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("most", [0, 1, 4])
def test_echo_with_log_probabilities_scores_the_prompt(
    client: openai.OpenAI, server: RunningServer, most: int
):
    llm = server.models["tiny"]
    text = "The prompt, of several chunks and pages. " * 6
    ids = llm.encode(text)
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=most, echo=True, logprobs=2)
    (choice,) = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.tokens is not None
    assert choice.text.startswith(text)
    assert choice.text == "".join(logprobs.tokens) or most
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(llm.token_logprobs(ids).tolist(), abs=1e-5)
    assert len(logprobs.tokens) == len(ids) + most
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs[1:])
    assert choice.finish_reason == "length"


def test_echo_without_log_probabilities(client: openai.OpenAI):
    answer = client.completions.create(model="tiny", prompt=["abc", "de"], max_tokens=0, echo=True)
    assert [choice.text for choice in answer.choices] == ["abc", "de"]
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is 3"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [1, 10**9]}, "is no id"),
        ({"logprobs": 50}, "logprobs is 50"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo with logprobs cannot be streamed"),
    ],
)
def test_refusals(server: RunningServer, change: dict, sentence: str):
    status, answer, _ = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 2, **change})
    assert status == 400
    assert sentence in answer["error"]["message"]


# /v1/responses --------------------------------------------------------------------------------------------


def test_a_response_and_its_events(client: openai.OpenAI, server: RunningServer):
    own = server.models["tiny"].generate(
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}], max_tokens=20
    )
    options = {"model": "tiny", "instructions": "Be brief", "input": "Hello", "max_output_tokens": 20}
    answer = client.responses.create(**options)
    assert answer.output_text == own.text
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (own.prompt_tokens, 20)
    with client.responses.stream(**options) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == own.text
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_continues_a_conversation_given_whole(client: openai.OpenAI, server: RunningServer):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"role": "user", "content": "three"},
    ]
    answer = client.responses.create(model="tiny", input=items, max_output_tokens=10)
    assert answer.output_text == server.models["tiny"].generate(messages, max_tokens=10).text
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]\.type is 'web_search'"):
        client.responses.create(model="tiny", input="x", tools=[{"type": "web_search"}])
