"""Quantized weights as the checkpoint has them: nothing is quantized here, stored codes are attached.

    linear(x, w)                       → quantized_linear(x, q, scale, zero_point)
    linear(x, w), columns permuted     → quantized_linear(gather(x, columns), q, scale, zero_point)
    linear(x, [wq; wk; wv]) whose      → concat(quantized_linear(x, wq…), …, linear(x, wv))
      parts lie on different grids
    moe(x, i, w, up, down)             → quantized_moe(x, i, w, up.q, up.scale, …, down.q, …)

A weight that the file has in floats stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import InputError
from ...ir.ops.moe import Moe
from ...ir.ops.nn import Linear
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear
from ...ir.ops.shape import Concat, Gather, Slice
from ...ir.weights import (
    ArrayTensor,
    LazyTensor,
    QuantizedTensors,
    ShapeOnlyTensor,
    quantized_of,
    read_chunks,
)
from ..base import Pass, PassContext, PassResult
from ..canonicalize.moe import why_floats
from ..derived import CastTensor, ConcatRows, SliceRows
from ..registry import Quantizer
from .attach import attach_quantized, is_head, is_quantizable
from .moe import Parts, attach_experts, experts_of

_UNKNOWN = "stored as floats, or in codes that no kernel reads or that differ from expert to expert"


@dataclass(frozen=True)
class KeepQuantized(Pass):
    """Attach the quantized parts that a checkpoint stores (`ir.weights.QuantizedTensors`).

    Options: `head`, whether a pass behind quantizes the embeddings and output head that are left as floats.
    """

    name = "keep-quantized"
    requires = "fused"
    ensures = "quantized"
    head: bool = False

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        for weight in list(graph.weights.values()):
            if is_quantizable(weight):
                split_by_grid(graph, weight)
        kept, floats, heads = 0, 0, list[str]()
        for weight in list(graph.weights.values()):
            if not is_quantizable(weight):
                continue
            parts = quantized_of(weight.weight)
            if parts is None and is_head(graph, weight):
                heads.append(weight.name)
            elif parts is None:
                floats += 1
            else:
                attach_stored(graph, weight, narrowed(parts))
                kept += 1
        mixtures = experts_of(graph)
        unkept = [op for op in mixtures if not _keep_experts(graph, op)]
        kept += len(mixtures) - len(unkept)
        graph.drop_dead()
        if not kept and any(isinstance(w.weight, ShapeOnlyTensor) for w in graph.weights.values()):
            raise InputError(
                f"--quant keep: only shapes of {graph.name} are known, not what is stored",
                remedy="give a local folder or a GGUF file",
            )
        if not kept:
            raise InputError(
                f"--quant keep: {graph.name} is not quantized; none of its weights has codes to keep",
                remedy="choose a scheme, such as --quant int8 or int4, or --quant none",
            )
        notes: list[str] = []
        if floats:
            notes.append(f"{floats} weights of linear layers are stored as floats and stay so")
        if heads and not self.head:
            names = ", ".join(heads)
            notes.append(
                f"{names} is stored as floats and stays so; --quant-head int8 gives it 8 bits a weight"
            )
        if unkept:
            notes.append(f"the experts of {len(unkept)} mixtures stay floats: {_without_codes(unkept)}")
        return PassResult(graph, True, notes)


def _keep_experts(graph: Graph, op: Moe) -> bool:
    """Attach the codes that are stored of a mixture's experts; whether there are any of both weights."""
    found = [quantized_of(weight.weight) for weight in (op.gate_up, op.down)]
    stored = [narrowed(parts) for parts in found if parts is not None and parts.columns is None]
    kept = [Parts(p.quant, p.codes, p.scale, p.zero_point) for p in stored]
    if len(kept) < len(found):
        return False
    attach_experts(graph, op, *kept)
    return True


def narrowed(parts: QuantizedTensors) -> QuantizedTensors:
    """The same parts with scales of float16 where these hold every one of float32 exactly, such as the powers
    of two of MXFP4; scales of K blocks are stored otherwise.
    """
    if parts.quant.scale_dtype != "float32" or parts.quant.super_group or parts.zero_point is not None:
        return parts
    with np.errstate(over="ignore", under="ignore"):
        exact = all((chunk.astype(np.float16) == chunk).all() for chunk in read_chunks(parts.scale))
    if not exact:
        return parts
    quant = replace(parts.quant, scale_dtype="float16")
    return replace(parts, quant=quant, scale=CastTensor(parts.scale, "float16"))


def _without_codes(mixtures: Sequence[Moe]) -> str:
    """Which of the mixtures' weights have no codes that can be kept, and why."""
    names: dict[str, list[str]] = {}
    for v in (v for op in mixtures for v in (op.gate_up, op.down)):
        parts = quantized_of(v.weight)
        if parts is None:
            names.setdefault(why_floats(v.weight) or _UNKNOWN, []).append(v.name)
        elif parts.columns is not None:
            names.setdefault("stored with columns in another order", []).append(v.name)
    return "; ".join(
        f"{', '.join(some[:8])}{f' and {len(some) - 8} more' if len(some) > 8 else ''} ({why})"
        for why, some in names.items()
    )


def attach_stored(graph: Graph, weight: Value, parts: QuantizedTensors) -> None:
    """`attach_quantized`, and columns that are stored in another order."""
    users = list(weight.users)
    attach_quantized(graph, weight, parts.quant, parts.codes, parts.scale, parts.zero_point)
    if parts.columns is None:
        return
    codes = graph.weights[f"{weight.name}.q"]
    order = ArrayTensor(parts.columns.astype(np.int32), f"columns({weight.name})")
    if any(isinstance(user, Linear) for user in users):
        index = graph.add_weight(f"{weight.name}.columns", order)
        for op in [u for u in codes.users if isinstance(u, QuantizedLinear)]:
            gathered = _gather(graph, op.x, index, before=op)
            graph.set_operand(op, op.operands.index(op.x), gathered)
    for op in [u for u in codes.users if isinstance(u, QuantizedEmbedding)]:
        back = ArrayTensor(parts.columns.argsort().astype(np.int32), f"columns({weight.name})")
        index = graph.add_weight(f"{weight.name}.order", back)
        uses = list(op.result.uses)
        outputs = [i for i, v in enumerate(graph.outputs) if v is op.result]
        gathered = _gather(graph, op.result, index, before=op.next)
        for user, position in uses:
            graph.set_operand(user, position, gathered)
        for i in outputs:
            graph.outputs[i] = gathered


def _gather(graph: Graph, x: Value, index: Value, before: Op | None) -> Value:
    return graph.insert(Gather(x, index), before=before).result


def split_by_grid(graph: Graph, weight: Value) -> bool:
    """Cut a merged weight whose parts lie on different grids into weights that each lie on one, or hold
    floats; every linear layer that reads it becomes one a piece, joined again. Whether it was cut.
    """
    data = weight.weight
    if data is None or quantized_of(data) is not None or not isinstance(data, ConcatRows):
        return False
    if any(not isinstance(user, Linear) for user in weight.users):
        return False
    pieces = _pieces(_flat(data))
    if all(quantized_of(piece) is None for piece in pieces):
        return False
    values = [graph.add_weight(_free_name(graph, weight.name), piece) for piece in pieces]
    for user in list(weight.users):
        assert isinstance(user, Linear)
        _split_linear(graph, user, values)
    return True


def _flat(data: LazyTensor) -> list[LazyTensor]:
    return [one for part in data.parts for one in _flat(part)] if isinstance(data, ConcatRows) else [data]


def _pieces(parts: Sequence[LazyTensor]) -> list[LazyTensor]:
    """Neighbours that agree, joined."""
    runs: list[list[LazyTensor]] = []
    for part in parts:
        if runs and _together(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [run[0] if len(run) == 1 else ConcatRows(run) for run in runs]


def _together(one: LazyTensor, other: LazyTensor) -> bool:
    a, b = quantized_of(one), quantized_of(other)
    return a is b if a is None or b is None else a.agrees_with(b)


def _free_name(graph: Graph, name: str) -> str:
    number = 0
    while f"{name}.part{number}" in graph.weights:
        number += 1
    return f"{name}.part{number}"


def _split_linear(graph: Graph, user: Linear, pieces: Sequence[Value]) -> None:
    outputs: list[Value] = []
    start = 0
    for piece in pieces:
        stop = start + piece.weight.shape[0] if piece.weight is not None else start
        bias = user.bias and _bias_rows(graph, user.bias, start, stop, before=user)
        layer = Linear(user.x, piece, bias)
        layer.loc = user.loc
        outputs.append(graph.insert(layer, before=user).result)
        start = stop
    joined = Concat(outputs, axis=-1)
    joined.loc = user.loc
    graph.replace(user, [graph.insert(joined, before=user).result])


def _bias_rows(graph: Graph, bias: Value, start: int, stop: int, before: Op) -> Value:
    if bias.weight is None:
        return graph.insert(Slice(bias, axis=-1, start=start, stop=stop), before=before).result
    name = f"{bias.name}[{start}:{stop}]"
    if name in graph.weights:
        return graph.weights[name]
    return graph.add_weight(name, SliceRows(bias.weight, start, stop))


class Keep(Quantizer):
    """`keep`: the codes that the checkpoint has."""

    forms = ("keep",)
    head = "none"

    def passes(self, scheme: str) -> list[Pass] | None:
        return [KeepQuantized()] if scheme == "keep" else None
