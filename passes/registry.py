"""Passes and quantizers by name, from this package and from anyone's, through entry points.

`llmc.passes`: name → a `Pass` class. `llmc.quantizers`: name → a `Quantizer` class, which turns schemes
(`int4-g64`) into passes. Two of one name are an error that names both packages.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from ..ir.errors import InputError
from .base import Pass


class Quantizer(ABC):
    """A family of schemes. `forms` is shown to the user ("int4-gN[-sym]")."""

    forms: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def passes(self, scheme: str) -> list[Pass] | None:
        """The passes that carry out a scheme, or None when the scheme is not one of these."""


@dataclass(frozen=True)
class Registered:
    """One entry: `origin` is the distribution that brought it."""

    name: str
    origin: str
    entry: EntryPoint


@cache
def registered(group: str) -> dict[str, Registered]:
    """All entries of an entry-point group by name, sorted.

    Raises InputError where two packages bring one name.
    """
    found: dict[str, Registered] = {}
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        origin = entry.dist.name if entry.dist is not None else "unknown"
        other = found.get(entry.name)
        if other is not None and other.entry.value != entry.value:
            raise InputError(
                f"{group}: {entry.name} comes from both {other.origin} and {origin}",
                remedy="uninstall one of them",
            )
        found[entry.name] = Registered(entry.name, origin, entry)
    return found


def _number(text: str, kind: Any) -> Any:
    kind = str(kind)
    if "bool" in kind:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(text)
    return int(text) if "int" in kind else float(text) if "float" in kind else text


def make_pass(text: str) -> Pass:
    """A pass from `NAME` or `NAME{option=value,…}`; InputError names what is unknown, lists what exists."""
    m = re.fullmatch(r"([\w.-]+)(?:\{(.*)\})?", text.strip())
    known = registered("llmc.passes")
    if m is None or m.group(1) not in known:
        raise InputError(f"no pass is named {text!r}", remedy=f"known: {', '.join(known)}")
    kind: type[Pass] = known[m.group(1)].entry.load()
    fields = {f.name: f for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (m.group(2) or "").split(","))):
        key, _, value = part.partition("=")
        if key not in fields:
            raise InputError(
                f"pass {kind.name} has no option {key!r}", remedy=f"options: {', '.join(fields) or 'none'}"
            )
        try:
            options[key] = _number(value, fields[key].type)
        except ValueError:
            raise InputError(
                f"pass {kind.name}: {key}={value!r} is no {fields[key].type}",
                remedy="give a value of that type",
            ) from None
    return kind(**options)


def quantization_passes(scheme: str) -> list[Pass]:
    """The passes of a scheme; "none" has none. InputError lists the schemes that exist."""
    if scheme == "none":
        return []
    forms: list[str] = ["none"]
    for entry in registered("llmc.quantizers").values():
        quantizer: Quantizer = entry.entry.load()()
        found = quantizer.passes(scheme)
        if found is not None:
            return found
        forms += quantizer.forms
    raise InputError(f"no quantization scheme is named {scheme!r}", remedy=f"known: {', '.join(forms)}")
