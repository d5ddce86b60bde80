"""Speed of our artifacts beside the peers: one prompt, one answer, many streams, long contexts.

python -m benchmarks.speed [--model smollm2] [--ours keep,int4-g64] [--peers llama.cpp,vllm,openvino…]
    [--repeat 5] [--curves] [-o FILE] [--merge FILE…] [--markdown FILE] [--plot FILE]

Each system runs in a process of its own, with as many threads, and stands still while another is measured;
in every round all are measured in turns on the same prompts of random ids. `make bench` is this with the
peers that our own environment has; `make bench-peers` makes the others' environments first (they are kept).

llama.cpp loads the published GGUF file, vLLM and transformers the same weights in bfloat16; transformers
computes one prompt after the other. onnxruntime-genai and OpenVINO load 4 bits that their own converters make
of those weights. Ours: a scheme of `llmc compile --quant`, "keep" being that file's codes; SCHEME:float16 is
one with that type of cache (`--kv-dtype`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, llmc, machine, report
from .environments import SPEED
from .peers_quantization.models import MODELS, Shared, shared_model
from .peers_speed import report as tables
from .peers_speed.protocol import Order
from .peers_speed.systems import Measure, System

NOISE = 0.03
"""Share of the processors that others may use while we measure."""
READ_BYTES = 256 << 20
CONVERTED = ("onnxruntime-genai", "openvino")
"""Peers that make a model of their own from the float weights."""

BARS = [
    Measure("prefill 512", "prefill", 1, 512, 1),
    Measure("decode", "decode", 1, 16, 64),
    Measure("decode at 4,096", "decode", 1, 4064, 32),
    Measure("8 × (128 + 64)", "answers", 8, 128, 64),
    Measure("32 × (128 + 64)", "answers", 32, 128, 64),
]
CURVES = [
    *(Measure(f"decode at {n:,}", "decode", 1, n, 32) for n in (128, 512, 1024, 2048, 8000)),
    *(Measure(f"{n} × (128 + 64)", "answers", n, 128, 64) for n in (1, 2, 4, 16, 64)),
]


def _others(systems: Sequence[System]) -> tuple[float, float] | None:
    """Processor seconds so far: of processes that are neither the systems nor this program, and of all and
    idle together; None where the operating system does not tell.
    """
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        groups = [Path(f"/proc/{system.pid}/stat").read_text(encoding="ascii") for system in systems]
    except OSError:
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system_, idle, wait, interrupts, soft, _ = (int(word) / tick for word in words)
    busy = user + nice + system_ + interrupts + soft
    used = resource.getrusage(resource.RUSAGE_SELF)
    known = used.ru_utime + used.ru_stime
    known += sum(int(w) / tick for text in groups for w in text.rpartition(")")[2].split()[11:15])
    return busy - known, busy + idle + wait


def read_gb_s(threads: int) -> float:
    """What the memory gives: the maximum of 256 MB by each thread at once."""
    arrays = [np.ones(READ_BYTES // 4, np.int32) for _ in range(threads)]
    workers = [threading.Thread(target=array.max) for array in arrays]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return threads * READ_BYTES / (time.perf_counter() - began) / 1e9


def _ours(model: Shared, name: str) -> tuple[System, dict[str, Any]]:
    """An artifact, compiled anew, and what compiling and starting it took."""
    scheme, _, cache = name.partition(":")
    artifact = (SCRATCH / f"{model.name}-{name.replace(':', '-')}.llmc").absolute()
    kv_dtype = ("--kv-dtype", cache) if cache else ()
    compiled = llmc("compile", model.gguf, "-o", artifact, "--quant", scheme, *kv_dtype)
    sizes = ("--prompt-tokens", "16", "--output-tokens", "4", "--concurrency", "1", "--repeat", "3")
    started = llmc("bench", artifact, *sizes)
    del compiled["artifact"]  # a path of this machine
    program, bits = SPEED.folder / "run_llmc.py", compiled["bits_per_weight"]
    system = System(f"llmc {name}", Path(sys.executable), program, artifact, bits=bits)
    kept = ("load_ms", "load_to_token_ms", "first_token_ms", "weight_bytes_per_token")
    return system, {"compile": compiled, **{fact: started[fact] for fact in kept}}


def _converted(tool: str, python: Path, model: Shared, cache: Path) -> Path:
    """The model as the peer's own converter makes it, kept in `cache`."""
    folder = cache / model.name / tool
    if not folder.is_dir():
        print(f"converting {model.name} for {tool}", file=sys.stderr, flush=True)
        partial = folder.with_name(f"{tool}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        command = [python, SPEED.program(tool), "--prepare", model.folder, partial]
        subprocess.run([str(part) for part in command], check=True)
        partial.rename(folder)
    return folder


def _peer(tool: str, model: Shared, options: argparse.Namespace) -> System:
    if tool == "transformers":  # in our own environment
        program = SPEED.folder / "run_transformers.py"
        return System(tool, Path(sys.executable), program, model.folder, alone=True, bits=16)
    if tool not in SPEED.programs:
        sys.exit(f"error: --peers {tool}: use some of {', '.join(SPEED.programs)}, transformers")
    python = SPEED.python_of(tool, dict(map(SPEED.named, options.peer_python)), options.cache)
    if tool == "llama.cpp":
        return System(tool, python, SPEED.program(tool), model.gguf)
    if tool in CONVERTED:
        folder = _converted(tool, python, model, options.cache)
        weights = max(path.stat().st_size for path in folder.iterdir())
        bits = 32 * weights / sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
        return System(tool, python, SPEED.program(tool), folder, bits=round(bits, 2))
    return System(tool, python, SPEED.program(tool), model.folder, bits=16)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; rates by system and measure."""
    SCRATCH.mkdir(exist_ok=True)
    model = shared_model(options.model, options.cache)
    vocabulary = int(json.loads((model.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    facts: dict[str, dict[str, Any]] = {}
    systems: list[System] = []
    for name in filter(None, options.ours.split(",")):
        system, facts[f"llmc {name}"] = _ours(model, name)
        systems.append(system)
    systems += [_peer(tool, model, options) for tool in filter(None, options.peers.split(","))]
    measures = BARS + (CURVES if options.curves else [])
    largest = max(m.streams * (m.prompt + m.tokens + m.streams + 16) for m in measures)
    longest = max(m.prompt + m.tokens for m in measures) + 16
    order = {"threads": options.threads, "context": longest, "sequences": max(m.streams for m in measures)}
    try:
        for system in systems:
            system.start(Order(model=str(system.model), tokens=largest, **order), SCRATCH.absolute())
        before = _others(systems)
        limits = _rounds(systems, measures, vocabulary, options)
        after = _others(systems)
    finally:
        for system in systems:
            system.stop()
    others = 0.0
    if before is not None and after is not None:
        others = max(0.0, after[0] - before[0]) / (after[1] - before[1])
        if others > NOISE:
            print(f"warning: other processes took {others:.0%} of the processors meanwhile", file=sys.stderr)
    return {
        "machine": machine(),
        "model": model.gguf.name,
        "threads": options.threads,
        "repeat": options.repeat,
        "others_cpu": round(others, 4),
        "read_gb_s": limits,
        "measures": [asdict(m) for m in measures],
        "systems": {
            system.name: {
                "ours": system.name in facts,
                "alone": system.alone,
                "bits": system.bits,
                "versions": system.versions,
                "rates": system.rates,
                **facts.get(system.name, {}),
            }
            for system in systems
        },
    }


def _rounds(
    systems: Sequence[System], measures: Sequence[Measure], vocabulary: int, options: argparse.Namespace
) -> list[float]:
    """Measure all in turns; what the memory gave in each round. The first round touches what was never
    touched, and counts for nothing.
    """
    generator, limits = random.Random(0), []
    for number in range(options.repeat + 1):
        limits.append(round(read_gb_s(options.threads), 2))
        for m in measures if number else BARS[:2]:
            prompts = [generator.choices(range(vocabulary), k=m.prompt) for _ in range(m.streams)]
            for system in systems:
                rate = system.measure(m, prompts)
                print(f"{number}: {m.name}: {system.name}: {rate:,.1f}", file=sys.stderr, flush=True)
                if number:
                    system.rates.setdefault(m.name, []).append(round(rate, 2))
    return limits[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2", choices=list(MODELS))
    add("--ours", default="keep,int4-g64", help="SCHEME[:KV_DTYPE], with commas  [default: %(default)s]")
    peers = ", ".join([*SPEED.programs, "transformers"])
    add("--peers", default="transformers", help=f"of {peers}, with commas  [default: %(default)s]")
    add("--repeat", type=int, default=5, help="rounds  [default: %(default)s]")
    add("--curves", action="store_true", help="more contexts and streams")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of every system  [default: %(default)s]")
    add("--cache", type=Path, default=SCRATCH / "speed", help="folder  [default: %(default)s]")
    SPEED.add_option(parser)
    add("--environments", action="store_true", help="make the peers' environments, and measure nothing")
    add("-o", "--output", type=Path, help="write the record as JSON")
    add("--merge", type=Path, nargs="*", default=[], help="earlier records: report them too")
    add("--markdown", type=Path, help="write the tables there, between its marks")
    add("--plot", type=Path, help="write the curves there (.svg or .png)")
    options = parser.parse_args()
    options.cache = options.cache.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the systems are stopped then too
    if options.environments:
        for tool in SPEED.programs:
            print(SPEED.python_of(tool, {}, options.cache))
        return
    record = measure(options)
    report(record, options.output)
    records = [record, *(json.loads(path.read_text(encoding="utf-8")) for path in options.merge)]
    if options.markdown is not None:
        tables.write(tables.text(records), options.markdown)
    if options.plot is not None:
        tables.plot(records, options.plot)


if __name__ == "__main__":
    main()
