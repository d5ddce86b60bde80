"""Tools with a real model: the server's and the agent's answer to "What is 25 * 4 + 10?"."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import llmc
import openai
import pytest
from llmc.runtime.chat import ChatModel
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.tools.agent import Agent
from llmc.runtime.tools.calculate import calculate
from llmc.runtime.tools.local_chat import local_chat
from llmc.runtime.tools.registry import ToolBox

from .models import real_model
from .server_harness import RunningServer

pytestmark = pytest.mark.slow

QUESTION = {"role": "user", "content": "What is 25 * 4 + 10?"}
CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example 2 * (3 + 4)"}},
            "required": ["expression"],
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    out: Path = tmp_path_factory.mktemp("qwen") / "qwen.llmc"
    llmc.compile(str(real_model("qwen2.5-coder")), out, quant="keep", targets=[_target()], verdict=False)
    with RunningServer({"qwen": llmc.load(out, context=4096, max_sequences=8)}) as running:
        yield running


def _target() -> str:
    """The kernels of this machine alone: the others would only take time."""
    from llmc.runtime.cpu import supported_isas

    return f"tvm-cpu:isa={supported_isas()[-1]}"


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_server_calls_gets_the_result_and_answers(client: openai.OpenAI):
    messages: list = [QUESTION]
    called: list[str] = []
    for _ in range(4):
        answer = client.chat.completions.create(
            model="qwen", messages=messages, tools=[CALCULATE], temperature=0, max_tokens=200
        )
        (choice,) = answer.choices
        calls = choice.message.tool_calls or []
        if not calls:
            break
        assert choice.finish_reason == "tool_calls"
        messages.append(choice.message.model_dump(exclude_none=True))
        for call in calls:
            assert call.type == "function"
            expression = json.loads(call.function.arguments)["expression"]
            called.append(expression)
            result = calculate(expression)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    assert called[0].replace(" ", "") == "25*4+10"
    assert messages[2]["content"] == "110"
    assert choice.finish_reason == "stop"
    assert "110" in (choice.message.content or "")


def test_the_agent_does_the_same(server: RunningServer):
    box = ToolBox()
    box.add_builtin()
    chat = local_chat(ChatModel(server.models["qwen"]), SamplingParams(max_tokens=200))
    result = Agent(chat, box).run([QUESTION])
    assert "110" in result.text
    assert json.loads(result.calls[0].call.arguments)["expression"].replace(" ", "") == "25*4+10"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculate"}}])
def test_a_call_that_must_be_made_is_valid_and_streams_to_the_same(client: openai.OpenAI, choice):
    options = {
        "model": "qwen", "messages": [QUESTION], "tools": [CALCULATE], "tool_choice": choice,
        "temperature": 0, "parallel_tool_calls": False, "max_tokens": 200,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert whole is not None and len(whole) == 1
    jsonschema.validate(json.loads(whole[0].function.arguments), CALCULATE["function"]["parameters"])
    name, arguments, ids = "", "", set()
    for chunk in client.chat.completions.create(**options, stream=True):
        for call in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            assert call.index == 0
            assert call.function is not None
            ids |= {call.id} - {None}
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, arguments, len(ids)) == ("calculate", whole[0].function.arguments, 1)


def test_structured_answers_are_valid_by_every_way_of_asking(client: openai.OpenAI):
    ask = [{"role": "user", "content": "Describe a person named Ann, 31 years old."}]
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answers = [
        client.chat.completions.create(
            model="qwen",
            messages=ask,
            max_tokens=100,
            temperature=temperature,
            seed=seed,
            response_format=wanted,
        ).choices[0]
        for temperature, seed in ((0, 1), (1.5, 2), (1.5, 3))
    ]
    for choice in answers:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
    regex = client.chat.completions.create(
        model="qwen",
        messages=ask,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[A-Z][a-z]{2,5}"}},
    )
    assert 3 <= len(regex.choices[0].message.content or "") <= 6
    choice = client.chat.completions.create(
        model="qwen",
        messages=ask,
        max_tokens=20,
        extra_body={"structured_outputs": {"choice": ["yes.", "no*"]}},
    )
    assert choice.choices[0].message.content in ("yes.", "no*")
