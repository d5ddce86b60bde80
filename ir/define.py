"""`@op`: one decorated class is the whole definition of an operation.

    @op("rms_norm")
    class RmsNorm(Op):
        x: Operand
        weight: Operand
        eps: float

        def infer(self): ...
        def reference(self, dims, x, weight): ...

Annotations `Operand`, `OptionalOperand` and `Operands` become operands, everything else an attribute. From
these come the constructor (`RmsNorm(x, w, eps=1e-6)`, result types inferred at once), the accessors, the
printer and the parser.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from .core import Op, OperandField, Value, attach_operands, make_results
from .errors import CompileError

Operand = Value
OptionalOperand = Value | None
Operands = list[Value]

OPS: dict[str, type[Op]] = {}
_T = TypeVar("_T", bound=type[Op])
_MISSING = object()


def _operand_kind(annotation: Any) -> str | None:
    # A module without `from __future__ import annotations` has the types themselves here, not their names.
    for alias, kind in ((Operand, "one"), (OptionalOperand, "optional"), (Operands, "many")):
        if annotation == alias:
            return kind
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return {"Operand": "one", "OptionalOperand": "optional", "Operands": "many"}.get(text)


def _accessor(index: int, kind: str) -> property:
    def get(self: Op) -> Any:
        start = sum(self.counts[:index])
        n = self.counts[index]
        if kind == "many":
            return self.operands[start : start + n]
        return self.operands[start] if n else None

    return property(get)


def _fields(cls: type[Op]) -> tuple[list[OperandField], dict[str, Any]]:
    """Operand fields and attributes (name → default or _MISSING) in order, inherited ones first."""
    operands: list[OperandField] = []
    attributes: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Op) or base is Op:
            continue
        for name, annotation in inspect.get_annotations(base).items():
            if "ClassVar" in str(annotation):
                continue
            kind = _operand_kind(annotation)
            if kind:
                if all(f.name != name for f in operands):
                    operands.append(OperandField(name, kind))
            else:
                attributes[name] = base.__dict__.get(name, _MISSING)
    return operands, attributes


def _initializer(operands: list[OperandField], attributes: dict[str, Any]) -> Callable[..., None]:
    names = [f.name for f in operands]

    def init(self: Op, *args: Any, **kwargs: Any) -> None:
        Op.__init__(self)
        bound = dict(zip(names + list(attributes), args, strict=False))
        bound.update(kwargs)
        unknown = set(bound) - set(names) - set(attributes)
        if unknown or len(args) > len(names) + len(attributes):
            raise CompileError(
                f"{self.opname} has no field {', '.join(sorted(unknown)) or 'for a further argument'}",
                remedy=f"fields: {', '.join(names + list(attributes))}",
            )
        for name, default in attributes.items():
            value = bound.get(name, default)
            if value is _MISSING:
                raise CompileError(f"{self.opname} needs the attribute {name}", remedy="give it")
            setattr(self, name, value)
        flat: list[Value] = []
        counts: list[int] = []
        for f in operands:
            value = bound.get(f.name)
            part = list(value or []) if f.kind == "many" else ([] if value is None else [value])
            if f.kind == "one" and not part:
                raise CompileError(f"{self.opname} needs the operand {f.name}", remedy="give it")
            counts.append(len(part))
            flat += part
        self.counts = tuple(counts)
        attach_operands(self, flat)
        make_results(self)

    return init


def op(name: str) -> Callable[[_T], _T]:
    """Register a subclass of `Op` under its text-form name. Two of one name raise."""

    def decorate(cls: _T) -> _T:
        if name in OPS:
            raise CompileError(
                f"two ops are named {name}: {OPS[name].__module__} and {cls.__module__}", remedy="rename one"
            )
        operands, attributes = _fields(cls)
        taken = [n for n in (*attributes, *(f.name for f in operands)) if hasattr(Op, n)]
        if taken:
            raise CompileError(f"{name}: field {taken[0]} hides a method of Op", remedy="rename the field")
        cls.opname = name
        cls.operand_fields = tuple(operands)
        cls.attribute_fields = tuple(attributes)
        for i, f in enumerate(operands):
            setattr(cls, f.name, _accessor(i, f.kind))
        cls.__init__ = _initializer(operands, attributes)
        OPS[name] = cls
        return cls

    return decorate


def attribute_types(cls: type[Op]) -> dict[str, Any]:
    """Attribute name → annotation, resolved (for the parser and for docs)."""
    hints = typing.get_type_hints(cls, include_extras=False)
    return {name: hints[name] for name in cls.attribute_fields}
