"""How far a schema goes: loops that never end, and how large it becomes where its parts are joined."""

from __future__ import annotations

from typing import Any

from .errors import GrammarError, refused
from .references import Document, Schema, subschemas

_LARGE = 5_000
_PASSES = 100
_ALTERNATIVES = ("anyOf", "oneOf")
_IN_PLACE = ("allOf", *_ALTERNATIVES)


def refuse_endless(document: Document, reached: list[Schema]) -> None:
    """Raise GrammarError for references that lead back to themselves without a value in between, and for
    schemas that only an endless value would match.
    """
    done: set[int] = set()
    for schema in reached:
        _refuse_loop(document, schema, done)
    if not _finite(document, reached):
        raise GrammarError(
            "no value matches the schema: what it requires is never allowed, or goes on without end",
            remedy="make a property optional",
        )


def _in_place(document: Document, schema: Schema) -> list[Schema]:
    """Schemas that hold for the same value."""
    parts: list[Any] = [part for key in _IN_PLACE for part in schema.get(key, [])]
    if "$ref" in schema:
        parts.append(document.target(schema, ""))
    return [part for part in parts if isinstance(part, dict)]


def _refuse_loop(document: Document, start: Schema, done: set[int]) -> None:
    """Depth first, without recursion; `done` are schemas known to lead into no loop."""
    path: dict[int, Schema] = {}
    waiting: list[Schema | None] = [start]
    while waiting:
        schema = waiting.pop()
        if schema is None:
            done.add(path.popitem()[0])
        elif id(schema) in path:
            raise refused("", "$ref", "leads back to itself", "let it lead to a schema of its own")
        elif id(schema) not in done:
            path[id(schema)] = schema
            waiting += [None, *_in_place(document, schema)]


def _finite(document: Document, reached: list[Schema]) -> bool:
    """Whether the root has a value of finite size, as far as its required properties and items say."""
    finite: set[int] = set()

    def ends(schema: Any) -> bool:
        return schema is not False and (schema is True or id(schema) in finite)

    for _ in range(_PASSES):
        before = len(finite)
        for schema in reversed(reached):
            if id(schema) not in finite and _ends(document, schema, ends):
                finite.add(id(schema))
        if len(finite) == before:
            return id(document.root) in finite
    return True  # a very long chain: nothing is lost but the answer's tokens


def _ends(document: Document, schema: Schema, ends: Any) -> bool:
    parts: list[Any] = [*schema.get("allOf", [])]
    if "$ref" in schema:
        parts.append(document.target(schema, ""))
    if not all(ends(part) for part in parts):
        return False
    if not all(any(ends(part) for part in schema[key]) for key in _ALTERNATIVES if key in schema):
        return False
    kind: Any = schema.get("type")
    if kind in ("object", ["object"]):
        properties: dict[str, Any] = schema.get("properties", {})
        rest: Any = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
        return all(ends(properties.get(name, rest)) for name in schema.get("required", []))
    if kind in ("array", ["array"]) and schema.get("minItems"):
        items: Any = schema.get("items", True)
        first: list[Any] = items if isinstance(items, list) else schema.get("prefixItems", [])
        rest = schema.get("additionalItems", True) if isinstance(items, list) else items
        wanted = [*first[: schema["minItems"]], *([rest] if schema["minItems"] > len(first) else [])]
        return all(ends(item) for item in wanted)
    return True


def is_large(document: Document, reached: list[Schema]) -> bool:
    """Whether compiling may take more than a moment, by its size once alternatives are multiplied out."""
    measure = _Measure(document)
    total = 0
    for schema in reached:
        total += measure.of(schema)[0]
        if measure.joins_references or total > _LARGE:
            return True
        if len(schema.get("patternProperties", ())) > 16 or len(schema.get("properties", ())) > 300:
            return True
    return False


def names_are_open(reached: list[Schema]) -> bool:
    """Whether an object may have properties besides those that are named, or names with control characters:
    then a name must have one spelling only.
    """
    for schema in reached:
        named: list[str] = [*schema.get("properties", ()), *schema.get("required", ())]
        if any(char < " " for name in named for char in name):
            return True
        if (named or schema.get("patternProperties")) and schema.get(
            "additionalProperties", True
        ) is not False:
            return True
    return False


class _Measure:
    """(values, alternatives) of schemas: a bound on what joining with another one multiplies."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._known: dict[int, tuple[int, int]] = {}
        self.joins_references = False
        """A reference is joined with something: its target is written out there, as often as it occurs."""

    def of(self, schema: Any) -> tuple[int, int]:
        if not isinstance(schema, dict):
            return 1, 1
        known: Schema = schema
        if id(known) not in self._known:
            self._known[id(known)] = (1, 1)
            self._known[id(known)] = self._measured(known)
        return self._known[id(known)]

    def _measured(self, schema: Schema) -> tuple[int, int]:
        parts: list[tuple[int, int]] = []
        inside = [part for place, part in subschemas(schema) if place.split("/")[0] not in _SEPARATE]
        own = {key for key in schema if key in _OWN}
        if own:
            sizes = [self.of(part) for part in inside]
            size = 1 + len(schema.get("enum", ())) + sum(size for size, _ in sizes)
            parts.append((size, max((ways for _, ways in sizes), default=1)))
        parts += [self.of(part) for part in schema.get("allOf", [])]
        for key in _ALTERNATIVES:
            if key in schema:
                options = [self.of(part) for part in schema[key]]
                parts.append((sum(size for size, _ in options), sum(ways for _, ways in options)))
        count = len(parts) + ("$ref" in schema)
        if count > 1 and self._refers(schema):
            self.joins_references = True
        size, ways = 1, 1
        for part_size, part_ways in parts:
            size, ways = size * part_ways + part_size * ways, ways * part_ways
        return min(size, 1 << 40), min(ways, 1 << 40)

    def _refers(self, schema: Schema) -> bool:
        """Whether a reference is found in what is joined: in place, or in the properties of any part."""
        waiting: list[Any] = [schema]
        seen: set[int] = set()
        while waiting:
            part = waiting.pop()
            if not isinstance(part, dict) or id(part) in seen:  # pyright: ignore[reportUnknownArgumentType]
                continue
            known: Schema = part
            seen.add(id(known))
            if "$ref" in known:
                return True
            waiting += [
                entry for place, entry in subschemas(known) if place.split("/")[0] not in _DEFINITIONS
            ]
        return False


_DEFINITIONS = frozenset({"$defs", "definitions"})
_SEPARATE = frozenset({*_DEFINITIONS, *_IN_PLACE})
_OWN = frozenset(
    {"type", "const", "enum", "properties", "patternProperties", "additionalProperties", "required", "items"}
    | {"prefixItems", "additionalItems", "minItems", "maxItems", "minProperties", "maxProperties"}
    | {"minLength", "maxLength", "pattern", "format", "minimum", "maximum"}
    | {"exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
)
