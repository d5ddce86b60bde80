"""Options as they are written, `NAME{option=value,…}` or `NAME:option=value,…`: the fields of a frozen
dataclass.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..ir.errors import InputError
from .entries import blaming


def split_spec(text: str, what: str) -> tuple[str, str]:
    """`NAME{…}` → (name, text of the options). `what` it is of, for the error: "pass"."""
    m = re.fullmatch(r"([\w.-]+)(?:\{(.*)\})?", text.strip())
    if m is None:
        raise InputError(f"{text!r} is no {what}", remedy="write NAME or NAME{option=value,…}")
    return m.group(1), m.group(2) or ""


def make_from_text(kind: type[Any], what: str, text: str) -> Any:
    """An instance from `option=value,…`; errors as in `make_from_texts`, or an option is there twice."""
    texts: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key in texts:
            raise InputError(f"{what}: {key} is given twice", remedy="give it once")
        texts[key] = value
    return make_from_texts(kind, what, texts)


def make_from_texts(kind: type[Any], what: str, texts: Mapping[str, str]) -> Any:
    """An instance from option → value as it was written.

    Args:
        what: whose options they are, for errors: "pass fuse-rope".
    Raises:
        InputError: an option that is unknown, missing, or not of its type.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for key, value in texts.items():
        _check_known(what, key, fields)
        wanted = type_name(fields[key])
        try:
            options[key] = _parsed(value, wanted)
        except ValueError:
            raise InputError(
                f"{what}: {key}={value!r} is no {wanted}", remedy="give a value of that type"
            ) from None
    return _make(kind, what, options)


def make_from_values(kind: type[Any], what: str, values: Mapping[str, Any]) -> Any:
    """An instance from values that came as JSON; errors as in `make_from_texts`."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for key, value in values.items():
        _check_known(what, key, fields)
        wanted = type_name(fields[key])
        if not _suits(value, wanted):
            raise InputError(
                f"{what}: {key}={str(value)[:60]!r} is no {wanted}", remedy="give a value of that type"
            )
        options[key] = float(value) if wanted == "float" else value
    return _make(kind, what, options)


def type_name(field: dataclasses.Field[Any]) -> str:
    """The name of an option's type, as annotated: "int"."""
    return str(getattr(field.type, "__name__", field.type))


def _check_known(what: str, key: str, fields: Mapping[str, Any]) -> None:
    if key not in fields:
        raise InputError(
            f"{what} has no option {key[:80]!r}", remedy=f"options: {', '.join(fields) or 'none'}"
        )


def _make(kind: type[Any], what: str, options: dict[str, Any]) -> Any:
    none = dataclasses.MISSING
    for f in dataclasses.fields(kind):
        if f.name not in options and f.default is none and f.default_factory is none:
            raise InputError(f"{what} needs the option {f.name}", remedy="give it a value")
    with blaming(what, kind):
        return kind(**options)


def _parsed(text: str, kind: str) -> Any:
    if "bool" in kind:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(text)
    return int(text) if "int" in kind else float(text) if "float" in kind else text


def _suits(value: Any, kind: str) -> bool:
    if "bool" in kind:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if "int" in kind:
        return isinstance(value, int)
    if "float" in kind:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, str)
