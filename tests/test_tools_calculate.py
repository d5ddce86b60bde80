"""The built-in tool `calculate`, beside Python's own arithmetic on fractions."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from llmc.runtime.tool_calls import ToolCall
from llmc.runtime.tools.calculate import MAX_DIGITS, CalculateError, compute
from llmc.runtime.tools.registry import ToolBox


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("25 * 4 + 10", "110"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333333"),
        ("2/3", "0.666666666666667"),
        ("1/3*3", "1"),
        ("10/4", "2.5"),
        ("4 / 2", "2"),
        ("-2 ** 2", "-4"),
        ("2 ^ 3 ^ 2", "512"),
        ("2 ** -1", "0.5"),
        ("--3 - +-2", "5"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("7 // 2 + -7 // 2 + -7 % 3 + 7.5 % 2", "2.5"),
        ("0 ** 0", "1"),
        ("(-1) ** 99999999999", "-1"),
        (".5 + 5. + 1.5e3 + 2E-2", "1505.52"),
        ("2 ** 100", str(2**100)),
        ("10 ** 999 // 10 ** 990", "1000000000"),
        ("1e-400 * 1e400", "1"),
        ("1e-400", "1e-400"),
        ("1 / 1024", "0.0009765625"),
        ("123456789012.34 + 0.01", "123456789012.35"),
        ("12345678901234567.89 + 0.01", "12345678901234567.9"),
        ("1e21 / 7", "1.42857142857143e20"),
        ("-1 / 3 * 1e-9", "-3.33333333333333e-10"),
        ("sqrt(16) + sqrt(9 / 4)", "5.5"),
        ("sqrt(2)", "1.4142135623731"),
        ("sqrt(2) ** 2", "2"),
        ("8 ** (1 / 3)", "2"),
        ("sin(pi)", "0"),
        ("cos(pi / 2)", "0"),
        ("sin(pi / 6)", "0.5"),
        ("tan(pi / 4)", "1"),
        ("atan(1) * 4 - pi", "0"),
        ("asin(1) + acos(1)", "1.5707963267949"),
        ("log(8, 2) + log2(8) + log10(1000)", "9"),
        ("ln(e) + log(e ** 2) + exp(0)", "4"),
        ("log(1.0000001)", "9.99999950000003e-8"),
        ("log10(10 ** 900)", "900"),
        ("abs(-3 / 4)", "0.75"),
        ("round(2.5) + round(3.5)", "6"),
        ("round(2.675, 2)", "2.68"),
        ("round(1234, -2)", "1200"),
        ("floor(-1.5) + ceil(-1.5)", "-3"),
        ("floor(pi) + ceil(pi)", "7"),
        ("min(1, 2.5, -3) + max(4)", "1"),
        ("((((1))))", "1"),
        ("0 * -1.0", "0"),
        ("\t1\n+ 1 ", "2"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert compute(expression) == value


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("", "the expression is empty"),
        (" \n", "the expression is empty"),
        ("1 +", "position 4: the expression ends too early"),
        ("(1 + 2", "position 1: this ( is never closed"),
        ("1 + 2)", "position 6: ')' is not expected here"),
        ("2 (3)", "position 3: '(' is not expected here; write * between factors"),
        ("5 5", "position 3: '5' is not expected here; write * between factors"),
        ("3 x 4", "position 3: 'x' is not expected here; write * between factors"),
        ("1,000", "position 2: ',' is not expected here; write numbers without thousands separators"),
        ("max(1,000)", "position 7: the number 000 begins with 0; write numbers without separators"),
        ("50%", "position 4: the expression ends too early; % is the remainder; for percent, write / 100"),
        ("20% of 50", "position 5: 'of' is unknown; % is the remainder; for percent, write / 100"),
        ("1 = 1", "position 3: '=' is no part of an expression"),
        ("'x' + 1", 'position 1: "\'" is no part of an expression'),
        ("١ + 1", "position 1: '١' is no part of an expression"),
        ("__import__('os')", 'position 12: "\'" is no part of an expression'),
        ("open", "position 1: 'open' is unknown; known: sqrt, sin, "),
        ("e.x", "position 2: '.' is no part of an expression"),
        ("sqrt", "position 1: sqrt needs ( and arguments"),
        ("pi(2)", "position 1: 'pi' is unknown"),
        ("sqrt()", "position 1: sqrt takes 1 argument, not 0"),
        ("log(1, 2, 3)", "position 1: log takes 1 to 2 arguments, not 3"),
        ("1 / 0", "position 3: division by zero"),
        ("1 // 0.0", "position 3: division by zero"),
        ("pi % 0", "position 4: division by zero"),
        ("0 ** -1", "position 3: division by zero"),
        ("sqrt(-1)", "position 1: the square root of a negative number is no real number"),
        ("(-8) ** (1 / 3)", "position 6: a negative number to this power is no real number"),
        ("log(0)", "position 1: the logarithm of a number that is not above 0"),
        ("log(2, 1)", "position 1: a logarithm to this base"),
        ("asin(2)", "position 1: this takes a number from -1 to 1"),
        ("tan(pi / 2)", "position 1: the tangent is not defined there"),
        ("sin(1e22)", "position 1: an angle of more than a billion"),
        ("round(1, 0.5)", "position 1: the number of digits is no whole number"),
        ("exp(1000)", "position 1: the result is too large"),
        ("pi * 10 ** 400", "position 4: the result is too large"),
        ("9 ** 9 ** 9", "position 3: a number of more than 1000 digits"),
        ("9 ^ 9 ^ 9 ^ 9", "position 7: a number of more than 1000 digits"),
        ("0.5 ** 1e9", "position 5: a number of more than 1000 digits"),
        ("10 ** 999 * 10", "position 11: a number of more than 1000 digits"),
        ("1e1001", "position 1: a number of more than 1000 digits"),
        ("1e99999999999999999999", "position 1: a number of more than 1000 digits"),
        ("(" * 60 + "1" + ")" * 60, "position 51: nested deeper than 50"),
        ("2" + "**2" * 60, "nested deeper than 50"),
        ("abs(" * 60 + "1" + ")" * 60, "nested deeper than 50"),
        ("1" * 1001, "the expression has 1001 characters; at most 1000 are read"),
    ],
)
def test_what_is_wrong_is_named_with_its_position(expression: str, sentence: str) -> None:
    with pytest.raises(CalculateError) as caught:
        compute(expression)
    assert sentence in str(caught.value)


def test_long_expressions_within_the_bounds() -> None:
    assert compute("1" + "+1" * 499) == "500"
    assert compute("-" * 999 + "1") == "-1"
    assert compute("9" * 1000) == "9" * 1000
    assert compute("(" * 50 + "1" + ")" * 50) == "1"


def test_as_a_tool() -> None:
    with ToolBox() as box:
        box.add_builtin()
        assert box.run(ToolCall("c", "calculate", '{"expression": "25 * 4 + 10"}')).content == "110"
        wrong = box.run(ToolCall("c", "calculate", '{"expression": "25 * "}'))
        assert wrong.content == "error: position 5: the expression ends too early"
        (spec,) = box.specs
        assert spec.parameters["required"] == ["expression"] and "exactly" in spec.description


# Beside Python ---------------------------------------------------------------------------------------------

_NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str),
    st.decimals(0, 1000, allow_nan=False, allow_infinity=False, places=3).map(str),
    st.sampled_from(["0", "1", "2", "1e3", "25e-2", ".5", "7."]),
)


def _join(parts: tuple[str, str, str]) -> str:
    return f"{parts[0]} {parts[1]} {parts[2]}"


_EXPRESSIONS = st.recursive(
    _NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(_join),
        st.tuples(inner, st.just("**"), st.integers(0, 4).map(str)).map(_join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(st.sampled_from(["abs", "floor", "ceil", "round"]), inner).map(lambda p: f"{p[0]}({p[1]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda p: f"{p[0]}({p[1]}, {p[2]})"),
    ),
    max_leaves=12,
)

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "abs": abs, "floor": math.floor, "ceil": math.ceil, "round": round, "min": min, "max": max,
}  # fmt: skip


class _TooLargeError(Exception):
    pass


def _python(node: ast.expr, source: str) -> Fraction:
    """The value that Python's grammar and fractions give it."""
    match node:
        case ast.Constant():
            text = ast.get_source_segment(source, node)
            assert text is not None
            return Fraction(Decimal(text))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_python(operand, source)
        case ast.BinOp(left=left, op=op, right=right):
            value = Fraction(_BINARY[type(op)](_python(left, source), _python(right, source)))
        case ast.Call(func=ast.Name(id=name), args=args):
            value = Fraction(_CALLS[name](*(_python(arg, source) for arg in args)))
        case _:
            raise AssertionError(ast.dump(node))
    if max(abs(value.numerator), value.denominator) >= 2 ** int(MAX_DIGITS * math.log2(10)):
        raise _TooLargeError
    return value


@given(_EXPRESSIONS)
def test_the_same_value_as_python(expression: str) -> None:
    assume(len(expression) <= 1000)
    try:
        expected = _python(ast.parse(expression, mode="eval").body, expression)
    except (ZeroDivisionError, _TooLargeError) as error:
        why = "division by zero" if isinstance(error, ZeroDivisionError) else "more than 1000 digits"
        with pytest.raises(CalculateError, match=why):
            compute(expression)
        return
    found = compute(expression)
    value = Fraction(Decimal(found))
    if value != expected:  # rounded to 15 digits, because it has more than 30 or no end of them
        assert expected.denominator != 1
        assert abs(value - expected) <= abs(expected) * Fraction(1, 10**14) / 2
        assert len(found.partition("e")[0].replace(".", "").strip("-0")) <= 15


@given(st.text(alphabet="0123456789.+-*/%^()e,× pisqrtmaxlog", max_size=60))
def test_any_text_gives_a_number_or_an_error(text: str) -> None:
    try:
        found = compute(text)
    except CalculateError:
        return
    assert Decimal(found).is_finite()
