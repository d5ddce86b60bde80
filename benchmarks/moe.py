"""How the time of a mixture of experts grows: with the experts that a token uses, not with their number.

    python -m benchmarks.moe [--width 512] [--inner 512] [--bits 0 | 4 | 8] [--plot FILE.svg] [-o FILE]

One `moe` of random weights on tvm-cpu, one thread: decoding (1 token) and a prompt (--tokens), for k of E
experts. Choices are random and differ from call to call, so that weights come from memory as they do in a
model. All configurations take turns, and each number is a median of CPU time, which other work beside moves
less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .commands import machine, report

CONFIGURATIONS = [(8, 1), (8, 2), (8, 4), (8, 8), (16, 2), (32, 2), (64, 2), (64, 8)]
"""(experts, k)"""


def layer(width: int, inner: int, experts: int, k: int, bits: int, folder: Path) -> Any:
    """An executor of one mixture."""
    from llmc.codegen.artifact import ArtifactWriter
    from llmc.codegen.target import get_target, no_progress
    from llmc.ir.core import Graph
    from llmc.ir.ops.moe import Moe
    from llmc.ir.types import TensorType, sym
    from llmc.ir.weights import ArrayTensor
    from llmc.passes.quantize.moe import round_experts
    from llmc.runtime.cpu import best_isa
    from llmc.runtime.executor import open_executor

    rng = np.random.default_rng(experts)
    graph, tokens = Graph(), sym("T")
    x = graph.add_input("x", TensorType("float32", (tokens, width)))
    indices = graph.add_input("indices", TensorType("int64", (tokens, k)))
    weights = graph.add_input("weights", TensorType("float32", (tokens, k)))
    shapes = {"up": (experts, 2 * inner, width), "down": (experts, width, inner)}
    up, down = (
        graph.add_weight(name, ArrayTensor(rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5))
        for name, shape in shapes.items()
    )
    graph.outputs.append(graph.append(Moe(x, indices, weights, up, down, None, None)).result)
    graph.output_names.append("y")
    if bits:
        round_experts(graph, {}, bits, 64, bits == 8)
        graph.drop_dead()
    path = folder / f"{experts}-{k}.llmc"
    with ArtifactWriter(path) as writer:
        entry = get_target(f"tvm-cpu:isa={best_isa()}").compile(graph, writer, progress=no_progress)
        artifact = writer.finish({"kind": "function", "model": {}, "targets": {"tvm-cpu": entry}})
    return open_executor(artifact, threads=1)


def inputs(rng: np.random.Generator, tokens: int, width: int, experts: int, k: int) -> dict[str, Any]:
    chosen = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])
    return {
        "x": rng.standard_normal((tokens, width), np.float32),
        "indices": chosen.astype(np.int64),
        "weights": np.full((tokens, k), 1 / k, np.float32),
    }


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    built = {c: layer(args.width, args.inner, *c, args.bits, folder) for c in CONFIGURATIONS}
    times: dict[tuple[int, int, int], list[float]] = {}
    for turn in range(args.turns + 1):
        for (experts, k), executor in built.items():
            for tokens in (1, args.tokens):
                given = inputs(rng, tokens, args.width, experts, k)
                began = time.process_time()
                executor.run(given)
                if turn:  # the first call maps the weights
                    times.setdefault((experts, k, tokens), []).append(time.process_time() - began)
    return [
        {"experts": e, "k": k, "tokens": t, "ms": round(1e3 * statistics.median(found), 4)}
        for (e, k, t), found in times.items()
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over k at 8 experts, and over experts at k = 2, each relative to its first point."""
    from matplotlib import pyplot, rc_context

    with rc_context({"svg.hashsalt": "llmc", "svg.fonttype": "none"}):
        figure, panes = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True)
        for tokens in sorted({row["tokens"] for row in rows}):
            for pane, fixed, free in ((panes[0], ("experts", 8), "k"), (panes[1], ("k", 2), "experts")):
                own = sorted((r for r in rows if r["tokens"] == tokens and r[fixed[0]] == fixed[1]),
                             key=lambda r, free=free: r[free])  # fmt: skip
                first = own[0]["ms"]
                label = f"{tokens} token{'s' if tokens > 1 else ''}"
                pane.plot([r[free] for r in own], [r["ms"] / first for r in own], marker="o", label=label)
                pane.set_xlabel(f"{free} ({fixed[0]} = {fixed[1]})")
                pane.set_xscale("log", base=2)
        panes[0].set_ylabel("time, relative to the first point")
        panes[0].legend()
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--width", type=int, default=512, help="of a token")
    add("--inner", type=int, default=512, help="of an expert")
    add("--bits", type=int, default=0, choices=(0, 4, 8), help="of quantized experts; 0: float32")
    add("--tokens", type=int, default=128, help="of the prompt")
    add("--turns", type=int, default=15)
    add("--plot", type=Path, help="draw the curves there (.svg or .png; needs matplotlib)")
    add("-o", "--output", type=Path, help="write the record there")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    record = {"machine": machine(), "width": args.width, "inner": args.inner, "bits": args.bits, "rows": rows}
    for row in rows:
        sys.stdout.write(f"{row['k']} of {row['experts']}, {row['tokens']} tokens: {row['ms']} ms\n")
    if args.plot:
        plot(rows, args.plot)
    report(record, args.output)


if __name__ == "__main__":
    main()
