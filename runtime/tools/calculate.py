"""The built-in tool `calculate`: arithmetic, by a parser of its own.

    sum     = product {("+" | "-") product}
    product = sign {("*" | "×" | "·" | "/" | "÷" | "//" | "%") sign}
    sign    = {"+" | "-" | "−"} power
    power   = atom [("**" | "^") sign]
    atom    = number | constant | function "(" sum {"," sum} ")" | "(" sum ")"

Precedence, `//` and `%` are Python's, and so is `round` (halves to even). Nothing is evaluated as Python.

Numbers are fractions as long as they can be: 0.1 + 0.2 is 3/10 and is written 0.3, 2 ** 100 keeps every
digit, and 1/3*3 is 1. Roots that do not come out, logarithms and the like are floats, and whatever they touch
is one from there on. What is written: whole numbers in full; fractions with up to 30 significant digits where
that is all of them; anything else rounded to 15, which is what a float holds for certain.

Everything is bounded, so that no expression takes long: its length, its depth, the digits of every number.
9**9**9 is refused before it is computed.
"""

from __future__ import annotations

import contextlib
import decimal
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

from ...ir.errors import InputError
from .function import tool

MAX_LENGTH = 1000
MAX_DEPTH = 50
MAX_DIGITS = 1000

Value = Fraction | float

_MAX_BITS = int(MAX_DIGITS * math.log2(10))
_EXACT_DIGITS, _ROUNDED_DIGITS = 30, 15
_MAX_ANGLE = 1e9

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|"
    r"(?P<symbol>\*\*|//|[-+*/%^(),×÷·−]))"
)
_SAME = {"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-"}
_PERCENT = "% is the remainder; for percent, write / 100"
_CONSTANTS = {"pi": math.pi, "e": math.e}


class CalculateError(InputError):
    """An expression that cannot be computed; the message says where it goes wrong and why."""


@tool
def calculate(expression: str) -> str:
    """Compute an arithmetic expression exactly, for example "25 * 4 + 10" or "sqrt(2) ** 3 / (1 - 0.1)".

    Args:
        expression: Numbers, + - * / // % ** and parentheses, pi, e, and functions: sqrt, sin (of radians),
            log (natural), log(x, base), exp, abs, round, floor, ceil, min, max and the like.
    """
    return compute(expression)


def compute(expression: str) -> str:
    """The value of an expression, as text. Raises CalculateError with the position of what is wrong."""
    if len(expression) > MAX_LENGTH:
        raise CalculateError(
            f"the expression has {len(expression)} characters", remedy=f"at most {MAX_LENGTH} are read"
        )
    return written(_Parser(expression).parse())


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int
    """Of its first character, from 1."""


def _tokens(expression: str) -> list[_Token]:
    found: list[_Token] = []
    at, end = 0, len(expression.rstrip())
    while at < end:
        match = _TOKEN.match(expression, at, end)
        if match is None:
            at += len(expression[at:]) - len(expression[at:].lstrip())
            raise _wrong(f"{expression[at]!r} is no part of an expression", at + 1)
        kind = str(match.lastgroup)
        text = match.group(kind)
        found.append(_Token(kind, _SAME.get(text, text), match.start(kind) + 1))
        at = match.end()
    return [*found, _Token("end", "", end + 1)]


def _wrong(what: str, position: int, remedy: str = "") -> CalculateError:
    return CalculateError(f"position {position}: {what}", remedy=remedy)


class _Parser:
    """Recursive descent that computes as it goes."""

    def __init__(self, expression: str) -> None:
        self._tokens = _tokens(expression)
        self._index = 0
        self._depth = 0

    def parse(self) -> Value:
        if self._next.kind == "end":
            raise CalculateError("the expression is empty", remedy='give one, as in "2 + 3"')
        value = self._sum()
        if self._next.kind != "end":
            self._fail_at_next()
        return value

    @property
    def _next(self) -> _Token:
        return self._tokens[self._index]

    def _take(self, *symbols: str) -> _Token | None:
        """The next token where it is one of these symbols."""
        token = self._next
        if token.kind != "symbol" or token.text not in symbols:
            return None
        self._index += 1
        return token

    def _fail_at_next(self) -> NoReturn:
        token = self._next
        remedy = ""
        if self._after_percent(self._index):
            remedy = _PERCENT
        elif token.text == ",":
            remedy = "write numbers without thousands separators"
        elif token.kind in ("number", "name") or token.text == "(":
            remedy = "write * between factors"
        what = f"{token.text[:40]!r} is not expected here" if token.text else "the expression ends too early"
        raise _wrong(what, token.position, remedy)

    def _after_percent(self, index: int) -> bool:
        return index > 0 and self._tokens[index - 1].text == "%"

    def _enter(self, token: _Token) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _wrong(f"nested deeper than {MAX_DEPTH}", token.position)

    def _sum(self) -> Value:
        value = self._product()
        while (sign := self._take("+", "-")) is not None:
            value = _binary(sign, value, self._product())
        return value

    def _product(self) -> Value:
        value = self._sign()
        while (sign := self._take("*", "/", "//", "%")) is not None:
            value = _binary(sign, value, self._sign())
        return value

    def _sign(self) -> Value:
        negative = False
        while (sign := self._take("+", "-")) is not None:
            negative ^= sign.text == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Value:
        base = self._atom()
        sign = self._take("**")
        if sign is None:
            return base
        self._enter(sign)
        exponent = self._sign()
        self._depth -= 1
        return _computed(sign, lambda: _power(base, exponent))

    def _atom(self) -> Value:
        token = self._next
        if token.kind == "number":
            self._index += 1
            return _number(token)
        if token.kind == "name":
            self._index += 1
            return self._named(token)
        if self._take("(") is None:
            self._fail_at_next()
        self._enter(token)
        value = self._sum()
        self._close(token)
        return value

    def _close(self, opened: _Token) -> None:
        if self._take(")") is None:
            if self._next.kind == "end":
                raise _wrong("this ( is never closed", opened.position)
            self._fail_at_next()
        self._depth -= 1

    def _named(self, name: _Token) -> Value:
        opened = self._take("(")
        if name.text in _CONSTANTS and opened is None:
            return _CONSTANTS[name.text]
        if name.text not in _FUNCTIONS:
            known = f"known: {', '.join([*_FUNCTIONS, *_CONSTANTS])}"
            before = self._index - (1 if opened is None else 2)
            remedy = _PERCENT if self._after_percent(before) else known
            raise _wrong(f"{name.text[:40]!r} is unknown", name.position, remedy)
        if opened is None:
            raise _wrong(f"{name.text} needs ( and arguments", name.position)
        self._enter(opened)
        arguments: list[Value] = []
        if self._next.text != ")":
            arguments.append(self._sum())
            while self._take(",") is not None:
                arguments.append(self._sum())
        self._close(opened)
        function = _FUNCTIONS[name.text]
        if not function.least <= len(arguments) <= function.most:
            raise _wrong(f"{name.text} takes {function.takes}, not {len(arguments)}", name.position)
        return _computed(name, lambda: function.compute(*arguments))


def _number(token: _Token) -> Fraction:
    digits, _, exponent = token.text.lower().partition("e")
    whole = digits.partition(".")[0]
    if len(whole) > 1 and whole.startswith("0"):
        raise _wrong(
            f"the number {token.text[:40]} begins with 0", token.position, "write numbers without separators"
        )
    if len(digits) > MAX_DIGITS or len(exponent.lstrip("+-0")) > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        raise _wrong(f"a number of more than {MAX_DIGITS} digits", token.position)
    return Fraction(token.text)


def _binary(sign: _Token, left: Value, right: Value) -> Value:
    return _computed(sign, lambda: _OPERATORS[sign.text](left, right))


def _computed(token: _Token, compute: Callable[[], Value]) -> Value:
    """The value, within bounds; a failure gets the token's position."""
    try:
        value = compute()
    except ZeroDivisionError:
        raise _wrong("division by zero", token.position) from None
    except OverflowError:
        raise _wrong("the result is too large", token.position) from None
    except ValueError as error:
        raise _wrong(str(error), token.position) from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _wrong("the result is too large", token.position)
    elif max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _wrong(f"a number of more than {MAX_DIGITS} digits", token.position)
    return value


_OPERATORS: dict[str, Callable[[Any, Any], Value]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda left, right: _whole(left // right),
    "%": operator.mod,
}


def _whole(value: int | float) -> Value:
    """A whole number that came as int or float."""
    return value if isinstance(value, float) and not math.isfinite(value) else Fraction(value)


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        # Powers of 0, 1 and -1 stay small whatever the exponent.
        if abs(base) in (0, 1):
            if base == 0 and exponent < 0:
                raise ZeroDivisionError
            return Fraction(1) if exponent == 0 else base if exponent % 2 else abs(base)
        if (size - 1) * abs(exponent) > _MAX_BITS:
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        return base**exponent.numerator
    if base < 0 and not float(exponent).is_integer():
        raise ValueError("a negative number to this power is no real number")
    return float(base) ** float(exponent)


# Functions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    compute: Callable[..., Value]
    least: int = 1
    most: int = 1

    @property
    def takes(self) -> str:
        if self.least == self.most:
            return f"{self.least} argument{'s' if self.least > 1 else ''}"
        return f"{self.least} to {self.most} arguments"


def _sqrt(value: Value) -> Value:
    if value < 0:
        raise ValueError("the square root of a negative number is no real number")
    if isinstance(value, Fraction):
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if top * top == value.numerator and bottom * bottom == value.denominator:
            return Fraction(top, bottom)
    return math.sqrt(value)


def _log(value: Value, base: Value | None = None) -> Value:
    if value <= 0:
        raise ValueError("the logarithm of a number that is not above 0")
    if base is None:
        return _natural(value)
    if base <= 0 or base == 1:
        raise ValueError("a logarithm to this base")
    result = _natural(value) / _natural(base)
    if isinstance(value, Fraction) and isinstance(base, Fraction):
        with contextlib.suppress(ValueError):  # a power that is too large is not the value either
            if _power(base, power := Fraction(round(result))) == value:
                return power
    return result


def _natural(value: Value) -> float:
    if isinstance(value, float):
        return math.log(value)
    if abs(value - 1) < Fraction(1, 2):
        return math.log1p(float(value - 1))
    return math.log(value.numerator) - math.log(value.denominator)  # each may be larger than any float


def _circular(compute: Callable[[float], float]) -> Callable[[Value], Value]:
    """Sine and cosine. Where the argument is rounded, a result below its rounding is 0: sin(pi) is."""

    def rounded(value: Value) -> Value:
        argument = float(value)
        if abs(argument) > _MAX_ANGLE:
            raise ValueError("an angle of more than a billion")
        result = compute(argument)
        exact = isinstance(value, Fraction) and Fraction(argument) == value
        return result if exact or abs(result) > math.ulp(argument) else Fraction(0)

    return rounded


def _tan(value: Value) -> Value:
    cosine = _circular(math.cos)(value)
    if cosine == 0:
        raise ValueError("the tangent is not defined there")
    return _circular(math.sin)(value) / cosine


def _inverse(compute: Callable[[float], float]) -> Callable[[Value], Value]:
    def checked(value: Value) -> Value:
        if abs(value) > 1:
            raise ValueError("this takes a number from -1 to 1")
        return compute(float(value))

    return checked


def _round(value: Value, digits: Value = Fraction(0)) -> Value:
    if digits != int(digits) or abs(digits) > MAX_DIGITS:
        raise ValueError("the number of digits is no whole number of reasonable size")
    return Fraction(round(Fraction(value), int(digits)))


_FUNCTIONS = {
    "sqrt": _Function(_sqrt),
    "sin": _Function(_circular(math.sin)),
    "cos": _Function(_circular(math.cos)),
    "tan": _Function(_tan),
    "asin": _Function(_inverse(math.asin)),
    "acos": _Function(_inverse(math.acos)),
    "atan": _Function(lambda value: math.atan(float(value))),
    "log": _Function(_log, 1, 2),
    "ln": _Function(_log),
    "log2": _Function(lambda value: _log(value, Fraction(2))),
    "log10": _Function(lambda value: _log(value, Fraction(10))),
    "exp": _Function(lambda value: math.exp(float(value))),
    "abs": _Function(lambda value: abs(value)),
    "round": _Function(_round, 1, 2),
    "floor": _Function(lambda value: Fraction(math.floor(value))),
    "ceil": _Function(lambda value: Fraction(math.ceil(value))),
    "min": _Function(lambda *values: min(values), 1, MAX_LENGTH),
    "max": _Function(lambda *values: max(values), 1, MAX_LENGTH),
}


# Writing ---------------------------------------------------------------------------------------------------


def written(value: Value) -> str:
    """A value as text: see the module's first lines."""
    if isinstance(value, float):
        return _decimal_text(Decimal(format(value, f".{_ROUNDED_DIGITS}g")), _ROUNDED_DIGITS)
    if value.denominator == 1:
        return str(value.numerator)
    for digits in (_EXACT_DIGITS, _ROUNDED_DIGITS):
        context = decimal.Context(prec=digits, rounding=decimal.ROUND_HALF_EVEN)
        number = context.divide(Decimal(value.numerator), Decimal(value.denominator))
        if not context.flags[decimal.Inexact]:
            break
    return _decimal_text(number, digits)


def _decimal_text(number: Decimal, digits: int) -> str:
    """With an exponent where zeros would have to fill up what `digits` digits do not reach."""
    exponent = number.adjusted()
    if number == 0:
        return "0"
    if -7 < exponent < digits:
        plain = format(number, "f")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    text = "".join(map(str, number.as_tuple().digits)).rstrip("0")
    point = "." if len(text) > 1 else ""
    return f"{'-' if number < 0 else ''}{text[0]}{point}{text[1:]}e{exponent}"
