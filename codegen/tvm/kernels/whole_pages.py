"""Keys and values of 16 tokens that fill a page of bfloat16, written by vectors: what `append_kv` does with
most tokens of a prompt. One token's keys are a column of the page, two bytes of each of its lines.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from . import PAGE_SIZE
from .builder import LANES, Buffer, Expr, call, i32s, let, put, put1, scalar, splat, vec

ReadHead = Callable[[Expr, Expr], Expr]
"""16 elements of a head from i on, of a token: (token, i)."""

WORDS = 2 * LANES
"""Elements of 16 words."""


def fits_whole(kv_dtype: str, head_dim: int) -> bool:
    """Whether pages can be written whole."""
    return kv_dtype == "bfloat16" and head_dim % WORDS == 0


def _is_whole(slots: Buffer, first: Expr) -> Expr:
    """1 where the 16 tokens from `first` on, which are there, fill a page in order, else 0."""
    expected = splat(slots[first]) + T.ramp(0, 1, LANES)
    others = T.Select(vec(slots, first) == expected, i32s(0), i32s(1))
    starts = T.floormod(slots[first], T.int32(PAGE_SIZE)) == 0
    return T.Select(T.And(starts, call("int32", "llmc_max_i32", others) == 0), T.int32(1), T.int32(0))


def by_pages(
    slots: Buffer, tokens: Expr, t: Expr, page: Callable[[Expr], None], token: Callable[[Expr], None]
) -> None:
    """For token t `token(t)`, or where the page it is of is filled in order by tokens of this step: for the
    first of these `page(t)`, for the others nothing.
    """
    offset = let(slots[t] % PAGE_SIZE)
    start = let(t - offset)
    whole = scalar(T.int32(0), "int32")
    with T.If(T.And(T.And(slots[t] >= 0, start >= 0), start + PAGE_SIZE <= tokens)), T.Then():
        put1(whole, _is_whole(slots, start), 0)
    with T.If(whole[0] == 0):
        with T.Then():
            token(t)
        with T.Else(), T.If(offset == 0), T.Then():
            page(t)


def _halves(value: Expr) -> Expr:
    return call("uint16x16", "llmc_to_bfloat", value)


def put_keys(pages: Buffer, place: tuple[Expr, Expr], head_dim: int, first: Expr, keys: ReadHead) -> None:
    """The keys of a (page, head) = place, as words [head_dim / 2, 16 tokens]."""
    page, head = place
    held = T.alloc_buffer((PAGE_SIZE, WORDS), "uint16")
    with T.serial(0, head_dim // WORDS) as c:
        with T.serial(0, PAGE_SIZE) as t:
            for at in (0, LANES):
                put(held, _halves(keys(first + t, c * WORDS + at)), t, at)
        to = T.address_of(pages[0, page, head, 0, c * (WORDS * PAGE_SIZE)])
        T.evaluate(T.call_extern("int32", "llmc_transpose_words", T.address_of(held[0, 0]), to))


def put_values(pages: Buffer, place: tuple[Expr, Expr], head_dim: int, first: Expr, values: ReadHead) -> None:
    """The values of a (page, head) = place, as words [8 pairs of tokens, head_dim]."""
    page, head = place
    with T.serial(0, PAGE_SIZE // 2) as pair, T.serial(0, head_dim // LANES) as c:
        low, high = (
            T.Cast("uint32x16", _halves(let(values(first + 2 * pair + at, c * LANES)))) for at in (0, 1)
        )
        words = T.bitwise_or(low, T.shift_left(high, T.broadcast(T.uint32(16), LANES)))
        start = let((pair * head_dim + c * LANES) * 2)
        put(pages, T.reinterpret(words, dtype=f"{pages.dtype}x{WORDS}"), 1, page, head, 0, start, lanes=WORDS)
