"""The table ATen operator → IR ops. A model family works because its operators stand here; nothing knows a
family.

Each entry takes the `Importer` and the node's arguments (IR values, numbers, dimensions, lists) and returns
an IR value, a tuple of them for operators with several results, or None for operators that only assert. To
add an operator, add a function with `@aten("name.overload")` to `aten.py` (arithmetic, layers),
`aten_composed.py` (what others make up), `aten_conv.py` (neighbouring tokens), `aten_reduce.py` or
`aten_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ir.errors import CompileError, UnsupportedError

Handler = Callable[..., Any]
TABLE: dict[str, Handler] = {}


def aten(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            _claim(TABLE, f"aten.{name}", name, handler)
        return handler

    return register


REGISTERED: dict[str, Handler] = {}
"""Operators that the frontend registers with torch itself, by their whole names ("namespace.name.overload"):
what stands for code that tracing must not look into."""


def registered(name: str) -> Callable[[Handler], Handler]:
    """Register the handler of an operator of our own."""

    def register(handler: Handler) -> Handler:
        _claim(REGISTERED, name, name, handler)
        return handler

    return register


def _claim(table: dict[str, Handler], shown: str, name: str, handler: Handler) -> None:
    if name in table:
        raise CompileError(
            f"operator {shown} has two handlers: in {table[name].__module__} and {handler.__module__}",
            remedy="take one of them away",
        )
    table[name] = handler


SYNONYMS = {
    "absolute": "abs",
    "clip": "clamp",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "subtract": "sub",
}
"""Operators that torch has under two names."""


def lookup(name: str, where: str) -> Handler:
    """The handler of "add.Tensor"; UnsupportedError names the operator and the module that calls it."""
    stem, _, overload = name.partition(".")
    name = f"{SYNONYMS.get(stem, stem)}.{overload}"
    if name not in TABLE:
        raise UnsupportedError(
            f"operator aten.{name} in {where or 'the model'} is not supported",
            remedy="add it to frontend/aten.py, or report the model",
        )
    return TABLE[name]
