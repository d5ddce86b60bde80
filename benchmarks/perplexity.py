"""Perplexity of unquantized artifacts on WikiText-2, beside transformers in float32.

    python -m benchmarks.perplexity [--model M] [--target T] [--windows 8] [--quant none] [-o FILE]

Both see the same tokens in the same windows; `llmc eval --help` defines them. The bar is 0.1 % for `--quant
none`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, machine, report, shared_data
from .commands import llmc as command
from .published_models import fetch

WINDOW = 1024


def windows_of(artifact: Path, text: Path, count: int) -> list[np.ndarray]:
    """The windows that `llmc eval` scores."""
    import llmc
    from llmc.cli.eval import windows_of

    with llmc.load(artifact, kv_tokens=WINDOW) as llm:
        return windows_of([llm], text, window=WINDOW, count=count)


def transformers_perplexity(source: Path, pieces: list[np.ndarray]) -> float:
    """What transformers in float32 makes of the same windows."""
    import torch
    from llmc.cli.peer import load_transformers

    model = load_transformers(str(source), "float32")
    total, predictions = 0.0, 0
    for ids in pieces:
        row = torch.from_numpy(ids.astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.double(), row[1:], reduction="sum"))
        predictions += len(ids) - 1
    return math.exp(total / predictions)


def measure(model: str, target: str, quant: str, count: int) -> dict[str, Any]:
    """Compiles, evaluates, and compares."""
    source = fetch(model)
    text = shared_data() / "wikitext2_raw" / "wiki.test.raw"
    SCRATCH.mkdir(exist_ok=True)
    artifact = SCRATCH / f"{model}-{quant}-{target}.llmc"
    command("compile", source, "-o", artifact, "--target", target, "--quant", quant)
    found = command("eval", artifact, "--ppl", text, "--windows", str(count), "--window", str(WINDOW))
    expected = transformers_perplexity(source, windows_of(artifact, text, count))
    return {
        "model": source.name,
        "target": target,
        "quant": quant,
        "predictions": found["tokens"],
        "ppl": found["ppl"],
        "ppl_transformers": expected,
        "difference_percent": 100 * (found["ppl"] / expected - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="repeatable; smollm2 and gemma3 by default")
    parser.add_argument("--target", action="append", help="repeatable; tvm-cpu and onnx-cpu by default")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.model or ("smollm2", "gemma3"):
        for target in arguments.target or ("tvm-cpu", "onnx-cpu"):
            rows.append(measure(model, target, arguments.quant, arguments.windows))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report({"machine": machine(), "window": WINDOW, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
