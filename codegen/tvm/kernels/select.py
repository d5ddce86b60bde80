"""`top_k`: where the largest values of a row stand."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from .builder import Buffer, Expr, Kernel, for_each_row, let, put1, scalar

_LOWEST = -0x80000000
_ABS = 0x7FFFFFFF


def _key(x: Expr) -> Expr:
    """An int32 that orders as floats do: 0 and -0 are one, NaN is above all, and nothing is `_LOWEST`."""
    bits = T.reinterpret(x, dtype="int32")
    ordered = T.Select(bits < 0, T.bitwise_xor(bits, T.int32(_ABS)), bits)
    number = T.Select(x == T.float32(0), T.int32(0), ordered)
    return T.Select(x == x, number, T.int32(_ABS))


def make_top_k(*, width: int, k: int, isa: str) -> Any:
    """out[t] = the places of the k largest of x[t], the largest first, of equal ones the first.

    x float32 [T, width]; out int64 [T, k].
    """
    kernel = Kernel("top_k", isa)
    with kernel:
        tokens = kernel.symbol("T")
        x = kernel.argument("x", (tokens, width), "float32")
        out = kernel.argument("out", (tokens, k), "int64")

        def row(t: Expr) -> None:
            keys: Buffer = T.alloc_buffer((width,), "int32")
            with T.serial(0, width) as i:
                put1(keys, _key(x[t, i]), i)
            with T.serial(0, k) as j:
                best, place = scalar(T.int32(_LOWEST), "int32"), scalar(T.int32(0), "int32")
                with T.serial(0, width) as i, T.If(keys[i] > best[0]), T.Then():
                    put1(best, keys[i], 0)
                    put1(place, i, 0)
                chosen = let(place[0])
                put1(out, T.Cast("int64", chosen), t, j)
                put1(keys, T.int32(_LOWEST), chosen)

        with kernel.body():
            for_each_row(tokens, 2 * width * k, row)
    return kernel.function
