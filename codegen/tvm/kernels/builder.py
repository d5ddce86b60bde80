"""Writing a PrimFunc from Python: the frame of a kernel, and its vocabulary of 16-lane vectors.

TVM's IR builder is used rather than its Python-like script: the kernels are families (row blocks, levels,
options) and here a Python loop unrolls and a Python function is a macro.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .isa import Isa, get_isa

LANES = 16
SERIAL_ELEMENTS = 8192
"""Elementwise work below which a parallel region does not pay."""
ROWS_BESIDE = 4
"""Rows that use the same memory in turn, at most: to ask for it takes a tenth of a row of 576 quantized."""
WIDE = 1 << 31
"""Elements of which offsets of 32 bits do not reach the last."""
Expr = Any
Buffer = Any
Shape = Sequence[Any]


class Kernel:
    """A PrimFunc under construction.

    k = Kernel("name", isa)
    with k:
        x = k.argument("x", (k.symbol("T"), 64), "float32")
        with k.body():
            ...
    return k.function
    """

    def __init__(self, name: str, isa: str) -> None:
        self.name = name
        self.isa: Isa = get_isa(isa)
        self.function: Any = None
        self._symbols: dict[str, Any] = {}

    def __enter__(self) -> Kernel:
        self._builder = IRBuilder()
        self._builder.__enter__()
        self._frame = T.prim_func(s_tir=True)
        self._frame.__enter__()
        T.func_name(self.name)
        T.func_attr({"global_symbol": self.name, "tirx.noalias": True})
        return self

    def __exit__(self, *error: Any) -> None:
        self._frame.__exit__(*error)
        if error[0] is None:
            self.function = self._builder.get()
        self._builder.__exit__(*error)

    def symbol(self, name: str) -> Any:
        """A size known at run time; the same object for the same name."""
        if name not in self._symbols:
            self._symbols[name] = tirx.Var(name, "int32")
        return self._symbols[name]

    def argument(self, name: str, shape: Shape, dtype: str, *, large: bool = False) -> Buffer:
        """The next parameter. A symbol takes its value from the first parameter with it as a dimension.

        Offsets are counted in 32 bits, but where the sizes known here reach beyond, or where a symbol makes
        an array `large`: a dimension of 64 bits widens whatever it is multiplied by.
        """
        if large or prod(d for d in shape if isinstance(d, int)) >= WIDE:
            shape = [T.int64(d) if isinstance(d, int) else d for d in shape]
        return T.arg(name, T.buffer(tuple(shape), dtype, buffer_name=name))

    @contextmanager
    def body(self) -> Generator[None]:
        """The statements of the kernel, behind its arguments; they may call the functions of `intrinsics`,
        which `build` gives to the module.
        """
        yield


def vec(buffer: Buffer, *index: Expr, lanes: int = LANES) -> Expr:
    """`lanes` consecutive elements; the last index is where they start."""
    return buffer[(*index[:-1], T.ramp(index[-1], 1, lanes))]


def put(buffer: Buffer, value: Expr, *index: Expr, lanes: int = LANES) -> None:
    """Store a vector where `vec` with the same index would read it."""
    _store(buffer, value, [*index[:-1], T.ramp(index[-1], 1, lanes)])


def put1(buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store a scalar."""
    _store(buffer, value, list(index))


_Store = tuple[Buffer, Expr, list[Expr]]
_kept: tuple[int, list[_Store]] | None = None
"""Within a body of `in_turns`: how many frames are open around it, and its stores so far."""


def _store(buffer: Buffer, value: Expr, index: list[Expr]) -> None:
    if _kept is None:
        T.buffer_store(buffer, value, index)
        return
    frames, stores = _kept
    assert _frames() == frames, "a body of in_turns has a loop or a condition"
    stores.append((buffer, value, index))


def _frames() -> int:
    return len(IRBuilder.current().frames)  # pyright: ignore[reportAttributeAccessIssue]


def in_turns(bodies: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the bodies return, which do not depend on each other: the first store of each is written (`put`,
    `put1`, `let`), then the second of each, and so on. A processor starts what is ready of the next 100
    instructions or so; of one long chain after another it would find few. Eight chains keep two units busy
    whose results take four cycles.

    A body has no loops or conditions, and integers that it binds (`let`) depend on nothing that it stores.
    What else it writes (calls of tiles, prefetches) stands before all stores.
    """
    global _kept
    assert _kept is None, "in_turns in a body of in_turns"
    results: list[Any] = []
    chains: list[list[_Store]] = []
    for body in bodies:
        chains.append([])
        _kept = _frames(), chains[-1]
        try:
            results.append(body())
        finally:
            _kept = None
    for turn in zip_longest(*chains):
        for store in turn:
            if store is not None:
                T.buffer_store(*store)
    return results


def let(value: Expr) -> Expr:
    """Compute once, use often: an expression in TIR is computed anew wherever it stands.

    A vector or a float is stored in a buffer, which becomes a register: TIR's own binding is substituted
    again where the value has no side effect, and a polynomial of a polynomial grows exponentially. Integers
    are bound, so that TIR still sees through indices and sizes.
    """
    kind = str(value.ty)
    if kind in ("int32", "bool", "uint8", "uint16"):
        return T.bind(value)
    dtype, _, lanes = kind.partition("x")
    count = int(lanes or 1)
    held = T.alloc_buffer((count,), dtype)
    if count == 1:
        put1(held, value, 0)
        return held[0]
    put(held, value, 0, lanes=count)
    return vec(held, 0, lanes=count)


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """A scalar expression in all lanes."""
    return T.broadcast(value, lanes)


def f32s(value: float) -> Expr:
    """A float32 constant in all lanes."""
    return T.broadcast(T.float32(value), LANES)


def i32s(value: int) -> Expr:
    """An int32 constant in all lanes."""
    return T.broadcast(T.int32(value), LANES)


def register(initial: Expr | None = None) -> Buffer:
    """A float32 vector that changes; it lives in a register.

    Read it by `vec(r, 0)`, write it by `put(r, v, 0)`.
    """
    buffer = T.alloc_buffer((LANES,), "float32")
    if initial is not None:
        put(buffer, initial, 0)
    return buffer


def register_i32(initial: Expr) -> Buffer:
    """An int32 vector that changes."""
    buffer = T.alloc_buffer((LANES,), "int32")
    put(buffer, initial, 0)
    return buffer


def scalar(initial: Expr, dtype: str = "float32") -> Buffer:
    """A scalar that changes: read `s[0]`, write by `put1(s, value, 0)`."""
    buffer = T.alloc_buffer((1,), dtype)
    put1(buffer, initial, 0)
    return buffer


def call(dtype: str, name: str, *args: Expr) -> Expr:
    """Call a function of `intrinsics`."""
    return T.call_pure_extern(dtype, name, *args)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a · b + c in 16 lanes, rounded once where the level has FMA."""
    return call("float32x16", "llmc_fma", a, b, c)


def fma1(a: Expr, b: Expr, c: Expr) -> Expr:
    """a · b + c of scalars, rounded like `fma`."""
    return call("float32", "llmc_fma1", a, b, c)


def lane_sum(v: Expr) -> Expr:
    return call("float32", "llmc_sum", v)


def lane_max(v: Expr) -> Expr:
    return call("float32", "llmc_max", v)


def lane_sums(vectors: Sequence[Expr]) -> Expr:
    """Lane i is the sum of vector i's lanes, of at most 16 vectors; bit for bit `lane_sum` of each."""
    return _reduced("sum", vectors)


def lane_maxima(vectors: Sequence[Expr]) -> Expr:
    """Lane i is the largest of vector i's lanes."""
    return _reduced("max", vectors)


def _reduced(name: str, vectors: Sequence[Expr]) -> Expr:
    count = -(-len(vectors) // 4) * 4
    filled = [*vectors, *([f32s(0)] * (count - len(vectors)))]
    return call("float32x16", f"llmc_{name}_{count}", *filled)


def load_float(buffer: Buffer, dtype: str, *index: Expr) -> Expr:
    """16 elements of a float32, float16 or bfloat16 buffer as float32."""
    if dtype == "float32":
        return vec(buffer, *index)
    bits = T.reinterpret(vec(buffer, *index), dtype="uint16x16")
    if dtype == "float16":
        return call("float32x16", "llmc_from_half", bits)
    wide = T.shift_left(T.Cast("uint32x16", bits), T.broadcast(T.uint32(16), LANES))
    return T.reinterpret(wide, dtype="float32x16")


@contextmanager
def loop(start: Expr, stop: Expr) -> Generator[Any]:
    """A loop over start … stop-1, none where stop ≤ start.

    It counts from 0: TVM's CanonicalizeLoop rewrites other loops so, and forgets the loops inside whose
    bounds depend on the outer variable.
    """
    with T.serial(0, stop - start) as i:
        yield start + i


def for_each(body: Callable[[Any], None], stop: Expr, *, parallel: bool = False) -> None:
    """A loop over 0 … stop-1; one turn known beforehand is no loop."""
    if isinstance(stop, int) and stop <= 1:
        for i in range(stop):
            body(T.int32(i))
        return
    with T.parallel(0, stop) if parallel else T.serial(0, stop) as i:
        body(i)


def row_tiles(rows: Expr, sizes: Sequence[int], tile: Callable[[Expr, int], None]) -> None:
    """Cover 0 … rows-1 by tiles: as many as fit of sizes[0], of the rest as many as fit of sizes[1], …; the
    last is 1.

    `tile(first, size)` writes the statements for `size` rows.
    """
    first: Expr = T.int32(0)
    rest = rows
    for size in sizes:
        count = let(T.floordiv(rest, T.int32(size))) if size > 1 else rest
        with T.serial(0, count) as i:
            tile(first + i * size, size)
        if size > 1:
            first = let(first + count * size)
            rest = let(rest - count * size)


def for_each_row(rows: Expr, cost: int, body: Callable[[Any], None]) -> None:
    """Rows in parallel, or in the calling thread where waking the others costs more than they would do.

    `cost`: elements touched a row.
    """
    with T.If(rows < T.int32(-(-SERIAL_ELEMENTS // max(1, cost)))):
        with T.Then(), T.serial(0, rows) as i:
            body(i)
        with T.Else(), T.parallel(0, rows) as i:
            body(i)


def for_each_row_beside(rows: Expr, cost: int, elements: int, body: Callable[[Any, Buffer], None]) -> None:
    """`for_each_row` with memory of float32 [elements] beside a row, which some rows in turn share, where
    they are short.
    """
    together = max(1, min(ROWS_BESIDE, SERIAL_ELEMENTS // max(1, cost)))
    with T.If(rows < T.int32(-(-SERIAL_ELEMENTS // max(1, cost)))):
        with T.Then():
            held = T.alloc_buffer((elements,), "float32")
            with T.serial(0, rows) as i:
                body(i, held)
        with T.Else(), T.parallel(0, T.floordiv(rows + (together - 1), T.int32(together))) as c:
            held = T.alloc_buffer((elements,), "float32")
            first = let(c * together)
            with T.serial(0, T.min(rows - first, T.int32(together))) as i:
                body(first + i, held)


def for_each_vector(width: int, body: Callable[[Any], None]) -> None:
    """`body(start)` for vectors that cover 0 … width-1 of elementwise work whose result is not its operand.

    The last vector starts at width - 16 and computes some elements again. width must be at least 16.
    """
    with T.serial(0, width // LANES) as i:
        body(i * LANES)
    if width % LANES:
        body(T.int32(width - LANES))


def padded(width: int, read: Callable[[Any], Any]) -> Expr:
    """A vector of `width` < 16 elements read one by one, and zeros."""
    held = register(f32s(0))
    with T.serial(0, width) as i:
        put1(held, read(i), i)
    return let(vec(held, 0))


def prefetch(buffer: Buffer, *index: Expr) -> None:
    """Fetch the cache line of an element that will be read, while something else is computed."""
    T.evaluate(T.call_extern("int32", "llmc_prefetch", T.address_of(buffer[index])))


def prefetch_second(buffer: Buffer, *index: Expr) -> None:
    """The same to the second cache, for more than the nearest one waits for at a time."""
    T.evaluate(T.call_extern("int32", "llmc_prefetch_second", T.address_of(buffer[index])))


def prefetch_to_write(buffer: Buffer, *index: Expr) -> None:
    """Fetch the cache line of an element that will be written, while something else is computed."""
    T.evaluate(T.call_extern("int32", "llmc_prefetch_to_write", T.address_of(buffer[index])))


def put_part(buffer: Buffer, value: Expr, width: int, *index: Expr) -> None:
    """Store the first `width` < 16 lanes."""
    held = register(value)
    with T.serial(0, width) as i:
        put1(buffer, held[i], *index[:-1], index[-1] + i)
