"""Python types of arguments: their JSON schema, and the way from a JSON value to a value of the type.

Both come from one definition a type, so what the model is told and what a function gets cannot differ. Why
not pydantic, which the server has anyway: it titles every field (words that a small model pays for in its
context), refuses `typing.TypedDict` before Python 3.12, and takes some tenths of a second to import, which a
tool of one `str` should not cost. What it could do beyond this (dates, constraints, models) a tool can check
itself and answer with an error, which the model reads.

Conversion keeps to the schema, with two allowances for what models that nothing constrains do: a number may
come as a text ("25"), a whole number as 25.0, `true` as "true"; in a union only where no member fits as it
is.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import math
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from ...ir.errors import InputError
from .base import ArgumentError, one_line, shortened
from .docstring import read_docstring

Schema = dict[str, Any]

_KNOWN = (
    "str, int, float, bool, None, Any, Literal, an Enum, Optional and other unions, list[T], dict[str, T], "
    "a TypedDict or a dataclass"
)
_WHOLE = re.compile(r"[+-]?\d{1,300}")


class Kind(ABC):
    """A type of arguments."""

    @abstractmethod
    def schema(self) -> Schema:
        """Its JSON schema; a new dict each time."""

    @abstractmethod
    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        """A JSON value as a value of the type. `exact`: without the allowances above.

        Raises ArgumentError, naming `where`.
        """


def _refuse(where: str, value: Any, wanted: str) -> ArgumentError:
    return ArgumentError(f"{where} is {_shown(value)}", remedy=f"give {wanted}")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {shortened(value, 60)!r}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return shortened(str(value), 60)
    return "a list" if isinstance(value, list) else "an object"


@dataclass(frozen=True)
class _Anything(Kind):
    def schema(self) -> Schema:
        return {}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        return value


@dataclass(frozen=True)
class _Scalar(Kind):
    """str, int, float, bool, or None."""

    type: Literal["string", "integer", "number", "boolean", "null"]

    def schema(self) -> Schema:
        return {"type": self.type}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        match self.type, value:
            case ("string", str()) | ("boolean", bool()) | ("null", None):
                return value
            case (("integer" | "number"), int()) if not isinstance(value, bool):
                return value if self.type == "integer" else self._float(value, where)
            case "number", float() if math.isfinite(value):
                return value
            case (("integer" | "number" | "boolean"), str() | float()) if not exact:
                return self._leniently(value, where)
            case _:
                raise _refuse(where, value, self._wanted())

    def _leniently(self, value: str | float, where: str) -> Any:
        words = value.strip() if isinstance(value, str) else value
        if self.type == "boolean" and words in ("true", "false"):
            return words == "true"
        if self.type == "integer" and isinstance(words, float) and words.is_integer():
            return int(words)
        if self.type == "integer" and isinstance(words, str) and _WHOLE.fullmatch(words):
            return int(words)
        if self.type == "number" and isinstance(words, str):
            with contextlib.suppress(ValueError):
                if math.isfinite(number := float(words)):
                    return number
        raise _refuse(where, value, self._wanted())

    def _float(self, value: int, where: str) -> float:
        try:
            return float(value)
        except OverflowError:
            raise _refuse(where, value, "a number of up to 1e308") from None

    def _wanted(self) -> str:
        return {
            "string": "a text in quotes",
            "integer": "a whole number",
            "number": "a number",
            "boolean": "true or false",
            "null": "null",
        }[self.type]


@dataclass(frozen=True)
class _OneOf(Kind):
    """Literal and Enum: JSON value → Python value, in order."""

    values: tuple[tuple[Any, Any], ...]

    def schema(self) -> Schema:
        return {"enum": [written for written, _ in self.values]}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        for written, meant in self.values:
            if type(written) is type(value) and written == value:
                return meant
        names = ", ".join(_shown(written).removeprefix("the text ") for written, _ in self.values)
        raise _refuse(where, value, f"one of {names}")


@dataclass(frozen=True)
class _Union(Kind):
    members: tuple[Kind, ...]

    def schema(self) -> Schema:
        return {"anyOf": [member.schema() for member in self.members]}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        errors: list[ArgumentError] = []
        for strictly in (True,) if exact else (True, False):
            for member in self.members:
                try:
                    return member.convert(value, where, exact=strictly)
                except ArgumentError as error:
                    errors.append(error)
        remedies = dict.fromkeys(error.remedy.removeprefix("give ") for error in errors)
        raise _refuse(where, value, " or ".join(remedies))


@dataclass(frozen=True)
class _List(Kind):
    items: Kind

    def schema(self) -> Schema:
        return {"type": "array", "items": self.items.schema()}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        if not isinstance(value, list):
            raise _refuse(where, value, "a list")
        return [self.items.convert(item, f"{where}[{i}]", exact=exact) for i, item in enumerate(value)]


@dataclass(frozen=True)
class _Dict(Kind):
    values: Kind

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": self.values.schema()}

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        return {
            key: self.values.convert(item, f"{where}[{shortened(key, 60)!r}]", exact=exact)
            for key, item in value.items()
        }


@dataclass(frozen=True)
class Field:
    """One argument of a function, or one field of an object."""

    kind: Kind
    required: bool
    description: str = ""
    default: Any = None
    """Shown in the schema where it is a plain JSON value and not None."""

    def schema(self) -> Schema:
        """The kind's schema with description and default."""
        schema = self.kind.schema()
        if self.description:
            schema["description"] = self.description
        if (
            not self.required
            and type(self.default) in (str, int, bool, float)
            and self.default == self.default
        ):
            schema["default"] = self.default
        return schema


@dataclass(frozen=True)
class Fields:
    """Named values: the arguments of a function, the fields of a TypedDict or dataclass."""

    fields: Mapping[str, Field]

    def schema(self) -> Schema:
        """The schema of an object that has these, and nothing else."""
        return {
            "type": "object",
            "properties": {name: field.schema() for name, field in self.fields.items()},
            "required": [name for name, field in self.fields.items() if field.required],
            "additionalProperties": False,
        }

    def convert(self, values: Mapping[str, Any], prefix: str, *, exact: bool = False) -> dict[str, Any]:
        """The values that were given, converted. Raises ArgumentError for one that is missing, unknown or
        wrong, by its name after `prefix`.
        """
        known = ", ".join(self.fields) or "none"
        for name in values:
            if name not in self.fields:
                raise ArgumentError(f"{prefix}{shortened(name, 60)} is unknown", remedy=f"known: {known}")
        for name, field in self.fields.items():
            if field.required and name not in values:
                raise ArgumentError(f"{prefix}{name} is missing", remedy=f"give {name}")
        return {
            name: field.kind.convert(values[name], f"{prefix}{name}", exact=exact)
            for name, field in self.fields.items()
            if name in values
        }


@dataclass(frozen=True)
class _Record(Kind):
    """A TypedDict, or a dataclass that is made from its fields."""

    fields: Fields
    make: collections.abc.Callable[..., Any]

    def schema(self) -> Schema:
        return self.fields.schema()

    def convert(self, value: Any, where: str, *, exact: bool = False) -> Any:
        if not isinstance(value, dict):
            raise _refuse(where, value, "an object")
        given = self.fields.convert(value, f"{where}.", exact=exact)
        try:
            return self.make(**given)
        except Exception as error:  # a dataclass may check its fields, and raise anything
            raise ArgumentError(f"{where}: {one_line(error)}") from error


def kind_of(annotation: Any, where: str, _inside: tuple[Any, ...] = ()) -> Kind:
    """The kind of a type. Raises InputError, naming `where`, for a type that has no JSON form here."""
    scalars: dict[Any, Kind] = {
        str: _Scalar("string"),
        int: _Scalar("integer"),
        float: _Scalar("number"),
        bool: _Scalar("boolean"),
        None: _Scalar("null"),
        type(None): _Scalar("null"),
        Any: _Anything(),
        list: _List(_Anything()),
        dict: _Dict(_Anything()),
    }
    annotation, _ = described(annotation)
    if isinstance(annotation, collections.abc.Hashable) and annotation in scalars:
        return scalars[annotation]
    if annotation in _inside:
        raise InputError(f"{where}: {annotation.__name__} holds itself", remedy="use a type of bounded depth")
    made = _generic(annotation, where, _inside) or _named(annotation, where, (*_inside, annotation))
    if made is None:
        name = getattr(annotation, "__name__", None) or str(annotation)
        raise InputError(f"{where} has the type {name}", remedy=f"use {_KNOWN}")
    return made


def _generic(annotation: Any, where: str, inside: tuple[Any, ...]) -> Kind | None:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _Union(tuple(kind_of(part, where, inside) for part in parts))
    if origin is Literal:
        if not all(isinstance(part, str | int | bool | None) for part in parts):
            raise InputError(f"{where}: Literal of other things than texts and numbers", remedy="use an Enum")
        return _OneOf(tuple((part, part) for part in parts))
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable):
        return _List(kind_of(parts[0], where, inside))
    if origin in (dict, collections.abc.Mapping):
        if described(parts[0])[0] is not str:
            raise InputError(f"{where}: keys of an object are texts", remedy="use dict[str, …]")
        return _Dict(kind_of(parts[1], where, inside))
    return None


def _named(annotation: Any, where: str, inside: tuple[Any, ...]) -> Kind | None:
    """Enum, dataclass, TypedDict."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        members = list(annotation)
        by_value = all(isinstance(member.value, str) for member in members)
        # The numbers of an enum mean nothing to a model; its names do.
        return _OneOf(tuple((str(member.value) if by_value else member.name, member) for member in members))
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        fields = {f.name: f for f in dataclasses.fields(annotation) if f.init}
        optional = {
            name: f.default if f.default is not dataclasses.MISSING else None
            for name, f in fields.items()
            if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        }
        return _Record(_fields(annotation, list(fields), optional, where, inside), annotation)
    if typing.is_typeddict(annotation):
        wrapped = typing.get_type_hints(annotation, include_extras=True)
        optional = {name: None for name, hint in wrapped.items() if not _is_required(annotation, name, hint)}
        return _Record(_fields(annotation, list(wrapped), optional, where, inside), dict)
    return None


def _is_required(annotation: Any, name: str, hint: Any) -> bool:
    # Where annotations are texts (PEP 563) the class itself does not know which were marked.
    marks = {typing.Required: True, typing.NotRequired: False}
    return marks.get(typing.get_origin(hint), name in annotation.__required_keys__)


def _fields(
    annotation: Any, names: list[str], optional: dict[str, Any], where: str, inside: tuple[Any, ...]
) -> Fields:
    hints = resolved_hints(annotation, where)
    said = read_docstring(annotation.__doc__).arguments
    made: dict[str, Field] = {}
    for name in names:
        _, description = described(hints[name])
        kind = kind_of(hints[name], f"{where}, field {name}", inside)
        text = shortened(description or said.get(name, ""), 300)
        made[name] = Field(kind, name not in optional, text, optional.get(name))
    return Fields(made)


def resolved_hints(holder: Any, where: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Annotations of a class, or of anything that has `__annotations__`, with texts resolved."""
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)
    except Exception as error:  # a text can hold any expression
        raise InputError(
            f"{where}: its types cannot be read ({one_line(error)})", remedy="define them in the same module"
        ) from error


def described(annotation: Any) -> tuple[Any, str]:
    """(the type inside Annotated, Required and the like; the description that Annotated gives, or "")."""
    description = ""
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation, *extras = typing.get_args(annotation)
            texts = (
                extra if isinstance(extra, str) else getattr(extra, "documentation", None) for extra in extras
            )
            description = description or next((text for text in texts if isinstance(text, str)), "")
        elif origin in (typing.Required, typing.NotRequired):
            (annotation,) = typing.get_args(annotation)
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":  # `type X = …`, from Python 3.12 on
            annotation = annotation.__value__
        else:
            return annotation, " ".join(description.split())
