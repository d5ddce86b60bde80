"""Places for adapters that are chosen per request: after each linear layer, what a token's adapter adds.

    %1 = linear(%x, @w)                 %1 = linear(%x, @w)
    %2 = add(%r, %1)           →        %2 = add(%r, %1)
                                        %3 = lora(%2, %x, %adapter, %lora_rank.0, …)

With gains the op may scale what the layer gives, too (DoRA), and add biases; it then reads what was added
to that since.

On the final graph, so that an artifact's text is all it takes. A sum with the residual stays beside its
layer, whose kernel does it. The layers below one another in a merged projection are found by the weight's
name, "….q_proj.weight+k_proj+v_proj", and by how its result is cut; where they are stored in several types
of blocks (Q4_K_M), products by pieces of that weight (`keep.py`) are put together before.

Mixtures of experts take theirs themselves (`lora_experts.py`), and embeddings have their own op
(`lora_embeddings.py`).

`graph.facts["adapters"]` says what stands where: {"places": [{"k", "parts": [[module, rows], …], "dtype": of
the factors, "gains": true}, …]}, in the order of the inputs' numbers; an embedding of V rows is {"k": V,
"parts": [[module, columns]], "dtype", "embedding": true, "tied": modules that have its table too, in a graph
that says so}; a place of experts has parts for each:
{"k", "parts": [["….gate_up_proj.gate", rows], ["….gate_up_proj.up", rows]], "dtype", "experts": their number,
"of": "….gate_up_proj", "interleaved": whether gates and ups alternate in that parameter, "unsaid": see
`ir.expert_parts`}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...ir.core import Graph, Op, Value
from ...ir.errors import UnsupportedError
from ...ir.ops.cache import GatherLast
from ...ir.ops.lora import LANES, Lora, column_blocks
from ...ir.ops.math import Add
from ...ir.ops.nn import Embedding, GatedMlp, Linear
from ...ir.ops.quant import Hadamard, QuantizedEmbedding, QuantizedLinear
from ...ir.ops.shape import Concat, Gather, Slice
from ...ir.types import TensorType
from ..base import Pass, PassContext, PassResult
from ..merged_names import merged_names, without_piece
from .lora_embeddings import BLOCKS, SLOTS, place_embeddings
from .lora_experts import factor_dtype, mixtures_of, place_experts

Parts = list[tuple[str, int]]
"""(module, rows) of each layer in a weight, from its first row on."""

_ENDS = (".q", ".transposed")
"""What passes put behind a weight's name, the outermost first."""


@dataclass(frozen=True)
class PlaceAdapters(Pass):
    """Make a paged graph take adapters as inputs; `gains`: also those that scale what a layer gives;
    `embeddings`: also those of embeddings; `experts`: also those of experts, in mixtures that this says yes
    to.
    """

    name = "place-adapters"
    requires = "paged"
    gains: bool = True
    embeddings: bool = True
    experts: Callable[[Op], bool] | None = None

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        found = layers_of(graph)
        if not found:
            raise UnsupportedError(
                f"{graph.name} has no linear layer that an adapter could change",
                remedy="leave --adapters away",
            )
        tokens = graph.input("token_ids")
        adapter = graph.add_input("adapter", TensorType("int32", tokens.shape))
        rows: dict[Any, Value] = {tokens.shape[0]: adapter}
        places: list[dict[str, Any]] = []
        for op, parts in found:
            dtype = "float32"
            if isinstance(op, QuantizedLinear):
                dtype = factor_dtype(op.q)
            _place(graph, op, parts, _adapter_of(graph, op, rows, adapter), dtype, len(places), self.gains)
            place = {"k": _width(op), "parts": [list(part) for part in parts], "dtype": dtype}
            places.append({**place, "gains": True} if self.gains else place)
        if self.embeddings:
            places += place_embeddings(graph, adapter, len(places))
        mixtures = [] if self.experts is None else [op for op in mixtures_of(graph) if self.experts(op)]
        if mixtures:
            expert = graph.add_input("expert_adapter", adapter.type)
            own: dict[Any, Value] = {tokens.shape[0]: expert}
            places += place_experts(
                graph, mixtures, lambda op: _adapter_of(graph, op, own, expert), len(places)
            )
        graph.facts["adapters"] = {"places": places}
        return PassResult(graph, True)


def layers_of(graph: Graph) -> list[tuple[Op, Parts]]:
    """The linear layers of a final graph that adapters can change, in order, and the modules in each."""
    found = [(op, parts) for op in graph.ops if (parts := _parts_of(graph, op))]
    # Several modules may have one weight (tied blocks), each of which an adapter changes by itself: no place
    # for it. A module that is gone through several times is one.
    users: dict[str, set[str]] = {}
    for op, parts in found:
        for module, _ in parts:
            users.setdefault(module, set()).add(op.loc)
    return [(op, parts) for op, parts in found if all(len(users[module]) == 1 for module, _ in parts)]


def rotation_of(op: Op) -> int:
    """The size of the rotation of what an op reads, which its weight's rows are rotated by too; 0 where there
    is none.
    """
    made = _made_for(op)
    return made.size if isinstance(made, Hadamard) else 0


def columns_of(op: Op) -> Value | None:
    """The order of columns that a weight is stored in, where it is another than the module's: column j is the
    module's column order[j].
    """
    made = _made_for(op)
    return made.index if isinstance(made, Gather) else None


def is_transposed(op: Op) -> bool:
    """Whether the module's own matrix is [K, N], where the layer's weight is [N, K]."""
    weight = op.q if isinstance(op, QuantizedLinear) else op.operands[1]
    return _ENDS[1] in weight.name


def _made_for(op: Op) -> Hadamard | Gather | None:
    """What made what an op reads of what its module reads: its columns rotated, or in another order."""
    made = op.operands[0].producer
    made = made.x.producer if isinstance(made, GatherLast) else made
    if isinstance(made, Gather):
        return made if made.index.is_weight and made.index.type.rank == 1 else None
    return made if isinstance(made, Hadamard) else None


def _width(op: Op) -> int:
    k = op.operands[0].shape[-1]
    assert isinstance(k, int)
    return k


def _parts_of(graph: Graph, op: Op) -> Parts | None:
    """The layers in an op's weight; None where it is no layer, or one that cannot be told apart."""
    if not isinstance(op, Linear | QuantizedLinear) or op.x.type.rank != 2 or op.x.dtype != "float32":
        return None
    weight = op.q if isinstance(op, QuantizedLinear) else op.weight
    rows = weight.shape[0]
    if not weight.is_weight or not isinstance(rows, int) or op.result.dtype != "float32":
        return None
    if any(isinstance(user, Embedding | QuantizedEmbedding) for user in weight.users):
        return [(op.loc, rows)] if op.loc else None  # tied: the weight has the embedding's name
    name, is_piece = _base(weight.name)
    names = [name.removesuffix(".weight") for name in merged_names(name)]
    if len(names) == 1:
        return None if is_piece else [(names[0], rows)]
    whole, first = op.result, 0
    if is_piece:
        joined = _put_together(op.result, name)
        if joined is None:
            return None
        whole, first = joined
    for halves in (False, True):
        widths = _cuts(whole, halves)
        if widths is not None and len(widths) == len(names) and sum(widths) == whole.shape[-1]:
            return _within(list(zip(names, widths, strict=True)), first, first + rows)
    return None


def _base(name: str) -> tuple[str, bool]:
    """A weight's name without what passes put behind it, and whether it is a piece of that weight."""
    for end in _ENDS:
        name = name.removesuffix(end)
    base = without_piece(name)
    return base.removesuffix(".weight"), base != name


def _put_together(y: Value, name: str) -> tuple[Value, int] | None:
    """What the columns y, products by a piece of the weight `name`, are put together in, and where they begin
    there; None where that is not what the other pieces give, and nothing else.
    """
    (joined, *others) = y.users or (None,)
    if not isinstance(joined, Concat) or others or joined.axis not in (-1, y.type.rank - 1):
        return None
    first, found = 0, None
    for part in joined.operands:
        op, width = part.producer, part.shape[-1]
        if not isinstance(op, Linear | QuantizedLinear) or not isinstance(width, int):
            return None
        weight = op.q if isinstance(op, QuantizedLinear) else op.weight
        if _base(weight.name) != (name, True):
            return None
        found = first if part is y else found
        first += width
    return None if found is None else (joined.result, found)


def _within(parts: Parts, start: int, stop: int) -> Parts | None:
    """Those of parts, one behind the other, that lie between two rows; None where one does in part."""
    found: Parts = []
    first = 0
    for module, rows in parts:
        last = first + rows
        if start <= first and last <= stop:
            found.append((module, rows))
        elif first < stop and start < last:
            return None
        first = last
    return found


def _cuts(y: Value, halves: bool) -> list[int] | None:
    """Widths of the columns that are read apart, in order; None where something reads all of them. `halves`:
    what is cut out for a gated MLP is two parts.
    """
    width = y.shape[-1]
    if not isinstance(width, int):
        return None
    edges = {0, width}
    for user in _readers(y):
        if isinstance(user, GatedMlp):
            edges.add(width // 2)
        elif isinstance(user, Slice) and user.axis in (-1, y.type.rank - 1) and user.step == 1:
            if not isinstance(user.start, int) or not isinstance(user.stop, int):
                return None
            edges |= {user.start, user.stop}
            if halves and any(isinstance(reader, GatedMlp) for reader in _readers(user.result)):
                edges.add((user.start + user.stop) // 2)
        else:
            return None
    return [b - a for a, b in pairwise(sorted(edges))]


def _readers(y: Value) -> list[Op]:
    """What reads y, or rows that are chosen of it."""
    chosen = [user.result for user in y.users if isinstance(user, GatherLast)]
    return [user for value in (y, *chosen) for user in value.users if not isinstance(user, GatherLast)]


def _adapter_of(graph: Graph, op: Op, rows: dict[Any, Value], adapter: Value) -> Value:
    """The slot of each row that an op computes: of each token, or of those whose logits are wanted."""
    count = op.operands[0].shape[0]
    if count not in rows:
        rows[count] = graph.insert(GatherLast(adapter, graph.input("output_index")), op).result
    return rows[count]


def _place(graph: Graph, op: Op, parts: Parts, adapter: Value, dtype: str, number: int, gains: bool) -> None:
    widths = tuple(rows for _, rows in parts)
    shape = (SLOTS, len(parts), BLOCKS, _width(op), LANES)
    rank = graph.add_input(f"lora_rank.{number}", TensorType("int32", (SLOTS, len(parts))))
    scale = graph.add_input(f"lora_scale.{number}", TensorType("float32", (*shape[:3], LANES)))
    a = graph.add_input(f"lora_a.{number}", TensorType(dtype, shape))
    b = graph.add_input(
        f"lora_b.{number}", TensorType(dtype, (SLOTS, column_blocks(widths), LANES * BLOCKS, LANES))
    )
    gained = gain = residual = None
    if gains:
        gained = graph.add_input(f"lora_gained.{number}", rank.type)
        gain = graph.add_input(f"lora_gain.{number}", TensorType("float32", (SLOTS, 2, sum(widths))))
    y = op.results[0]
    users = list(y.uses)
    if len(users) == 1 and not graph.output_uses(y) and isinstance(users[0][0], Add):
        total = users[0][0]
        if total.a.type == total.b.type:
            residual = (total.b if total.a is y else total.a) if gains else None
            y = total.results[0]
    x = _read_by_module(graph, op)
    new = Lora(y, x, adapter, rank, scale, a, b, gained, gain, residual, parts=widths)
    assert y.producer is not None
    new.loc = op.loc
    following = y.producer.next
    graph.replace_uses(y, new.result)
    graph.set_operand(new, 0, y)
    graph.insert(new, before=following)


def _read_by_module(graph: Graph, op: Op) -> Value:
    """What an op's module reads, or those rows of it that the op does: an adapter's factors are neither
    rotated nor in the weight's order of columns.
    """
    x, made = op.operands[0], _made_for(op)
    if made is None:
        return x
    if isinstance(x.producer, GatherLast):
        return graph.insert(GatherLast(made.x, x.producer.index), before=op).result
    return made.x


__all__ = ["Parts", "PlaceAdapters", "columns_of", "is_transposed", "layers_of", "rotation_of"]
