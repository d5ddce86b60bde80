"""What a KV cache of int8 costs and gives, beside float16: loss on WikiText-2, bytes, speed of decoding.

    python -m benchmarks.kv_int8 [--model M] [--quant none] [--windows 8] [--context 4096] [-o FILE]

Both artifacts have the same weights. The loss is over the same windows of 1,024 tokens; decoding steps follow
`context` tokens that were computed before, and the two artifacts take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, machine, report, shared_data
from .commands import llmc as command
from .published_models import MODELS, fetch
from .steps import Steps


def compiled(model: str, quant: str, folder: Path) -> dict[str, Path]:
    """An artifact for each element type of the cache, with kernels for this machine."""
    from llmc.runtime.cpu import supported_isas

    found: dict[str, Path] = {}
    for kind in ("float16", "int8"):
        found[kind] = folder / f"{model}-{quant}-kv-{kind}.llmc"
        target = f"tvm-cpu:isa={supported_isas()[-1]}"
        options = ("--target", target, "--quant", quant, "--kv-dtype", kind)
        command("compile", fetch(model), "-o", found[kind], *options)
    return found


def loss(paths: dict[str, Path], text: Path, windows: int) -> dict[str, Any]:
    """Perplexity of both, and how far int8 is from float16."""
    words = ("--ppl", text, "--windows", str(windows))
    compared = command("eval", paths["int8"], "--against", paths["float16"], *words)
    float16 = command("eval", paths["float16"], *words)["ppl"]
    return {
        "predictions": compared["tokens"],
        "ppl_float16": float16,
        "ppl_int8": compared["ppl"],
        "difference_percent": 100 * (compared["ppl"] / float16 - 1),
        "kl": compared["kl"],
        "top1_agreement": compared["top1_agreement"],
    }


def decoding(paths: dict[str, Path], context: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a decoding step after `context` tokens, and after one page."""
    from llmc.codegen.artifact import Artifact

    result: dict[str, Any] = {"context": context, "steps": steps}
    for name, length in (("short", 16), ("long", context)):
        rng = np.random.default_rng(0)
        vocabulary = Artifact.open(paths["int8"]).model["vocab_size"]
        ids = rng.integers(0, vocabulary, length + steps).astype(np.int32)
        sequences = {kind: Steps(path, length + steps) for kind, path in paths.items()}
        for sequence in sequences.values():
            sequence.prompt(ids[:length])
        times: dict[str, list[float]] = {kind: [] for kind in paths}
        for at in range(length, length + steps):
            for kind, sequence in sequences.items():
                began = time.perf_counter()
                sequence.step(ids[at : at + 1], all_rows=False)
                times[kind].append(1000 * (time.perf_counter() - began))
        result[name] = {kind: statistics.median(values) for kind, values in times.items()}
    result["float16_over_int8"] = result["long"]["float16"] / result["long"]["int8"]
    more = {kind: result["long"][kind] - result["short"][kind] for kind in paths}
    result["float16_over_int8_attention"] = more["float16"] / more["int8"]
    return result


def measure(model: str, quant: str, windows: int, context: int, steps: int) -> dict[str, Any]:
    """Everything about one model."""
    SCRATCH.mkdir(exist_ok=True)
    paths = compiled(model, quant, SCRATCH)
    record: dict[str, Any] = {"model": fetch(model).name, "quant": quant}
    record["bytes_per_token"] = {k: command("inspect", p)["kv_bytes_per_token"] for k, p in paths.items()}
    if windows:
        record["loss"] = loss(paths, shared_data() / "wikitext2_raw" / "wiki.test.raw", windows)
    if context:
        record["decoding_ms"] = decoding(paths, context, steps)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in MODELS if name != "minilm"]
    parser.add_argument("--model", action="append", choices=names, help="repeatable; smollm2 by default")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--windows", type=int, default=8, help="0: no loss")
    parser.add_argument("--context", type=int, default=4096, help="0: no speed")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.model or ("smollm2",):
        rows.append(measure(model, arguments.quant, arguments.windows, arguments.context, arguments.steps))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report({"machine": machine(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
