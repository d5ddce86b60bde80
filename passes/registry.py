"""Passes and quantizers by name, from this package and from anyone's, through entry points.

`llmc.passes`: name → a `Pass` class. `llmc.quantizers`: name → a `Quantizer` class, which turns schemes
(`int4-g64`) into passes. Two of one name are an error that names both packages.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from ..ir.errors import InputError
from .base import Pass


class Quantizer(ABC):
    """A family of schemes. `forms` is shown to the user ("int4-gN[-sym]"). `head` is the scheme of embeddings
    and output head where --quant-head names none; None where these schemes themselves see to them.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[str | None] = "int8"

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
    return collect(group, entry_points(group=group))


def collect(group: str, entries: Iterable[EntryPoint]) -> dict[str, Registered]:
    """Entries by name. One distribution found twice (editable install and build folder) is no clash."""
    found: dict[str, Registered] = {}
    for entry in sorted(entries, key=lambda e: e.name):
        origin = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
        other = found.setdefault(entry.name, Registered(entry.name, origin, entry))
        if (other.origin, other.entry.value) != (origin, entry.value):
            raise InputError(
                f"{group}: {entry.name} comes from both {other.origin} and {origin}",
                remedy="uninstall one of them",
            )
    return found


def _load(item: Registered, base: type[Any]) -> type[Any]:
    """The class of an entry. Raises InputError, naming the package, where it cannot be had."""
    try:
        cls = item.entry.load()
    except Exception as error:  # a plugin's import may fail in any way
        raise InputError(
            f"{item.name} of package {item.origin} cannot be imported ({type(error).__name__}: {error})",
            remedy=f"upgrade or uninstall {item.origin}",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(
            f"entry point {item.name} of package {item.origin} is no {base.__name__} class",
            remedy=f"report it to the authors of {item.origin}",
        )
    return cls


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
    if m is None:
        raise InputError(f"{text!r} is no pass", remedy="write NAME or NAME{option=value,…}")
    if m.group(1) not in known:
        raise InputError(f"no pass is named {m.group(1)!r}", remedy=f"known: {', '.join(known)}")
    kind = _load(known[m.group(1)], Pass)
    options = _options(m.group(1), dataclasses.fields(kind), m.group(2) or "")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in options
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"pass {m.group(1)} needs the option {missing[0]}", remedy="give it in braces")
    return kind(**options)


def _options(name: str, declared: Iterable[dataclasses.Field[Any]], text: str) -> dict[str, Any]:
    fields = {f.name: f for f in declared}
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in fields:
            raise InputError(
                f"pass {name} has no option {key!r}", remedy=f"options: {', '.join(fields) or 'none'}"
            )
        if key in options:
            raise InputError(f"pass {name}: {key} is given twice", remedy="give it once")
        kind = getattr(fields[key].type, "__name__", fields[key].type)
        try:
            options[key] = _number(value, kind)
        except ValueError:
            raise InputError(
                f"pass {name}: {key}={value!r} is no {kind}", remedy="give a value of that type"
            ) from None
    return options


def quantization_passes(scheme: str) -> list[Pass]:
    """The passes of a scheme; "none" has none. InputError lists the schemes that exist, or the packages of
    two quantizers that both claim it.
    """
    return [] if scheme == "none" else _claim(scheme)[1]


def default_head(scheme: str) -> str | None:
    """The scheme of embeddings and output head that goes with one of the linear layers, `Quantizer.head`."""
    return "none" if scheme == "none" else _claim(scheme)[0].head


def _claim(scheme: str) -> tuple[Quantizer, list[Pass]]:
    """The quantizer of a scheme, and its passes."""
    forms: list[str] = ["none"]
    claims: list[tuple[Registered, Quantizer, list[Pass]]] = []
    for item in registered("llmc.quantizers").values():
        quantizer: Quantizer = _load(item, Quantizer)()
        passes = quantizer.passes(scheme)
        claims += [(item, quantizer, passes)] if passes is not None else []
        forms += quantizer.forms
    if not claims:
        raise InputError(f"no quantization scheme is named {scheme!r}", remedy=f"known: {', '.join(forms)}")
    if len(claims) > 1:
        named = " and ".join(f"{item.name} of {item.origin}" for item, _, _ in claims[:2])
        raise InputError(f"scheme {scheme!r} comes from both {named}", remedy="uninstall one of them")
    return claims[0][1:]
