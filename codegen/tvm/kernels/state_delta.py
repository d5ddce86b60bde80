"""`gated_delta_rule` of a ragged batch; what it shares with other recurrences is in `state.py`."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Expr, Kernel, f32s, fma, let, put, register, splat, vec
from .builder import loop as tokens_from
from .state import Rows, Source, Step, Task, load, store
from .vector_math import exp


def make_gated_delta_rule(
    *,
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    by_element: bool,
    scale: float,
    sources: tuple[Source, Source, Source, Source, Source],
    isa: str,
) -> Any:
    """q, k, v, g, beta [T, sources] (key_heads · key_dim twice, heads · value_dim, heads or heads · key_dim,
    and heads columns), state [S, heads, key_dim, value_dim] → out [T, heads, value_dim].
    """
    kernel = Kernel("gated_delta_rule", isa)
    with kernel:
        names = ("q", "k", "v", "g", "beta")
        q, k, v, g, beta = (Rows(kernel, n, s) for n, s in zip(names, sources, strict=True))
        step = Step(kernel, (heads, key_dim, value_dim))
        out = kernel.argument("out", (kernel.symbol("T"), heads, value_dim), "float32")
        padded_keys = -(-key_dim // LANES) * LANES

        def task(at: Task) -> None:
            step.clear(at, key_dim, at.head)
            key_head = let(at.head // (heads // key_heads) * key_dim)
            decays = T.alloc_buffer((padded_keys,), "float32") if by_element else None

            def place(n: Expr) -> tuple[Expr, ...]:
                return (at.slot, at.head, n, at.start)

            with tokens_from(at.first, at.last) as t:
                if decays is None:
                    common = exp(splat(g.one(t, at.head)))
                else:
                    common = None
                    for first in range(0, key_dim, LANES):
                        count = min(LANES, key_dim - first)
                        put(decays, exp(g.load(count, t, at.head * key_dim + first)), first)
                known = register(f32s(0))
                with T.serial(0, key_dim) as n:
                    decay = common if decays is None else splat(decays[n])
                    faded = let(decay * load(step.state, at.count, *place(n)))
                    store(step.state, faded, at.count, *place(n))
                    put(known, fma(faded, splat(k.one(t, key_head + n)), vec(known, 0)), 0)
                value = v.load(at.count, t, at.head * value_dim + at.start)
                new = let((value - vec(known, 0)) * splat(beta.one(t, at.head)))
                total = register(f32s(0))
                with T.serial(0, key_dim) as n:
                    before = load(step.state, at.count, *place(n))
                    after = let(fma(new, splat(k.one(t, key_head + n)), before))
                    store(step.state, after, at.count, *place(n))
                    put(total, fma(after, splat(q.one(t, key_head + n)), vec(total, 0)), 0)
                store(out, vec(total, 0) * f32s(scale), at.count, t, at.head, at.start)

        with kernel.body():
            step.tasks(heads, value_dim, task)
    return kernel.function
