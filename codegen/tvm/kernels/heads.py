"""Heads as a kernel reads them: where they stand, and turned by rotary embeddings on the way where that was
left to it, so that no turned copy of a prompt's queries and keys is written and read again.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, Kernel, f32s, fma, let, splat, vec

Source = tuple[int, int] | None
"""(row_width, offset) of an operand in a wider result, or None."""


def head_argument(kernel: Kernel, name: str, heads: int, width: int, source: Source) -> Buffer:
    """The parameter for [T, heads, width], of its own or inside a wider result."""
    tokens = kernel.symbol("T")
    shape = (tokens, heads, width) if source is None else (tokens, source[0])
    return kernel.argument(name, shape, "float32")


def head_index(row: Expr, head: Expr, width: int, source: Source) -> Callable[[Expr], tuple[Expr, ...]]:
    """Index of element i of a head in the parameter made by `head_argument`."""
    if source is None:
        return lambda i: (row, head, i)
    return lambda i: (row, source[1] + head * width + i)


def turns_whole_vectors(head_dim: int, rotary_dim: int) -> bool:
    """Whether `Heads` turns such heads: halves of whole vectors."""
    return head_dim % LANES == 0 and rotary_dim % (2 * LANES) == 0


class Heads:
    """The parameter float32 [T, heads, width], or with source = (row_width, offset) columns of [T,
    row_width].

    rotary > 0: cosines and sines float32 [T, rotary] follow it, and elements i and i + rotary/2 of a head are
    read turned; the same bits as from `elementwise.make_rope`. `turns_whole_vectors` holds then.
    """

    def __init__(
        self, kernel: Kernel, name: str, heads: int, width: int, source: Source, rotary: int = 0
    ) -> None:
        self.width, self.source, self.rotary = width, source, rotary
        self.x = head_argument(kernel, name, heads, width, source)
        if rotary:
            shape = (kernel.symbol("T"), rotary)
            self.cos = kernel.argument(f"{name}_cos", shape, "float32")
            self.sin = kernel.argument(f"{name}_sin", shape, "float32")

    def one(self, row: Expr, head: Expr, d: Expr) -> Expr:
        """Element d of heads that are not turned."""
        assert not self.rotary
        return self.x[head_index(row, head, self.width, self.source)(d)]

    def lanes(self, count: int, row: Expr, head: Expr, d: Expr) -> Expr:
        """16 elements, or one."""
        return self.one(row, head, d) if count == 1 else self.vector(row, head, d)

    def vector(self, row: Expr, head: Expr, d: Expr) -> Expr:
        """16 elements from d, a multiple of 16, on."""
        at = head_index(row, head, self.width, self.source)
        if not self.rotary:
            return vec(self.x, *at(d))
        half = self.rotary // 2
        first = let(d < T.int32(half))
        # Behind what is turned, whatever is read: what is made of it is not used.
        angle = let(T.min(d, T.int32(self.rotary - LANES)))
        partner = let(T.Select(first, d + half, T.max(d - half, T.int32(0))))
        value = let(vec(self.x, *at(d)))
        other = let(vec(self.sin, row, angle) * let(vec(self.x, *at(partner))))
        part = T.Select(splat(first), f32s(0) - other, other)
        turned = fma(value, vec(self.cos, row, angle), let(part))
        if self.rotary == self.width:
            return turned
        return T.Select(splat(d < T.int32(self.rotary)), turned, value)
