"""What adapters cost: throughput of 8 and 32 answers at once with none, one and eight LoRA adapters.

    python -m benchmarks.adapters [--model smollm2 | ARTIFACT] [--quant keep] [--rank 16] [--streams 8,32]
        [--repeat 5] [-o FILE]

The adapters are drawn at random, over every linear layer of the blocks. Measured in turns in one process, on
the same prompts: the artifact as it is; its kernels with places and no adapter asked for; all answers with
one adapter; each with one of eight, in turn. A round's numbers are compared with each other, medians of the
rounds' ratios are reported: whatever else runs on the machine meets them all. CPU time is of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import llmc
import numpy as np
from llmc.cli.measure import Prompts
from llmc.runtime.adapter_places import AdapterPlaces
from llmc.runtime.adapters import TakesAdapters
from llmc.runtime.llm import LLM
from safetensors.numpy import save_file

from .commands import labels, report
from .published_models import fetch

MANY = 8


def write_random(folder: Path, places: AdapterPlaces, rank: int, seed: int) -> None:
    """A PEFT folder that changes every linear layer but the head."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for place in places.places:
        for module, rows in place.parts:
            if not module.endswith("lm_head"):
                label = f"base_model.model.{module}"
                a, b = rng.standard_normal((rank, place.k)), rng.standard_normal((rows, rank))
                tensors[f"{label}.lora_A.weight"] = (0.02 * a).astype(np.float32)
                tensors[f"{label}.lora_B.weight"] = (0.02 * b).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def timed(
    llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, adapters: Sequence[str | None]
) -> tuple[float, float]:
    """Seconds and CPU seconds until every prompt has its tokens; its adapter is adapters[i % len]."""
    with llm.engine.paused() as engine:
        for i, prompt in enumerate(prompts):
            chosen = adapters[i % len(adapters)]
            params = llm.sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True, adapter=chosen)
            engine.add_request(prompt, params)
        began, cpu = time.perf_counter(), time.process_time()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - began, time.process_time() - cpu


def measure(
    artifact: Path, *, rank: int, streams: Sequence[int], repeat: int, **sizes: int
) -> dict[str, Any]:
    """Rows of the record: a number of streams, and for each way of asking tokens a second, and ratios to the
    artifact as it is.
    """
    room = {"kv_tokens": max(streams) * (sum(sizes.values()) + 32), "max_sequences": max(64, *streams)}
    rows: list[dict[str, Any]] = []
    with llmc.load(artifact, **room) as plain, llmc.load(artifact, adapters={}, **room) as placed:
        executor = placed.executor
        assert isinstance(executor, TakesAdapters) and executor.adapter_places is not None
        with tempfile.TemporaryDirectory() as folder:
            for i in range(MANY):
                write_random(Path(folder, str(i)), executor.adapter_places, rank, i)
                placed.load_adapter(f"a{i}", Path(folder, str(i)))
        many = [f"a{i}" for i in range(MANY)]
        ways: dict[str, tuple[LLM, list[str | None]]] = {
            "plain": (plain, [None]),
            "places, none used": (placed, [None]),
            "1 adapter": (placed, ["a0"]),
            f"{MANY} adapters": (placed, [*many]),
        }
        prompts = Prompts(plain.engine.engine.facts.vocab_size)
        for count in streams:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for number in range(repeat + 1):  # the first round touches memory
                given = [prompts.take(sizes["prompt"]) for _ in range(count)]
                for way, (llm, names) in ways.items():
                    one = timed(llm, given, sizes["tokens"], names)
                    if number:
                        found[way].append(one)
            rows.append({"streams": count, **_summary(found, count * sizes["tokens"])})
    return {"rank": rank, "repeat": repeat, **sizes, "rows": rows}


def _summary(found: dict[str, list[tuple[float, float]]], tokens: int) -> dict[str, Any]:
    base = found["plain"]
    return {
        way: {
            "tok_s": round(tokens / median(seconds for seconds, _ in times), 1),
            "of_plain": round(median(b[0] / t[0] for b, t in zip(base, times, strict=True)), 3),
            "of_plain_cpu": round(median(b[1] / t[1] for b, t in zip(base, times, strict=True)), 3),
        }
        for way, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a published model's name, or an artifact")
    parser.add_argument("--quant", default="keep")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", default="8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(asked.model)
        if not artifact.is_dir():
            artifact = Path(folder, f"{asked.model}.llmc")
            llmc.compile(fetch(asked.model), artifact, quant=asked.quant, verdict=False)
        streams = [int(count) for count in asked.streams.split(",")]
        sizes = {"prompt": asked.prompt, "tokens": asked.tokens}
        found = measure(artifact, rank=asked.rank, streams=streams, repeat=asked.repeat, **sizes)
        record = {**labels(artifact), **found, "load_average": round(os.getloadavg()[0], 1)}
    report(record, asked.output)


if __name__ == "__main__":
    main()
