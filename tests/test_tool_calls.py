"""Tool calls: what a parser finds in an answer, however the answer is cut, and what tools are refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.tool_calls import (
    FORMATS,
    CallArguments,
    CallBegin,
    Content,
    Event,
    Tool,
    ToolCall,
    collect,
    new_call_id,
    tools_from_openai,
)

NAMES = ("weather", "count-stars", "f")
TOOLS = [Tool(name) for name in NAMES]
Calls = list[tuple[str, str]]


def events_of(format: str, pieces: Sequence[str]) -> list[Event]:
    parser = FORMATS[format].parser(TOOLS)
    found = [event for piece in pieces for event in parser.push(piece)]
    return [*found, *parser.finish()]


def read(format: str, *pieces: str) -> tuple[str, Calls]:
    """(content, [(name, arguments)]), and the rules that every stream of events keeps."""
    events = events_of(format, pieces)
    begun: list[str] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(begun)
            assert re.fullmatch(r"call_[0-9a-f]{24}", event.id)
            begun.append(event.id)
        elif isinstance(event, CallArguments):
            assert event.index == len(begun) - 1
            assert event.text
        else:
            assert event.text
    assert len(set(begun)) == len(begun)
    content, calls = collect(events)
    return content, [(call.name, call.arguments) for call in calls]


def cuts(text: str) -> Iterator[list[str]]:
    """The text in two pieces, cut at every position, and in single characters."""
    for position in range(len(text) + 1):
        yield [text[:position], text[position:]]
    yield list(text)


# What answers mean -----------------------------------------------------------------------------------------

HERMES = [
    ("Just text.\n", "Just text.\n", []),
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1, {}]}}\n</tool_call>', "", [("f", '{"a": [1, {}]}')]),
    ('Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "Let me see.", [("f", "{}")]),
    ('\n\n <tool_call>{"name":"f","arguments":{}}</tool_call>\n', "", [("f", "{}")]),
    ("a <tool_call", "a <tool_call", []),
    ("<tool_call>\nnot JSON</tool_call>", "<tool_call>\nnot JSON</tool_call>", []),
    ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ('<tool_call>\n{"nam', '<tool_call>\n{"nam', []),
    # Unknown to the tools: what the model asked for is still a call, to be answered with an error.
    ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [("other", "{}")]),
    # Arguments first; in a string; absent; null; with line breaks in a string.
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\u00e9\"}"}</tool_call>',
        "",
        [("f", r'{"a": "\u00e9"}')],
    ),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": null, "id": 3}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>', "", [("f", '{"a": "x\\n\\ty"}')]),
    # Two objects in one pair of markers; two pairs; a closing marker that is missing.
    ('<tool_call>{"name": "f"}\n{"name": "weather"}</tool_call>', "", [("f", "{}"), ("weather", "{}")]),
    (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"b": 2}}\n</tool_call>\nDone.',
        "Done.",
        [("f", '{"a": 1}'), ("weather", '{"b": 2}')],
    ),
    ('<tool_call>{"name": "f"}<tool_call>{"name": "f"}', "", [("f", "{}"), ("f", "{}")]),
    # Cut off: what there is. Nonsense: as it is, up to the marker.
    ('<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
    ('<tool_call>{"name": "f", "argum', "", [("f", "")]),
    (r'<tool_call>{"name": "f", "arguments": "{\"a', "", [("f", r'"{\"a')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1 + 2}}</tool_call>.', ".", [("f", '{"a": 1 + 2}}')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [("f", "[1]}")]),
    ("</tool_call>", "</tool_call>", []),
    # Without the markers, as small models write it: of known names only.
    ('{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        '{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    ('{"name": "g", "arguments": {}}', '{"name": "g", "arguments": {}}', []),
    ('Now:\n```json\n{"name": "f", "arguments": {}}\n```', "Now:", [("f", "{}")]),
    (
        '<tool_call>{"name": "f"}\n```json\n{"name": "f"}\n```</tool_call>',
        "</tool_call>",
        [("f", "{}"), ("f", "{}")],
    ),
]
LLAMA3 = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ('\n{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}', "", [("f", "{}")] * 2),
    ('Sure.<|python_tag|>{"name": "f", "parameters": {}}', "Sure.", [("f", "{}")]),
    ('Sure: {"name": "f", "parameters": {}}', 'Sure: {"name": "f", "parameters": {}}', []),
    ('{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
    ('{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    ('{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ('<|python_tag|>print("x")', '<|python_tag|>print("x")', []),
    ('{"name": "f", "parameters": {"a": 1}} and', " and", [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {"a": oh', "", [("f", '{"a": oh')]),
]
MISTRAL = [
    ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', "", [("f", '{"a": 1}')]),
    (
        'So:\n[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "weather", "arguments": {}}]',
        "So:",
        [("f", "{}"), ("weather", "{}")],
    ),
    (
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]count-stars[CALL_ID]abcdefghi[ARGS]{}',
        "",
        [("f", '{"a": 1}'), ("count-stars", "{}")],
    ),
    ('[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    (r'[TOOL_CALLS]f[ARGS]"{\"a\": 1}"', "", [("f", '{"a": 1}')]),
    ("[TOOL_CALLS]f[ARGS]no[TOOL_CALLS]f[ARGS]{}", "", [("f", "no"), ("f", "{}")]),
    ("[TOOL_CALLS]f[ARGS", "[TOOL_CALLS]f[ARGS", []),
    ("[TOOL_CALLS]f is here", "[TOOL_CALLS]f is here", []),
    (f"[TOOL_CALLS]{'f' * 65}[ARGS]{{}}", f"[TOOL_CALLS]{'f' * 65}[ARGS]{{}}", []),
    ("[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ('[TOOL_CALLS][{"name": "f", "arguments": {"a', "", [("f", '{"a')]),
]
GEMMA = [
    (
        'Well.\n<start_function_call>call:f{a:<escape>x "y", {z}<escape>,b:[1,-2.5e3,true,null],c:{d:{}}}'
        "<end_function_call>",
        "Well.",
        [("f", '{"a": "x \\"y\\", {z}", "b": [1, -2.5e3, true, null], "c": {"d": {}}}')],
    ),
    ('<|tool_call>call:f{<|"|>a<|"|>:<|"|>\n<|"|>}<tool_call|>', "", [("f", '{"a": "\\n"}')]),
    ("<start_function_call>call:f{a: New York }<end_function_call>", "", [("f", '{"a": "New York"}')]),
    (
        "<start_function_call>call:f{}<end_function_call><start_function_call>call:weather{a:None}",
        "",
        [("f", "{}"), ("weather", '{"a": null}')],
    ),
    ("<start_function_call>call:f{a:<escape>x<esc", "", [("f", '{"a": "x<esc')]),
    ("<start_function_call>call:f{a:1,}<end_function_call>!", "!", [("f", '{"a": 1, }')]),
    ("<start_function_call>f{}", "<start_function_call>f{}", []),
    ("<start_function_call>call:f g", "<start_function_call>call:f g", []),
    ("<end_function_call>", "<end_function_call>", []),
]
JSON = [
    ('{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        '[{"name": "f", "arguments": {}}, {"arguments": {}, "name": "weather"}]',
        "",
        [("f", "{}"), ("weather", "{}")],
    ),
    ('{"name": "f", "arguments": null}\n{"name": "f"}', "", [("f", "{}"), ("f", "{}")]),
    ('{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": "x"}', []),
    ("[1, 2]", "[1, 2]", []),
    ('[{"name": "f", "arguments": {}}, 3]', ", 3]", [("f", "{}")]),
    ('{"answer": {"name": "f", "arguments": {}}}', '{"answer": {"name": "f", "arguments": {}}}', []),
    # In a fenced block, anywhere; by a known name, and that first.
    ('```json\n{"name": "f", "arguments": {}}\n```', "", [("f", "{}")]),
    ('So:\n```\n{\n  "name": "f",\n  "arguments": {}\n}\n{"name": "f"}\n```\n.', "So:.", [("f", "{}")] * 2),
    ('```json\n{"name": "my-app", "version": 1}\n```', '```json\n{"name": "my-app", "version": 1}\n```', []),
    ('```json\n{"arguments": {}, "name": "f"}\n```', '```json\n{"arguments": {}, "name": "f"}\n```', []),
    ('```json\n{"name": "f", "arguments": {"a": no', "", [("f", '{"a": no')]),
    ('```json\n{"name": "f", "arguments": {"a": no}}\n```.', ".", [("f", '{"a": no}}\n')]),
    ("```python\nprint({})\n```\n", "```python\nprint({})\n```\n", []),
    ("```js", "```js", []),
]
ANSWERS = [
    (format, *one)
    for format, answers in
    [("hermes", HERMES), ("llama3", LLAMA3), ("mistral", MISTRAL), ("gemma", GEMMA), ("json", JSON)]
    for one in answers
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "content", "calls"), ANSWERS)
def test_an_answer_means_the_same_however_it_is_cut(
    format: str, text: str, content: str, calls: Calls
) -> None:
    assert read(format, text) == (content, calls)
    for pieces in cuts(text):
        assert read(format, *pieces) == (content, calls), pieces


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.push("Hello <b") == [Content("Hello <b")]
    assert parser.push(" <tool") == [Content(" ")]
    assert parser.push("s> \n") == [Content("<tools> ")]
    assert parser.push('<tool_call>\n{"name": "wea') == []
    (begun,) = parser.push('ther"')
    assert isinstance(begun, CallBegin)
    assert (begun.index, begun.name) == (0, "weather")
    assert parser.push(', "arguments": {"city": "Gr') == [CallArguments(0, '{"city": "Gr')]
    assert parser.push('az"}') == [CallArguments(0, 'az"}')]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_writes_it_reads(format: str) -> None:
    calls = [
        ToolCall(new_call_id(), "f", '{"a": "\\u00e9 {\\"", "b": [1, true]}'),
        ToolCall("", "weather", "{}"),
    ]
    for count in (1, 2):
        content, found = read(format, FORMATS[format].write(calls[:count]))
        assert content == ""
        assert [(name, json.loads(text)) for name, text in found] == [
            (call.name, json.loads(call.arguments)) for call in calls[:count]
        ]


# Anything, cut anywhere ------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("ab_", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_ARGUMENTS = st.dictionaries(st.sampled_from(["a", "city", "n_1"]), _VALUES, max_size=3)
_CALLS = st.lists(st.tuples(st.sampled_from(NAMES), _ARGUMENTS), min_size=1, max_size=3)
_TEXT = st.text(alphabet='aé😀 \n{}"<[|', max_size=12)
_PIECES = {
    "hermes": ["<tool_call>", "</tool_call>", "arguments", "```", "json\n"],
    "llama3": ["<|python_tag|>", "parameters", ";"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "arguments"],
    "gemma": ["<start_function_call>", "call:", "<escape>", "<end_function_call>", "<|tool_call>", '<|"|>'],
    "json": ["[", "arguments", "```", "json\n"],
}
_SCRAPS = [
    "{", "}", "[", "]", '"', ":", ",", " ", "\n", "\\", "\\u00", "\ud83d", "\udc00", "é", "😀", "\0", "1",
    "-", "e9", "tru", "null", "<", "|", '"name"', '"f"', "f", '{"name": "f", ', '"a"', '": {"', "</",
    "_call>",
]  # fmt: skip


def _cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[begin:end] for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_calls_survive_any_cut(format: str, data: st.DataObject) -> None:
    given_calls: list[tuple[str, dict[str, Any]]] = data.draw(_CALLS)
    if format == "gemma":  # strings without escapes: what holds the quoting token cannot be written
        given_calls = [(n, a) for n, a in given_calls if "escape" not in json.dumps(a)]
    written = [ToolCall("", name, json.dumps(arguments)) for name, arguments in given_calls]
    before = data.draw(_TEXT.map(lambda text: f"x{text}x\n")) if format not in ("json", "llama3") else ""
    text = before + (FORMATS[format].write(written) if written else "")
    pieces = _cut(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    content, calls = read(format, *pieces)
    assert content == (before.removesuffix("\n") if written else before)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == given_calls


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nonsense_is_read_alike_in_pieces_and_never_lost(format: str, data: st.DataObject) -> None:
    scraps = st.one_of(st.sampled_from(_SCRAPS), st.sampled_from(_PIECES[format]), st.text(max_size=3))
    text = "".join(data.draw(st.lists(scraps, max_size=25)))
    whole = read(format, text)
    if not whole[1]:
        assert whole[0] == text
    assert read(format, *_cut(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))) == whole
    assert read(format, *text) == whole


_MEGABYTE = 1 << 20
HOSTILE = {
    "opening markers": lambda format: "".join(_PIECES[format][:1]),
    "an opened call": lambda format: _PIECES[format][0] + '{"name": "f", "' + _PIECES[format][-1],
    "braces": lambda format: "{",
    "brackets": lambda format: "[",
    "quotes": lambda format: '"',
    "backslashes": lambda format: "\\",
    "line breaks": lambda format: "\n",
    "surrogates": lambda format: "\ud800",
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_long_hostile_answer_keeps_nothing_waiting(format: str, kind: str) -> None:
    """In small pieces, where work that grew with what came before would not come to an end."""
    unit = HOSTILE[kind](format)
    size = _MEGABYTE if kind == "opening markers" else _MEGABYTE // 8
    text = (unit * (size // len(unit) + 1))[:size]
    parser = FORMATS[format].parser(TOOLS)
    events: list[Event] = []
    for place in range(0, len(text), 61):
        events += parser.push(text[place : place + 61])
        assert len(parser._waits) < 32  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
    events += parser.finish()
    content, calls = collect(events)
    assert content == text or calls


@pytest.mark.parametrize("depth", [99, 101, 100_000])
def test_arguments_are_nested_as_deep_as_any_reader_can_follow(depth: int) -> None:
    arguments = '{"a": ' * (depth - 1) + "{}" + "}" * (depth - 1)
    content, calls = read("hermes", f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
    assert content == ""
    if depth < 100:
        json.loads(calls[0][1])
    assert calls[0][1].startswith(arguments[:500])


@pytest.mark.parametrize(
    "value",
    ["01", "1.", ".5", "-", "1e", "+1", "nul", "NaN", "Infinity", "'a'", '"\\x"', '"\\u12g4"', "[1,]",
     '{"b":1,}', "{b:1}", "[1 2]", "{}}{", "1" * 1001],
)  # fmt: skip
def test_what_is_no_json_is_not_taken_for_it(value: str) -> None:
    assert read("hermes", f'<tool_call>{{"arguments": {{"a": {value}}}, "name": "f"}}</tool_call>')[1] == []


@pytest.mark.parametrize(
    "value", ["0", "-0.5e+10", "1E5", '"\\u00e9\\n\\/"', "[[], {}, [1, 2]]", "false", "1" * 1000]
)
def test_what_is_json_is(value: str) -> None:
    _, calls = read("hermes", f'<tool_call>{{"arguments": {{"a": {value}}}, "name": "f"}}</tool_call>')
    assert json.loads(calls[0][1]) == {"a": json.loads(value)}


def test_a_name_that_no_utf8_can_hold_is_no_name() -> None:
    text = r'<tool_call>{"name": "f\ud800", "arguments": {}}</tool_call>'
    assert read("hermes", text) == (text, [])
    unwrapped = read("hermes", r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>')[1]
    assert unwrapped[0][1].encode() == rb'{"a": "\ud800"}'


# Tools -----------------------------------------------------------------------------------------------------

GOOD = {"name": "f", "description": "does", "parameters": {"properties": {"a": {"type": "string"}}}}


def test_a_tool_from_a_request() -> None:
    tool = Tool.from_openai({"type": "function", "function": GOOD})
    assert (tool.name, tool.description) == ("f", "does")
    assert tool.parameters == {"type": "object", "properties": {"a": {"type": "string"}}}
    assert Tool.from_openai(tool.as_openai()) == tool
    bare = Tool.from_openai({"function": {"name": "g"}})
    assert (bare.description, bare.parameters["additionalProperties"]) == ("", False)
    assert [one.name for one in tools_from_openai([tool.as_openai(), bare.as_openai()])] == ["f", "g"]


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"properties": schema}
    return schema


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (3, r"tools\[0\] is no object"),
        ({"type": "retrieval"}, r"tools\[0\]\.type is 'retrieval'"),
        ({"type": "function"}, r"tools\[0\]\.function is missing"),
        ({"function": {}}, r"tools\[0\]\.function\.name is missing"),
        ({"function": {"name": "a b"}}, r"tools\[0\]\.function\.name is 'a b'; allowed: 1 to 64 letters"),
        ({"function": {"name": "f" * 65}}, r"tools\[0\]\.function\.name is"),
        ({"function": {"name": "f\n"}}, r"tools\[0\]\.function\.name is"),
        ({"function": {"name": "ümlaut"}}, r"tools\[0\]\.function\.name is"),
        ({"function": {**GOOD, "description": 3}}, r"tools\[0\]\.function\.description is 3"),
        ({"function": {**GOOD, "description": "é" * 8193}}, r"description has 16386 bytes; at most 16384"),
        ({"function": {**GOOD, "description": "\ud800"}}, r"description is not valid Unicode"),
        ({"function": {**GOOD, "parameters": []}}, r"tools\[0\]\.function\.parameters is \[\]"),
        ({"function": {**GOOD, "parameters": {"type": "array"}}}, r"parameters\.type is 'array'; allowed"),
        ({"function": {**GOOD, "parameters": _nested(65)}}, r"parameters is nested too deep"),
        ({"function": {**GOOD, "parameters": _nested(100_000)}}, r"parameters is nested too deep"),
        ({"function": {**GOOD, "parameters": {"a": "x" * 65536}}}, r"parameters has \d+ bytes; at most"),
        ({"function": {**GOOD, "parameters": {"minimum": float("nan")}}}, r"parameters is no JSON"),
        ({"function": {**GOOD, "parameters": {"title": "\udfff"}}}, r"parameters is not valid Unicode"),
    ],
)  # fmt: skip
def test_a_tool_that_is_refused_names_the_field(raw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tool.from_openai(raw)
    with pytest.raises(InputError, match=message.replace("0", "1", 1)):
        tools_from_openai([{"function": {"name": "other"}}, raw])


def test_lists_of_tools_that_are_refused() -> None:
    with pytest.raises(InputError, match=r"tools\[1\]\.function\.name 'f' is there twice"):
        tools_from_openai([{"function": GOOD}] * 2)
    with pytest.raises(InputError, match="tools is no list"):
        tools_from_openai({"function": GOOD})
    with pytest.raises(InputError, match="tools has 129 elements; at most 128"):
        tools_from_openai([{"function": {"name": f"f{number}"}} for number in range(129)])


def test_instructions_show_the_tools() -> None:
    text = FORMATS["json"].instructions([Tool("f", "does ünusual things", {"type": "object"})])
    assert text is not None
    assert '- f: does ünusual things\n  arguments: {"type": "object"}\n' in text
    assert all(FORMATS[name].instructions(TOOLS) is None for name in FORMATS if name != "json")
