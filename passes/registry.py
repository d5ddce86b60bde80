"""Passes and quantizers by name, from this package and from anyone's, through entry points.

`llmc.passes`: name → a `Pass` class. `llmc.quantizers`: name → a `Quantizer` class, which turns schemes
(`int4-g64`) into passes. What a broken or a clashing package does to others: nothing (`plugins/entries.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, cast

from ..ir.errors import CompileError, InputError, LlmcError
from ..plugins.entries import Registered, blaming, collect, registered
from ..plugins.options import make_from_text, split_spec
from .base import Pass

__all__ = [
    "Quantizer",
    "Registered",
    "collect",
    "default_head",
    "make_pass",
    "quantization_passes",
    "registered",
]


class Quantizer(ABC):
    """A family of schemes. `forms` is shown to the user ("int4-gN[-sym]"). `head` is the scheme of embeddings
    and output head where --quant-head names none; None where these schemes themselves see to them.
    """

    forms: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[str | None] = "int8"

    @abstractmethod
    def passes(self, scheme: str) -> list[Pass] | None:
        """The passes that carry out a scheme, or None when the scheme is not one of these."""


def make_pass(text: str) -> Pass:
    """A pass from `NAME` or `NAME{option=value,…}`; InputError names what is unknown, lists what exists."""
    name, options = split_spec(text, "pass")
    known = registered("llmc.passes")
    if name not in known:
        raise InputError(f"no pass is named {name!r}", remedy=f"known: {', '.join(known)}")
    return make_from_text(load_pass(known[name]), f"pass {name}", options)


def load_pass(item: Registered) -> type[Pass]:
    """The class of an entry. Raises InputError, naming its package."""
    kind: type[Pass] = item.load_class(Pass)
    if kind.name != item.name:
        raise item.wrong(f"is a pass that calls itself {kind.name!r}")
    return kind


def quantization_passes(scheme: str) -> list[Pass]:
    """The passes of a scheme; "none" has none. InputError lists the schemes that exist, or the packages of
    two quantizers that both claim it.
    """
    return [] if scheme == "none" else _claim(scheme)[1]


def default_head(scheme: str) -> str | None:
    """The scheme of embeddings and output head that goes with one of the linear layers, `Quantizer.head`."""
    return "none" if scheme == "none" else _claim(scheme)[0].head


def _claim(scheme: str) -> tuple[Quantizer, list[Pass]]:
    """The quantizer of a scheme, and its passes. A scheme of ours is ours: no other package is asked then."""
    items = registered("llmc.quantizers").values()
    forms = ["none"]
    for ours in (True, False):
        claims, said = _claims(scheme, [item for item in items if item.is_ours == ours], forms)
        if len(claims) > 1:
            named = " and ".join(f"{item.name} of {item.origin}" for item, _, _ in claims[:2])
            raise InputError(f"scheme {scheme!r} comes from both {named}", remedy="uninstall one of them")
        if claims:
            return claims[0][1:]
        if said:
            known = f"{', '.join(forms)}; not asked: {'; '.join(said)}"
            raise InputError(f"no quantization scheme is named {scheme!r}", remedy=f"known: {known}")
    raise InputError(f"no quantization scheme is named {scheme!r}", remedy=f"known: {', '.join(forms)}")


def claimed_by_ours(scheme: str) -> bool:
    """Whether a scheme is one of llmc's own."""
    ours = [item for item in registered("llmc.quantizers").values() if item.is_ours]
    return bool(_claims(scheme, ours, [])[0])


def _claims(
    scheme: str, items: Iterable[Registered], forms: list[str]
) -> tuple[list[tuple[Registered, Quantizer, list[Pass]]], list[str]]:
    """Who claims a scheme, and what was wrong with those that could not be asked; adds to `forms`."""
    claims: list[tuple[Registered, Quantizer, list[Pass]]] = []
    said: list[str] = []
    for item in items:
        try:
            quantizer = make_quantizer(item)
        except LlmcError as error:
            said.append(str(error))
            continue
        forms += quantizer.forms
        passes = _passes_of(item, quantizer, scheme)
        claims += [(item, quantizer, passes)] if passes is not None else []
    return claims, said


def make_quantizer(item: Registered) -> Quantizer:
    """The quantizer of an entry. Raises InputError or CompileError, naming its package."""
    kind = item.load_class(Quantizer)
    with blaming(f"quantizer {item.name}", kind):
        quantizer: Quantizer = kind()
    return quantizer


def _passes_of(item: Registered, quantizer: Quantizer, scheme: str) -> list[Pass] | None:
    with blaming(f"quantizer {item.name}, asked for scheme {scheme!r},", quantizer):
        found: Any = quantizer.passes(scheme)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(one, Pass) for one in cast(list[Any], found)):
        raise CompileError(
            f"quantizer {item.name} of package {item.origin} gave no list of passes for scheme {scheme!r}",
            remedy=f"report it to the authors of {item.origin}, or uninstall it",
        )
    return cast(list[Pass], found)
