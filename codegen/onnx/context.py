"""What the emitters share: the table that they fill, and the state of one graph being lowered.

emits("add")            the function below it writes the nodes of an `add`
context.name(value)     the ONNX name of an operand (a weight becomes an initializer when first asked for)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import FunctionProto, helper

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import HALVES, KV_SCALE_BYTES
from ...ir.errors import CompileError, UnsupportedError
from ...ir.types import TensorType
from ...plugins.entries import blaming
from ..extensions import import_emitters
from .builder import CONTRIB, LOCAL, OPSET, Dims, Scope
from .weights import WeightFile

if TYPE_CHECKING:
    from .attention_plan import Batch, Plan

Emitter = Callable[["Context", Any], "str | list[str] | None"]
EMITTERS: dict[str, Emitter] = {}
# Ops that only move data keep half-precision values as they are; everything else computes in float32.
_MOVES = {
    "append_kv", "arange", "cast", "concat", "dim_value", "embedding", "expand", "full", "gather",
    "gather_last", "index", "reshape", "slice", "transpose",
}  # fmt: skip


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register the emitter of some IR ops."""

    def register(function: Emitter) -> Emitter:
        for name in names:
            if name in EMITTERS:
                raise CompileError(f"onnx-cpu emits {name} already", remedy="give the op another name")
            EMITTERS[name] = function
        return function

    return register


@dataclass(frozen=True)
class KvPages:
    """One layer's cache: the model's inputs for it, and the rows that this step adds."""

    index: str
    type: TensorType  # [2, N, page_size, Hkv, D] as in the IR

    @property
    def quantized(self) -> bool:
        """Whether there are scales, which lie in arrays of their own: ONNX cannot take bytes for floats."""
        return self.type.dtype == "int8"

    @property
    def inputs(self) -> list[tuple[str, TensorType]]:
        """Keys and values, then their scales where quantized. A head's pages lie together: gathering them
        needs no transposition.
        """
        _, pages, size, heads, width = self.type.shape
        dim = width - KV_SCALE_BYTES if self.quantized else width
        held = TensorType(self.type.dtype, (heads, pages, size, dim))
        found = [(f"{part}_pages.{self.index}", held) for part in "kv"]
        if self.quantized:
            scales = TensorType("float32", (heads, pages, size))
            found += [(f"{part}_scales.{self.index}", scales) for part in "kv"]
        return found


@dataclass(frozen=True)
class NewRows:
    """The keys and values of a step's own tokens in one layer."""

    k: str
    """[T, Hkv, D] as the cache will hold them: in its element type, or dequantized to float32."""
    v: str
    outputs: list[tuple[str, str, TensorType]]
    """(name, value, type) of what the executor writes into the cache."""


@dataclass
class Context:
    """One graph being lowered."""

    graph: Graph
    accuracy_level: int = 4
    scope: Scope = field(default_factory=Scope)
    weights: WeightFile = field(default_factory=WeightFile)
    functions: dict[Any, FunctionProto] = field(default_factory=dict)
    batches: dict[Any, Batch] = field(default_factory=dict)  # attention's view of the batch, shared by layers
    plans: dict[Any, Plan] = field(default_factory=dict)  # and its indices and masks
    pages: dict[Value, KvPages] = field(default_factory=dict)  # cache inputs
    new_rows: dict[str, NewRows] = field(default_factory=dict)  # by the index of the pages
    needs_packing: bool = False  # a kernel is used that is only fast on weights that onnxruntime repacks

    def __post_init__(self) -> None:
        self.dims = Dims(self.scope)
        self._names: dict[Value, str] = {}
        self._wide: dict[Value, str] = {}
        self._widening = False

    def name(self, value: Value) -> str:
        """The ONNX value of an operand; in float32 while a computing op is emitted."""
        if value not in self._names:
            if value.weight is None:
                raise UnsupportedError(
                    f"onnx: {value.name or 'a value'} of type {value.type} cannot be used here",
                    remedy="a KV cache may only be appended to and attended over",
                )
            self._names[value] = self.weights.raw(value)
        if not (self._widening and value.dtype in HALVES):
            return self._names[value]
        if value not in self._wide:
            self._wide[value] = self.scope.cast(self._names[value], "float32")
        return self._wide[value]

    def optional(self, value: Value | None) -> str | None:
        return None if value is None else self.name(value)

    def bind(self, value: Value, name: str) -> None:
        self._names[value] = name

    def is_bound(self, value: Value) -> bool:
        return value in self._names

    def lower(self, op: Op) -> None:
        """Write the nodes of one op and bind its results."""
        if op.opname not in EMITTERS:
            import_emitters(op, "onnx-cpu")
        emitter = EMITTERS.get(op.opname)
        if emitter is None:
            raise UnsupportedError(
                f"onnx-cpu has no {op.opname} (from {op.loc or 'the graph'})",
                remedy="compile for tvm-cpu, or decompose it",
            )
        self._widening = op.opname not in _MOVES
        with blaming(f"onnx-cpu's emitter of {op.opname}", emitter):
            out = emitter(self, op)
        self._widening = False
        if out is None:  # the result is only known to other emitters (a cache)
            return
        for value, name in zip(op.results, [out] if isinstance(out, str) else out, strict=True):
            narrow = op.opname not in _MOVES and value.dtype in HALVES
            self.bind(value, self.scope.cast(name, value.dtype) if narrow else name)


def opsets() -> Sequence[Any]:
    """The operator sets that a model or a function of ours uses."""
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid(LOCAL, 1)]
