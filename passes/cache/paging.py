"""The traced model of one sequence → the ragged paged step (docs/architecture.md, "The paged step
interface").

    input_ids [1, T]       → token_ids [T], positions [T], slot_mapping [T], query_start [B+1],
                             context_len [B], block_table [B, P], output_index [R],
                             kv_pages.i [2, N, page_size, heads, head_dim]
    token_type_ids [1, T]  → token_type_ids [T], where the model takes them
    arange(T)              → positions
    attention(q, k, v)     → pages' = append_kv(k, v, pages); paged_attention(q, pages', …)
    … that sees a window   → the same over slot_mapping.W [T], block_table.W [B, P] and pages [2, NW, …]
    recurrences            → the same with a state a sequence (`state.py`)
    logits of every row    → of wanted rows alone, and what only they need (`wanted.py`)

What is left must treat every token alone: sequences stand back to back in T, so an op that mixes rows would
mix strangers. `rows.row_mixing` refuses such an op by name and module.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.core import Graph, Op, Value
from ...ir.dtypes import is_float
from ...ir.errors import InputError, UnsupportedError
from ...ir.ops import math as m
from ...ir.ops.attention import Attention, Sdpa
from ...ir.ops.cache import AppendKv, PagedAttention
from ...ir.ops.nn import Embedding
from ...ir.ops.quant import QuantizedEmbedding
from ...ir.ops.shape import Arange, Concat, Expand, Full, Index, Reshape, Slice
from ...ir.rewriter import constant
from ...ir.types import Dim, Shape, TensorType, sym
from ..base import Pass, PassContext, PassResult
from .rows import R, T, mentions_tokens, row_mixing
from .state import keep_states, recurrences
from .wanted import gather_wanted_rows

B, P_, N = sym("B"), sym("P"), sym("N")


def _without_batch(shape: Shape) -> Shape:
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def drop_batch_axis(graph: Graph, *per_token: Value) -> None:
    """input_ids [1, T] → [T], any other input of a number a token as well, and every value after them;
    attributes with shapes lose their leading 1, axes are negative and stay. Raises UnsupportedError where
    rows are picked along the batch axis as well.
    """
    picked = {op: op.x.type.rank for op in graph if isinstance(op, Index)}
    for ids in per_token:
        ids.type = TensorType("int32", (T,))
        others = [
            (op, i) for op, i in ids.uses if not isinstance(op, Embedding | QuantizedEmbedding | m.Cast)
        ]
        if others:  # they were traced with ids of 64 bits
            wide = graph.insert(m.Cast(ids, dtype="int64"), before=graph.ops[0])
            for op, i in others:
                graph.set_operand(op, i, wide.result)
    for op in graph.ops:
        depends = any(mentions_tokens(d) for r in op.results for d in r.shape) or any(
            r.type.rank and r.shape[0] == 1 for r in op.results
        )
        if isinstance(op, (Reshape, Expand, Full)) and depends:
            op.shape = _without_batch(op.shape)
        if isinstance(op, m.Binary) and depends:
            _weights_without_batch(graph, op)
        if isinstance(op, Index) and op.x.type.rank < picked[op]:
            raise UnsupportedError(
                f"{op.opname} in {op.loc or graph.name} picks rows by index: sequences would meet",
                remedy="report the model",
            )
        graph.retype(op)


def _weights_without_batch(graph: Graph, op: m.Binary) -> None:
    """A weight [1, …] of the rank of a result [1, T, …] would give the batch axis back."""
    for i, v in enumerate(op.operands):
        if v.is_weight and v.type.rank == op.result.type.rank > 1 and v.shape[0] == 1:
            part = Reshape(v, shape=_without_batch(v.shape))
            part.loc = op.loc
            graph.set_operand(op, i, graph.insert(part, before=op).result)


@dataclass(frozen=True)
class _StepInputs:
    token_ids: Value
    positions: Value
    slot_mapping: Value
    query_start: Value
    context_len: Value
    block_table: Value
    output_index: Value


def _replace_inputs(graph: Graph) -> _StepInputs:
    ids = graph.input("input_ids")
    ids.name = "token_ids"

    def add(name: str, *shape: Dim) -> Value:
        return graph.add_input(name, TensorType("int32", shape))

    return _StepInputs(
        ids,
        add("positions", T),
        add("slot_mapping", T),
        add("query_start", B + 1),
        add("context_len", B),
        add("block_table", B, P_),
        add("output_index", R),
    )


def _replace_positions(graph: Graph, positions: Value) -> None:
    """arange(T) counts tokens of the sequence: it becomes `positions` (times step plus start)."""
    for op in graph.ops:
        if not isinstance(op, Arange) or not mentions_tokens(op.length):
            continue
        if op.length != T:
            raise UnsupportedError(
                f"{op.loc}: positions over {op.length} tokens", remedy="only arange(T) can become a position"
            )
        _replace_by_position(graph, op, positions, step=op.step, start=op.start)


def _replace_by_position(graph: Graph, op: Op, positions: Value, *, step: int, start: int) -> None:
    """The op's result becomes positions · step + start."""
    dtype = op.results[0].dtype
    new: list[Op] = [m.Cast(positions, dtype=dtype)]
    if step != 1:
        c = Full(value=step, dtype=dtype)
        new += [c, m.Mul(new[-1].result, c.result)]
    if start:
        c = Full(value=start, dtype=dtype)
        new += [c, m.Add(new[-1].result, c.result)]
    for o in new:
        o.loc = op.loc
        graph.insert(o, before=op)
    graph.replace(op, [new[-1].result])


def _replace_counts(graph: Graph, inputs: _StepInputs) -> list[str]:
    """cumsum(token_ids ≠ padding) counts tokens as well: positions + 1. A step holds no padding, so
    this differs only for a text that spells the padding token out, and only for what comes after it.
    """
    notes: list[str] = []
    for op in graph.ops:
        if not isinstance(op, m.CumSum) or op.result.shape != (T,):
            continue
        counted = _uncast(op.x).producer
        if not isinstance(counted, m.NotEqual):
            continue
        ids, padding = (counted.a, counted.b) if constant(counted.b) is not None else (counted.b, counted.a)
        number = constant(padding)
        if _uncast(ids) is not inputs.token_ids or number is None:
            continue
        notes.append(f"{op.loc or graph.name} counts tokens other than {int(number)}: taken as positions")
        _replace_by_position(graph, op, inputs.positions, step=1, start=1)
    return notes


def _positions_held(graph: Graph, positions: Value) -> int | None:
    """How many positions there are rows for, in models that look positions up in a table; None in others.

    Such a table may have rows that no position reads, and its configuration then promises too many.
    """
    found: list[int] = []
    for op in graph:
        if isinstance(op, Embedding | QuantizedEmbedding):
            rows, offset = op.operands[1].shape[0], _offset(op.ids, positions)
            if isinstance(rows, int) and offset is not None:
                found.append(rows - offset)
    return min(found, default=None)


def _offset(v: Value, positions: Value) -> int | None:
    """n where a value is positions + n (times a mask of ones and zeros); None for other values."""
    offset = 0.0
    while True:
        v = _uncast(v)
        op = v.producer
        if v is positions:
            return int(offset)
        if not isinstance(op, m.Add | m.Mul):
            return None
        a, b = op.operands
        if isinstance(op, m.Mul):
            if _uncast(a).dtype != "bool" and _uncast(b).dtype != "bool":
                return None
            v = a if _uncast(b).dtype == "bool" else b
            continue
        shift = constant(b) if constant(b) is not None else constant(a)
        if shift is None:
            return None
        offset += shift
        v = a if constant(b) is not None else b


def _uncast(v: Value) -> Value:
    while isinstance(v.producer, m.Cast):
        v = v.producer.x
    return v


def _reason(context: PassContext) -> str:
    """What the attention fusion refused first: the usual cause of tokens that still meet."""
    refused = [n for n in context.notes if n.startswith(("FuseSdpa", "FuseEagerAttention"))]
    return f" ({refused[-1].partition(': ')[2]})" if refused else ""


def _candidates(graph: Graph) -> str:
    """Where a softmax stands that no rule took for attention's."""
    where = next((op.loc for op in graph if isinstance(op, m.Softmax) and op.loc), "")
    return f" (no rule fits the softmax in {where})" if where else ""


@dataclass(frozen=True)
class PageKvCache(Pass):
    """Turn the whole-sequence graph into the ragged paged step.

    An encoder or classifier whose tokens meet otherwise than in attention that was recognised stays as it is:
    its step takes one sequence, which the graph's fact `alone` says.

    Options: `page_size` tokens a page; `kv_dtype` of the cache, a type of floats.
    """

    name = "page-kv-cache"
    ensures = "paged"
    page_size: int = 16
    kv_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not is_float(self.kv_dtype):
            raise InputError(
                f"pass {self.name}: kv_dtype={self.kv_dtype}",
                remedy="use a type of floats; for int8, run quantize-kv-cache after this pass",
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        attentions = [op for op in graph if isinstance(op, Attention)]
        whole = graph.facts.get("kind") in ("encoder", "classifier")
        unknown = not recurrences(graph) or any(isinstance(op, Sdpa) for op in graph)
        if not attentions and unknown and not whole:
            why = _reason(context) or _candidates(graph)
            raise UnsupportedError(
                f"{graph.name} holds no attention that was recognised{why}",
                remedy="report the model",
            )
        ahead = next((op for op in attentions if not op.causal), None)
        if ahead is not None and graph.facts.get("kind") == "causal_lm":
            raise UnsupportedError(
                f"attention in {ahead.loc or graph.name} sees the tokens that are to be generated",
                remedy="a model that generates is causal; is_decoder may be missing in config.json",
            )
        types = [v for v in graph.inputs if v.name == "token_type_ids"]
        inputs = _replace_inputs(graph)
        drop_batch_axis(graph, inputs.token_ids, *types)
        _replace_positions(graph, inputs.positions)
        notes = _replace_counts(graph, inputs)
        graph.retype_all()
        self._page(graph, inputs, attentions, context.context_length)
        keep_states(graph, inputs.query_start, inputs.context_len)
        graph.retype_all()
        graph.drop_dead()
        held = _positions_held(graph, inputs.positions)
        if held is not None:
            graph.facts["positions"] = min(held, graph.facts.get("positions", held))
        for op in graph:
            refusal = row_mixing(op)
            if refusal is not None and not isinstance(op, (AppendKv, PagedAttention)):
                where = op.loc or graph.name
                if whole:
                    graph.facts["alone"] = True
                    notes.append(f"{op.opname} in {where} {refusal}: a step takes one text, not many")
                    break
                raise UnsupportedError(
                    f"{op.opname} in {where} {refusal}: sequences would meet{_reason(context)}",
                    remedy="report the model",
                )
        if graph.outputs[0].shape[:-1] != (T,):
            raise UnsupportedError(
                f"{graph.name}: its result is {graph.outputs[0].type}, not a row for each token",
                remedy="report the model",
            )
        gather_wanted_rows(graph, inputs.output_index)
        return PassResult(graph, True, notes)

    def _page(
        self, graph: Graph, inputs: _StepInputs, attentions: list[Attention], length: int | None
    ) -> None:
        facts: list[dict[str, object]] = []
        for layer, op in enumerate(attentions):
            heads, width = op.k.shape[-2:]
            q, k, v = _one_width(graph, op)
            width = k.shape[-1]
            slots, table, number = inputs.slot_mapping, inputs.block_table, N
            if op.window is not None and op.causal and _pays(graph, op.window, length):
                slots, table = _window_tables(graph, op.window)
                number = sym(f"N{op.window}")
            pages = graph.add_input(
                f"kv_pages.{layer}", TensorType(self.kv_dtype, (2, number, self.page_size, heads, width))
            )
            appended = AppendKv(k, v, pages, slots)
            paged = PagedAttention(
                q,
                appended.result,
                inputs.query_start,
                inputs.context_len,
                table,
                op.sinks,
                op.slopes,
                op.distances,
                scale=op.scale,
                causal=op.causal,
                window=op.window,
                softcap=op.softcap,
            )
            for new in (appended, paged):
                new.loc = op.loc
                graph.insert(new, before=op)
            facts.append({"heads": heads, "head_dim": width, "window": op.window})
            result = paged.result
            if v is not op.v:
                cut = Slice(result, axis=-1, start=0, stop=op.v.shape[-1])
                cut.loc = op.loc
                result = graph.insert(cut, before=op).result
            graph.replace(op, [result])
        graph.facts["kv"] = facts
        graph.facts["page_size"] = self.page_size
        graph.facts["kv_dtype"] = self.kv_dtype


def _pays(graph: Graph, window: int, length: int | None) -> bool:
    """Whether sequences that are kept in the cache grow beyond the window."""
    return graph.facts.get("kind") == "causal_lm" and (length is None or window < length)


def _window_tables(graph: Graph, window: int) -> tuple[Value, Value]:
    """slot_mapping and block_table of the layers that see this window: they keep only its pages."""
    names = (f"slot_mapping.{window}", f"block_table.{window}")
    held = {value.name: value for value in graph.inputs}
    shapes: tuple[Shape, Shape] = ((T,), (B, P_))
    slots, table = (
        held.get(name) or graph.add_input(name, TensorType("int32", shape))
        for name, shape in zip(names, shapes, strict=True)
    )
    return slots, table


def _one_width(graph: Graph, op: Attention) -> tuple[Value, Value, Value]:
    """q, k and v of heads of one width, as pages hold them: zeros behind the narrower ones change neither a
    score nor what is left of a result when as many are cut off it.
    """
    widths = [x.shape[-1] for x in (op.k, op.v)]
    wide = max(d for d in widths if isinstance(d, int))

    def padded(x: Value) -> Value:
        missing = wide - x.shape[-1]
        if not missing:
            return x
        zeros = Full(value=0.0, dtype=x.dtype, shape=(*x.shape[:-1], missing))
        joined = Concat([x, zeros.result], axis=-1)
        for new in (zeros, joined):
            new.loc = op.loc
            graph.insert(new, before=op)
        return joined.result

    q, k, v = (padded(x) for x in (op.q, op.k, op.v))
    return q, k, v
