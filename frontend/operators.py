"""Operators of ours that torch.export records: defined once in torch, which knows them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.core import Op
from ..ir.define import attribute_types

_WORDS = {bool: "bool", float: "float", int: "int", str: "str"}
_libraries: list[Any] = []
"""They live for as long as their operators."""


@dataclass(frozen=True)
class Definition:
    """An operator's schema without its name, what it makes of tensors without data, and of those of the CPU
    where it has any.
    """

    schema: str
    fake: Callable[..., Any]
    run: Callable[..., Any] | None = None


def define_operators(namespace: str, definitions: Mapping[str, Definition]) -> Any:
    """The operators by name, as attributes. To be called once a namespace."""
    import torch

    library = torch.library.Library(namespace, "DEF")
    for name, one in definitions.items():
        library.define(f"{name}{one.schema}")
        torch.library.register_fake(f"{namespace}::{name}", one.fake, lib=library)
        if one.run is not None:
            library.impl(name, one.run, "CPU")
    _libraries.append(library)
    return getattr(torch.ops, namespace)


def operand_names(kind: type[Op]) -> list[str]:
    """The operands of an op that are one value each: what is traced has no cache."""
    return [field.name for field in kind.operand_fields if field.kind != "many"]


def schema_of(kind: type[Op]) -> str:
    """The schema of an operator that stands for an op: its operands, then its attributes."""
    optional = {field.name for field in kind.operand_fields if field.kind == "optional"}
    tensors = [f"Tensor{'?' if name in optional else ''} {name}" for name in operand_names(kind)]
    types = attribute_types(kind)
    attributes = [f"{_WORDS.get(types[name], 'str?')} {name}" for name in kind.attribute_fields]
    return f"({', '.join(tensors + attributes)}) -> Tensor"
