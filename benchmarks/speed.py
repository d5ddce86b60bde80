"""Compile time, memory and speed of SmolLM2-135M int4, beside transformers in bfloat16 (`make bench`).

python -m benchmarks.speed [--model smollm2] [--quant int4-g32] [--repeat 5] [-o FILE]
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path
from typing import Any

from .commands import SCRATCH, llmc, machine, report
from .published_models import MODELS, fetch

NOISE = 0.03
"""Share of the processors that others may use while we measure; a region that
two threads share waits for the one that lost its core.
"""


def _seconds() -> tuple[float, float, float] | None:
    """Processor seconds so far of this program with its finished children, of all processes, and of all and
    idle together; None where the system does not tell.
    """
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, idle, wait, interrupts, soft, stolen = (int(word) for word in words)
    busy = user + nice + system + interrupts + soft + stolen
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tick = os.sysconf("SC_CLK_TCK")
    return sum(u.ru_utime + u.ru_stime for u in used), busy / tick, (busy + idle + wait) / tick


def speeds(artifact: Path, source: Path, repeat: int) -> dict[str, Any]:
    """The JSON of `llmc bench`, and `others_cpu`: the share of the processors that was not ours meanwhile.

    Says so where that is enough to make the numbers worthless.
    """
    concurrency = [word for n in (1, 8, 32) for word in ("--concurrency", str(n))]
    before = _seconds()
    found = llmc("bench", artifact, *concurrency, "--repeat", str(repeat), "--against-transformers", source)
    after = _seconds()
    if before is None or after is None:
        return found
    ours, busy, whole = (new - old for new, old in zip(after, before, strict=True))
    others = max(0.0, busy - ours) / max(whole, 1e-9)
    if others > NOISE:
        print(
            f"warning: other processes took {others:.0%} of the processors meanwhile, so these speeds are "
            "too low, prefill most of all: measure again when the machine is idle",
            file=sys.stderr,
        )
    return {**found, "others_cpu": round(others, 4)}


def measure(model: str, quant: str, repeat: int) -> dict[str, Any]:
    """Compiles a model and measures the artifact; the JSON of both commands, and the ratios to
    transformers.
    """
    source = fetch(model)
    artifact = SCRATCH / f"{model}-{quant}.llmc"
    SCRATCH.mkdir(exist_ok=True)
    compiled = llmc("compile", source, "-o", artifact, "--quant", quant)
    compiled["source_bytes"] = source.stat().st_size
    found = speeds(artifact, source, repeat)
    return {"machine": machine(), "model": source.name, "quant": quant, "compile": compiled, "bench": found}


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
