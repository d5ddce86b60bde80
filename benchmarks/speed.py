"""Compile time, memory and speed of SmolLM2-135M int4, beside transformers in bfloat16 (`make bench`).

python -m benchmarks.speed [--model smollm2] [--quant int4-g32] [--repeat 5] [-o FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .commands import SCRATCH, llmc, machine, report
from .published_models import MODELS, fetch


def measure(model: str, quant: str, repeat: int) -> dict[str, Any]:
    """Compiles a model and measures the artifact; the JSON of both commands, and the ratios to
    transformers.
    """
    source = fetch(model)
    artifact = SCRATCH / f"{model}-{quant}.llmc"
    SCRATCH.mkdir(exist_ok=True)
    compiled = llmc("compile", source, "-o", artifact, "--quant", quant)
    compiled["source_bytes"] = source.stat().st_size
    concurrency = [word for n in (1, 8, 32) for word in ("--concurrency", str(n))]
    speeds = llmc("bench", artifact, *concurrency, "--repeat", str(repeat), "--against-transformers", source)
    return {"machine": machine(), "model": source.name, "quant": quant, "compile": compiled, "bench": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=[name for name in MODELS if name != "minilm"])
    parser.add_argument("--quant", default="int4-g32")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    report(measure(arguments.model, arguments.quant, arguments.repeat), arguments.output)


if __name__ == "__main__":
    main()
