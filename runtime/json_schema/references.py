"""Where the references of a schema lead, and its draft."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from .errors import refused

Schema = dict[str, Any]

_DRAFT = re.compile(r"https?://json-schema\.org/draft[-/](0\d|2019-09|2020-12)/schema#?")
_DRAFTS = {"04": 4, "06": 6, "07": 7, "2019-09": 2019, "2020-12": 2020}
_LATEST = "http://json-schema.org/schema#"
_URLS = {
    4: "http://json-schema.org/draft-04/schema#",
    6: "http://json-schema.org/draft-06/schema#",
    7: "http://json-schema.org/draft-07/schema#",
    2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}

LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SINGLE = (
    *("additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)


def subschemas(schema: Schema) -> list[tuple[str, Any]]:
    """What stands where a schema may stand, with its place relative to `schema`."""
    found: list[tuple[str, Any]] = [(key, schema[key]) for key in SINGLE if key in schema]
    for key in NAMED:
        entries: Any = schema.get(key)
        if isinstance(entries, dict):
            named: dict[str, Any] = entries
            found += [(f"{key}/{_escaped(name)}", entry) for name, entry in named.items()]
    for key in (*LISTS, "items"):
        elements: Any = schema.get(key)
        if isinstance(elements, list):
            members: list[Any] = elements
            found += [(f"{key}/{index}", member) for index, member in enumerate(members)]
    return [(place, entry) for place, entry in found if isinstance(entry, bool | dict)]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


class Document:
    """A schema with all of its parts. The drafts before 2019-09 ignore what stands beside a `$ref`: such
    keywords are taken out.
    """

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.draft = self._read_draft(root)
        self._bases: dict[int, str] = {}
        self._resources: dict[str, Schema] = {}
        self._anchors: dict[tuple[str, str], Schema] = {}
        self._resources[""] = root
        self._index(root, "", "")

    def _read_draft(self, root: Schema) -> int:
        """The draft; `$schema` is written as the compiler knows it."""
        named: Any = root.pop("$schema", _LATEST)
        if named == _LATEST:
            return 2020
        found = _DRAFT.fullmatch(named) if isinstance(named, str) else None
        if found is None or found[1] not in _DRAFTS:
            raise refused("", "$schema", f"is {named!r:.80}", "name one of the drafts 4 to 2020-12")
        draft = _DRAFTS[found[1]]
        root["$schema"] = _URLS[draft]
        return draft

    def _index(self, schema: Schema, base: str, path: str) -> None:
        """Note every part's base address, and the names that references may use."""
        waiting = [(schema, base, path)]
        while waiting:
            schema, base, path = waiting.pop()
            if self.draft <= 7 and "$ref" in schema:
                for key in [k for k in schema if k not in ("$ref", "$schema", "$defs", "definitions")]:
                    del schema[key]
            if "$schema" in schema and schema is not self.root and self._read_draft(schema) != self.draft:
                raise refused(path, "$schema", "differs from the root's", "use one draft")
            base = self._named(schema, base)
            self._bases[id(schema)] = base
            for place, part in subschemas(schema):
                if isinstance(part, dict):
                    waiting.append((part, base, f"{path}/{place}"))

    def _named(self, schema: Schema, base: str) -> str:
        """The base address inside of a schema, which an identifier may change."""
        identifier: Any = schema.get("id" if self.draft == 4 else "$id")
        if isinstance(identifier, str):
            address, fragment = urldefrag(urljoin(base, identifier))
            if fragment:
                self._anchors[address, fragment] = schema
            if address != base or not fragment:
                base = address
                self._resources.setdefault(base, schema)
        for key in ("$anchor", "$dynamicAnchor"):
            anchor: Any = schema.get(key)
            if isinstance(anchor, str):
                self._anchors[base, anchor] = schema
        return base

    def target(self, schema: Schema, path: str) -> Schema | bool:
        """What a schema's `$ref` means. Raises GrammarError where that is not inside of the document."""
        reference: Any = schema["$ref"]
        if not isinstance(reference, str):
            raise refused(path, "$ref", "is no text", "give an address inside of the schema")
        base = self._bases.get(id(schema), "")
        address, fragment = urldefrag(urljoin(base, reference) if reference[:1] != "#" else base + reference)
        resource: Any = self._resources.get(address)
        if resource is None and reference[:1] == "#":
            resource = self.root
        if fragment and not fragment.startswith("/"):
            resource = self._anchors.get((address, fragment))
        elif fragment and resource is not None:
            resource = _follow(resource, unquote(fragment))
        if not isinstance(resource, bool | dict):
            raise refused(
                path, "$ref", f"leads to {reference[:80]!r}, which is not there", "use #/$defs/NAME"
            )
        if isinstance(resource, bool):
            return resource
        found: Schema = resource
        if id(found) not in self._bases:  # where no keyword's schema stands: nobody looked into it yet
            self._index(found, address, reference)
        return found


def _follow(value: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901); None where there is none."""
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(part)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 7:
            elements: list[Any] = value
            value = elements[int(part)] if int(part) < len(elements) else None
        else:
            return None
    return value  # pyright: ignore[reportUnknownVariableType]
