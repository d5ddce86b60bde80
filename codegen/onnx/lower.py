"""IR graph → ONNX model, by the emitters of `ops_*.py` and `attention.py`.

`append_kv` writes no cache: the rows become outputs `new_k.i`, `new_v.i` [T, Hkv, D] that the executor
writes, and `paged_attention` reads the past from the pages `k_pages.i`, `v_pages.i` [Hkv, N, page_size, D]
and the new rows from where they were computed. So no cache is ever copied by the model. A cache of int8 has
its scales apart, `k_scales.i`, `v_scales.i` float32 [Hkv, N, page_size], and outputs `new_k_scale.i`,
`new_v_scale.i` [T, Hkv].
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import FunctionProto, GraphProto, ModelProto, helper

from ...ir.core import Graph, Value
from ...ir.errors import UnsupportedError
from ...ir.types import TensorType
from . import attention, ops_math, ops_nn, ops_quant, ops_shape
from .builder import IR_VERSION, value_infos
from .context import EMITTERS, Context, KvPages, opsets
from .weights import WeightFile


@dataclass(frozen=True)
class Lowered:
    """The main graph and its functions, the weights to stream, and what the executor needs to know."""

    graph: GraphProto
    functions: list[FunctionProto]
    weights: WeightFile
    inputs: list[str]
    kv_dtype: str | None
    page_size: int | None
    needs_packing: bool

    def model(self) -> ModelProto:
        """The whole model. Ask for it after the initializers were pointed to the weight file."""
        graph = GraphProto()
        graph.CopyFrom(self.graph)
        graph.initializer.extend(sorted(self.weights.initializers, key=lambda t: t.name))
        return helper.make_model(
            graph,
            functions=self.functions,
            opset_imports=opsets(),
            ir_version=IR_VERSION,
            producer_name="llmc",
        )


def _add_inputs(context: Context) -> list[tuple[str, TensorType]]:
    """The model's inputs in order. Caches are split in two; unread ones (`slot_mapping`) are left out."""
    inputs: list[tuple[str, TensorType]] = []
    outputs = set(context.graph.outputs)
    for value in context.graph.inputs:
        if any(op.opname == "append_kv" and op.operands[2] is value for op in value.users):
            pages = KvPages(value.name.rpartition(".")[2], value.type)
            context.pages[value] = pages
            inputs += pages.inputs
            continue
        only_slots = value.users and all(op.opname == "append_kv" for op in value.users)
        if only_slots or not (value.users or value in outputs or _names_a_dimension(value, context.graph)):
            continue
        inputs.append((value.name, value.type))
        context.bind(value, value.name)
        context.dims.learn(value.name, value.type)
    return inputs


def _names_a_dimension(value: Value, graph: Graph) -> bool:
    """An unread input stays where its shape is the only one to tell a dimension, and in plain functions
    always.
    """
    if graph.stage != "paged":
        return True
    others = {
        s
        for v in graph.inputs
        if v is not value
        for d in v.shape
        if not isinstance(d, int)
        for s in d.symbols()
    }
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
    for rows in context.new_rows.values():
        for name, row, type in rows.outputs:
            context.scope.rename(row, name)
            outputs.append((name, type))
    return outputs


def lower(graph: Graph, *, accuracy_level: int = 4) -> Lowered:
    """The ONNX model of a graph of any stage whose ops are in `OPERATIONS`.

    Raises UnsupportedError for an op without an emitter or a cache that is used otherwise than by appending
    and attending.
    """
    context = Context(graph, accuracy_level)
    inputs = _add_inputs(context)
    for name in [*graph.output_names, *(name for name, _ in inputs), *graph.weights]:
        if not context.scope.names.take(name):
            raise UnsupportedError(
                f"onnx: {name} names two of the model's inputs, outputs and weights",
                remedy="rename one of them",
            )
    for op in graph:
        context.lower(op)
    outputs = _add_outputs(context)
    body = context.scope.body(value_infos(inputs), value_infos(outputs), graph.name)
    first = next(iter(context.pages.values()), None)
    size = first.type.shape[2] if first else None
    assert size is None or isinstance(size, int)
    return Lowered(
        body,
        list(context.functions.values()),
        context.weights,
        [name for name, _ in inputs],
        first.type.dtype if first else None,
        size,
        context.needs_packing,
    )


_TABLES = (attention, ops_math, ops_nn, ops_quant, ops_shape)  # importing them filled the table

OPERATIONS = frozenset(EMITTERS)
"""Names of the IR ops that can be emitted."""
