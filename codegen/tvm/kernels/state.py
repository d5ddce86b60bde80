"""Recurrences of a ragged batch: `causal_conv1d`, `linear_recurrence`, `wkv`, `selective_scan`,
`ssd_scan` (`ir/ops/state.py` says what they compute; `gated_delta_rule` is in `state_delta.py`).

A kernel goes through the tokens of a sequence once, one after the other, for 16 channels at a time; sequences
and blocks of channels are computed in parallel. So a row's bits depend on the tokens before it alone, however
the sequence is cut into chunks: between two steps the state lies in memory as it lay between two tokens.

All have, after their own operands, `state` float32 [S, …] (written in place), state_slot int32 [B],
query_start int32 [B + 1], context_len int32 [B]. The row of an empty sequence is left alone. An operand with
a row a token is [T, row width], of which a source = (row width, first column) says where it begins: a slice
is not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from ....ir.ops.state import LARGEST
from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    let,
    loop,
    padded,
    put,
    put_part,
    register,
    splat,
    vec,
)
from .vector_math import ACTIVATIONS, exp, softplus

Source = tuple[int, int]
"""(row width, first column)."""


def load(buffer: Buffer, count: int, *index: Expr) -> Expr:
    """`count` ≤ 16 elements from an index on, and zeros."""
    if count == LANES:
        return let(vec(buffer, *index))
    return padded(count, lambda i: buffer[(*index[:-1], index[-1] + i)])


def store(buffer: Buffer, value: Expr, count: int, *index: Expr) -> None:
    """Where `load` would read them."""
    if count == LANES:
        put(buffer, value, *index)
    else:
        put_part(buffer, value, count, *index)


class Rows:
    """An operand with a row for each token."""

    def __init__(self, kernel: Kernel, name: str, source: Source) -> None:
        width, self.first = source
        self.buffer = kernel.argument(name, (kernel.symbol("T"), width), "float32")

    def load(self, count: int, token: Expr, column: Expr) -> Expr:
        """16 of a token's elements from a column on."""
        return load(self.buffer, count, token, self.first + column)

    def one(self, token: Expr, column: Expr) -> Expr:
        """One element of a token."""
        return self.buffer[token, self.first + column]


@dataclass(frozen=True)
class Task:
    """The tokens first … last-1 of one sequence in channels start … start + count - 1 of a head."""

    first: Expr
    last: Expr
    slot: Expr
    fresh: Expr
    """Whether the sequence begins here, with zeros for a state."""
    head: Expr
    start: Expr
    count: int


class Step:
    """The parameters that all of these kernels share, in the place where they stand."""

    def __init__(self, kernel: Kernel, state_shape: tuple[int, ...]) -> None:
        self.sequences = kernel.symbol("B")
        self.state = kernel.argument("state", (kernel.symbol("S"), *state_shape), "float32", large=True)
        self.slots = kernel.argument("state_slot", (self.sequences,), "int32")
        self.starts = kernel.argument("query_start", (kernel.symbol("B1"),), "int32")
        self.context = kernel.argument("context_len", (self.sequences,), "int32")

    def tasks(self, heads: int, width: int, body: Callable[[Task], None]) -> None:
        """`body` for each sequence that has tokens, head, and 16 of its channels, in parallel."""
        blocks, rest = -(-width // LANES), width % LANES
        with T.parallel(0, self.sequences * (heads * blocks)) as w:
            b, place = let(w // (heads * blocks)), let(w % (heads * blocks))
            head, block = let(place // blocks), let(place % blocks)
            first, last = let(self.starts[b]), let(self.starts[b + 1])
            fresh = let(self.context[b] <= last - first)
            common = (first, last, let(self.slots[b]), fresh, head, let(block * LANES))
            with T.If(first < last), T.Then():
                if not rest:
                    body(Task(*common, LANES))
                elif blocks == 1:
                    body(Task(*common, rest))
                else:
                    with T.If(block < blocks - 1):
                        with T.Then():
                            body(Task(*common, LANES))
                        with T.Else():
                            body(Task(*common, rest))

    def clear(self, task: Task, rows: int, *lead: Expr) -> None:
        """Zeros for a sequence that begins here."""
        with T.If(task.fresh), T.Then(), T.serial(0, rows) as n:
            store(self.state, f32s(0), task.count, task.slot, *lead, n, task.start)


def make_causal_conv1d(
    *, channels: int, width: int, bias: bool, activation: str | None, source: Source, isa: str
) -> Any:
    """x [T, source], weight [width, channels], (bias [channels]), state [S, width - 1, channels] → out [T,
    channels].
    """
    kernel = Kernel("causal_conv1d", isa)
    with kernel:
        x = Rows(kernel, "x", source)
        weight = kernel.argument("weight", (width, channels), "float32")
        added = kernel.argument("bias", (channels,), "float32") if bias else None
        step = Step(kernel, (width - 1, channels))
        out = kernel.argument("out", (kernel.symbol("T"), channels), "float32")

        def task(at: Task) -> None:
            filters = [load(weight, at.count, w, at.start) for w in range(width)]
            offset = f32s(0) if added is None else load(added, at.count, at.start)
            kept = [
                register(T.Select(splat(at.fresh), f32s(0), load(step.state, at.count, at.slot, w, at.start)))
                for w in range(width - 1)
            ]
            with loop(at.first, at.last) as t:
                new = x.load(at.count, t, at.start)
                seen = [*(let(vec(one, 0)) for one in kept), new]
                total = offset
                for value, factor in zip(seen, filters, strict=True):
                    total = let(fma(value, factor, total))
                total = total if activation is None else ACTIVATIONS[activation](total)
                store(out, total, at.count, t, at.start)
                for held, value in zip(kept, seen[1:], strict=True):
                    put(held, value, 0)
            for w, held in enumerate(kept):
                store(step.state, vec(held, 0), at.count, at.slot, w, at.start)

        with kernel.body():
            step.tasks(1, channels, task)
    return kernel.function


def make_linear_recurrence(*, channels: int, x_source: Source, a_source: Source, isa: str) -> Any:
    """x [T, x_source], a [T, a_source], state [S, 1, channels] → out [T, channels]."""
    kernel = Kernel("linear_recurrence", isa)
    with kernel:
        x, a = Rows(kernel, "x", x_source), Rows(kernel, "a", a_source)
        step = Step(kernel, (1, channels))
        out = kernel.argument("out", (kernel.symbol("T"), channels), "float32")

        def task(at: Task) -> None:
            before = load(step.state, at.count, at.slot, 0, at.start)
            held = register(T.Select(splat(at.fresh), f32s(0), before))
            with loop(at.first, at.last) as t:
                new = fma(a.load(at.count, t, at.start), vec(held, 0), x.load(at.count, t, at.start))
                put(held, new, 0)
                store(out, vec(held, 0), at.count, t, at.start)
            store(step.state, vec(held, 0), at.count, at.slot, 0, at.start)

        with kernel.body():
            step.tasks(1, channels, task)
    return kernel.function


def make_wkv(*, channels: int, k_source: Source, v_source: Source, isa: str) -> Any:
    """k [T, k_source], v [T, v_source], decay [channels], first [channels], state [S, 3, channels] → out [T,
    channels].
    """
    kernel = Kernel("wkv", isa)
    with kernel:
        k, v = Rows(kernel, "k", k_source), Rows(kernel, "v", v_source)
        decay = kernel.argument("decay", (channels,), "float32")
        first = kernel.argument("first", (channels,), "float32")
        step = Step(kernel, (3, channels))
        out = kernel.argument("out", (kernel.symbol("T"), channels), "float32")

        def larger(a: Expr, b: Expr) -> Expr:
            return let(T.Select(a > b, a, b))

        def task(at: Task) -> None:
            slower = let(load(decay, at.count, at.start))
            more = let(load(first, at.count, at.start))
            kept = [let(load(step.state, at.count, at.slot, i, at.start)) for i in range(3)]
            begun = [let(T.Select(splat(at.fresh), f32s(0), one)) for one in kept]
            begun[2] = let(T.Select(begun[1] > f32s(0), begun[2], f32s(-LARGEST)))
            top, below, largest = (register(one) for one in begun)

            def weighed(at_most: Expr, before: Expr, now: Expr, value: Expr) -> tuple[Expr, Expr]:
                old, new = let(exp(before - at_most)), let(exp(now - at_most))
                return let(fma(old, vec(top, 0), new * value)), let(fma(old, vec(below, 0), new))

            with loop(at.first, at.last) as t:
                key, value = let(k.load(at.count, t, at.start)), let(v.load(at.count, t, at.start))
                before, now = let(vec(largest, 0)), let(more + key)
                above, under = weighed(larger(before, now), before, now, value)
                store(out, above / under, at.count, t, at.start)
                before = let(before + slower)
                held = larger(before, key)
                above, under = weighed(held, before, key, value)
                for one, new in zip((top, below, largest), (above, under, held), strict=True):
                    put(one, new, 0)
            for i, one in enumerate((top, below, largest)):
                store(step.state, vec(one, 0), at.count, at.slot, i, at.start)

        with kernel.body():
            step.tasks(1, channels, task)
    return kernel.function


def make_selective_scan(
    *,
    channels: int,
    elements: int,
    sources: tuple[Source, Source, Source, Source],
    d: bool,
    dt_bias: bool,
    softplus_of_dt: bool,
    isa: str,
) -> Any:
    """x, dt, b, c [T, sources], a [elements, channels], (d [channels]), (dt_bias [channels]), state [S,
    elements, channels] → out [T, channels].
    """
    kernel = Kernel("selective_scan", isa)
    with kernel:
        x, dt, b, c = (Rows(kernel, n, s) for n, s in zip(("x", "dt", "b", "c"), sources, strict=True))
        a = kernel.argument("a", (elements, channels), "float32")
        through = kernel.argument("d", (channels,), "float32") if d else None
        shift = kernel.argument("dt_bias", (channels,), "float32") if dt_bias else None
        step = Step(kernel, (elements, channels))
        out = kernel.argument("out", (kernel.symbol("T"), channels), "float32")

        def task(at: Task) -> None:
            step.clear(at, elements)
            with loop(at.first, at.last) as t:
                size = dt.load(at.count, t, at.start)
                size = size if shift is None else let(size + load(shift, at.count, at.start))
                size = softplus(size) if softplus_of_dt else size
                value = x.load(at.count, t, at.start)
                scaled = let(size * value)
                total = register(f32s(0) if through is None else value * load(through, at.count, at.start))
                with T.serial(0, elements) as n:
                    decay = exp(size * load(a, at.count, n, at.start))
                    before = load(step.state, at.count, at.slot, n, at.start)
                    new = let(fma(decay, before, let(scaled * splat(b.one(t, n)))))
                    store(step.state, new, at.count, at.slot, n, at.start)
                    put(total, fma(new, splat(c.one(t, n)), vec(total, 0)), 0)
                store(out, vec(total, 0), at.count, t, at.start)

        with kernel.body():
            step.tasks(1, channels, task)
    return kernel.function


def make_ssd_scan(
    *,
    heads: int,
    head_dim: int,
    groups: int,
    elements: int,
    sources: tuple[Source, Source, Source, Source],
    d: bool,
    isa: str,
) -> Any:
    """x, dt, b, c [T, sources] (heads · head_dim, heads, and groups · elements columns), a [heads], (d
    [heads]), state [S, heads, elements, head_dim] → out [T, heads, head_dim].
    """
    kernel = Kernel("ssd_scan", isa)
    with kernel:
        x, dt, b, c = (Rows(kernel, n, s) for n, s in zip(("x", "dt", "b", "c"), sources, strict=True))
        a = kernel.argument("a", (heads,), "float32")
        through = kernel.argument("d", (heads,), "float32") if d else None
        step = Step(kernel, (heads, elements, head_dim))
        out = kernel.argument("out", (kernel.symbol("T"), heads, head_dim), "float32")

        def task(at: Task) -> None:
            step.clear(at, elements, at.head)
            group = let(at.head // (heads // groups) * elements)
            with loop(at.first, at.last) as t:
                size = splat(dt.one(t, at.head))
                decay = exp(size * splat(a[at.head]))
                value = x.load(at.count, t, at.head * head_dim + at.start)
                scaled = let(size * value)
                total = register(f32s(0) if through is None else value * splat(through[at.head]))
                with T.serial(0, elements) as n:
                    before = load(step.state, at.count, at.slot, at.head, n, at.start)
                    new = let(fma(decay, before, let(scaled * splat(b.one(t, group + n)))))
                    store(step.state, new, at.count, at.slot, at.head, n, at.start)
                    put(total, fma(new, splat(c.one(t, group + n)), vec(total, 0)), 0)
                store(out, vec(total, 0), at.count, t, at.head, at.start)

        with kernel.body():
            step.tasks(heads, head_dim, task)
    return kernel.function
