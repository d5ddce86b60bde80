"""Places for adapters at embeddings: what a token's adapter adds to its row.

    %0 = embedding(%ids, @table)   →   %0 = embedding(%ids, @table)
                                       %1 = lora_embedding(%0, %ids, %adapter, %lora_rank.0, …)

Behind what makes the module's row of the table's: a rotation turned back, a cast to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.core import Graph, Op, Value
from ...ir.ops.lora import LANES, LoraEmbedding, column_blocks
from ...ir.ops.math import Cast
from ...ir.ops.nn import Embedding
from ...ir.ops.quant import Hadamard, QuantizedEmbedding
from ...ir.types import TensorType, sym

SLOTS, BLOCKS = sym("A"), sym("L")
TIED = "tied_modules"
"""The fact that says which modules have one table; graphs of versions before have it not."""


@dataclass(frozen=True)
class Table:
    """An embedding of a final graph.

    Attributes:
        op: what reads it, by ids [T].
        module: its name.
        rows: what the module gives, float32 [T, D].
        rotation: the size of the rotation of its stored rows; 0 where there is none.
    """

    op: Embedding | QuantizedEmbedding
    module: str
    rows: Value
    rotation: int

    @property
    def weight(self) -> Value:
        """The table [V, D], or its codes."""
        return self.op.q if isinstance(self.op, QuantizedEmbedding) else self.op.weight


def tables_of(graph: Graph) -> list[Table]:
    """The embeddings that adapters can change, in order: of a row for each token, by modules that none shares
    with another.
    """
    found = [table for op in graph.ops if (table := _table(op)) is not None]
    modules = [table.module for table in found]
    return [table for table in found if modules.count(table.module) == 1]


def place_embeddings(graph: Graph, adapter: Value, number: int) -> list[dict[str, Any]]:
    """Make embeddings take adapters, `adapter` int32 [T] each of their tokens; inputs are counted from
    `number` on. What stands where, as `lora_places.py` has it.
    """
    places: list[dict[str, Any]] = []
    tied: Sequence[str] | None = graph.facts.get(TIED)
    for table in tables_of(graph):
        if table.rows.shape[:1] != adapter.shape:
            continue
        size, width = table.weight.shape
        assert isinstance(size, int) and isinstance(width, int)
        _place(graph, table, adapter, (size, width), number + len(places))
        place: dict[str, Any] = {"k": size, "parts": [[table.module, width]], "dtype": "float32"}
        place["embedding"] = True
        if tied is not None:
            place["tied"] = [one for one in tied if one != table.module] if table.module in tied else []
        places.append(place)
    return places


def _place(graph: Graph, table: Table, adapter: Value, sizes: tuple[int, int], number: int) -> None:
    size, width = sizes
    rank = graph.add_input(f"lora_rank.{number}", TensorType("int32", (SLOTS, 1)))
    scale = graph.add_input(f"lora_scale.{number}", TensorType("float32", (SLOTS, 1, BLOCKS, LANES)))
    a = graph.add_input(f"lora_a.{number}", TensorType("float32", (SLOTS, 1, BLOCKS, size, LANES)))
    b = graph.add_input(
        f"lora_b.{number}", TensorType("float32", (SLOTS, column_blocks((width,)), LANES * BLOCKS, LANES))
    )
    y = table.rows
    new = LoraEmbedding(y, table.op.ids, adapter, rank, scale, a, b)
    new.loc = table.op.loc
    assert y.producer is not None
    following = y.producer.next
    graph.replace_uses(y, new.result)
    graph.set_operand(new, 0, y)
    graph.insert(new, before=following)


def _table(op: Op) -> Table | None:
    if not isinstance(op, Embedding | QuantizedEmbedding) or op.ids.type.rank != 1:
        return None
    weight = op.q if isinstance(op, QuantizedEmbedding) else op.weight
    rows, rotation = op.result, 0
    while len(rows.users) == 1:
        user = rows.users[0]
        if isinstance(user, Hadamard) and user.loc == op.loc and not rotation:
            rotation = user.size  # else that of a layer which reads them
        elif not isinstance(user, Cast) or rows.dtype == "float32":
            break
        rows = user.results[0]
    sizes = weight.shape
    if not weight.is_weight or rows.dtype != "float32" or not all(isinstance(d, int) for d in sizes):
        return None
    shared = any(not isinstance(user, Embedding | QuantizedEmbedding) for user in weight.users)
    module = op.loc if shared else weight.name.removesuffix(".q").removesuffix(".weight")
    return Table(op, module, rows, rotation) if module else None


__all__ = ["BLOCKS", "SLOTS", "TIED", "Table", "place_embeddings", "tables_of"]
