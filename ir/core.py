"""The graph: values, operations, uses. Only the code in this file changes a graph.

SSA: a `Value` is an input, a weight or the result of one op; an `Op` knows its operands, a value knows its
uses. Ops stand in a doubly linked list in execution order, so that inserting and erasing cost O(1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

from .errors import CompileError
from .types import Dim, TensorType

if TYPE_CHECKING:
    from .weights import LazyTensor


class Value:
    """One SSA value. `producer` is None for graph inputs and weights; `name` is a hint for the text form."""

    __slots__ = ("index", "name", "producer", "type", "uses", "weight")

    def __init__(self, type: TensorType, name: str = "", producer: Op | None = None, index: int = 0) -> None:
        self.type = type
        self.name = name
        self.producer = producer
        self.index = index
        self.uses: dict[tuple[Op, int], None] = {}  # insertion-ordered set: deterministic iteration
        self.weight: LazyTensor | None = None

    @property
    def users(self) -> list[Op]:
        """The ops that use this value, each once, in order of first use."""
        return list(dict.fromkeys(op for op, _ in self.uses))

    @property
    def is_weight(self) -> bool:
        return self.weight is not None

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    def __repr__(self) -> str:
        return f"%{self.name or '?'}: {self.type}"


@dataclass(frozen=True)
class OperandField:
    name: str
    kind: str  # "one", "optional", "many"


@dataclass_transform()
class Op:
    """Base of all operations; subclasses are made by `define.op`.

    Attributes are instance fields, operands are a flat list.
    """

    opname: ClassVar[str] = ""
    operand_fields: ClassVar[tuple[OperandField, ...]] = ()
    attribute_fields: ClassVar[tuple[str, ...]] = ()
    emitters: ClassVar[Mapping[str, str]] = {}
    """Of an op of another package: target → the module that registers what emits it there."""

    def __init__(self) -> None:
        self.operands: list[Value] = []
        self.counts: tuple[int, ...] = ()  # how many operands each operand field takes
        self.results: list[Value] = []
        self.loc: str = ""  # the module that the op was traced from, for error messages
        self.graph: Graph | None = None
        self.prev: Op | None = None
        self.next: Op | None = None

    # -- meaning; subclasses override
    # ------------------------------------------------------------------------------
    def infer(self) -> list[TensorType]:
        """Result types from operand types and attributes. Raises `CompileError` where they do not fit."""
        raise NotImplementedError(f"abstract: {self.opname}.infer")

    def verify(self) -> None:
        """Constraints beyond `infer`. Raises `VerifyError`."""

    def reference(self, dims: Mapping[str, int], *args: Any) -> Any:
        """The op's meaning in torch: one argument a operand field (None when absent, a list for "many")."""
        raise NotImplementedError(f"abstract: {self.opname}.reference")

    # -- access
    # ----------------------------------------------------------------------------------------------------
    @property
    def result(self) -> Value:
        return self.results[0]

    def attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.attribute_fields}

    def grouped(self, values: Sequence[Any]) -> list[Any]:
        """Flat operand values → one entry a field (value, None, or list)."""
        out: list[Any] = []
        start = 0
        for f, n in zip(self.operand_fields, self.counts, strict=True):
            part = list(values[start : start + n])
            out.append(part if f.kind == "many" else (part[0] if part else None))
            start += n
        return out

    def clone(self, operands: Mapping[Value, Value] | None = None, **changes: Any) -> Op:
        """A detached copy with operands mapped and attributes changed; result types are inferred anew."""
        new = type(self).__new__(type(self))
        Op.__init__(new)
        for name, value in {**self.attributes(), **changes}.items():
            setattr(new, name, value)
        new.loc = self.loc
        new.counts = self.counts
        attach_operands(new, [(operands or {}).get(v, v) for v in self.operands])
        make_results(new, [r.name for r in self.results])
        return new

    def __repr__(self) -> str:
        return f"<{self.opname} -> {', '.join(map(repr, self.results))}>"


def attach_operands(op: Op, operands: Iterable[Value]) -> None:
    for v in operands:
        v.uses[(op, len(op.operands))] = None
        op.operands.append(v)


def make_results(op: Op, names: Sequence[str] = ()) -> None:
    types = op.infer()
    op.results = [Value(t, names[i] if i < len(names) else "", op, i) for i, t in enumerate(types)]


class Graph:
    """A function over tensors: inputs and weights → outputs.

    `stage` names what is allowed in it (see `verifier.py`); `facts` are what the frontend knows of the model,
    JSON-like.
    """

    def __init__(self, name: str = "main", stage: str = "traced") -> None:
        self.name = name
        self.stage = stage
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.weights: dict[str, Value] = {}
        self.facts: dict[str, Any] = {}
        self._first: Op | None = None
        self._last: Op | None = None

    # -- reading
    # -----------------------------------------------------------------------------------------------------
    def __iter__(self) -> Iterator[Op]:
        """Ops in order. The op just yielded may be erased, and ops may be inserted, while iterating."""
        op = self._first
        while op is not None:
            following = op.next
            yield op
            op = following if op.graph is None else op.next

    @property
    def ops(self) -> list[Op]:
        return list(self)

    @property
    def first(self) -> Op | None:
        return self._first

    @property
    def last(self) -> Op | None:
        return self._last

    def input(self, name: str) -> Value:
        for v in self.inputs:
            if v.name == name:
                return v
        raise CompileError(
            f"graph {self.name} has no input {name}",
            remedy=f"inputs: {', '.join(v.name for v in self.inputs)}",
        )

    def output_uses(self, value: Value) -> int:
        return sum(1 for v in self.outputs if v is value)

    # -- building and changing
    # ---------------------------------------------------------------------------------------
    def add_input(self, name: str, type: TensorType) -> Value:
        value = Value(type, name)
        self.inputs.append(value)
        return value

    def add_weight(self, name: str, data: LazyTensor, type: TensorType | None = None) -> Value:
        """A weight by its unique name; the same name again must be the same data."""
        if name in self.weights:
            if self.weights[name].weight is not data:
                raise CompileError(
                    f"two weights are named {name}", remedy="give the derived weight a name of its own"
                )
            return self.weights[name]
        value = Value(type or TensorType(data.dtype, tuple(data.shape)), name)
        value.weight = data
        self.weights[name] = value
        return value

    def set_weight(self, value: Value, data: LazyTensor) -> None:
        """Other data of the same shape for a weight, under its name."""
        old = value.weight if self.weights.get(value.name) is value else None
        if old is None or data.shape != old.shape:
            raise CompileError(
                f"{value!r} cannot take data of shape {list(data.shape)}", remedy="add another weight"
            )
        value.weight = data
        value.type = TensorType(data.dtype, tuple(data.shape))

    def insert(self, op: Op, before: Op | None = None) -> Op:
        """Put a detached op before another one, or at the end."""
        if op.graph is not None:
            raise CompileError(f"{op!r} already stands in a graph", remedy="clone it")
        op.graph = self
        op.next = before
        op.prev = before.prev if before is not None else self._last
        if op.prev is not None:
            op.prev.next = op
        else:
            self._first = op
        if before is not None:
            before.prev = op
        else:
            self._last = op
        return op

    def append(self, op: Op) -> Op:
        return self.insert(op)

    def erase(self, op: Op) -> None:
        """Remove an op whose results nobody uses."""
        for r in op.results:
            if r.uses or self.output_uses(r):
                raise CompileError(f"{op!r} is still used", remedy="replace its uses first")
        for i, v in enumerate(op.operands):
            v.uses.pop((op, i), None)
        if op.prev is not None:
            op.prev.next = op.next
        else:
            self._first = op.next
        if op.next is not None:
            op.next.prev = op.prev
        else:
            self._last = op.prev
        op.graph = None

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        old = op.operands[index]
        old.uses.pop((op, index), None)
        op.operands[index] = value
        value.uses[(op, index)] = None

    def replace_uses(self, old: Value, new: Value) -> None:
        """Every use of `old`, graph outputs included, becomes a use of `new`."""
        for op, index in list(old.uses):
            self.set_operand(op, index, new)
        self.outputs = [new if v is old else v for v in self.outputs]

    def replace(self, op: Op, values: Sequence[Value]) -> None:
        """Replace all results of `op` by `values` and erase it."""
        for r, v in zip(op.results, values, strict=True):
            if not v.name:
                v.name = r.name
            self.replace_uses(r, v)
        self.erase(op)

    def retype(self, op: Op) -> bool:
        """Infer the result types again after an operand changed; true when one changed."""
        types = op.infer()
        changed = any(r.type != t for r, t in zip(op.results, types, strict=True))
        for r, t in zip(op.results, types, strict=True):
            r.type = t
        return changed

    def retype_all(self) -> None:
        for op in self:
            self.retype(op)

    def drop_dead(self) -> int:
        """Erase ops whose results are unused, and weights that nobody reads; how many ops went."""
        used = {id(v) for v in self.outputs}
        count = 0
        op = self._last
        while op is not None:
            previous = op.prev
            if not any(r.uses or id(r) in used for r in op.results):
                self.erase(op)
                count += 1
            op = previous
        for name in [n for n, v in self.weights.items() if not v.uses and id(v) not in used]:
            del self.weights[name]
        return count

    def clone(self) -> Graph:
        """A deep copy of the structure; weights' data is shared."""
        new = Graph(self.name, self.stage)
        new.facts = dict(self.facts)
        mapping: dict[Value, Value] = {v: new.add_input(v.name, v.type) for v in self.inputs}
        for name, v in self.weights.items():
            assert v.weight is not None
            mapping[v] = new.add_weight(name, v.weight, v.type)
        for op in self:
            copy = new.append(op.clone(mapping))
            mapping.update(zip(op.results, copy.results, strict=True))
        new.outputs = [mapping[v] for v in self.outputs]
        new.output_names = list(self.output_names)
        return new
