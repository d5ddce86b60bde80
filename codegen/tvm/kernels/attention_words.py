"""Attention of a block of rows and heads by products of pairs of bfloat16 (`Isa.bfloat`).

As in `attention_blocks`, but that queries, once scaled, and weights are rounded to bfloat16, as keys and
values are in the cache, and that two elements of a query, or two weights, are multiplied at once by the words
in which pages hold two neighbours: half as many instructions, and none that widen. Weights are as exact as
bfloat16 needs (`exp2`, rough); what the result is divided by is their sum before they are rounded. Eight
pages are taken at once, since what stands around the products takes a larger share.

A token of a pair that no row of the block sees is taken out of the word, since what stands there may be NaN.
The others that a row does not see add 0 to its sums, which changes none but those below the normal numbers
(10^-38): the instruction makes zeros of them.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from .attention_blocks import Add, Block
from .attention_spec import Attention
from .builder import LANES, Buffer, Expr, call, let, put, splat, vec
from .cache import PAGE_SIZE, in_pairs
from .isa import Isa

_PAIRS = PAGE_SIZE // 2
"""Words of a page's weights."""


class WordBlock(Block):
    """A `Block` whose query and weights are words of two neighbours, kept as float32 of the same bits."""

    tile = 8
    rough = True

    @property
    def query_width(self) -> int:
        return self.spec.head_dim // 2

    def _put_query(self, lanes: int, query: Expr, cell: Expr, d: Expr) -> None:
        assert lanes == LANES
        put(self.query, call("float32x8", "llmc_bfloat_words", query), cell, T.floordiv(d, 2), lanes=8)

    def _add_keys(self, score: list[list[Buffer]], pages: list[Expr], d: Expr, place: Expr) -> None:
        keys = [let(self._words(0, page, place)) for page in pages]
        for i, _, _ in self.cells:
            query = let(splat(self.query[i, d]))
            for total, key in zip(score[i], keys, strict=True):
                put(total, self._add_value(vec(total, 0), query, key), 0)

    def _put_weights(self, weights: Expr, cell: int, slot: Expr) -> None:
        put(self.weights, call("float32x8", "llmc_bfloat_words", weights), cell, slot * _PAIRS, lanes=_PAIRS)

    def _add_value(self, acc: Expr, weight: Expr, value: Expr) -> Expr:
        return call("float32x16", "llmc_dot_bfloat", acc, weight, value)

    def _each_of_pair(self, where: tuple[Expr, Expr], seen: list[Expr], at: list[Expr], add: Add) -> None:
        """Both tokens at once; their column is that of their word."""
        page, column = where
        lower = T.Select(seen[0], T.uint32(0xFFFF), T.uint32(0))
        upper = T.Select(seen[1], T.uint32(0xFFFF0000), T.uint32(0))
        mask = let(splat(T.bitwise_or(lower, upper)))
        words = [T.reinterpret(self._words(1, page, place), dtype="uint32x16") for place in at]
        values = [let(T.reinterpret(T.bitwise_and(word, mask), dtype="float32x16")) for word in words]
        add(T.floordiv(column, 2), values)

    def _words(self, which: int, page: Expr, place: Expr) -> Expr:
        """16 words of the keys (0) or values (1) of a page."""
        stored = vec(self.at.pages, which, page, self.kv_head, 0, place, lanes=2 * LANES)
        return T.reinterpret(stored, dtype="float32x16")


def block_of(spec: Attention, isa: Isa) -> type[Block]:
    """How blocks of that attention are computed at a level."""
    words = isa.bfloat and in_pairs(spec.kv_dtype, spec.head_dim) and spec.head_dim % LANES == 0
    return WordBlock if words else Block
