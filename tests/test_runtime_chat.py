"""One turn of a conversation: what is refused, what a template gets, and how an answer is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.chat import ChatModel, TurnReader
from llmc.runtime.generation import FinishReason, StepOutput
from llmc.runtime.grammar import Grammar
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.tool_calls import FORMATS, CallBegin, Tool, ToolCall, collect

from .server_harness import fake_llm

ADD = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
ADD_1 = '{"name": "add", "arguments": {"a": 1}}'
HELLO = [{"role": "user", "content": "Hello"}]
PARAMS = SamplingParams(max_tokens=5)


@pytest.fixture(scope="module")
def model():
    with fake_llm(context=4000, kv_tokens=4000) as llm:
        yield ChatModel(llm)


def _text(model: ChatModel, messages: Any, **options: Any) -> str:
    turn = model.prepare(messages, PARAMS, **options)
    return model.llm.decode(turn.prompt_ids, skip_special_tokens=False)


def test_a_template_without_tools_is_told_of_them_in_words(model: ChatModel):
    plain = _text(model, HELLO)
    assert plain == "<user>Hello\n<assistant>"
    told = _text(model, [{"role": "system", "content": "Be brief."}, *HELLO], tools=[ADD])
    assert told.startswith("<system>Be brief.\n\n")
    assert "- add: Adds." in told and told.endswith(plain)
    assert _text(model, HELLO, tools=[ADD], tool_choice="none") == plain


def test_calls_and_results_reach_a_template_without_tools_as_text(model: ChatModel):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    text = _text(model, messages, tools=[ADD])
    assert '"add"' in text and '{"a": 1}' in text and "42" in text
    assert "<tool>" not in text


def test_special_tokens_in_results_of_tools_are_broken_up(model: ChatModel):
    special = model.llm.tokenizer.token(next(iter(model.llm.tokenizer.special_ids)))
    assert special is not None
    messages = [*HELLO, {"role": "tool", "tool_call_id": "c1", "content": f"a{special}b"}]
    ids = model.prepare(messages, PARAMS).prompt_ids
    assert not model.llm.tokenizer.special_ids.intersection(ids)
    own = model.prepare([{"role": "user", "content": special}], PARAMS).prompt_ids
    assert model.llm.tokenizer.special_ids.intersection(own), "a user writes to the model itself"


def test_a_form_of_the_answer_counts_where_no_tool_must_be_called(model: ChatModel):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    grammars = [
        model.prepare(HELLO, PARAMS, tools=[ADD], response_format=wanted, tool_choice=choice).params.grammar
        for wanted, choice in ((form, "auto"), (None, "auto"), (form, "required"), (None, "required"))
    ]
    written = {text: [_allows(model, one, text) for one in grammars] for text in ("[]", "Yes", ADD_1)}
    assert written == {
        "[]": [True, True, False, False],
        "Yes": [False, True, False, False],
        ADD_1: [True] * 4,
    }


def _allows(model: ChatModel, grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    matcher = grammar.start()
    for token in model.llm.encode(text, add_special_tokens=False):
        matcher.accept(token)
    return matcher.error is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tool_choice": "required"}, "tool_choice is required, but there are no tools"),
        ({"tools": [ADD], "tool_choice": "sub"}, "tool_choice names 'sub'; tools: add"),
        ({"response_format": {"type": "yaml"}}, "response_format.type is 'yaml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
    ],
)
def test_refusals(model: ChatModel, options: dict[str, Any], sentence: str):
    with pytest.raises(InputError, match=sentence):
        model.prepare(HELLO, PARAMS, **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"function": {"arguments": "{}"}}, r"messages\[0\].tool_calls\[0\].function.name is missing"),
        ({"function": {"name": "f", "arguments": "{"}}, "function.arguments is not JSON"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "function.arguments is no object"),
    ],
)
def test_calls_that_no_model_made_are_refused(model: ChatModel, call: Any, sentence: str):
    with pytest.raises(InputError, match=sentence):
        model.prepare([{"role": "assistant", "content": "", "tool_calls": [call]}], PARAMS)


# Reading --------------------------------------------------------------------------------------------------


def _call(name: str, value: int) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": {value}}}}}\n</tool_call>\n'


def _read(text: str, size: int, reason: FinishReason = "stop") -> tuple[TurnReader, list[Any]]:
    reader = TurnReader(FORMATS["hermes"].parser([ADD]))
    events: list[Any] = []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for number, piece in enumerate(pieces):
        last = reason if number == len(pieces) - 1 else None
        events += reader.push(StepOutput("r", 0, text=piece, finish_reason=last))
    return reader, events


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_same_call_twice_ends_the_answer(size: int):
    text = "Well. " + "".join(
        _call(*c) for c in (("add", 1), ("add", 12), ("sub", 1), ("add", 12), ("add", 3))
    )
    reader, events = _read(text, size)
    assert [(c.name, json.loads(c.arguments)["a"]) for c in reader.calls] == [
        ("add", 1),
        ("add", 12),
        ("sub", 1),
    ]
    assert reader.finish_reason == "tool_calls"
    assert collect(events) == (reader.content, reader.calls)
    assert sum(isinstance(event, CallBegin) for event in events) == 3


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_that_only_begin_alike_are_kept_whole(size: int):
    reader, events = _read(_call("add", 1) + _call("add", 1000) + _call("add", 10), size)
    assert [json.loads(c.arguments)["a"] for c in reader.calls] == [1, 1000, 10]
    assert collect(events) == (reader.content, reader.calls)


def test_an_answer_that_was_cut_says_so_even_if_it_called():
    reader, _ = _read(_call("add", 1) + "and then", 4, "length")
    assert (reader.finish_reason, len(reader.calls)) == ("length", 1)


# A call that was answered before --------------------------------------------------------------------------

ASKED = ToolCall("c1", "add", '{"a": 1}')


def _answered_reader(text: str, size: int) -> tuple[TurnReader, list[Any]]:
    format = FORMATS["hermes"]
    reader = TurnReader(format.parser([ADD]), (ASKED,), format.markers)
    events: list[Any] = []
    for start in range(0, len(text), size):
        last = "stop" if start + size >= len(text) else None
        events += reader.push(StepOutput("r", 0, text=text[start : start + size], finish_reason=last))
    return reader, events


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("arguments", ['{"a": 1}', '{\n  "a": 1\n}'])
def test_a_bare_call_that_was_just_answered_is_asked_for_as_text(size: int, arguments: str):
    reader, events = _answered_reader(f'{{"name": "add", "arguments": {arguments}}}', size)
    assert (reader.wants_prose, events, reader.calls) == (True, [], [])
    reader.into_prose()
    events = reader.push(StepOutput("r2", 0, text="It is 1.", finish_reason="stop"))
    assert (reader.content, reader.finish_reason) == ("It is 1.", "stop")
    assert collect(events) == ("It is 1.", [])


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_call_in_the_models_own_form_may_ask_again(size: int):
    reader, _ = _answered_reader(_call("add", 1), size)
    assert (reader.wants_prose, len(reader.calls), reader.finish_reason) == (False, 1, "tool_calls")


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_bare_call_with_other_arguments_is_a_call(size: int):
    reader, events = _answered_reader('{"name": "add", "arguments": {"a": 12}}', size)
    assert (reader.wants_prose, reader.finish_reason) == (False, "tool_calls")
    assert collect(events)[1] == reader.calls
    assert json.loads(reader.calls[0].arguments) == {"a": 12}


def test_the_turn_for_text_tells_the_results(model: ChatModel):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    turn = model.prepare(messages, PARAMS, tools=[ADD])
    assert turn.prose is not None
    text = model.llm.decode(turn.prose().prompt_ids)
    assert text.startswith("<user>Hello\n") and text.endswith("<assistant>")
    assert 'add({"a": 1}): 42' in text and text.count("<") == 2
    assert model.prepare(messages, PARAMS, tools=[ADD], tool_choice="required").prose is None
    assert model.prepare(HELLO, PARAMS, tools=[ADD]).prose is None
