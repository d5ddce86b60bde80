"""Registers and stack of a model's CUDA kernels on each architecture, of those for adapters too, read from
the machine code: no GPU is needed.

    python -m benchmarks.cuda [--model FILE] [--quant SCHEME] [-o results/cuda_smollm2.json]

With a GPU, `llmc bench ARTIFACT --target tvm-cuda` measures them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import llmc
from llmc.codegen.tvm.gpu.nvrtc import compiler_name, resources

from .published_models import fetch

HOT = re.compile(r"(linear|moe_product)\d*_by|paged_attention\d*_|lora\d*_(down|up)")
"""Products, attention and adapters: where the time of a step goes."""


def measured(model: Path, quant: str) -> dict[str, Any]:
    """{"compiler", "seconds", "architectures": {architecture: {kernel: what it takes}}}."""
    with tempfile.TemporaryDirectory(prefix="llmc-cuda-") as folder:
        begun = time.perf_counter()
        root, targets = Path(folder, "model.llmc"), ["tvm-cuda:arch=all"]
        artifact = llmc.compile(model, root, quant=quant, targets=targets, adapters=True, verdict=False)
        seconds = time.perf_counter() - begun
        found: dict[str, dict[str, dict[str, int]]] = {}
        for image in artifact.target("tvm-cuda")["images"]:
            if image["arch"] != "ptx":
                taken = resources(artifact.path(image["path"]).read_bytes())
                found[image["arch"]] = {
                    name: {"registers": r.registers, "stack": r.stack} for name, r in taken.items()
                }
    return {"compiler": Path(str(compiler_name())).name, "seconds": round(seconds, 1), "architectures": found}


def table(found: dict[str, Any]) -> str:
    """A line a kernel: registers on each architecture, and the bytes of stack where there are some."""
    architectures = found["architectures"]
    names = sorted(next(iter(architectures.values())))
    lines = [f"{'kernel':40} " + " ".join(f"{arch:>10}" for arch in architectures)]
    for name in names:
        cells = [architectures[arch][name] for arch in architectures]
        texts = [f"{c['registers']}" + (f"+{c['stack']}B" if c["stack"] else "") for c in cells]
        lines.append(f"{name:40} " + " ".join(f"{text:>10}" for text in texts))
    spilt = [
        f"{arch} {name}"
        for arch, kernels in architectures.items()
        for name, taken in kernels.items()
        if taken["stack"] and HOT.search(name)
    ]
    lines.append(f"products, attention and adapters with a stack: {', '.join(spilt) or 'none'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model; by default SmolLM2-135M's file")
    parser.add_argument("--quant", default="int4-g64")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    model = arguments.model or fetch("smollm2")
    found = {"model": Path(model).name, "quant": arguments.quant, **measured(model, arguments.quant)}
    print(table(found))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
