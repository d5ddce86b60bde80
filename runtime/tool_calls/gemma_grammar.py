"""JSON schemas as grammars of what Gemma's function-calling models write (gemma_value.py).

Numbers, booleans and null are written as in JSON and are left to llguidance's own schemas. Strings, arrays
and objects are made here; a keyword about them that would not be kept to is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast
from urllib.parse import unquote

from ..json_schema import GrammarError, check_schema
from .base import Tool
from .gemma_value import is_bare
from .lark import Marker, arguments_schema, json_rule, quoted

_REFUSED: Final = (
    "pattern", "format", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas",
    "dependencies", "patternProperties", "propertyNames", "minProperties", "maxProperties", "prefixItems",
    "additionalItems", "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedProperties",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_MOST_REPEATED: Final = 10_000
_MOST_RULES: Final = 5_000


class GemmaRules:
    """The rules of one grammar; `tool` adds those of a tool's arguments.

    `prefix` keeps the names of its rules apart from other grammars'.
    """

    def __init__(self, prefix: str, quote: Marker) -> None:
        self._prefix = prefix
        self._quote = quote
        self._lines = quote.rules()
        self._any = ""
        self._refs: dict[str, str] = {}
        self._count = 0
        self._tool = ""
        self._root: Mapping[str, Any] = {}

    def rules(self) -> list[str]:
        """All that was added."""
        return self._lines

    def tool(self, tool: Tool) -> str:
        """The name of the rule of a tool's arguments.

        Raises GrammarError, naming the tool and the keyword, for a schema that cannot be kept to.
        """
        self._tool, self._refs = tool.name, {}
        self._root = check_schema(arguments_schema(tool)).schema
        try:
            return self._value(self._root)
        except RecursionError:
            raise self._too_large() from None

    def _refuse(self, keyword: str) -> GrammarError:
        return GrammarError(
            f"the parameters of {self._tool}: {keyword} cannot be kept to in this model's form of calls",
            remedy=f"leave {keyword} out",
            keyword=keyword,
        )

    def _too_large(self) -> GrammarError:
        return GrammarError(f"the parameters of {self._tool} are too large", remedy="simplify the schema")

    def _add(self, body: str, name: str = "") -> str:
        if self._count > _MOST_RULES:
            raise self._too_large()
        name = name or self._new_name()
        self._lines.append(f"{name}: {body}")
        return name

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _value(self, schema: Any) -> str:
        if schema is True or not isinstance(schema, Mapping) or not schema:
            if schema is False:
                raise self._refuse("false")
            return self._anything()
        one = cast(Mapping[str, Any], schema)
        for keyword in _REFUSED:
            if keyword in one and one[keyword] is not False:
                raise self._refuse(keyword)
        if "$ref" in one:
            return self._reference(str(one["$ref"]))
        if "allOf" in one:
            if len(one["allOf"]) != 1 or "properties" in one:
                raise self._refuse("allOf")
            return self._value(one["allOf"][0])
        if "anyOf" in one:
            if "properties" in one:
                raise self._refuse("anyOf")
            return self._add(" | ".join(self._value(option) for option in one["anyOf"]))
        if "const" in one or "enum" in one:
            return self._choice([one["const"]] if "const" in one else one["enum"])
        return self._typed(one)

    def _typed(self, schema: Mapping[str, Any]) -> str:
        kind = schema.get("type")
        if kind is None:
            keyed = {"properties": "object", "items": "array", "minLength": "string", "maxLength": "string"}
            kind = next((keyed[keyword] for keyword in keyed if keyword in schema), None)
        if isinstance(kind, Sequence) and not isinstance(kind, str):
            return self._add(" | ".join(self._typed({**schema, "type": one}) for one in kind))
        match kind:
            case None:
                return self._anything()
            case "string":
                return self._string(schema)
            case "array":
                return self._array(schema)
            case "object":
                return self._object(schema)
            case _:
                return self._add(json_rule(schema))

    def _reference(self, ref: str) -> str:
        if ref not in self._refs:
            target: Any = self._root
            if not ref.startswith("#"):
                raise self._refuse("$ref")
            for part in ref.removeprefix("#").split("/")[1:]:
                key = unquote(part).replace("~1", "/").replace("~0", "~")
                if not isinstance(target, Mapping) or key not in target:
                    raise self._refuse("$ref")
                target = cast(Mapping[str, Any], target)[key]
            name = self._refs[ref] = self._new_name()
            self._add(self._value(target), name)
        return self._refs[ref]

    def _choice(self, values: Sequence[Any]) -> str:
        quote = self._quote.name
        options: list[str] = []
        for value in values:
            if isinstance(value, str) and self._quote.text not in value:
                options.append(f"{quote} {quoted(value)} {quote}")
            elif value is None or isinstance(value, bool | int | float):
                options.append(self._add(json_rule({"const": value})))
            else:
                raise self._refuse("enum")
        return self._add(" | ".join(options))

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = self._bounds(schema, "minLength", "maxLength")
        name = self._new_name()
        text = name.upper()
        self._lines.append(f"{text}: /(.|\\n){_times(least, most)}/")
        self._lines += self._quote.after_text(f"{name}_end", text)
        return self._add(f"{self._quote.name} {name}_end", name)

    def _bounds(self, schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
        for keyword in (least, most):
            if schema.get(keyword, 0) > _MOST_REPEATED:
                raise self._refuse(keyword)
        return int(schema.get(least, 0)), int(schema[most]) if most in schema else None

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = self._bounds(schema, "minItems", "maxItems")
        if most == 0:
            return self._add('"[" "]"')
        item = self._value(schema.get("items", {}))
        more = _times(max(least - 1, 0), None if most is None else most - 1)
        items = f'{item} ("," {item}){more}'
        return self._add(f'"[" {items} "]"' if least else f'"[" ({items})? "]"')

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        required = set(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        for name in required - properties.keys():
            properties[name] = others
        if not properties:
            return self._add('"{" "}"') if others is False else self._map(others)
        # In the order of Jinja's dictsort, by which these models were shown their calls.
        names = sorted(properties, key=str.lower)
        for name in names:
            if not is_bare(name):
                raise self._refuse(f"a property called {name[:40]!r}")
        fields = [f"{quoted(f'{name}:')} {self._value(properties[name])}" for name in names]
        tail = ""
        tails: list[str] = []
        for field, name in zip(reversed(fields), reversed(names), strict=True):
            tails.append(tail)
            tail = self._add(f'"," {field} {tail}' if name in required else f'("," {field})? {tail}')
        firsts: list[str] = []
        for field, name, after in zip(fields, names, reversed(tails), strict=True):
            firsts.append(f"{field} {after}")
            if name in required:
                return self._add(f'"{{" ({" | ".join(firsts)}) "}}"')
        return self._add(f'"{{" ({" | ".join(firsts)})? "}}"')

    def _map(self, schema: Any) -> str:
        pair = self._add(f'/[a-zA-Z0-9_-]{{1,64}}/ ":" {self._value(schema)}')
        return self._add(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def _anything(self) -> str:
        if not self._any:
            self._any = self._new_name()
            options = [
                self._string({}),
                self._add(json_rule({"type": ["number", "boolean", "null"]})),
                self._array({}),
                self._map({}),
            ]
            self._add(" | ".join(options), self._any)
        return self._any


def _times(least: int, most: int | None) -> str:
    """The repetition in a rule or a regular expression."""
    if most is None:
        return "*" if least == 0 else f"{{{least},}}"
    return f"{{{least},{most}}}"
