"""What kernels of `paged_attention` share: its parameters, its buffers, and the order of its softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Buffer, Expr, loop, put, put1, splat, vec
from .heads import Heads
from .isa import Isa

LOG2E = math.log2(math.e)
NOTHING = -1e30
"""The maximum before any score; a number, since infinity minus infinity is none."""
SEGMENT = 32
"""Pages whose softmax is computed in one go."""
TILE = 4
"""Pages whose maximum is taken at once. Tiles begin at multiples of it, whatever a row sees."""
MANY_ROWS = 16
"""Tokens in a step from which on rows are taken in blocks."""


@dataclass(frozen=True)
class Attention:
    """What is known when the kernel is made."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    slopes: bool = False
    distances: int = 0
    """Elements of a head's row of `distances`; 0 where scores have none."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @staticmethod
    def most(isa: Isa) -> int:
        """Vectors that are accumulated at once, so that they stay in registers."""
        return 24 if isa.live_vectors >= 32 else 6 if isa.live_vectors >= 8 else 3

    def blocking(self, isa: Isa) -> tuple[int, int]:
        """(query heads, query rows) computed together: their scores and weights must fit the registers."""
        # With half of what fits, two pages share what is read for a row and head, and all fit.
        most = min(self.most(isa), 12)
        heads = max(h for h in range(1, min(self.group, most) + 1) if self.group % h == 0)
        return heads, max(1, min(12, most // heads))

    def row_heads(self, isa: Isa) -> int:
        """Query heads computed together where rows stand alone, as in decoding. 7 heads fill 14 of 16
        registers, and what they are multiplied by does not fit beside them; still they take half the time of
        7 blocks of one head, each of which reads the keys again.
        """
        most = min(self.most(isa) + (1 if 8 <= isa.live_vectors < 32 else 0), LANES)
        return max(h for h in range(1, min(self.group, most) + 1) if self.group % h == 0)


class Memory:
    """One piece of memory, cut into float32 buffers: to get one takes longer than to attend to a page."""

    def __init__(self, elements: int) -> None:
        self._all = T.alloc_buffer((elements,), "float32")
        self._used = 0

    def take(self, *shape: int) -> Buffer:
        start, self._used = self._used, self._used + math.prod(shape)
        return T.decl_buffer(shape, "float32", data=self._all.data, elem_offset=start)

    def again(self) -> Memory:
        """The same memory, to be cut anew."""
        self._used = 0
        return self


@dataclass(frozen=True)
class Buffers:
    q: Heads
    pages: Buffer
    query_start: Buffer
    context_len: Buffer
    block_table: Buffer
    sinks: Buffer | None
    slopes: Buffer | None
    distances: Buffer | None
    out: Buffer


def advance(at: Buffers, sequence: Buffer, row: Expr) -> None:
    """Move `sequence` on to the one that owns a row."""
    with T.While(at.query_start[sequence[0] + 1] <= row):
        put1(sequence, sequence[0] + 1, 0)


def for_elements(width: int, body: Callable[[Expr, int], None]) -> None:
    """`body(first, lanes)` for 16 elements of `width` at a time, then for one."""
    with T.serial(0, width // LANES) as c:
        body(c * LANES, LANES)
    if width % LANES:
        with loop(width // LANES * LANES, width) as d:
            body(d, 1)


def get_lanes(lanes: int, buffer: Buffer, *index: Expr) -> Expr:
    """16 elements, or one."""
    return buffer[index] if lanes == 1 else vec(buffer, *index)


def put_lanes(lanes: int, buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store 16 elements, or one."""
    if lanes == 1:
        put1(buffer, value, *index)
    else:
        put(buffer, value, *index)


def all_lanes(lanes: int, value: Expr) -> Expr:
    """A scalar in as many lanes."""
    return value if lanes == 1 else splat(value)
