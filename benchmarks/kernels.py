"""Speed of single kernels on one thread, beside what the machine gives in the same minute.

python -m benchmarks.kernels [--only attention] [--repeat 12] [-o FILE] [--plot FILE]

A kernel is called on one set of arrays after the other, more in all than caches hold, as in a step, where
each layer has weights and pages of its own. All kernels are measured in turns; best and median of the turns.
`gb_s`: weights, or pages of the cache. `gop_s`: additions and multiplications. The limits are a loop that
only reads, and loops that only multiply what is in registers: bytes as the level adds their products (to
int16 where it has no instruction for int32), and floats. `--plot` draws them as a roof over the kernels, by
operations a byte.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .commands import machine, report

os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM is imported

SET_BYTES = 128 << 20
"""Of all sets of a kernel's arrays together."""

READING, MULTIPLYING = "limit: reading", "limit: multiplying "

Array = np.ndarray[Any, Any]


@dataclass
class Measured:
    """A compiled kernel with its sets of arrays."""

    name: str
    function: Any
    sets: Sequence[Sequence[Any]]
    read: int
    """Bytes of weights or pages a call."""
    ops: int
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> None:
        began = time.perf_counter()
        for arrays in self.sets:
            self.function(*arrays)
        self.seconds.append((time.perf_counter() - began) / len(self.sets))

    def row(self) -> dict[str, Any]:
        best, middle = min(self.seconds), median(self.seconds)
        return {
            "kernel": self.name,
            "us": round(1e6 * middle, 1),
            "best_us": round(1e6 * best, 1),
            "gb_s": round(self.read / middle / 1e9, 2),
            "gop_s": round(self.ops / middle / 1e9, 1),
        }


def _compiled(function: Any, isa: str) -> Any:
    from llmc.codegen.tvm.build import compile_kernel
    from llmc.codegen.tvm.kernels.isa import get_isa

    return compile_kernel(function, get_isa(isa))["f"]


def _tensor(array: Array) -> Any:
    import tvm
    from llmc.codegen.tvm.kernels import stored_dtype

    return tvm.runtime.tensor(np.ascontiguousarray(array).view(stored_dtype(array.dtype.name)))


def read_limit(isa: str) -> Measured:
    """A loop that reads memory, 256 bytes a turn."""
    from llmc.codegen.tvm.kernels.builder import Kernel, i32s, put, register_i32, vec
    from tvm.script.ir_builder import tirx as T

    turns, width = SET_BYTES // 256, 4
    kernel = Kernel("read", isa)
    with kernel:
        x = kernel.argument("x", (turns, width, 16), "int32")
        out = kernel.argument("out", (width, 16), "int32")
        with kernel.body():
            sums = [register_i32(i32s(0)) for _ in range(width)]
            with T.serial(0, turns) as i:
                for j, cell in enumerate(sums):
                    put(cell, vec(cell, 0) + vec(x, i, j, 0), 0)
            for j, cell in enumerate(sums):
                put(out, vec(cell, 0), j, 0)
    arrays = [_tensor(np.ones((turns, width, 16), np.int32)), _tensor(np.zeros((width, 16), np.int32))]
    return Measured(READING, _compiled(kernel.function, isa), [arrays], SET_BYTES, 0)


def multiply_limit(isa: str, dtype: str) -> Measured:
    """A loop over registers: products of bytes, or multiply-adds of floats."""
    from llmc.codegen.tvm.kernels.builder import (
        Kernel,
        call,
        f32s,
        fma,
        i32s,
        put,
        register,
        register_i32,
        vec,
    )
    from llmc.codegen.tvm.kernels.isa import get_isa
    from tvm.script.ir_builder import tirx as T

    turns = 1 << 18
    cells = 16 if get_isa(isa).live_vectors >= 32 else 4
    kernel = Kernel("multiply", isa)
    floats = dtype == "float32"
    dot = "llmc_narrow4" if get_isa(isa).dot == "maddubs" else "llmc_dot4"
    with kernel:
        w = kernel.argument("w", (cells, 16 if floats else 64), "float32" if floats else "uint8")
        out = kernel.argument("out", (cells, 16), dtype)
        with kernel.body():
            sums = [register(f32s(0)) if floats else register_i32(i32s(0)) for _ in range(cells)]
            # Operands that differ: of equal products LLVM would compute one.
            with T.serial(0, turns) as i:
                for j, cell in enumerate(sums):
                    if floats:
                        put(cell, fma(vec(w, j, 0), f32s(1.0), vec(cell, 0)), 0)
                    else:
                        put(cell, call("int32x16", dot, vec(cell, 0), vec(w, j, 0, lanes=64), i), 0)
            for j, cell in enumerate(sums):
                put(out, vec(cell, 0), j, 0)
    operand = np.ones((cells, 16), np.float32) if floats else np.ones((cells, 64), np.uint8)
    arrays = [_tensor(operand), _tensor(np.zeros((cells, 16), dtype))]
    ops = turns * cells * (32 if floats else 128)
    return Measured(
        f"{MULTIPLYING}{'floats' if floats else 'bytes'}", _compiled(kernel.function, isa), [arrays], 0, ops
    )


@dataclass(frozen=True)
class Form:
    """How weights are quantized."""

    group: int
    zero: str | None = None
    apart: int = 1
    """How many of a row's largest activations are kept apart."""
    bits: int = 4

    def __str__(self) -> str:
        kind = "sym" if self.zero is None else "asym"
        return f"int{self.bits}-g{self.group} {kind}, {self.apart} apart"

    def static(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group,
            "zero_point": self.zero,
            "scale_dtype": "float16",
            "apart": self.apart,
        }

    def weights(self, n: int, k: int) -> list[Array]:
        """Codes, scales, and zero points where there are any."""
        from llmc.codegen.tvm.kernels.layout import QuantLayout

        lay = QuantLayout(n, k, self.bits, self.group, None, "float16", self.zero, 0)
        codes = np.random.default_rng(0).integers(0, 256, lay.weight_shape, dtype=np.uint8)
        found = [codes, np.full(lay.scale_shape, 0.01, lay.scale_storage)]
        if lay.zero_storage is not None:
            found.append(np.full(lay.zero_shape, 0x88, lay.zero_storage))
        return found

    def activations(self, k: int, rows: int) -> list[Any]:
        """a, sums and a_scale of `quantize_activation` for these weights."""
        from llmc.codegen.tvm.kernels.layout import QuantLayout

        lay = QuantLayout(1, k, self.bits, self.group)
        a = np.random.default_rng(1).integers(-127, 128, (rows, lay.k_padded), dtype=np.int8)
        sums = a.reshape(rows, lay.groups, -1).sum(2).astype(np.float32)
        if self.apart:
            sums = np.hstack(
                (sums, np.random.default_rng(2).integers(0, k, (rows, self.apart)).astype(np.float32))
            )
        return [_tensor(x) for x in (a, sums, np.ones(sums.shape, np.float32))]


def _product(
    name: str, function: Any, given: list[Any], weights: list[Array], out: list[Array], rows: int, ops: int
) -> Measured:
    """A product with sets of weights of its own."""
    read = sum(array.nbytes for array in weights)
    results = [_tensor(array) for array in out]
    sets = [[*given, *map(_tensor, weights), *results] for _ in range(max(1, SET_BYTES // read))]
    # Of many rows, weights are read once and used often.
    return Measured(f"{name}, {rows} rows", function, sets[:2] if rows > 64 else sets, read, ops)


def linear(isa: str, n: int, k: int, rows: int, form: Form) -> Measured:
    """`quantized_linear`."""
    from llmc.codegen.tvm.kernels.quantized import make_quantized_linear

    function = _compiled(make_quantized_linear(n=n, k=k, **form.static(), isa=isa), isa)
    given, weights = form.activations(k, rows), form.weights(n, k)
    out = [np.zeros((rows, n), np.float32)]
    return _product(f"quantized_linear {n}x{k} {form}", function, given, weights, out, rows, 2 * rows * n * k)


def gated(isa: str, width: int, k: int, rows: int, form: Form) -> Measured:
    """`quantized_gated_mlp`: both products, the gate, and its result quantized for the next product."""
    from llmc.codegen.tvm.kernels.activation import activation_layout
    from llmc.codegen.tvm.kernels.gated import make_quantized_gated_mlp
    from llmc.codegen.tvm.kernels.layout import QuantLayout

    quantize = (form.group, QuantLayout(1, width, form.bits, form.group).align)
    static = {"width": width, "k": k, **form.static(), "activation": "silu", "quantize": quantize}
    function = _compiled(make_quantized_gated_mlp(**static, isa=isa), isa)
    lay = activation_layout(width, *quantize)
    groups = [np.zeros((rows, lay.groups), np.float32) for _ in range(2)]
    out = [np.zeros((rows, lay.k_padded), np.int8), *groups]
    given, weights = form.activations(k, rows), form.weights(2 * width, k)
    name = f"quantized_gated_mlp {width}x{k} {form}"
    return _product(name, function, given, weights, out, rows, 4 * rows * width * k)


def experts(isa: str, n: int, k: int, count: int, rows: int, form: Form) -> Measured:
    """`moe_quantized_linear`: rows that are spread evenly over `count` experts."""
    from llmc.codegen.tvm.kernels.layout import ROWS, round_up
    from llmc.codegen.tvm.kernels.moe import make_moe_quantized_linear

    maker = make_moe_quantized_linear(n=n, k=k, experts=count, **form.static(), isa=isa)
    offsets = (rows * np.arange(count + 1) // count).astype(np.int32)
    used = np.flatnonzero(np.diff(offsets))
    active = np.zeros(count + 1, np.int32)
    active[0], active[1 : 1 + len(used)] = len(used), used
    given = [*form.activations(k, rows), _tensor(offsets), _tensor(active)]
    weights = form.weights(count * round_up(n, ROWS), k)
    out = [np.zeros((rows, n), np.float32)]
    name = f"moe_quantized_linear {count} of {n}x{k} {form}"
    return _product(name, _compiled(maker, isa), given, weights, out, rows, 2 * rows * n * k)


def attention(
    isa: str, heads: tuple[int, int, int], kv_dtype: str, sequences: Sequence[tuple[int, int]]
) -> Measured:
    """`paged_attention`: heads = (query heads, key/value heads, their size); sequences = [(new tokens, tokens
    of context with them)].
    """
    from llmc.codegen.tvm.kernels.attention import make_paged_attention
    from llmc.codegen.tvm.kernels.cache import PAGE_SIZE, page_width
    from llmc.ir.dtypes import to_numpy

    queries, shared, width = heads
    maker = {"heads": queries, "kv_heads": shared, "head_dim": width, "kv_dtype": kv_dtype}
    function = _compiled(make_paged_attention(**maker, scale=width**-0.5, isa=isa), isa)
    rng = np.random.default_rng(0)
    counts = [-(-context // PAGE_SIZE) for _, context in sequences]
    shape = (2, sum(counts), shared, PAGE_SIZE, page_width(kv_dtype, width))
    pages = rng.standard_normal(shape).astype(np.float32)
    order = iter(rng.permutation(sum(counts)))
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [next(order) for _ in range(count)]
    tokens = sum(new for new, _ in sequences)
    arrays = [
        rng.standard_normal((tokens, queries, width)).astype(np.float32),
        np.zeros(shape, np.int8) if kv_dtype == "int8" else pages.astype(to_numpy(kv_dtype)),
        np.cumsum([0, *(new for new, _ in sequences)]).astype(np.int32),
        np.array([context for _, context in sequences], np.int32),
        table,
        np.zeros((tokens, queries, width), np.float32),
    ]
    read = arrays[1].nbytes
    sets = [[_tensor(array) for array in arrays] for _ in range(max(1, SET_BYTES // read))]
    if tokens > 64:
        sets = sets[:2]
    pairs = sum(sum(range(context - new + 1, context + 1)) for new, context in sequences)
    name = f"paged_attention {queries}/{shared}x{width} {kv_dtype}, {len(sequences)} of {sequences[0]}"
    return Measured(name, function, sets, read, 4 * queries * width * pairs)


def cases(isa: str, only: str) -> list[Measured]:
    """The limits, then kernels of SmolLM2-135M, Qwen2.5-0.5B, a ternary model, with `only` in the name."""
    found = [read_limit(isa), multiply_limit(isa, "int32"), multiply_limit(isa, "float32")]
    asymmetric, symmetric = Form(32, "uint8"), Form(64)
    if only in "quantized_linear":
        for n, k in ((3072, 576), (576, 1536), (9728, 896)):
            found += [linear(isa, n, k, rows, asymmetric) for rows in (1, 8, 32, 512)]
        found += [linear(isa, 3072, 576, rows, symmetric) for rows in (1, 512)]
        ternary = Form(2560, None, 0, 2)  # a row is one group
        found += [linear(isa, 6912, 2560, rows, ternary) for rows in (1, 8, 512)]
    if only in "quantized_gated_mlp":
        found += [gated(isa, 1536, 576, rows, form) for form in (asymmetric, symmetric) for rows in (1, 512)]
    if only in "moe_quantized_linear":
        found += [experts(isa, 1536, 576, 8, rows, symmetric) for rows in (2, 512)]
    if only in "paged_attention":
        smollm2, qwen = (9, 3, 64), (14, 2, 64)
        kinds = ("bfloat16", "float16", "int8", "float8_e4m3fn")
        for heads, dtype in (*((smollm2, kind) for kind in kinds), (qwen, "bfloat16")):
            found += [
                attention(isa, heads, dtype, sequences)
                for sequences in ([(1, 4096)], [(1, 170)] * 32, [(512, 512)])
            ]
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Operations a second over operations a byte, below what the machine reads and multiplies."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "llmc"
    import matplotlib.pyplot as plt

    rows = record["rows"]
    bandwidth = next(row["gb_s"] for row in rows if row["kernel"] == READING)
    tops = {row["kernel"].removeprefix(MULTIPLYING): row["gop_s"] for row in rows if not row["gb_s"]}
    figure, axes = plt.subplots(figsize=(9, 5))
    reach = np.logspace(-0.5, 4, 200)
    for (name, top), style in zip(tops.items(), ("-", "--"), strict=True):
        axes.plot(reach, np.minimum(reach * bandwidth, top), style, color="grey", label=f"limit: {name}")
    kinds = {
        "products by quantized weights": ("quantized_linear", "o"),
        "gate and up together": ("quantized_gated_mlp", "^"),
        "experts": ("moe_quantized_linear", "v"),
        "attention": ("paged_attention", "s"),
    }
    for label, (kind, marker) in kinds.items():
        points = [row for row in rows if row["kernel"].startswith(kind)]
        axes.scatter(
            [row["gop_s"] / row["gb_s"] for row in points],
            [row["gop_s"] for row in points],
            marker=marker,
            label=label,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte of weights or cache")
    axes.set_ylabel("Gop/s, one thread")
    axes.set_title(f"{record['machine'].split(';')[0]}; reads {bandwidth:.1f} GB/s", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--isa", help="instruction-set level [default: the best that runs here]")
    parser.add_argument("--repeat", type=int, default=12, help="turns [default: 12]")
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    parser.add_argument("--plot", type=Path, help="draw kernels and limits there (.svg or .png)")
    arguments = parser.parse_args()
    from llmc.runtime.cpu import supported_isas

    isa = arguments.isa or supported_isas()[-1]
    measured = cases(isa, arguments.only)
    for turn in range(arguments.repeat + 1):
        for kernel in measured:
            kernel.turn()
            if turn == 0:
                kernel.seconds.clear()  # touches memory for the first time
    rows = [kernel.row() for kernel in measured]
    record = {"machine": machine(), "isa": isa, "threads": 1, "rows": rows}
    report(record, arguments.output)
    if arguments.plot is not None:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()
