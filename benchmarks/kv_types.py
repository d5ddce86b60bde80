"""What a KV cache of 8 bits costs and gives, beside float16: loss on WikiText-2, bytes, speed of decoding.

    python -m benchmarks.kv_types [--model M] [--quant none] [--types int8,float8_e4m3fn] [--windows 8]
        [--context 4096] [-o FILE]

All artifacts have the same weights. The loss is over the same windows of 1,024 tokens; decoding steps follow
`context` tokens that were computed before, and the artifacts take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, machine, report, shared_data
from .commands import llmc as command
from .published_models import MODELS, fetch
from .steps import Steps


def compiled(model: str, quant: str, types: Sequence[str], folder: Path) -> dict[str, Path]:
    """An artifact for each element type of the cache, with kernels for this machine."""
    from llmc.runtime.cpu import supported_isas

    found: dict[str, Path] = {}
    for kind in ("float16", *types):
        found[kind] = folder / f"{model}-{quant}-kv-{kind}.llmc"
        target = f"tvm-cpu:isa={supported_isas()[-1]}"
        options = ("--target", target, "--quant", quant, "--kv-dtype", kind)
        command("compile", fetch(model), "-o", found[kind], *options)
    return found


def loss(paths: dict[str, Path], text: Path, windows: int) -> dict[str, dict[str, Any]]:
    """For each type its perplexity, and how far it is from float16."""
    words = ("--ppl", text, "--windows", str(windows))
    base = command("eval", paths["float16"], *words)
    found: dict[str, dict[str, Any]] = {"float16": {"ppl": base["ppl"], "predictions": base["tokens"]}}
    for kind, path in paths.items():
        if kind == "float16":
            continue
        compared = command("eval", path, "--against", paths["float16"], *words)
        found[kind] = {
            "predictions": compared["tokens"],
            "ppl": compared["ppl"],
            "difference_percent": 100 * (compared["ppl"] / base["ppl"] - 1),
            "kl": compared["kl"],
            "top1_agreement": compared["top1_agreement"],
        }
    return found


def decoding(paths: dict[str, Path], context: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a decoding step after `context` tokens, and after one page; and how many times faster
    than with float16 each type is there, the whole step and what the context adds to it.
    """
    from llmc.codegen.artifact import Artifact

    result: dict[str, Any] = {"context": context, "steps": steps}
    for name, length in (("short", 16), ("long", context)):
        rng = np.random.default_rng(0)
        vocabulary = Artifact.open(paths["float16"]).model["vocab_size"]
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
    more = {kind: result["long"][kind] - result["short"][kind] for kind in paths}
    result["speedup"] = {kind: result["long"]["float16"] / result["long"][kind] for kind in paths}
    result["speedup_of_context"] = {kind: more["float16"] / more[kind] for kind in paths}
    return result


def measure(model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    SCRATCH.mkdir(exist_ok=True)
    paths = compiled(model, given.quant, given.types.split(","), SCRATCH)
    record: dict[str, Any] = {"model": fetch(model).name, "quant": given.quant}
    record["bytes_per_token"] = {k: command("inspect", p)["kv_bytes_per_token"] for k, p in paths.items()}
    if given.windows:
        record["loss"] = loss(paths, shared_data() / "wikitext2_raw" / "wiki.test.raw", given.windows)
    if given.context:
        record["decoding_ms"] = decoding(paths, given.context, given.steps)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in MODELS if name != "minilm"]
    parser.add_argument("--model", action="append", choices=names, help="repeatable; smollm2 by default")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--types", default="int8,float8_e4m3fn", help="with commas  [default: %(default)s]")
    parser.add_argument("--windows", type=int, default=8, help="0: no loss")
    parser.add_argument("--context", type=int, default=4096, help="0: no speed")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.model or ("smollm2",):
        rows.append(measure(model, arguments))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report({"machine": machine(), "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
