"""Every keyword of a schema: right in itself, and one that the compiler obeys; small rewritings make more of
them so.

A schema's parts are looked at from the root, through references too. What nothing leads to may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, cast

from .document import EXACT
from .errors import refused
from .patterns import PatternError, translated
from .references import Document, Schema, subschemas

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
"""What the compiler knows how to write, and holds strings to."""
_HINTS = frozenset({"password", "binary", "float", "double"})
"""OpenAPI's names that say nothing about what may stand in JSON."""
_INTEGERS = {
    **{f"int{bits}": (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32)},
    # The largest double below the end of the range.
    "int64": (-(1 << 63) + 1024, (1 << 63) - 1024),
    "uint64": (0, (1 << 63) - 1024),
}

_APPLICATORS = frozenset(
    {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "$dynamicRef", "$recursiveRef"}
)
_NOT_OBEYED = frozenset(
    {"not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"}
    | {"dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"}
    | {
        "$dynamicRef",
        "$dynamicAnchor",
        "$recursiveRef",
        "$recursiveAnchor",
        "disallow",
        "divisibleBy",
        "extends",
    }
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_MOST_PROPERTIES = 1000
_MOST_PATTERNS = 64
_MOST_OPTIONS = 20_000
_NEXT_TO_ZERO = 1e-12
_LARGEST_DIVISOR = 100_000
_LARGEST_COMMON_DIVISOR = 65_535  # products of two stay below the compiler's 32 bits


def check_keywords(document: Document) -> list[Schema]:
    """Check and rewrite all that can be reached; returns it, the root first.

    Raises GrammarError for the first keyword that is wrong or cannot be honoured.
    """
    reached: list[Schema] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, str]] = [(document.root, "")]
    divisors: set[Decimal] = set()
    while waiting:
        schema, path = waiting.pop()
        if id(schema) in seen or not isinstance(schema, dict):
            continue
        known: Schema = schema
        seen.add(id(known))
        reached.append(known)
        _check(document, known, path)
        if "multipleOf" in known:
            divisors.add(Decimal(repr(known["multipleOf"])))
            _check_divisors(divisors, path)
        if "$ref" in known:
            waiting.append((document.target(known, path), str(known["$ref"])))
        waiting += [
            (part, f"{path}/{place}")
            for place, part in subschemas(known)
            if not place.startswith(("$defs/", "definitions/"))
        ]
    return reached


def _check(document: Document, schema: Schema, path: str) -> None:
    _rename_unevaluated(schema)
    _drop_idle(schema)
    for keyword in schema:
        if keyword in _NOT_OBEYED:
            raise refused(path, keyword, "is not supported")
    if "prefixItems" in schema and document.draft < 2020:
        raise refused(path, "prefixItems", "is newer than $schema says", "name draft 2020-12")
    if "const" in schema and document.draft == 4:
        raise refused(path, "const", "is newer than $schema says", "name draft 6 or later")
    for keyword in sorted(schema, key=lambda name: name == "format"):  # last: it builds upon others
        check = _CHECKS.get(keyword)
        if check is not None:
            check(schema, keyword, path)
    _check_duplicates(schema, path)
    _move_exclusive(schema)


# Rewriting --------------------------------------------------------------------------------------------------


def _drop_idle(schema: Schema) -> None:
    """Take out keywords that say nothing where they stand."""

    def drop(*keywords: str) -> None:
        for keyword in keywords:
            schema.pop(keyword, None)

    if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
        drop("uniqueItems")
    if "if" not in schema or not ("then" in schema or "else" in schema):
        drop("if", "then", "else")
    if "contains" not in schema:
        drop("minContains", "maxContains")
    elif repr(schema.get("minContains")) == "0" and "maxContains" not in schema:  # not false
        drop("contains", "minContains")
    if "not" in schema and schema["not"] is False:
        drop("not")
    for keyword in ("propertyNames", "unevaluatedItems", "unevaluatedProperties"):
        if keyword in schema and (schema[keyword] is True or schema[keyword] == {}):
            drop(keyword)
    for keyword in ("dependencies", "dependentRequired", "dependentSchemas"):
        if schema.get(keyword) == {}:
            drop(keyword)


def _rename_unevaluated(schema: Schema) -> None:
    """Without others that evaluate, `unevaluatedX` means what `additionalProperties` and `items` mean."""
    if _APPLICATORS & schema.keys() or "contains" in schema:
        return
    for keyword, same in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if keyword in schema and same not in schema:
            schema[same] = schema.pop(keyword)
        elif keyword in schema and not isinstance(schema.get(same), list):
            del schema[keyword]  # nothing is left to it


def _move_exclusive(schema: Schema) -> None:
    """Write whole exclusive bounds as inclusive ones a little beside them, on the side away from 0.

    The compiler takes 1 for more than 1 where it must be below 2, and 0 for more than 0 where it must be
    below 1.
    """
    for keyword, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        bound: Any = schema.get(exclusive)
        if isinstance(bound, bool):
            bound = schema.get(keyword) if bound else None
        if bound is None or bound != int(bound) or not 0 <= bound * sign < 1e9:
            continue
        del schema[exclusive]
        beside = float(f"{bound * sign + (1e-9 if bound * sign < 1000 else 1e-5):.9f}") * sign
        other = schema.get(keyword, beside)
        schema[keyword] = max(other, beside) if sign > 0 else min(other, beside)


# Checks of one keyword --------------------------------------------------------------------------------------


def _elements(value: Any) -> list[Any] | None:
    """The elements of a list; None for anything else."""
    return cast("list[Any]", value) if isinstance(value, list) else None


def _check_type(schema: Schema, keyword: str, path: str) -> None:
    types: Any = schema[keyword]
    named: list[Any] = types if isinstance(types, list) else [types]
    if not named or not all(isinstance(name, str) and name in _TYPES for name in named):
        raise refused(path, keyword, f"is {types!r:.60}", f"allowed: {', '.join(sorted(_TYPES))}")


def _check_count(schema: Schema, keyword: str, path: str) -> None:
    count: Any = schema[keyword]
    if isinstance(count, float) and count.is_integer():
        count = schema[keyword] = int(count)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= EXACT:
        raise refused(path, keyword, f"is {count!r:.60}", "allowed: a whole number from 0")


def _check_bound(schema: Schema, keyword: str, path: str) -> None:
    bound: Any = schema[keyword]
    if isinstance(bound, bool) and keyword.startswith("exclusive"):
        return  # draft 4
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        raise refused(path, keyword, f"is {bound!r:.60}", "give a number")
    if not (float(bound) == bound and abs(bound) < 1 << 63):  # wide enough for what a 64-bit integer holds
        _check_exact(bound, keyword, path)
    if keyword == "multipleOf":
        if bound <= 0:
            raise refused(path, keyword, f"is {bound}", "give a number above 0")
        if isinstance(bound, float) and bound.is_integer():
            schema[keyword] = int(bound)


def _check_exact(number: float, keyword: str, path: str) -> None:
    """Raise where a number is one that the compiler would round."""
    if abs(number) > EXACT or (number and abs(number) < _NEXT_TO_ZERO):
        raise refused(path, keyword, f"holds {number!r:.40}", "allowed: up to 2**53, in steps of 1e-12")


def _check_divisors(divisors: set[Decimal], path: str) -> None:
    """Intersected schemas ask for a multiple of both numbers: the least common one must be small."""
    scale = 10 ** max(-int(d.as_tuple().exponent) for d in divisors)
    whole = [int(d * max(1, scale)) for d in divisors]
    limit = _LARGEST_DIVISOR if len(whole) == 1 else _LARGEST_COMMON_DIVISOR
    if max(whole) > _LARGEST_DIVISOR or math.lcm(*whole) > limit:
        raise refused(path, "multipleOf", "asks for too large a divisor", f"allowed: up to {limit} steps")


def _check_values(schema: Schema, keyword: str, path: str) -> None:
    values = [schema[keyword]] if keyword == "const" else _elements(schema[keyword])
    if values is None:
        raise refused(path, keyword, "is no list", "give the values that are allowed")
    if len(values) > _MOST_OPTIONS:
        raise refused(path, keyword, "is too long", f"allowed: up to {_MOST_OPTIONS} values")
    for value in _leaves(values):
        if isinstance(value, str):
            _check_writable(value, keyword, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_exact(value, keyword, path)


def _leaves(value: Any) -> Iterator[Any]:
    """All that stands in a JSON value, names of properties too."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            entries: dict[str, Any] = value
            waiting += [*entries.keys(), *entries.values()]
        elif isinstance(value, list):
            waiting += value
        else:
            yield value


def _check_writable(text: str, keyword: str, path: str) -> None:
    """Raise for characters that the grammars of strings cannot write (grammar.py says why)."""
    if any((char < " " and char not in "\b\f\n\r\t") or char == "\x7f" for char in text):
        raise refused(path, keyword, f"holds a control character in {text!r:.40}")


def _check_pattern(schema: Schema, keyword: str, path: str) -> None:
    schema[keyword] = _translated(schema[keyword], keyword, path)


def _translated(pattern: Any, keyword: str, path: str) -> str:
    if not isinstance(pattern, str):
        raise refused(path, keyword, f"is {pattern!r:.60}", "give a regular expression")
    try:
        return translated(pattern)
    except PatternError as error:
        raise refused(path, keyword, f"cannot be used: {error.message}", error.remedy) from None


def _check_format(schema: Schema, keyword: str, path: str) -> None:
    name: Any = schema[keyword]
    types: Any = schema.get("type", ["integer", "number"])
    if not isinstance(name, str):
        raise refused(path, keyword, f"is {name!r:.60}", "give the name of a format")
    if name in _FORMATS:
        return
    del schema[keyword]
    if name in _HINTS:
        return
    if name in _INTEGERS and ("integer" in types or "number" in types):
        low, high = _INTEGERS[name]
        schema["allOf"] = [*schema.get("allOf", []), {"minimum": low, "maximum": high}]
        if "number" in types:
            raise refused(path, keyword, f"is {name!r} of a number", "write the type as integer")
    else:
        raise refused(path, keyword, f"is {name!r:.60}", f"known: {', '.join(sorted(_FORMATS))}")


def _check_names(schema: Schema, keyword: str, path: str) -> None:
    names = _elements(schema[keyword])
    if names is None or not all(isinstance(name, str) for name in names):
        raise refused(path, keyword, f"is {schema[keyword]!r:.60}", "give a list of names")
    for name in names:
        _check_writable(name, keyword, path)


def _check_named(schema: Schema, keyword: str, path: str) -> None:
    entries: Any = schema[keyword]
    named: Schema = entries if isinstance(entries, dict) else {}
    if not isinstance(entries, dict) or not all(isinstance(part, bool | dict) for part in named.values()):
        raise refused(path, keyword, "is no object of schemas", "give one schema for each name")
    most = _MOST_PATTERNS if keyword == "patternProperties" else _MOST_PROPERTIES
    if len(named) > most:
        raise refused(path, keyword, f"has {len(named)} entries", f"allowed: up to {most}")
    if keyword == "patternProperties":
        schema[keyword] = {_translated(name, keyword, path): entry for name, entry in named.items()}
        if len(schema[keyword]) < len(named):
            raise refused(path, keyword, "has two patterns for the same names", "join them")
        return
    for name in named:
        _check_writable(name, keyword, path)


def _check_schema(schema: Schema, keyword: str, path: str) -> None:
    part: Any = schema[keyword]
    if keyword == "items" and isinstance(part, list):
        _check_list(schema, keyword, path)
    elif not isinstance(part, bool | dict):
        raise refused(path, keyword, "is no schema", "give an object, true or false")


def _check_list(schema: Schema, keyword: str, path: str) -> None:
    members = _elements(schema[keyword])
    if members is None or not all(isinstance(part, bool | dict) for part in members):
        raise refused(path, keyword, "is no list of schemas", "give a list of objects, true or false")
    if not members and keyword in ("allOf", "anyOf", "oneOf"):
        raise refused(path, keyword, "is empty", "give one schema at least")
    if len(members) > _MOST_PROPERTIES:
        raise refused(path, keyword, f"has {len(members)} entries", f"allowed: up to {_MOST_PROPERTIES}")


_CHECKS: dict[str, Callable[[Schema, str, str], None]] = {
    "type": _check_type,
    "const": _check_values,
    "enum": _check_values,
    "pattern": _check_pattern,
    "format": _check_format,
    "required": _check_names,
    **dict.fromkeys(("properties", "patternProperties"), _check_named),
    **dict.fromkeys(("items", "additionalItems", "additionalProperties"), _check_schema),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _check_list),
    **dict.fromkeys(_COUNTS, _check_count),
    **dict.fromkeys(_BOUNDS, _check_bound),
}


def _check_duplicates(schema: Schema, path: str) -> None:
    """Raise for a count that properties without names would have to fill: one may be written twice, which
    counts once.
    """
    names: list[str] = schema.get("required", [])
    if schema.get("minProperties", 0) > len(set(names)) + 1:
        raise refused(path, "minProperties", "asks for properties without names", "list them in required")
