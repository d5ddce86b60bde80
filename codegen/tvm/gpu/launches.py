"""What the makers of kernels share: threads of a block, numbers that stand for dtypes and activations, the
usual launches.
"""

from __future__ import annotations

from ....ir.dtypes import FLOAT8
from ....ir.ops.cache import page_width
from ..kernels import stored_dtype
from .source import Argument, Launch, Size

Source = tuple[int, int] | None
"""(row width, first column): an operand that stands in columns of a wider matrix."""
ROW_THREADS = 128
FLAT_THREADS = 256
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, FLOAT8: 4}
"""`Kind` of common.cuh."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4}
"""`Activation` of common.cuh."""


def per_row_launch(name: str, call: str, arguments: tuple[str, ...], rows: Size) -> Launch:
    return Launch(name, call, arguments, (rows, 1, 1), ROW_THREADS)


def flat_launch(name: str, call: str, arguments: tuple[str, ...], elements: str) -> Launch:
    grid = f"({elements} + {FLAT_THREADS - 1}) // {FLAT_THREADS}"
    return Launch(name, call, arguments, (grid, 1, 1), FLAT_THREADS)


def present(*names: tuple[str, bool]) -> tuple[str, ...]:
    """Arguments of a call; what is absent is a null pointer."""
    return tuple(name if there else "nullptr" for name, there in names)


def heads_argument(name: str, heads: int, width: int, source: Source) -> Argument:
    shape: tuple[Size, ...] = ("T", heads, width) if source is None else ("T", source[0])
    return Argument(name, shape, "float32")


def pages_argument(kv_heads: int, head_dim: int, kv_dtype: str, page_size: int, written: bool) -> Argument:
    width = page_width(kv_dtype, head_dim)
    assert isinstance(width, int)
    return Argument("pages", (2, "N", kv_heads, page_size, width), stored_dtype(kv_dtype), written)
