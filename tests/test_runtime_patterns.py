"""Patterns of schemas: translated, they match what Python's do; what is not regular is refused."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.json_schema.patterns import PatternError, translated

from .test_runtime_json_schema import compiler, takes

ATOMS = [
    *("a", "b", ".", r"\d", r"\w", r"\s", r"\S", "[ab]", "[^a]", r"[^\s]", r"[\w-]", "[a-c[]", "[^[&&b]"),
    *("[--~]", r"\.", r"\/", "-", "&&", r"\x41", r"\u0062", r"[\]]", r"[^\]a]", "#", " ", "}", "[~~]"),
    *(r"[a\-z]", "[0-9-_]", "[-a]", "[a-]", r"\{", "é", r"\cA", r"[\b]", r"\n", r"[\d-a]"),
]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        )
    ),
    max_leaves=5,
)


@given(
    PATTERNS,
    st.sampled_from(["", "^"]),
    st.sampled_from(["", "$"]),
    st.lists(st.text("ab.AZ09 _-[]&~/{}#\té\\^|c\x01\x08", max_size=5), min_size=8, max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_translated_patterns_match_what_pythons_do(pattern: str, start: str, end: str, texts: list[str]):
    pattern = start + pattern + end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets in Python's future, which we do not have
        try:
            expected = re.compile(pattern.replace(r"\cA", r"\x01"), re.ASCII)
        except re.error:
            return
    grammar = compiler().json_schema({"type": "string", "pattern": pattern})
    for text in texts:
        assert takes(grammar, json.dumps(text, ensure_ascii=False)) == bool(expected.search(text)), text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?!a)b", "looks around, or sets flags"),
        ("(?<=a)b", "looks around, or sets flags"),
        ("(?i)a", "looks around, or sets flags"),
        (r"(a)\1", "refers to a group"),
        (r"\bword\b", "word boundary"),
        (r"\e", "unknown escape"),
        (r"\00", "octal"),
        (r"\u12", "ends in the middle"),
        (r"\ud800", "wrong escape"),
        (r"\p{", "wrong Unicode class"),
        ("[a", "ends in the middle"),
        ("(a", "not closed"),
        ("a)", "not open"),
        ("*a", "repeats nothing"),
        ("a**", "repeats nothing"),
        ("a{3,1}", "runs backwards"),
        ("a{99999999999}", "too large"),
        ("(ab){5000}", "too large"),
        ("(((a{99}){99}){99})", "too large"),
        ("a*" * 101, "too large"),
        ("(" * 40 + ")" * 40, "nested too deeply"),
        ("a" * 5000, "5000 characters"),
    ],
)
def test_patterns_that_are_not_regular_or_too_large_are_refused(pattern: str, message: str):
    with pytest.raises(PatternError, match=re.escape(message)):
        translated(pattern)


@given(st.text(st.sampled_from(r"ab()[]{}|*+?^$\.,-0123<>:=!uxpdwsS&~"), max_size=24))
@settings(max_examples=500, deadline=None)
def test_no_pattern_breaks_the_reader(pattern: str):
    try:
        text = translated(pattern)
    except PatternError as error:
        assert error.remedy  # noqa: PT017
        return
    assert text.isprintable()
