"""Contexts longer than a model was trained on: what rotary scaling gives, and what a long prompt takes.

    python -m benchmarks.long_context [--part ppl,texts,passkey,prefill] [--kinds "none;yarn:4"] [-o F]
                                      [--plot F]

One model (SmolLM2-135M, `--quant keep`) compiled once for each kind of `--rope-scaling`. The steps are called
with positions beyond what an artifact's manifest promises, so that "none" shows what the unscaled model does
there.

ppl      perplexity of a public-domain book by position: one pass over its first tokens, buckets of positions;
         the same tokens for every kind.
texts    perplexity of the same tokens cut into texts of some length, each a sequence of its own.
passkey  a number is told once in filler text, at five depths, and asked for at the end (Mohtashami & Jaggi
         2023, arXiv:2305.16300): the share of answers whose digits are right, by prompt length.
prefill  one prompt through the engine, 512 tokens a step, in a process of its own: the time of each step, and
         the largest RSS.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, labels, report, shared_data
from .commands import llmc as command
from .published_models import fetch
from .steps import CHUNK, Steps

KINDS = ("none", "yarn:4", "yarn:4,when=needed", "linear:4", "dynamic:4")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def compiled(kind: str, model: str, kv_dtype: str) -> Path:
    """An artifact of the model scaled in one way, with kernels for this machine."""
    from llmc.runtime.cpu import supported_isas

    SCRATCH.mkdir(exist_ok=True)
    out = SCRATCH / f"{model}-long-{kind.replace(':', '').replace(',', '-').replace('=', '')}-{kv_dtype}.llmc"
    if not out.is_dir():
        scaling = () if kind == "none" else ("--rope-scaling", kind)
        target = f"tvm-cpu:isa={supported_isas()[-1]}"
        words = ("--quant", "keep", "--kv-dtype", kv_dtype, "--target", target, *scaling)
        command("compile", fetch(model), "-o", out, *words)
    return out


def tokenizer_of(artifact: Path) -> Any:
    from llmc.runtime.tokenizer import Tokenizer

    return Tokenizer.from_file(artifact / "tokenizer.json")


# Perplexity ------------------------------------------------------------------------------------------------


def losses(steps: Steps, ids: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each token of a text but the first, nats."""
    steps.begin(len(ids))
    found = list[np.ndarray]()
    for at in range(0, len(ids) - 1, CHUNK):
        chunk = ids[at : at + CHUNK]
        wanted = ids[at + 1 : at + 1 + len(chunk)]
        logits = steps.step(chunk, all_rows=True)[: len(wanted)]
        top = logits.max(axis=1, keepdims=True)
        logits -= top
        right = logits[np.arange(len(wanted)), wanted].copy()
        np.exp(logits, out=logits)
        found.append(np.log(logits.sum(axis=1, dtype=np.float64)) - right)
    return np.concatenate(found)


def perplexities(paths: dict[str, Path], text: Path, length: int, bucket: int) -> dict[str, Any]:
    """By kind: perplexity of each bucket of positions."""
    words = text.read_text(encoding="utf-8")
    ids = np.array(tokenizer_of(next(iter(paths.values()))).encode(words)[: length + 1], np.int32)
    starts = list(range(0, len(ids) - 1, bucket))
    record: dict[str, Any] = {"text": text.name, "tokens": len(ids) - 1, "bucket": bucket, "starts": starts}
    kinds: dict[str, Any] = {}
    for kind, path in paths.items():
        nll = losses(Steps(path, len(ids)), ids)
        kinds[kind] = {
            "ppl": [math.exp(nll[at : at + bucket].mean()) for at in starts],
            **{f"ppl_{n}": math.exp(nll[:n].mean()) for n in (2048, 8192, length) if n <= len(nll)},
        }
        print(kind, json.dumps(kinds[kind]), file=sys.stderr, flush=True)
    return {**record, "kinds": kinds}


def by_text(paths: dict[str, Path], text: Path, tokens: int, lengths: Sequence[int]) -> dict[str, Any]:
    """By kind and length: perplexity of the first tokens of a book as texts of that many tokens."""
    words = text.read_text(encoding="utf-8")
    ids = np.array(tokenizer_of(next(iter(paths.values()))).encode(words)[:tokens], np.int32)
    kinds: dict[str, Any] = {}
    for kind, path in paths.items():
        kinds[kind] = {}
        for length in lengths:
            steps = Steps(path, length)
            nll = [losses(steps, ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
            kinds[kind][str(length)] = math.exp(np.concatenate(nll).mean())
            print(kind, length, kinds[kind][str(length)], file=sys.stderr, flush=True)
    return {"text": text.name, "tokens": len(ids), "lengths": list(lengths), "kinds": kinds}


# Passkey ---------------------------------------------------------------------------------------------------


def passkey_prompt(tokenizer: Any, length: int, depth: float, key: int) -> np.ndarray:
    """About `length` tokens, the key told at a share `depth` of them."""
    head = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    told = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    ask = "\nWhat is the pass key? The pass key is"
    one = len(tokenizer.encode(FILLER))
    room = length - len(tokenizer.encode(head + told + ask))
    before = int(room * depth) // one
    after = room // one - before
    return np.array(tokenizer.encode(head + FILLER * before + told + FILLER * after + ask), np.int32)


def passkey(paths: dict[str, Path], lengths: Sequence[int]) -> dict[str, Any]:
    """By kind and length: the share of depths at which the answer begins with the key."""
    tokenizer = tokenizer_of(next(iter(paths.values())))
    rng = np.random.default_rng(7)
    keys = {length: [int(rng.integers(10000, 99999)) for _ in DEPTHS] for length in lengths}
    kinds: dict[str, Any] = {}
    for kind, path in paths.items():
        steps = Steps(path, max(lengths) + 64)
        kinds[kind] = {}
        for length in lengths:
            right = 0
            for depth, key in zip(DEPTHS, keys[length], strict=True):
                answer = _answer(steps, passkey_prompt(tokenizer, length, depth, key))
                right += tokenizer.decode(answer).strip().startswith(str(key))
            kinds[kind][str(length)] = right / len(DEPTHS)
            print(kind, length, right, file=sys.stderr, flush=True)
    return {"depths": list(DEPTHS), "lengths": list(lengths), "kinds": kinds}


def _answer(steps: Steps, prompt: np.ndarray, tokens: int = 8) -> list[int]:
    logits, answer = steps.prompt(prompt, tokens), list[int]()
    for _ in range(tokens):
        answer.append(int(logits.argmax()))
        logits = steps.step(np.array(answer[-1:], np.int32), all_rows=False)[0]
    return answer


# A long prompt ---------------------------------------------------------------------------------------------


def prefill(artifact: Path, length: int) -> dict[str, Any]:
    """One prompt of `length` tokens in a process of its own."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.long_context",
        "--child",
        str(artifact),
        "--length",
        str(length),
    ]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    found = json.loads(done.stdout)
    return {**found, **fit(found["seconds"])}


def child(artifact: Path, length: int) -> dict[str, Any]:
    """What `prefill` runs: the engine's steps until the first new token, CPU seconds of each; RSS."""
    import llmc
    from llmc.cli.resources import peak_rss_bytes
    from llmc.runtime.sampling_params import SamplingParams

    with llmc.load(artifact, kv_tokens=length + 16, max_sequences=1, max_batch_tokens=CHUNK) as llm:
        before = peak_rss_bytes()
        with llm.engine.paused() as engine:
            text = (shared_data() / "longtext" / "alice_in_wonderland.txt").read_text(encoding="utf-8")
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode(text)[:length]
            engine.add_request(ids, SamplingParams(max_tokens=1))
            seconds: list[float] = []
            wall = time.perf_counter()
            while engine.has_work:
                began = time.process_time()
                engine.step()
                seconds.append(time.process_time() - began)
            wall = time.perf_counter() - wall
        kv = llm.kv_cache.bytes
        context = llm.context_length
    peak = peak_rss_bytes()
    record = {"artifact": artifact.name, "tokens": len(ids), "context": context, "kv_bytes": kv}
    return {**record, "rss_before": before, "rss_peak": peak, "wall_seconds": wall, "seconds": seconds}


def fit(seconds: Sequence[float]) -> dict[str, float]:
    """The whole steps' times as a + b · tokens before: linear in the position, so the sum is linear plus
    quadratic; `r2` is the share of their variance that this explains.
    """
    times = np.array(seconds[:-1])
    at = CHUNK * np.arange(len(times))
    slope, base = np.polyfit(at, times, 1)
    rest = times - (base + slope * at)
    return {
        "linear_us_per_token": 1e6 * base / CHUNK,
        "quadratic_ns_per_pair": 1e9 * slope / CHUNK,
        "r2": float(1 - rest.var() / times.var()),
    }


# The picture -----------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], path: Path) -> None:
    """A panel for each part that was measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [(key, panel) for key, panel in _PANELS.items() if key in record]
    with rc_context({"svg.hashsalt": "llmc", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.2 * len(panels), 3.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (key, panel) in zip(axes, panels, strict=True):
            panel(place, record[key])
            place.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_ppl(axes: Any, found: dict[str, Any]) -> None:
    middles = [(at + found["bucket"] / 2) / 1024 for at in found["starts"]]
    for kind, row in found["kinds"].items():
        axes.plot(middles, row["ppl"], label=kind, marker=".", ms=4)
    axes.set(xlabel="position, 1,024 tokens", ylabel="perplexity", title=found["text"], yscale="log")
    axes.legend(fontsize=8)


def _draw_passkey(axes: Any, found: dict[str, Any]) -> None:
    for kind, row in found["kinds"].items():
        axes.plot(
            [n / 1024 for n in found["lengths"]], [row[str(n)] for n in found["lengths"]], "o-", label=kind
        )
    axes.set(xlabel="prompt, 1,024 tokens", ylabel="share of keys found", title="passkey", ylim=(-0.05, 1.05))
    axes.legend(fontsize=8)


def _draw_prefill(axes: Any, found: dict[str, Any]) -> None:
    for row in found["rows"]:
        whole = row["seconds"][:-1]
        at = [CHUNK * (i + 1) / 1024 for i in range(len(whole))]
        label = f"{row['artifact'].removesuffix('.llmc')}, RSS {row['rss_peak'] / 1e9:.2f} GB"
        axes.plot(at, [512 / s for s in whole], label=label, lw=1)
    axes.set(xlabel="position, 1,024 tokens", ylabel="tokens a CPU second", title="prefill")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


_PANELS = {"ppl": _draw_ppl, "passkey": _draw_passkey, "prefill": _draw_prefill}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for, each with what it was measured on: a record may hold those of several runs."""
    parts = arguments.part.split(",")
    record: dict[str, Any] = {}
    kinds = arguments.kinds.split(";") if {"ppl", "texts", "passkey"} & set(parts) else []
    paths = {kind: compiled(kind, arguments.model, "bfloat16") for kind in kinds}
    text = shared_data() / "longtext" / "alice_in_wonderland.txt"
    if "texts" in parts:
        found = by_text(paths, text, arguments.length, [int(n) for n in arguments.text_lengths.split(",")])
        record["texts"] = {**labels(*paths.values()), **found}
    if "ppl" in parts:
        found = perplexities(paths, text, arguments.length, arguments.bucket)
        record["ppl"] = {**labels(*paths.values()), **found}
    if "passkey" in parts:
        found = passkey(paths, [int(n) for n in arguments.lengths.split(",")])
        record["passkey"] = {**labels(*paths.values()), **found}
    if "prefill" in parts:
        artifacts = [compiled("yarn:4", arguments.model, kv) for kv in arguments.kv_dtypes.split(",")]
        rows = [prefill(path, arguments.prompt) for path in artifacts]
        record["prefill"] = {**labels(*artifacts), "rows": rows}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--part", default="ppl,texts,passkey,prefill", help="'' draws what -o has")
    parser.add_argument("--kinds", default=";".join(KINDS), help="separated by ';'")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the text")
    parser.add_argument("--text-lengths", default="2048,8192,16384", help="of the texts that it is cut into")
    parser.add_argument("--bucket", type=int, default=1024)
    parser.add_argument(
        "--lengths", default="1024,2048,4096,6144,8192,12288,16384", help="of passkey prompts"
    )
    parser.add_argument("--prompt", type=int, default=32767, help="tokens of the long prompt")
    parser.add_argument("--kv-dtypes", default="bfloat16,int8")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o", "--output", type=Path, help="write the record as JSON; what it has already stays"
    )
    parser.add_argument("--plot", type=Path, help="draw the record")
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.child, arguments.length)))
        return
    output: Path | None = arguments.output
    before = json.loads(output.read_text()) if output is not None and output.is_file() else {}
    record = {**before, **measure(arguments)} if arguments.part else before
    if arguments.part:
        report(record, output)
    if arguments.plot is not None:
        draw(record, arguments.plot)


if __name__ == "__main__":
    main()
