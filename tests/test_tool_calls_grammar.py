"""What a model may write when it has tools: the grammar of every format, through llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import validate
from llmc.runtime.grammar import Grammar, GrammarCompiler, GrammarError
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.tool_calls import FORMATS, Tool, ToolCall, calls_or_json, collect
from llmc.runtime.tool_calls.lark import arguments_schema
from tokenizers import AddedToken

from .models import EOS, real_model, tiny_tokenizer

POINT = {
    "type": "object",
    "properties": {
        "at": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
        "label": {"type": ["string", "null"], "maxLength": 3},
    },
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(
        "calculate",
        "",
        {
            "type": "object",
            "properties": {"expression": {"type": "string"}, "digits": {"type": "integer", "minimum": 0}},
            "required": ["expression"],
        },
    ),
    Tool(
        "calendar",
        "",
        {
            "type": "object",
            "properties": {"kind": {"enum": ["day", "week 2", 3]}, "point": {"$ref": "#/$defs/Point"}},
            "required": ["point"],
            "$defs": {"Point": POINT},
        },
    ),
    Tool("free", "", {"type": "object"}),
    Tool("nothing"),
]
VALID: list[tuple[str, dict[str, Any]]] = [
    ("calculate", {"expression": '2 "+" 5\n'}),
    ("calculate", {"expression": "", "digits": 3}),
    ("calendar", {"point": {"at": [1, -2.5e3]}}),
    ("calendar", {"kind": "week 2", "point": {"at": [0], "label": None}}),
    ("calendar", {"kind": 3, "point": {"at": [0], "label": "abc"}}),
    ("free", {"a": [1, {"b": "c"}], "d": None, "e": []}),
    ("free", {}),
    ("nothing", {}),
]
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("calculator", {"expression": "2"}),
    ("calc", {"expression": "2"}),
    ("calculate", {"expression": 2}),
    ("calculate", {"digits": 2}),
    ("calculate", {"expression": "2", "digits": -1}),
    ("calculate", {"expression": "2", "more": 1}),
    ("calendar", {"point": {"at": []}}),
    ("calendar", {"point": {"at": [1, 2, 3]}}),
    ("calendar", {"point": {"at": [1], "label": "abcd"}}),
    ("calendar", {"point": {"at": ["a"]}}),
    ("calendar", {"kind": "year", "point": {"at": [1]}}),
    ("nothing", {"a": 1}),
]


@dataclass(frozen=True)
class Case:
    """A format, and the markers that are tokens of the vocabulary."""

    format: str
    tokens: tuple[str, ...] = ()
    special: bool = True
    change: tuple[tuple[str, str], ...] = ()
    """What its models write otherwise than `write` does."""

    def write(self, calls: list[tuple[str, dict[str, Any]]]) -> str:
        if self.tokens == ("[TOOL_CALLS]",):
            inner = ", ".join(
                f'{{"name": "{name}", "arguments": {json.dumps(given)}}}' for name, given in calls
            )
            return f"[TOOL_CALLS][{inner}]"
        text = FORMATS[self.format].write([ToolCall("", name, json.dumps(given)) for name, given in calls])
        for old, new in self.change:
            text = text.replace(old, new)
        return text


GEMMA = ("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = ("<|tool_call>", "<tool_call|>", '<|"|>')
CASES = [
    Case("hermes"),
    Case("hermes", ("<tool_call>", "</tool_call>")),
    Case("hermes", ("<tool_call>", "</tool_call>"), special=False),
    Case("llama3"),
    Case("llama3", ("<|python_tag|>",)),
    Case("mistral", ("[TOOL_CALLS]",)),
    Case("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    Case("mistral", ("[TOOL_CALLS]", "[ARGS]"), special=False),
    Case(
        "mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), change=(("[ARGS]", "[CALL_ID]a1B2c3D4e[ARGS]"),)
    ),
    Case("gemma"),
    Case("gemma", GEMMA),
    Case("gemma", GEMMA_4, change=tuple(zip(GEMMA, GEMMA_4, strict=True))),
    Case("json"),
]


@cache
def _compiler(tokens: tuple[str, ...], special: bool) -> tuple[Tokenizer, GrammarCompiler, int]:
    inner = tiny_tokenizer()
    inner.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    tokenizer = Tokenizer(inner)
    eos = inner.token_to_id(EOS)
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size, [eos]), eos


Accepts = Callable[[str], bool]


def _accepts(tokenizer: Tokenizer, grammar: Grammar, eos: int) -> Accepts:
    """Whether a text and its end are allowed."""

    def accepts(text: str) -> bool:
        matcher = grammar.start()
        for token in [*tokenizer.encode(text, add_special_tokens=False), eos]:
            matcher.accept(token)
        return matcher.error is None

    return accepts


@cache
def _accepts_of(case: Case, *, required: bool = False, parallel: bool = True) -> Accepts:
    tokenizer, compiler, eos = _compiler(case.tokens, case.special)
    source = FORMATS[case.format].grammar(
        TOOLS, required=required, parallel=parallel, token_id=tokenizer.token_id
    )
    return _accepts(tokenizer, compiler.lark(source), eos)


def _ids(case: Case) -> str:
    return f"{case.format}-{len(case.tokens)}{'' if case.special else '-plain'}"


@pytest.mark.parametrize("case", CASES, ids=_ids)
@pytest.mark.parametrize("required", [False, True])
def test_calls_are_held_to_the_tools(case: Case, required: bool) -> None:
    accepts = _accepts_of(case, required=required)
    assert [one for one in VALID if not accepts(case.write([one]))] == []
    assert [one for one in INVALID if accepts(case.write([one]))] == []


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_text_is_free_until_a_call_opens(case: Case) -> None:
    text, call, bad = "Let me see: { [ 1.\n", case.write(VALID[:1]), case.write(INVALID[:1])
    accepts = _accepts_of(case)
    for one in ("", "Hello", "\n\nUse `f(1)` <b>there</b>, {x} and [1].", "é😀\n" * 20, text):
        assert accepts(one), one
    assert not accepts(bad)
    assert not accepts(call[:-1])
    assert not accepts(f"{call} and more text")
    if case.format == "json":
        assert accepts(text + bad)  # not at the beginning: text to the parser, too
        return
    before = text + ("<|python_tag|>" if case.format == "llama3" else "")
    assert accepts(before + call)
    assert not accepts(before + bad)


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_required_means_a_call_and_nothing_before_it(case: Case) -> None:
    accepts = _accepts_of(case, required=True)
    assert not accepts("")
    assert not accepts("Hello")
    assert not accepts(f"Hello\n{case.write(VALID[:1])}")


@pytest.mark.parametrize("case", CASES, ids=_ids)
@pytest.mark.parametrize("required", [False, True])
def test_several_calls_only_where_they_are_allowed(case: Case, required: bool) -> None:
    two, bad = case.write([VALID[0], VALID[2]]), case.write([VALID[0], INVALID[0]])
    assert _accepts_of(case, required=required)(two)
    assert not _accepts_of(case, required=required)(bad)
    assert not _accepts_of(case, required=required, parallel=False)(two)
    assert _accepts_of(case, required=required, parallel=False)(case.write(VALID[2:3]))


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_what_the_grammar_allows_the_parser_reads(case: Case) -> None:
    parser = FORMATS[case.format].parser(TOOLS)
    text = case.write(VALID[:3])
    assert _accepts_of(case)(text)
    names = [event.name for event in [*parser.push(text), *parser.finish()] if hasattr(event, "name")]
    assert names == [name for name, _ in VALID[:3]]


def test_a_marker_that_has_a_token_is_a_call_when_it_is_spelled() -> None:
    """A parser of text sees no difference, so neither may the grammar."""
    tokenizer, compiler, eos = _compiler(("<tool_call>", "</tool_call>"), True)
    grammar = compiler.lark(
        FORMATS["hermes"].grammar(TOOLS, required=False, parallel=True, token_id=tokenizer.token_id)
    )
    call = FORMATS["hermes"].write([ToolCall("", name, json.dumps(given)) for name, given in INVALID[:1]])
    matcher = grammar.start()
    for piece in ("<tool", "_call>", call.removeprefix("<tool_call>")):
        for token in tokenizer.encode(piece, add_special_tokens=False):
            matcher.accept(token)
    assert matcher.error is not None
    del eos


LOOSE = [Case("hermes"), Case("hermes", ("<tool_call>", "</tool_call>")), Case("llama3"), Case("json")]
FORMS = {
    "bare": "%s",
    "after a line break": "\n%s",
    "in a list": "[%s]",
    "fenced": "```json\n%s\n```",
    "fenced, no language": "```\n%s```",
    "fenced, behind text": "I call a function.\n```json\n%s\n```",
}


def _object(case: Case, call: tuple[str, dict[str, Any]], indent: int | None = None, **before: Any) -> str:
    key = "parameters" if case.format == "llama3" else "arguments"
    return json.dumps({**before, "name": call[0], key: call[1]}, indent=indent)


@pytest.mark.parametrize("case", LOOSE, ids=_ids)
@pytest.mark.parametrize("form", FORMS)
def test_calls_without_markers_are_held_to_the_tools_too(case: Case, form: str) -> None:
    accepts, names = _accepts_of(case), {tool.name for tool in TOOLS}
    wrap = FORMS[form]
    assert [one for one in VALID if not accepts(wrap % _object(case, one))] == []
    assert [one for one in VALID if not accepts(wrap % _object(case, one, indent=2))] == []
    assert [one for one in VALID if not accepts(wrap % _object(case, one, type="function"))] == []
    known = [one for one in INVALID if one[0] in names]
    assert [one for one in known if accepts(wrap % _object(case, one))] == []
    two = f"{_object(case, VALID[0])}{',' if form == 'in a list' else ''}\n{_object(case, VALID[2])}"
    assert accepts(wrap % two)
    assert not _accepts_of(case, parallel=False)(wrap % two)
    assert _accepts_of(case, parallel=False)(wrap % _object(case, VALID[0]))


@pytest.mark.parametrize("case", LOOSE, ids=_ids)
def test_other_json_is_free(case: Case) -> None:
    accepts = _accepts_of(case)
    app = '{\n  "name": "my-app",\n  "arguments": 3\n}'
    for text in (
        '{"answer": [1]}',
        "[1, 2]",
        '[{"a": 1}]',
        f"```json\n{app}\n```",
        f"Here:\n```\n{app}\n```",
    ):
        assert accepts(text), text
    # Of models that are taught markers, an object with a name is a call by its name only.
    assert accepts(app) == (case.format == "hermes")
    assert accepts(_object(case, INVALID[0])) == (case.format == "hermes")


SCRAPS = [
    '{"name": ', '"calculate"', '"nothing"', '"free"', '"other"', ', "arguments": ', ', "parameters": ',
    '{"expression": 2}', '{"expression": "2"}', "{}", "}", '{"type": "x", ', '{"id": 1, ',
    '{"arguments": {}, ',
    '{"parameters": {}, ', '"name": ', "```", "json", "[", "]", ";", ",", "\n", " ", "{",
    "Text.", "`", "<tool_call>", "\n</tool_call>", "\\x", "<|python_tag|>",
    '{"name": "calculate", "arguments": ',
    '{"n\\u0061me": "calculate", "arguments": ',
]  # fmt: skip


@pytest.mark.parametrize("case", LOOSE, ids=_ids)
@settings(max_examples=200, deadline=None)
@given(scraps=st.lists(st.sampled_from(SCRAPS), max_size=9))
@example(scraps=['{"name": ', "```", '{"name": "calculate", "arguments": ', "{"])
@example(scraps=['{"name": ', "<tool_call>", '{"name": "calculate", "arguments": ', "{}"])
@example(scraps=['```{"name": "\\x', "<tool_call>", '{"name": "calculate", "arguments": ', '{}"'])
def test_no_text_that_is_allowed_holds_a_call_that_is_not(case: Case, scraps: list[str]) -> None:
    text = "".join(scraps)
    parser = FORMATS[case.format].parser(TOOLS)
    _, calls = collect([*parser.push(text), *parser.finish()])
    if not calls or not _accepts_of(case)(text):
        return
    schemas = {tool.name: arguments_schema(tool) for tool in TOOLS}
    for call in calls:
        validate(json.loads(call.arguments), schemas[call.name])


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "range": {"$ref": "#/$defs/Range"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Range": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
}


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_beside_tools_an_answer_may_have_a_form(case: Case) -> None:
    tokenizer, compiler, eos = _compiler(case.tokens, case.special)
    source = calls_or_json(FORMATS[case.format], TOOLS, WEATHER, parallel=False, token_id=tokenizer.token_id)
    accepts = _accepts(tokenizer, compiler.lark(source), eos)
    for indent in (None, 2):
        assert accepts(json.dumps({"city": "Graz", "range": [1, 2]}, indent=indent))
    for text in ("", "Graz", '{"city": 1}', '{"city": "Graz", "range": [1, 2, 3]}', '{"town": "Graz"}'):
        assert not accepts(text), text
    assert [one for one in VALID if not accepts(case.write([one]))] == []
    assert [one for one in INVALID if accepts(case.write([one]))] == []
    bare = FORMATS[case.format].bare_key is not None
    assert [accepts(_object(case, one)) for one in VALID] == [bare] * len(VALID)
    assert [one for one in INVALID if accepts(_object(case, one))] == []


def test_without_the_vocabulary_markers_are_spelled() -> None:
    tokenizer, compiler, eos = _compiler((), True)
    for name in FORMATS:
        grammar = compiler.lark(FORMATS[name].grammar(TOOLS, required=True, parallel=True))
        text = FORMATS[name].write([ToolCall("", "calculate", '{"expression": "1"}')])
        assert _accepts(tokenizer, grammar, eos)(text), name


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "pattern": "a+"}, "pattern"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "array", "prefixItems": [{}]}, "prefixItems"),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "oneOf"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "allOf"),
        ({"enum": [["a"]]}, "enum"),
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "string", "maxLength": 100_000}, "maxLength"),
        ({"type": "object", "properties": {"a:b": {}}}, "a property called 'a:b'"),
    ],
)
def test_gemma_refuses_what_its_form_cannot_keep_to(schema: dict[str, Any], keyword: str) -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": schema}})
    with pytest.raises(GrammarError, match=f"the parameters of f: {keyword} cannot be kept to") as caught:
        FORMATS["gemma"].grammar([tool], required=False, parallel=True)
    assert caught.value.keyword is not None


def test_gemma_refuses_what_no_format_takes() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}})
    with pytest.raises(GrammarError, match=r"'\$ref' of the schema at /properties/a"):
        FORMATS["gemma"].grammar([tool], required=False, parallel=True)
    chain = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(1500)} | {"d1500": {}}
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": chain})
    with pytest.raises(GrammarError):
        FORMATS["gemma"].grammar([tool], required=False, parallel=True)


def test_gemma_keeps_to_the_rest() -> None:
    tool = Tool(
        "f",
        "",
        {
            "type": "object",
            "properties": {
                "any": {},
                "either": {"anyOf": [{"type": "integer"}, {"const": "x"}]},
                "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
                "none": {"type": "array", "maxItems": 0},
                "only": {"allOf": [{"$ref": "#/$defs/Tree"}]},
            },
            "$defs": {
                "Tree": {
                    "type": "object",
                    "properties": {"in": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
                }
            },
        },
    )
    tokenizer, compiler, eos = _compiler(GEMMA, True)
    source = FORMATS["gemma"].grammar([tool], required=True, parallel=False, token_id=tokenizer.token_id)
    accepts = _accepts(tokenizer, compiler.lark(source), eos)
    text = "<start_function_call>call:f{%s}<end_function_call>"
    for good in ("", "any:1", "any:[{a:<escape>b<escape>},null],map:{k:true,l:false}", "either:-3,none:[]",
                 "either:<escape>x<escape>", "only:{in:[{},{in:[]}]}"):  # fmt: skip
        assert accepts(text % good), good
    for bad in (
        "either:<escape>y<escape>",
        "map:{k:1}",
        "none:[1]",
        "only:{out:[]}",
        "map:{},any:1",
        "any:b",
        "any:",
    ):
        assert not accepts(text % bad), bad


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2.5-coder", "smollm2"])
@pytest.mark.parametrize("format", ["hermes", "json"])
def test_with_a_published_vocabulary(model: str, format: str, tmp_path: Any) -> None:
    from llmc.frontend.source import open_source
    from llmc.frontend.tokenizer import export_tokenizer

    facts = export_tokenizer(open_source(real_model(model)), tmp_path)
    assert facts is not None
    tokenizer = Tokenizer.from_file(tmp_path / facts.path)
    eos = facts.special_token_ids["eos_token"]
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [eos])
    source = FORMATS[format].grammar(TOOLS, required=False, parallel=True, token_id=tokenizer.token_id)
    accepts = _accepts(tokenizer, compiler.lark(source), eos)
    case = Case(format)
    assert [one for one in VALID if not accepts(case.write([one]))] == []
    assert [one for one in INVALID if accepts(case.write([one]))] == []
    assert accepts(case.write(VALID[:3]))
    assert accepts("Hello.")
    assert accepts("Hello.\n" + case.write(VALID[:1]))
    assert accepts("Hello.\n" + case.write(INVALID[:1])) == (format == "json")
