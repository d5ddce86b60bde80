"""`llmc bench`: prefill, decode and batch throughput of an artifact, and how soon it answers.

With `--server` it is load on a server instead, which is `cli/load/`.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError, LlmcError
from .load.options import SERVER_OPTIONS, bench_server, check_mode, load_options
from .output import emit, facts, json_option, notes_from_logging, size, table
from .progress import Progress
from .sampling import runtime_options, split

if TYPE_CHECKING:
    from ..runtime.llm import LLM
    from .peer import Peer

# torch's threads spin for a while after their last work; what is measured next would pay for it.
_SETTLE_SECONDS = 0.3

POSITIVE = click.IntRange(min=1)


@click.command("bench", short_help="Measure speed.")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1, max=10_000_000),
    default=512,
    show_default=True,
    help="Of prefill; of a server, of each prompt.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(min=1, max=10_000_000),
    default=64,
    show_default=True,
    help="Of decode; of a server, of each answer.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1, max=1024),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    help="Requests at once (128 tokens of prompt each); repeatable, once with --server.",
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Runs to take medians of."
)
@click.option("--against-transformers", metavar="MODEL", help="Measure transformers in bfloat16 beside it.")
@click.option("--profile", "profiled", is_flag=True, help="Say where the time goes, by kernel.")
@runtime_options
@load_options
@json_option
def command(artifact: Path | None, as_json: bool, **options: Any) -> None:
    """Measure ARTIFACT: tokens a second of one long prompt (prefill), of one answer (decode), and of many
    requests at once; the time to load what was verified before, and from the start of the process to the
    first token.

    With --against-transformers, MODEL (the folder, hub id or GGUF file that ARTIFACT was made from) runs in
    transformers in bfloat16, in a process of its own with as many threads, and is measured in turns with it.

    With --profile, every kernel's share of the time of a prompt, of a token and of a token of all requests
    follows, and how fast it read its weights.

    With --server, the load is on a server of the OpenAI API (llmc, llama.cpp, vLLM) instead: requests of
    --prompt-tokens and --output-tokens, or as long as those of a --trace, that arrive at --request-rate, or
    --concurrency at a time. TTFT, TPOT, ITL and E2EL are those of vLLM's `bench serve`, the keys of --json
    too. With --find-knee the rate is doubled, and the gap then halved, until the largest one is found at
    which the 95th percentile of TTFT is within --knee-ttft and no request is lost.
    """
    context = click.get_current_context()
    check_mode(context)
    if artifact is None:
        bench_server(context, options, as_json=as_json)
        return
    result, text = _bench_artifact(artifact, **{k: v for k, v in options.items() if k not in SERVER_OPTIONS})
    emit(result, as_json=as_json, text=text)


def _bench_artifact(
    artifact: Path,
    *,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: tuple[int, ...],
    repeat: int,
    against_transformers: str | None,
    profiled: bool,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """The numbers of an artifact, and the same for a person."""
    from . import profile
    from .loading import load
    from .measure import speeds

    notes_from_logging()
    runtime, _ = split(options)
    sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        progress("starting processes")
        starts = _starts(artifact, runtime, repeat=min(3, repeat))
        most = max(concurrency)
        tokens = prompt_tokens + 2 * output_tokens + 64 + most * (160 + output_tokens)
        llm = stack.enter_context(load(artifact, kv_tokens=tokens, max_sequences=max(64, most), **runtime))
        weights, read = _weight_bytes(llm, runtime.get("target"))
        rival = _rival(against_transformers, runtime, stack, progress)
        engine = stack.enter_context(llm.engine.paused())
        measured = speeds(
            engine,
            **sizes,
            concurrency=concurrency,
            repeat=repeat,
            between=rival.turn if rival is not None else _nothing,
            progress=progress,
        )
        if profiled:
            measured["profile"] = profile.profile(engine, weights, **sizes, concurrency=most)
    result: dict[str, Any] = {
        "artifact": str(artifact),
        **measured,
        **starts,
        "weight_bytes_per_token": sum(weights[name] for name in read),
        **sizes,
        "repeat": repeat,
        **(rival.result(measured) if rival is not None else {}),
    }
    return result, _text(result) + (f"\n\n{profile.text(result['profile'])}" if profiled else "")


class Rival:
    """transformers, measured in turns with the artifact."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._seconds: dict[str, list[float]] = {"prefill": [], "decode": []}
        self._tokens = 0

    def turn(self, what: str, tokens: int) -> None:
        """Measures what the artifact was just measured at."""
        taken = self._peer.seconds(what, tokens)
        self._seconds[what].append(taken / tokens if what == "prefill" else taken)
        time.sleep(_SETTLE_SECONDS)

    def result(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Its speeds, and the artifact's as multiples of them."""
        prefill, decode = (1 / median(self._seconds[what]) for what in ("prefill", "decode"))
        return {
            "transformers": {"prefill_tok_s": round(prefill, 2), "decode_tok_s": round(decode, 2)},
            "prefill_ratio": round(measured["prefill_tok_s"] / prefill, 3),
            "decode_ratio": round(measured["decode_tok_s"] / decode, 3),
        }


def _nothing(what: str, tokens: int) -> None:
    """No peer to measure."""


def _starts(artifact: Path, runtime: dict[str, Any], *, repeat: int) -> dict[str, float]:
    """Medians over fresh processes that generate one token: `first_token_ms` from the start of the process
    until the token is on its standard output; `load_to_token_ms` of it, once the runtime is imported, until
    there is a token; `load_ms` of that opens the artifact.
    """
    # -P: nothing is imported from the current directory.
    words = [sys.executable, "-P", "-m", "llmc.cli.main", "run", str(artifact), "The", "--max-tokens=1"]
    words += ["--json", "--no-chat-template", *(f"--{name}={value}" for name, value in runtime.items())]
    firsts: list[float] = []
    answers: list[dict[str, Any]] = []
    for _ in range(repeat):
        began = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            firsts.append(1000 * (time.perf_counter() - began))
        answer = json.loads(line or "{}")
        if process.returncode or "load_ms" not in answer:
            kind = InputError if process.returncode == 2 else LlmcError
            raise kind(answer.get("error", f"llmc run ended with {process.returncode}"))
        answers.append(answer)
    parts = {name: median(answer[name] for answer in answers) for name in ("load_ms", "load_to_token_ms")}
    return {name: round(value, 1) for name, value in {**parts, "first_token_ms": median(firsts)}.items()}


def _rival(
    model: str | None, runtime: dict[str, Any], stack: contextlib.ExitStack, progress: Progress
) -> Rival | None:
    if model is None:
        return None
    from ..runtime import cpu
    from .peer import Peer

    progress("loading transformers")
    return Rival(stack.enter_context(Peer(model, runtime.get("threads") or cpu.default_threads())))


def _weight_bytes(llm: LLM, wanted: str | None) -> tuple[dict[str, int], list[str]]:
    """Bytes of each weight, and the names of those that one decoded token reads: all but the tables of which
    it takes a row. Of experts those count that a token chooses.
    """
    from ..runtime.executor import choose_target

    artifact = llm.artifact
    if artifact is None or llm.kind != "causal_lm":
        raise InputError("this artifact generates nothing", remedy="bench a language model")
    target = choose_target(artifact.targets, wanted)
    text = artifact.read_text("ir.txt")
    gathered = gathered_tables(text)
    # A target that keeps several forms of a weight writes "name:form".
    weights = {name: array.nbytes for name, array in artifact.weights(target).items()}
    for name, share in chosen_shares(text).items():
        if name in weights:
            weights[name] = round(weights[name] * share)
    return weights, [name for name in weights if name.partition(":")[0] not in gathered]


def chosen_shares(graph: str) -> dict[str, float]:
    """The part of each weight of experts that a token reads, k / E, by name, in a graph's text."""
    if "moe(" not in graph:
        return {}
    from .experts import mixtures

    found: dict[str, float] = {}
    for op in mixtures(graph):
        k, experts = (int(str(d)) for d in (op.operands[1].shape[-1], op.operands[3].shape[0]))
        found |= {v.name: k / experts for v in op.operands if v.is_weight}
    return found


def gathered_tables(graph: str) -> set[str]:
    """Weights, by name, that only embeddings read, in a graph's text: a token takes a row of each."""
    taken: set[str] = set()
    whole: set[str] = set()
    for line in graph.splitlines():
        call = re.match(r"%[^=]*= (\w+)\(", line)
        if call is not None:
            operands = line.partition(" loc ")[0]
            names = {quoted or plain for quoted, plain in re.findall(r'@(?:"([^"]+)"|([\w.]+))', operands)}
            (taken if call[1] in ("embedding", "quantized_embedding") else whole).update(names)
    return taken - whole


def _text(result: dict[str, Any]) -> str:
    lines = facts(
        [
            ("prefill", f"{result['prefill_tok_s']:.1f} tok/s ({result['prompt_tokens']} tokens)"),
            ("decode", f"{result['decode_tok_s']:.1f} tok/s ({result['output_tokens']} tokens)"),
            ("load", f"{result['load_ms']:.0f} ms"),
            (
                "first token",
                f"{result['first_token_ms']:.0f} ms after the start of the process, "
                f"{result['load_to_token_ms']:.0f} ms after imports",
            ),
            ("weights a token", size(result["weight_bytes_per_token"])),
            *((f"transformers {what}", _ratio(result, what)) for what in ("prefill", "decode")),
        ]
    )
    rows = [(row["concurrency"], row["output_tok_s"], row["total_tok_s"]) for row in result["batch"]]
    return f"{lines}\n\n{table(('requests', 'output tok/s', 'total tok/s'), rows)}"


def _ratio(result: dict[str, Any], what: str) -> str | None:
    if "transformers" not in result:
        return None
    theirs, ratio = result["transformers"][f"{what}_tok_s"], result[f"{what}_ratio"]
    return f"{theirs:.1f} tok/s; ours is {ratio:.2f} times that"
