"""Schemas: what is refused, by which keyword; what is rewritten; and that grammars take exactly what is
valid.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.grammar import Grammar, GrammarCompiler, GrammarError
from llmc.runtime.json_schema import check_schema
from llmc.runtime.tokenizer import Tokenizer

from benchmarks.grammar import FILES, Found, Row, Writer, check_file, check_row, compiler_for, rows_of

from .conftest import LONG
from .models import real_model, tiny_tokenizer

VOCAB = 384


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), VOCAB, (2,))


def takes(grammar: Grammar, text: str) -> bool:
    return Writer(tokenizer(), VOCAB).write(grammar, text)


# Refused
# ----------------------------------------------------------------------------------------------------------

STRING = {"type": "string"}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [STRING, {"$ref": "#/$defs/a"}]}}}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"not": STRING}),
        ("not", {"properties": {"a": {"items": {"not": STRING}}}}),
        ("not", {"$ref": "#/elsewhere/a", "elsewhere": {"a": {"not": STRING}}}),
        ("if", {"if": STRING, "then": {"minLength": 1}}),
        ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("contains", {"type": "array", "contains": STRING}),
        ("propertyNames", {"propertyNames": {"pattern": "^a"}}),
        ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
        ("dependentSchemas", {"dependentSchemas": {"a": STRING}}),
        ("dependencies", {"dependencies": {"a": ["b"]}}),
        ("unevaluatedProperties", {"allOf": [STRING], "unevaluatedProperties": False}),
        ("$dynamicRef", {"$dynamicRef": "#a"}),
        ("$recursiveRef", {"$recursiveRef": "#"}),
        ("disallow", {"disallow": "string"}),
        ("oneOf", {"oneOf": [{"minimum": 2}, {"maximum": 5}]}),
        ("patternProperties", {"patternProperties": {"a": STRING, "b": {"type": "null"}}}),
        ("minProperties", {"type": "object", "minProperties": 2}),
        ("minProperties", {"properties": {"a": True, "b": True}, "minProperties": 2}),
        ("format", {"type": "string", "format": "iri"}),
        ("format", {"type": "number", "format": "int32"}),
        ("format", {"type": "string", "format": "int32"}),
        ("type", {"type": "dict"}),
        ("type", {"type": []}),
        ("required", {"required": True}),
        ("required", {"required": [1]}),
        ("properties", {"properties": [STRING]}),
        ("properties", {"properties": {"a": "string"}}),
        ("properties", {"properties": {f"p{i}": True for i in range(1001)}}),
        ("items", {"items": "string"}),
        ("anyOf", {"anyOf": []}),
        ("allOf", {"allOf": STRING}),
        ("enum", {"enum": "abc"}),
        ("enum", {"enum": ["\x00"]}),
        ("const", {"const": "\x7f"}),
        ("const", {"const": 2**53 + 1}),
        ("const", {"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}),
        ("prefixItems", {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [STRING]}),
        ("minimum", {"minimum": "3"}),
        ("minimum", {"minimum": 1e300}),
        ("maximum", {"maximum": True}),
        ("maxLength", {"maxLength": 1.5}),
        ("minLength", {"minLength": -1}),
        ("multipleOf", {"multipleOf": 0}),
        ("multipleOf", {"type": "integer", "multipleOf": 1234567}),
        ("multipleOf", {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
        ("pattern", {"pattern": "(?=a)b"}),
        ("pattern", {"pattern": "(a{1000}){1000}"}),
        ("pattern", {"pattern": "a$b"}),
        ("pattern", {"pattern": "("}),
        ("$ref", {"$ref": "#/$defs/none"}),
        ("$ref", {"$ref": "https://example.com/schema.json"}),
        ("$ref", {"$ref": "file:///etc/passwd"}),
        ("$ref", {"$ref": 5}),
        ("$ref", {"$ref": "#"}),
        ("$ref", LOOP),
        ("$schema", {"$schema": "http://json-schema.org/draft-03/schema#"}),
        ("$schema", {"$schema": "https://example.com/my-own-keywords"}),
        (None, False),
        (None, {"allOf": [{"type": "string"}, {"type": "null"}], "type": "string"}),
        (None, ENDLESS),
        (None, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        (None, {"type": "object", "required": ["a"], "additionalProperties": False}),
        (None, {"enum": [float("nan")]}),
        (None, {"default": 10**400}),
        (None, {"title": "\ud800"}),
        (None, {"enum": [{1, 2}]}),
        (None, ["string"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_keyword(keyword: str | None, schema: Any):
    with pytest.raises(GrammarError) as caught:
        compiler().json_schema(schema)
    assert caught.value.keyword == keyword
    assert caught.value.remedy
    if keyword is not None:
        assert f"{keyword!r} of the schema" in caught.value.message


def test_a_refusal_names_the_place():
    schema = {"properties": {"a/b": {"items": [{"not": {}}]}}}
    with pytest.raises(GrammarError, match=re.escape("'not' of the schema at /properties/a~1b/items/0 is")):
        check_schema(schema)


def nested(depth: int) -> Any:
    schema: Any = True
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_depth_and_size_are_bounded():
    assert check_schema(nested(90)).schema == nested(90)
    for depth in (97, 60_000):
        with pytest.raises(GrammarError, match="nested more than 96 deep"):
            check_schema(nested(depth))
    with pytest.raises(GrammarError, match="more than 50000 values"):
        check_schema({"examples": list(range(60_000))})
    with pytest.raises(GrammarError, match=r"the schema has \d+ bytes"):
        compiler().json_schema({"description": "x" * 300_000})


def doubling(depth: int) -> dict[str, Any]:
    """2**depth schemas once every reference with something beside it is written out."""
    definitions: dict[str, Any] = {f"s{depth}": {"type": "null"}}
    for index in range(depth):
        part = {"type": "object", "$ref": f"#/$defs/s{index + 1}"}
        definitions[f"s{index}"] = {"type": "object", "properties": {"x": part, "y": part}}
    return {"$ref": "#/$defs/s0", "$defs": definitions}


def test_a_schema_that_would_fill_the_memory_dies_in_a_trial():
    with pytest.raises(GrammarError, match="too much memory or time"):
        compiler().json_schema(doubling(40))
    compiler().json_schema(doubling(4))


def test_long_chains_of_references_do_not_overflow_the_stack(tmp_path: Path):
    """In a process of its own, for a failure would end this one."""
    program = """if True:
        import sys
        from pathlib import Path
        from llmc.runtime.grammar import GrammarCompiler
        from llmc.runtime.tokenizer import Tokenizer
        links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5000)}
        schema = {"$ref": "#/$defs/d0", "$defs": {**links, "d5000": {"type": "null"}}}
        compiler = GrammarCompiler(Tokenizer.from_file(Path(sys.argv[1])), 384, (2,))
        print(compiler.json_schema(schema).start().forced())
    """
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer().to_json())
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == str(tokenizer().encode("null", add_special_tokens=False))


# Accepted
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (True, ["1", '"a"', "{}"], ["x"]),
        ({"title": "t", "x-own": {"not": {}}, "nullable": True, "default": {"not": 1}}, ["null"], []),
        ({"$defs": {"unused": {"not": {}}}, "type": "null"}, ["null"], ["1"]),
        ({"x-guidance": {"lenient": True}, "type": "null"}, ["null"], ["1"]),
        ({"type": "array", "uniqueItems": False, "items": {"type": "null"}}, ["[null,null]"], ["[1]"]),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[]", "[1]"], ["[1,1]"]),
        ({"if": {"type": "string"}, "type": "null"}, ["null"], ["1"]),
        ({"unevaluatedProperties": False, "properties": {"a": True}}, ['{"a":1}', "3"], ['{"b":1}']),
        (
            {"type": "array", "prefixItems": [{"type": "null"}], "unevaluatedItems": False},
            ["[null]"],
            ["[null,1]"],
        ),
        ({"type": "integer", "format": "int32"}, ["2147483647", "-2147483648"], ["2147483648"]),
        ({"type": ["integer", "null"], "format": "uint8"}, ["255", "null"], ["256", "-1"]),
        ({"type": "integer", "format": "int64"}, ["9007199254740993"], ["9223372036854775808"]),
        ({"type": "number", "format": "double"}, ["1.5"], []),
        ({"type": "string", "format": "password"}, ['"a"'], ["1"]),
        ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-2-29"', '"29.2.2024"']),
        ({"type": "string", "maxLength": 2.0}, ['"aé"'], ['"abc"']),
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, ["4"], ["3"]),
        (
            {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
            ["0.1", "0.5"],
            ["0", "-0", "0.0", "0.6"],
        ),
        ({"type": "number", "maximum": 0, "exclusiveMaximum": True, "minimum": -0.5}, ["-0.5"], ["0", "-0"]),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, ["1.01"], ["1", "1.0", "1.5"]),
        ({"type": "integer", "exclusiveMinimum": 0}, ["1"], ["0", "-1"]),
        ({"type": "integer", "multipleOf": 3.0}, ["-6", "0"], ["4"]),
        ({"type": "number", "multipleOf": 0.01}, ["1.25", "3"], ["0.005"]),
        ({"type": "string", "pattern": "^[a[]+$"}, ['"a["'], ['"b"']),
        ({"type": "string", "pattern": "^[0-9-_.]+$"}, ['"1-_"'], ['":"']),
        ({"type": "string", "pattern": "^{id}$"}, ['"{id}"'], ['"id"']),
        ({"type": "string", "pattern": "a{2,9}"}, ['"xaay"'], ['"xay"']),
        ({"type": "string", "pattern": "^.$"}, ['"é"'], ['"\\n"', '"\\r"']),
        ({"type": "object", "patternProperties": {"^a": {"type": "null"}}}, ['{"ab":null}'], ['{"ab":1}']),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ["null", '"a"'], ["1"]),
        ({"enum": ["a\nb", None, 2.5]}, ['"a\\nb"', "null", "2.5"], ['"a"', "2"]),
        ({"type": "object", "minProperties": 1}, ['{"a":1}'], ["{}"]),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "$ref": "#/definitions/a",
                "minimum": 5,
                "definitions": {"a": {"type": "integer"}},
            },
            ["3"],
            ['"a"'],
        ),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, ["6"], ["3", '"a"']),
        (
            {
                "$id": "https://x.y/z",
                "$ref": "a#n",
                "$defs": {"q": {"$id": "a", "$anchor": "n", "type": "null"}},
            },
            ["null"],
            ["1"],
        ),
        (
            {
                "type": "object",
                "properties": {"next": {"$ref": "#"}, "v": {"type": "null"}},
                "required": ["v"],
                "additionalProperties": False,
            },
            ['{"next":{"v":null},"v":null}'],
            ['{"next":{},"v":null}'],
        ),
    ],
)
def test_schemas_mean_what_they_say(schema: Any, valid: list[str], invalid: list[str]):
    grammar = compiler().json_schema(schema)
    assert [text for text in valid if not takes(grammar, text)] == []
    assert [text for text in invalid if takes(grammar, text)] == []


def test_a_name_has_one_spelling_where_others_are_allowed():
    grammar = compiler().json_schema({"properties": {"a": {"type": "integer"}}})
    assert takes(grammar, '{"a":1}')
    assert takes(grammar, '{"b":"x"}')
    assert not takes(grammar, '{"a":"x"}')
    assert not takes(grammar, r'{"\u0061":"x"}'), "another spelling of a"
    assert not takes(grammar, r'{"\u0062":"x"}'), "the price"
    closed = compiler().json_schema({"properties": {"a": {"type": "string"}}, "additionalProperties": False})
    assert takes(closed, r'{"a":"\u0001"}')


def test_whitespace_is_what_models_write_and_never_endless():
    grammar = compiler().json_schema({"type": "object"})
    value = {"a": [1, {"b": None}], "c": "d"}
    for options in ({}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}):
        assert takes(grammar, json.dumps(value, **options))
    assert takes(grammar, '{"a" : 1}')
    assert not takes(grammar, '{"a":  1}')
    assert not takes(grammar, '{\n\n"a":1}')
    assert not takes(grammar, "{\n" + " " * 41 + '"a":1}')
    assert not takes(grammar, ' {"a":1}')


def test_a_request_comes_in_the_schemas_order():
    grammar = compiler().json_schema({"type": "object", "properties": {"b": True, "a": True}})
    assert takes(grammar, '{"b":1,"a":2}')
    assert not takes(grammar, '{"a":2,"b":1}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
KEYWORDS = (
    *(
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "items",
    ),
    *("prefixItems", "additionalItems", "minItems", "maxItems", "minLength", "maxLength", "minProperties"),
    *("maxProperties", "pattern", "format", "minimum", "exclusiveMinimum", "multipleOf", "allOf", "anyOf"),
    *("oneOf", "not", "if", "then", "contains", "minContains", "uniqueItems", "unevaluatedItems", "$ref"),
    *("$id", "id", "$anchor", "$defs", "definitions", "$schema", "x-guidance", "title"),
)
LIKELY = st.sampled_from(
    ["string", "integer", "int32", "object", "#/$defs/a", "#", "array", "^a", ["a"], 1, True]
)
JUNK = st.recursive(
    JSON,
    lambda inner: st.dictionaries(
        st.sampled_from(KEYWORDS), LIKELY | inner | st.lists(inner, max_size=2), max_size=4
    ),
    max_leaves=8,
)


@given(JUNK)
@settings(max_examples=600, deadline=None)
def test_whatever_a_client_sends_is_compiled_or_refused(schema: Any):
    try:
        grammar = compiler().json_schema(schema)
    except GrammarError as error:
        assert error.remedy  # noqa: PT017
        return
    assert not grammar.start().is_finished


# Against public schemas
# ----------------------------------------------------------------------------------------------------------


def public_rows(folder: Path) -> list[Row]:
    return [row for file in FILES.values() for row in rows_of(folder / "jsonschema" / file)]


def test_a_sample_of_public_schemas(shared_data: Path):
    writer, found = Writer(tokenizer(), VOCAB), Found()
    rows = public_rows(shared_data)
    random.Random(5).shuffle(rows)
    accepted = 0
    for row in rows[:60]:
        try:
            grammar = compiler().json_schema(row.schema)
        except GrammarError:
            continue
        check_row(row, grammar, writer, found)
        accepted += 1
    assert accepted > 30
    assert found.valid > 30
    assert found.invalid > 30
    assert found.mismatches == []


@pytest.mark.slow
def test_all_public_schemas(shared_data: Path):
    real_model("qwen2.5-coder")
    compile_for, words, vocab_size = compiler_for("qwen2.5-coder")
    rows = list(public_rows(shared_data))[:: 1 if LONG else 3]
    found = check_file(rows, compile_for, Writer(words, vocab_size))
    assert found.mismatches == []
    assert found.accepted > 0.7 * found.schemas


# Against another implementation
# ----------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-20, 120) | st.sampled_from([0.5, -0.25, 99.99, 0.1, 1e6, 1e-3, 2**31 - 1, -(2**31)])
TEXTS = st.text('abcxyz19 é"\\\nf', max_size=6)
SCALARS = NUMBERS | TEXTS | st.sampled_from([None, True, False])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "é", 'x"y', "pp"]), inner, max_size=3)
    ),
    max_leaves=5,
)


def with_some(base: dict[str, Any], options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=options).map(lambda chosen: {**base, **chosen})


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "é", 'x"y'])
    few = st.lists(inner, min_size=1, max_size=2)
    return (
        with_some(
            {"type": "array"},
            {
                "items": inner,
                "prefixItems": few,
                "minItems": st.integers(0, 3),
                "maxItems": st.integers(1, 4),
            },
        )
        | with_some(
            {"type": "object"},
            {
                "properties": st.dictionaries(names, inner, max_size=3),
                "required": st.lists(names, max_size=2, unique=True),
                "additionalProperties": st.booleans() | inner,
                "patternProperties": st.dictionaries(st.sampled_from(["^p", "[b-q]$"]), inner, max_size=1),
                "minProperties": st.integers(0, 2),
                "maxProperties": st.integers(0, 3),
            },
        )
        | st.builds(
            lambda keyword, parts: {keyword: parts}, st.sampled_from(["anyOf", "allOf", "oneOf"]), few
        )
        | st.builds(lambda schema, parts: {**schema, "allOf": parts}, inner, few)
    )


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SCHEMAS = st.recursive(
    with_some(
        {"type": "integer"}, {**dict.fromkeys(BOUNDS, NUMBERS), "multipleOf": st.sampled_from([1, 3, 7])}
    )
    | with_some({"type": "number"}, dict.fromkeys(BOUNDS, NUMBERS))
    | with_some(
        {"type": "string"},
        {
            "minLength": st.integers(0, 4),
            "maxLength": st.integers(2, 6),
            "pattern": st.sampled_from(["^a", "[a-c]", r"\d", "^.{2}", "a|b", "[^a]", "^(foo|ab)"]),
        },
    )
    | st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}])
    | st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    containers,
    max_leaves=6,
)


@given(SCHEMAS, st.lists(VALUES, min_size=5, max_size=5), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_grammars_agree_with_a_validator(schema: Any, values: list[Any], seed: int):
    """What a grammar writes at random is valid; what the validator takes can be written, and no more."""
    import jsonschema

    validator: Any = jsonschema.Draft202012Validator(schema)
    try:
        grammar = compiler().json_schema(schema)
    except GrammarError:
        return
    text = written_at_random(grammar, seed)
    if text is not None:
        assert validator.is_valid(json.loads(text)), text
    writer = Writer(tokenizer(), VOCAB)
    for value in values:
        assert writer.write_in_some_order(grammar, value, 3000) == validator.is_valid(value), value


def written_at_random(grammar: Grammar, seed: int) -> str | None:
    """An answer whose tokens are drawn from the masks; None where it does not end."""
    import numpy as np

    rng, matcher = np.random.default_rng(seed), grammar.start()
    row, ids = np.zeros(VOCAB // 32, np.int32), list[int]()
    for count in range(200):
        matcher.fill(row)
        assert matcher.error is None
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        ends = [
            token
            for token in allowed
            if count > 60 and tokenizer().decode([token]).strip() in {'"', "}", "]"}
        ]
        ids.append(2 if 2 in allowed else int(rng.choice(ends or allowed)))
        matcher.accept(ids[-1])
        if matcher.is_finished:
            return tokenizer().decode([token for token in ids if token != 2])
    return None
