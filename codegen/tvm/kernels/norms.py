"""`rms_norm` and `layer_norm`: float32, sums in 64 lanes over the row in order, then across the lanes in a
fixed tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from .activation import activation_layout, elements_held, quantize_as_made, quantized_arguments
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
    lane_sum,
    let,
    loop,
    padded,
    put,
    put1,
    put_part,
    register,
    scalar,
    splat,
    vec,
)
from .heads import Source, head_argument, head_index
from .layout import QuantLayout

_TOTALS = 4


def _sum(width: int, x: Buffer, index: Callable[[Expr], tuple[Expr, ...]], minus: Expr | None) -> Expr:
    """Σ (x - minus)², or Σ x where `minus` is None."""
    # Several: an addition takes four cycles, and the next to the same register waits for it.
    totals = [register(f32s(0)) for _ in range(_TOTALS)]

    def add(total: Buffer, i: Expr) -> None:
        v = vec(x, *index(i))
        if minus is None:
            put(total, vec(total, 0) + v, 0)
        else:
            d = let(v - splat(minus))
            put(total, fma(d, d, vec(total, 0)), 0)

    vectors = width // LANES
    with T.serial(0, vectors // _TOTALS) as c:
        for i, total in enumerate(totals):
            add(total, (c * _TOTALS + i) * LANES)
    for i in range(vectors % _TOTALS):
        add(totals[i], T.int32((vectors - vectors % _TOTALS + i) * LANES))
    a, b, c, d = (vec(total, 0) for total in totals)
    result = scalar(lane_sum(let((a + b) + (c + d))))
    with loop(width // LANES * LANES, width) as i:
        if minus is None:
            put1(result, result[0] + x[index(i)], 0)
        else:
            d = let(x[index(i)] - minus)
            put1(result, fma1(d, d, result[0]), 0)
    return let(result[0])


def _scaled(
    width: int,
    read: Callable[[Expr, bool], Expr],
    weight: Buffer | None,
    bias: Buffer | None,
    write: tuple[Buffer, Callable[[Expr], tuple[Expr, ...]]],
) -> None:
    """out = read · weight + bias over a row. `read(i, whole)` gives 16 elements from i, or one."""
    out, index = write

    def finish(v: Expr, w: Expr | None, b: Expr | None) -> Expr:
        if w is None:
            return v if b is None else v + b
        return v * w if b is None else fma(v, w, b)

    if width >= LANES:

        def body(i: Expr) -> None:
            w = None if weight is None else vec(weight, i)
            b = None if bias is None else vec(bias, i)
            put(out, finish(read(i, True), w, b), *index(i))

        for_each_vector(width, body)
        return
    w = None if weight is None else padded(width, lambda i: weight[i])
    b = None if bias is None else padded(width, lambda i: bias[i])
    put_part(out, finish(padded(width, lambda i: read(i, False)), w, b), width, *index(T.int32(0)))


def _inverse_root(total: Expr, width: int, eps: float) -> Expr:
    return let(T.float32(1) / T.sqrt(total / T.float32(width) + T.float32(eps)))


def make_rms_norm(
    *,
    width: int,
    eps: float,
    weight: bool = True,
    heads: int = 0,
    source: Source = None,
    quantize: tuple[int, int] | None = None,
    apart: int = 0,
    rotate: int = 0,
    isa: str,
) -> Any:
    """out = x / √(mean(x²) + eps) · weight over the last axis.

    heads = 0: x float32 [T, width] → out float32 [T, width]. heads > 0: each head by itself, x float32
    [T, heads, width] or, with source = (row_width, offset), columns of [T, row_width] → out [T, heads,
    width]. weight float32 [width].

    With quantize = (group_size, align) the outputs are a, sums and a_scale of `quantize_activation`, with
    `apart` and `rotate`; heads is 0 then.
    """
    kernel = Kernel("rms_norm", isa)
    if quantize is not None:
        lay = activation_layout(width, *quantize)
        return _rms_norm_quantized(kernel, width, eps, weight, lay, (apart, rotate))
    with kernel:
        tokens = kernel.symbol("T")
        if heads:
            x = head_argument(kernel, "x", heads, width, source)
        else:
            x = kernel.argument("x", (tokens, width), "float32")
        w = kernel.argument("weight", (width,), "float32") if weight else None
        shape = (tokens, heads, width) if heads else (tokens, width)
        out = kernel.argument("out", shape, "float32")

        def normalise(
            read_at: Callable[[Expr], tuple[Expr, ...]], write_at: Callable[[Expr], tuple[Expr, ...]]
        ) -> None:
            root = _inverse_root(_sum(width, x, read_at, T.float32(0)), width, eps)

            def read(i: Expr, whole: bool) -> Expr:
                return vec(x, *read_at(i)) * splat(root) if whole else x[read_at(i)] * root

            _scaled(width, read, w, None, (out, write_at))

        def row(t: Expr) -> None:
            if not heads:
                normalise(lambda i: (t, i), lambda i: (t, i))
                return
            with T.serial(0, heads) as h:
                normalise(head_index(t, h, width, source), lambda i: (t, h, i))

        with kernel.body():
            for_each_row(tokens, max(1, heads) * width, row)
    return kernel.function


def _rms_norm_quantized(
    kernel: Kernel, width: int, eps: float, weight: bool, lay: QuantLayout, how: tuple[int, int]
) -> Any:
    """The kernel whose rows are quantized as they are made; bit for bit those of the other, quantized."""
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        w = kernel.argument("weight", (width,), "float32") if weight else None
        to = quantized_arguments(kernel, lay, apart=how[0], rotate=how[1])

        def row(t: Expr, held: Buffer) -> None:
            root = _inverse_root(_sum(width, x, lambda i: (t, i), T.float32(0)), width, eps)

            def make(i: Expr) -> Expr:
                v = vec(x, t, i) * splat(root)
                return v if w is None else v * vec(w, i)

            quantize_as_made(to, t, held, make)

        with kernel.body():
            for_each_row_beside(tokens, 3 * width, elements_held(lay, to.apart), row)
    return kernel.function


def reference_rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """Over the last axis, float64."""
    x = x.astype(np.float64)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def make_layer_norm(*, width: int, eps: float, weight: bool = True, bias: bool = True, isa: str) -> Any:
    """out = (x - mean) / √(variance + eps) · weight + bias over the last axis; the variance in a second pass.

    x float32 [T, width], weight and bias float32 [width], out float32 [T, width].
    """
    kernel = Kernel("layer_norm", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        w = kernel.argument("weight", (width,), "float32") if weight else None
        b = kernel.argument("bias", (width,), "float32") if bias else None
        out = kernel.argument("out", (tokens, width), "float32")

        def row(t: Expr) -> None:
            def at(i: Expr) -> tuple[Expr, ...]:
                return (t, i)

            mean = let(_sum(width, x, at, None) / T.float32(width))
            root = _inverse_root(_sum(width, x, at, mean), width, eps)

            def read(i: Expr, whole: bool) -> Expr:
                if whole:
                    return (vec(x, t, i) - splat(mean)) * splat(root)
                return (x[t, i] - mean) * root

            _scaled(width, read, w, b, (out, at))

        with kernel.body():
            for_each_row(tokens, 2 * width, row)
    return kernel.function


def reference_layer_norm(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> np.ndarray:
    """Over the last axis, float64."""
    x = x.astype(np.float64)
    d = x - x.mean(-1, keepdims=True)
    y = d / np.sqrt((d * d).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
