"""Sizes as text, which the executor of a step evaluates: whole numbers, names, + - * // %, min and max."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....ir.errors import CompileError
from ..untyped import tirx

_BINARY = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.Div: "//",
    tirx.FloorMod: "%",
    tirx.Mod: "%",
}


def text_of(size: Any, names: Mapping[Any, str] | None = None) -> str:
    """A TIR expression; `names` of its variables, their own where there are none given.

    Raises CompileError for what no size is made of.
    """
    if isinstance(size, int | tirx.IntImm):
        return str(int(size))
    if isinstance(size, tirx.Var):
        return names[size] if names is not None and size in names else str(size.name)
    if isinstance(size, tirx.Cast):
        return text_of(size.value, names)
    for kind, sign in _BINARY.items():
        if isinstance(size, kind):
            return f"({text_of(size.a, names)} {sign} {text_of(size.b, names)})"
    for kind, name in ((tirx.Min, "min"), (tirx.Max, "max")):
        if isinstance(size, kind):
            return f"{name}({text_of(size.a, names)}, {text_of(size.b, names)})"
    raise CompileError(f"a size of {type(size).__name__} ({size})", remedy="report this model")
