"""What `--prefix-cache` gives after a restart: time to the first token of a prompt that was answered before.

    python -m benchmarks.prefix_disk [--model M | --artifact A] [--tokens 2000] [--rounds 3] [-o FILE]

In turns, each time with an engine of its own: without the folder, with an empty one, and with what that left.
The answers have to be the same tokens. Time is the clock's and the CPU's (of all threads), which says more on
a machine that does other things meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from .commands import SCRATCH, labels, report
from .commands import llmc as command
from .published_models import MODELS, fetch

ANSWER = 8


def compiled(model: str) -> Path:
    """An artifact with kernels for this machine."""
    from llmc.runtime.cpu import supported_isas

    out = SCRATCH / f"{model}-prefix.llmc"
    target = f"tvm-cpu:isa={supported_isas()[-1]}"
    command("compile", fetch(model), "-o", out, "--target", target, "--quant", "keep")
    return out


def first_token(artifact: Path, folder: Path | None, count: int) -> dict[str, Any]:
    """Times of one prompt in a new engine, and the answer."""
    import llmc
    from llmc.runtime.sampling_params import SamplingParams

    with llmc.load(artifact, prefix_cache_dir=folder, kv_tokens=count + 256, context=count + 64) as llm:
        prompt = [7 + (i * 7919) % (llm.engine.engine.facts.vocab_size - 7) for i in range(count)]
        llm.generate([5] * 40, SamplingParams(max_tokens=1, temperature=0.0))  # threads, pages of the weights
        clock, work = time.perf_counter(), time.process_time()
        llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0.0))
        found = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - work}
        answer = llm.generate(prompt, SamplingParams(max_tokens=ANSWER, temperature=0.0)).token_ids
        return {**found, "answer": list(answer), "read": llm.engine.engine.counters.tokens_from_disk}


def measure(artifact: Path, count: int, rounds: int) -> dict[str, Any]:
    """Medians of each way."""
    found: dict[str, list[dict[str, Any]]] = {"without": [], "computed": [], "restarted": []}
    size = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            for name in found:
                where = None if name == "without" else Path(folder)
                found[name].append(first_token(artifact, where, count))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.page"))
    answers = {tuple(one["answer"]) for runs in found.values() for one in runs}
    if len(answers) != 1 or not all(one["read"] for one in found["restarted"]):
        raise SystemExit("the answers differ, or nothing was read")
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in ("seconds", "cpu_seconds")}
        for name, runs in found.items()
    }
    return {"tokens": count, "rounds": rounds, "disk_bytes": size, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--artifact", type=Path, help="measure this one, and compile none")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    artifact = given.artifact or compiled(given.model)
    found = measure(artifact, given.tokens, given.rounds)
    report({**labels(artifact), **found}, given.output)


if __name__ == "__main__":
    main()
