"""Low-rank changes of linear layers and embeddings, each token its own (Hu et al. 2021, section 4.1).

The factors of many adapters stand in *slots*, in blocks of 16 as vectors take them:

    a [A, P, L, K, 16]       a[s, p, l, k, i] = A[16 l + i, k], of part p of slot s
    b [A, C, 16 · L, 16]     b[s, c, r, j]    = B[16 c + j, r], scaling multiplied in
    scale [A, P, L, 16]      scale[s, p, l, i]  multiplies row 16 l + i of A x: with factors of int8, what a
                             step of that row of A and of that column of B is worth

and, where adapters may scale what a part gives (DoRA, Liu et al. 2024, section 4), or add biases to it:

    gained [A, P]            whether slot s does
    gain [A, 2, N]           gain[s, 0, n] multiplies W x + B A x of column n, gain[s, 1, n] is added: what
                             the bias, which is not multiplied, loses by it, and what the adapter adds to it

Each part begins a block of b. A slots, 16 · L the largest rank, P parts, C = sum over parts of
ceil(rows / 16). Parts are the layers that fusion has put one below the other (q, k and v): each has factors
of its own over the same x. What lies beyond a part's rank or its rows is never read.

An embedding is a linear layer of one part whose x has a 1 in column id, and 0 elsewhere: K is the size of the
vocabulary, and A x the column id of A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op, Value
from ..define import Operand, OptionalOperand, op
from ..errors import CompileError, VerifyError
from ..types import TensorType

Dims = Mapping[str, int]

LANES = 16
MOST_RANK = 8192
"""The largest rank: a row's A x is held in memory of this size. As wide as models are, for a change of full
rank is one too: a matrix in the place of another.
"""
FACTOR_DTYPES = ("float32", "int8")


def column_blocks(parts: tuple[int, ...]) -> int:
    """Blocks of 16 rows of the parts' B, each part's last one maybe not full."""
    return sum(-(-rows // LANES) for rows in parts)


def low_rank(x: Any, rows: int, rank: Any, scale: Any, a: Any, b: Any) -> Any:
    """What a part of so many rows adds to those of x [T, K], in torch; its factors as they lie in a slot."""
    r = int(rank)
    down = a.transpose(1, 2).flatten(0, 1)[:r].float()
    up = b.transpose(1, 2).flatten(0, 1)[:rows, :r].float()
    return x @ down.T * scale.flatten()[:r] @ up.T


@op("lora")
class Lora(Op):
    """y [T, N] + B[s] (scale[s] · A[s] x) for tokens of slot s = adapter[t]; y itself where that is negative.

    With gains, of parts that a slot has gained: r + gain[s, 0] · (y - r + B[s] …) + gain[s, 1], r being what
    was added to the layer's result since, `residual` [T, N], or 0.

    x float32 [T, K]; adapter int32 [T]; rank int32 [A, P], 0 where a slot leaves a part alone; scale, a, b as
    in the module's text; `parts`: rows of each part, N together. Computed in float32. A target may write in
    place: y must not be read after this op but through its result.
    """

    y: Operand
    x: Operand
    adapter: Operand
    rank: Operand
    scale: Operand
    a: Operand
    b: Operand
    gained: OptionalOperand
    gain: OptionalOperand
    residual: OptionalOperand
    parts: tuple[int, ...]

    def infer(self) -> list[TensorType]:
        n, k, count = self.y.shape[-1], self.x.shape[-1], len(self.parts)
        fits = (
            self.y.type.rank == self.x.type.rank == 2
            and sum(self.parts) == n
            and self.adapter.shape == self.x.shape[:1] == self.y.shape[:1]
            and self.rank.shape[1:] == (count,)
            and self.scale.shape[1:] == (count, self.a.shape[2], LANES)
            and (self.a.shape[1], *self.a.shape[3:]) == (count, k, LANES)
            and self.b.shape[1:] == (column_blocks(self.parts), LANES * self.a.shape[2], LANES)
        )
        slots = self.rank.shape[:1]
        if self.gain is not None and self.gained is not None:
            fits = fits and self.gained.shape == self.rank.shape and self.gain.shape == (*slots, 2, n)
            fits = fits and (self.residual is None or self.residual.type == self.y.type)
        if not fits:
            raise CompileError(
                f"lora: {self.y.type} by {self.x.type}, factors {self.a.type}, {self.b.type} ({self.loc})",
                remedy=f"{count} parts of {list(self.parts)} rows",
            )
        return [self.y.type]

    def verify(self) -> None:
        _verify_factors(self.opname, self.a, self.b)
        if (self.gain is None) != (self.gained is None) or (self.gain is None and self.residual is not None):
            raise VerifyError(
                "lora: gain, gained and residual", remedy="gains with both, residual with gains"
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        y, x, adapter, rank, scale, a, b, gained, gain, residual = args
        out = y.clone()
        for slot in adapter.unique().tolist():
            if slot < 0:
                continue
            rows = adapter == slot
            first = start = 0
            for part, count in enumerate(self.parts):
                last = first + -(-count // LANES)
                columns = slice(start, start + count)
                factors = rank[slot, part], scale[slot, part], a[slot, part], b[slot, first:last]
                total = y[rows, columns] + low_rank(x[rows], count, *factors)
                if gain is not None and gained[slot, part]:
                    kept = 0 if residual is None else residual[rows, columns]
                    total = kept + gain[slot, 0, columns] * (total - kept) + gain[slot, 1, columns]
                out[rows, columns] = total
                first, start = last, start + count
        return out


@op("lora_embedding")
class LoraEmbedding(Op):
    """y [T, D] + B[s] (scale[s] · A[s] of column ids[t]) for tokens of slot s = adapter[t]; y itself where
    that is negative.

    ids, adapter int32 [T], ids within 0 … V-1; rank int32 [A, 1], 0 where a slot leaves the embedding alone;
    scale, a and b of one part of D rows and V columns, as in the module's text. Computed in float32. A target
    may write in place, as `lora`.
    """

    y: Operand
    ids: Operand
    adapter: Operand
    rank: Operand
    scale: Operand
    a: Operand
    b: Operand

    def infer(self) -> list[TensorType]:
        width = self.y.shape[-1]
        fits = (
            self.y.type.rank == 2
            and isinstance(width, int)
            and self.y.shape[:1] == self.ids.shape == self.adapter.shape
            and self.rank.shape[1:] == (1,)
            and self.scale.shape[1:] == (1, self.a.shape[2], LANES)
            and (self.a.shape[1], self.a.shape[-1]) == (1, LANES)
            and self.b.shape[1:] == (column_blocks((width,)), LANES * self.a.shape[2], LANES)
        )
        if not fits:
            raise CompileError(
                f"lora_embedding: {self.y.type} of ids {self.ids.type}, factors {self.a.type}, {self.b.type} "
                f"({self.loc})",
                remedy="one part, whose rows are the columns of y",
            )
        return [self.y.type]

    def verify(self) -> None:
        _verify_factors(self.opname, self.a, self.b)

    def reference(self, dims: Dims, *args: Any) -> Any:
        y, ids, adapter, rank, scale, a, b = args
        out = y.clone()
        for slot in adapter.unique().tolist():
            if slot >= 0:
                rows, r = adapter == slot, int(rank[slot, 0])
                down = a[slot, 0].transpose(0, 1)[ids[rows].long()].flatten(1)[:, :r].float()
                up = b[slot].transpose(1, 2).flatten(0, 1)[: y.shape[1], :r].float()
                out[rows] += down * scale[slot, 0].flatten()[:r] @ up.T
        return out


def _verify_factors(opname: str, a: Value, b: Value) -> None:
    if a.dtype not in FACTOR_DTYPES or a.dtype != b.dtype:
        raise VerifyError(
            f"{opname}: factors are {a.dtype} and {b.dtype}", remedy="both float32 or both int8"
        )


__all__ = ["FACTOR_DTYPES", "LANES", "MOST_RANK", "Lora", "LoraEmbedding", "column_blocks", "low_rank"]
