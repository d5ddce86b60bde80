"""`gated_mlp`, plain activations and `rope`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from ....ir.errors import CompileError
from .activation import (
    Quantized,
    activation_layout,
    elements_held,
    quantize_as_made,
    quantized_arguments,
)
from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    f32s,
    fma,
    fma1,
    for_each_row,
    for_each_row_beside,
    for_each_vector,
    let,
    loop,
    padded,
    put,
    put1,
    put_part,
    vec,
)
from .heads import Source, head_argument, head_index
from .vector_math import ACTIVATIONS, ROUGH

COST = 8
"""An activation costs about as much as touching this many elements."""


def activation_function(activation: str, *, rough: bool = False) -> Callable[[Expr], Expr]:
    """Of 16 lanes; rough: for what is rounded to 8 bits. Raises CompileError for a name without one."""
    if activation not in ACTIVATIONS:
        raise CompileError(
            f"no kernel for the activation {activation!r}", remedy=f"one of {', '.join(ACTIVATIONS)}"
        )
    return (ROUGH if rough else ACTIVATIONS)[activation]


def make_gated_mlp(
    *, width: int, activation: str, quantize: tuple[int, int] | None = None, rotate: int = 0, isa: str
) -> Any:
    """out = activation(gate) · up. gate_up float32 [T, 2 · width] = [gate, up]; out float32 [T, width].

    activation: silu, gelu, gelu_tanh, relu or sigmoid. With quantize = (group_size, align) the outputs are a,
    sums and a_scale of `quantize_activation`, with `rotate`, and the activation is one of `ROUGH`.
    """
    function = activation_function(activation, rough=quantize is not None)
    kernel = Kernel("gated_mlp", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("gate_up", (tokens, 2 * width), "float32")
        if quantize is not None:
            to = quantized_arguments(kernel, activation_layout(width, *quantize), rotate=rotate)
            out = None
        else:
            to, out = None, kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            put_gated(
                out, t, width, lambda gate, up: function(gate) * up, lambda i: vec(x, t, i), lambda i: x[t, i]
            )

        def quantized(to: Quantized, t: Expr, held: Buffer) -> None:
            quantize_as_made(to, t, held, lambda i: function(vec(x, t, i)) * vec(x, t, width + i))

        with kernel.body():
            if to is None:
                for_each_row(tokens, COST * width, row)
            else:
                held = elements_held(to.layout, 0)
                for_each_row_beside(tokens, COST * width, held, partial(quantized, to))
    return kernel.function


def put_gated(
    out: Buffer,
    row: Expr,
    width: int,
    gated: Callable[[Expr, Expr], Expr],
    read: Callable[[Expr], Expr],
    one: Callable[[Expr], Expr],
) -> None:
    """out[row] = gated(gate, up). `read` gives 16 elements of [gate, up] from a column on, `one` a single
    one.
    """
    if width < LANES:
        gate, up = padded(width, one), padded(width, lambda i: one(width + i))
        put_part(out, gated(gate, up), width, row, T.int32(0))
        return
    for_each_vector(width, lambda i: put(out, gated(read(i), read(width + i)), row, i))


def make_activation(*, width: int, activation: str, isa: str) -> Any:
    """out = activation(x): x float32 [T, width] → out float32 [T, width]; names as in `make_gated_mlp`."""
    function = activation_function(activation)
    kernel = Kernel("activation", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            put_active(out, t, width, function, lambda i: vec(x, t, i), lambda i: x[t, i])

        with kernel.body():
            for_each_row(tokens, COST * width, row)
    return kernel.function


def put_active(
    out: Buffer,
    row: Expr,
    width: int,
    function: Callable[[Expr], Expr],
    read: Callable[[Expr], Expr],
    one: Callable[[Expr], Expr],
) -> None:
    """out[row] = function(x). `read` gives 16 elements of x from a column on, `one` a single one."""
    if width < LANES:
        put_part(out, function(padded(width, one)), width, row, T.int32(0))
        return
    for_each_vector(width, lambda i: put(out, function(read(i)), row, i))


def _turn_halves(x: Buffer, cos: Buffer, sin: Buffer, out: Buffer, half: int, where: Any) -> None:
    """Pairs (i, i + half)."""
    t, h, at = where

    def body(i: Expr) -> None:
        a, b = let(vec(x, *at(i))), let(vec(x, *at(half + i)))
        put(out, fma(a, vec(cos, t, i), f32s(0) - let(vec(sin, t, i) * b)), t, h, i)
        put(out, fma(b, vec(cos, t, half + i), let(vec(sin, t, half + i) * a)), t, h, half + i)

    if half >= LANES:
        for_each_vector(half, body)
        return
    with T.serial(0, half) as i:
        a, b = let(x[at(i)]), let(x[at(half + i)])
        put1(out, fma1(a, cos[t, i], T.float32(0) - let(sin[t, i] * b)), t, h, i)
        put1(out, fma1(b, cos[t, half + i], let(sin[t, half + i] * a)), t, h, half + i)


def _turn_neighbours(x: Buffer, cos: Buffer, sin: Buffer, out: Buffer, half: int, where: Any) -> None:
    """Pairs (2i, 2i + 1)."""
    t, h, at = where
    with T.serial(0, half) as i:
        a, b = let(x[at(2 * i)]), let(x[at(2 * i + 1)])
        put1(out, fma1(a, cos[t, 2 * i], T.float32(0) - let(sin[t, 2 * i] * b)), t, h, 2 * i)
        put1(out, fma1(b, cos[t, 2 * i + 1], let(sin[t, 2 * i + 1] * a)), t, h, 2 * i + 1)


def make_rope(
    *, heads: int, head_dim: int, rotary_dim: int, interleaved: bool = False, source: Source = None, isa: str
) -> Any:
    """Turn the first rotary_dim elements of each head by the angles of its token; the rest is copied.

    x float32 [T, heads, head_dim], or with source = (row_width, offset) columns of [T, row_width]; cos and
    sin float32 [T, rotary_dim] hold the angle of every element; out float32 [T, heads, head_dim]. Pairs are
    (i, i + rotary_dim/2), or (2i, 2i + 1) where interleaved.
    """
    kernel = Kernel("rope", isa)
    turn = _turn_neighbours if interleaved else _turn_halves
    with kernel:
        tokens = kernel.symbol("T")
        x = head_argument(kernel, "x", heads, head_dim, source)
        cos = kernel.argument("cos", (tokens, rotary_dim), "float32")
        sin = kernel.argument("sin", (tokens, rotary_dim), "float32")
        out = kernel.argument("out", (tokens, heads, head_dim), "float32")

        def row(t: Expr) -> None:
            with T.serial(0, heads) as h:
                at = head_index(t, h, head_dim, source)
                turn(x, cos, sin, out, rotary_dim // 2, (t, h, at))
                with loop(rotary_dim, head_dim) as i:
                    put1(out, x[at(i)], t, h, i)

        with kernel.body():
            for_each_row(tokens, 2 * heads * head_dim, row)
    return kernel.function


def reference_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [T, H, D], cos and sin [T, R] → float64 [T, H, D]."""
    out = x.astype(np.float64)
    r = cos.shape[1]
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    a, b = out[..., first].copy(), out[..., second].copy()
    c, s = cos[:, None, :].astype(np.float64), sin[:, None, :].astype(np.float64)
    out[..., first] = a * c[..., first] - b * s[..., first]
    out[..., second] = b * c[..., second] + a * s[..., second]
    return out
