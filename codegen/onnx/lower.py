"""IR graph → ONNX model. One table of emitters, filled by `ops_*.py` and `attention.py`: IR op → ONNX nodes.

    emits("add")            the function below it writes the nodes of an `add`
    context.name(value)     the ONNX name of an operand (a weight becomes an initializer when first asked for)

`append_kv` leaves no node: the rows become outputs `new_k.i`, `new_v.i` [T, Hkv, D] that the executor writes, and
`paged_attention` reads the past from the pages `k_pages.i`, `v_pages.i` [Hkv, N, page_size, D] and the new rows from
where they were computed. So no cache is ever copied by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import FunctionProto, ModelProto, helper

from ...ir.core import Graph, Op, Value
from ...ir.errors import UnsupportedError
from ...ir.types import TensorType
from .builder import CONTRIB, IR_VERSION, LOCAL, OPSET, Dims, Scope, value_infos
from .weights import WeightFile

if TYPE_CHECKING:
    from .attention import Plan

Emitter = Callable[["Context", Any], "str | list[str] | None"]
EMITTERS: dict[str, Emitter] = {}
_HALVES = ("float16", "bfloat16")
# Ops that only move data keep half-precision values as they are; everything else computes in float32.
_MOVES = frozenset(
    "cast reshape transpose expand slice concat index gather full arange dim_value embedding gather_last append_kv".split()
)


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register the emitter of some IR ops."""

    def register(function: Emitter) -> Emitter:
        for name in names:
            assert name not in EMITTERS, name
            EMITTERS[name] = function
        return function

    return register


@dataclass(frozen=True)
class KvPages:
    """One layer's cache: the model's inputs for it, and the rows that this step adds."""

    index: str
    type: TensorType  # [2, N, page_size, Hkv, D] as in the IR

    @property
    def names(self) -> tuple[str, str]:
        return f"k_pages.{self.index}", f"v_pages.{self.index}"

    @property
    def page_type(self) -> TensorType:
        """Type of either input: a head's pages lie together, so that gathering them needs no transposition."""
        _, pages, size, heads, dim = self.type.shape
        return TensorType(self.type.dtype, (heads, pages, size, dim))


@dataclass
class Context:
    """One graph being lowered."""

    graph: Graph
    accuracy_level: int = 4
    scope: Scope = field(default_factory=Scope)
    weights: WeightFile = field(default_factory=WeightFile)
    functions: dict[Any, FunctionProto] = field(default_factory=dict)
    plans: dict[Any, Plan] = field(default_factory=dict)  # attention's indices and masks, shared by layers
    pages: dict[Value, KvPages] = field(default_factory=dict)  # cache inputs
    new_rows: dict[str, tuple[str, str, TensorType]] = field(default_factory=dict)  # page index → k, v, their type
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
        if not (self._widening and value.dtype in _HALVES):
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
        emitter = EMITTERS.get(op.opname)
        if emitter is None:
            raise UnsupportedError(
                f"onnx-cpu has no {op.opname} (from {op.loc or 'the graph'})",
                remedy="compile for tvm-cpu, or decompose it",
            )
        self._widening = op.opname not in _MOVES
        out = emitter(self, op)
        self._widening = False
        if out is None:  # the result is only known to other emitters (a cache)
            return
        for value, name in zip(op.results, [out] if isinstance(out, str) else out, strict=True):
            narrow = op.opname not in _MOVES and value.dtype in _HALVES
            self.bind(value, self.scope.cast(name, value.dtype) if narrow else name)


@dataclass(frozen=True)
class Lowered:
    """The model without its weights, the weights to stream, and what the executor needs to know."""

    model: ModelProto
    weights: WeightFile
    inputs: list[str]
    kv_dtype: str | None
    page_size: int | None
    needs_packing: bool


def _add_inputs(context: Context) -> list[tuple[str, TensorType]]:
    """The model's inputs in order. Caches are split in two; what nothing reads (`slot_mapping`) is left out."""
    inputs: list[tuple[str, TensorType]] = []
    outputs = set(context.graph.outputs)
    for value in context.graph.inputs:
        if any(op.opname == "append_kv" and op.operands[2] is value for op in value.users):
            pages = KvPages(value.name.rpartition(".")[2], value.type)
            context.pages[value] = pages
            inputs += [(name, pages.page_type) for name in pages.names]
            continue
        only_slots = value.users and all(op.opname == "append_kv" for op in value.users)
        if only_slots or not (value.users or value in outputs or _names_a_dimension(value, context.graph)):
            continue
        inputs.append((value.name, value.type))
        context.bind(value, value.name)
        context.dims.learn(value.name, value.type)
    for name, _ in inputs:
        context.scope.names.fresh(name)
    return inputs


def _names_a_dimension(value: Value, graph: Graph) -> bool:
    """An unread input stays where its shape is the only one to tell a dimension, and in plain functions always."""
    if graph.stage != "paged":
        return True
    others = {s for v in graph.inputs if v is not value for d in v.shape if not isinstance(d, int) for s in d.symbols()}
    return any(d.symbols() - others for d in value.shape if not isinstance(d, int))


def _add_outputs(context: Context) -> list[tuple[str, TensorType]]:
    graph = context.graph
    outputs: list[tuple[str, TensorType]] = []
    names = graph.output_names or [v.name or f"output.{i}" for i, v in enumerate(graph.outputs)]
    for value, name in zip(graph.outputs, names, strict=True):
        if value.type.rank == 5 and value.producer is not None and value.producer.opname == "append_kv":
            continue  # the caches themselves: the executor has them
        context.scope.rename(context.name(value), name)
        outputs.append((name, value.type))
    for index, (k, v, type) in context.new_rows.items():
        for part, row in (("k", k), ("v", v)):
            context.scope.rename(row, f"new_{part}.{index}")
            outputs.append((f"new_{part}.{index}", type))
    return outputs


def lower(graph: Graph, *, accuracy_level: int = 4) -> Lowered:
    """The ONNX model of a graph of any stage whose ops are in `OPERATIONS`.

    Raises UnsupportedError for an op without an emitter or a cache that is used otherwise than by appending and
    attending.
    """
    context = Context(graph, accuracy_level)
    for name in [*graph.output_names, *graph.weights]:
        context.scope.names.fresh(name)
    inputs = _add_inputs(context)
    for op in graph:
        context.lower(op)
    outputs = _add_outputs(context)
    body = context.scope.body(value_infos(inputs), value_infos(outputs), graph.name)
    body.initializer.extend(sorted(context.weights.initializers, key=lambda t: t.name))
    model = helper.make_model(
        body,
        functions=list(context.functions.values()),
        opset_imports=opsets(),
        ir_version=IR_VERSION,
        producer_name="llmc",
    )
    first = next(iter(context.pages.values()), None)
    size = first.type.shape[2] if first else None
    assert size is None or isinstance(size, int)
    return Lowered(
        model,
        context.weights,
        [name for name, _ in inputs],
        first.type.dtype if first else None,
        size,
        context.needs_packing,
    )


def opsets() -> Sequence[Any]:
    """The operator sets that a model or a function of ours uses."""
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid(LOCAL, 1)]


from . import attention, ops_math, ops_nn, ops_quant, ops_shape  # noqa: E402, F401  (they fill the table)

OPERATIONS = frozenset(EMITTERS)
"""Names of the IR ops that can be emitted."""
