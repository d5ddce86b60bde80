"""`llmc compile`: a published model becomes an artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .output import emit, facts, json_option, size
from .progress import Progress
from .quality import verdict_facts
from .resources import peak_rss_bytes

target_option = click.option(
    "--target",
    "targets",
    multiple=True,
    default=("tvm-cpu",),
    show_default=True,
    metavar="NAME[:k=v,…]",
    help="Kernel family, with options; repeatable. See llmc targets.",
)
quant_option = click.option(
    "--quant",
    default="none",
    show_default=True,
    metavar="SCHEME",
    help="none; keep (as the checkpoint is); int8[-gN]; int4 (= best-int4-g32, minutes); int4-gN (rounded to "
    "nearest, seconds; N weights share a scale; -sym: no zero points); gptq-, awq-, best-int4-gN[-sym]; nf4; "
    "gguf-q4_k_m and others. See docs/quantization.md.",
)
quant_head_option = click.option(
    "--quant-head",
    metavar="SCHEME",
    help="Embeddings and output head: none, int8, int6-gN, int4-gN[-sym], …  "
    "[default: the scheme's own, int8]",
)
bits_option = click.option(
    "--bits-per-weight",
    type=float,
    metavar="X",
    help="Size of all weights together: each layer gets the bits that lose least within it.",
)
context_option = click.option(
    "--context", type=click.IntRange(min=1), help="Longest sequence, in tokens.  [default: the model's]"
)
rope_scaling_option = click.option(
    "--rope-scaling",
    metavar="KIND:FACTOR[,k=v…]",
    help="Make the context longer than the model was trained on: yarn:4, linear:4, dynamic:2, llama3:8, "
    "longrope:4,factors=FILE; with ,when=needed for the sequences that need it. See docs/long-context.md.",
)
kv_dtype_option = click.option(
    "--kv-dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]),
    help="Element type of the cache; int8 has a scale for each head and token, float8 none.  "
    "[default: float32 with --quant none; else bfloat16 for tvm-cpu, float16 for others]",
)


@click.command("compile", short_help="Compile a model into an artifact.")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The artifact, OUT.llmc."
)
@target_option
@quant_option
@quant_head_option
@bits_option
@context_option
@rope_scaling_option
@kv_dtype_option
@click.option(
    "--lora",
    multiple=True,
    metavar="PATH[:scale]",
    help="An adapter's folder (PEFT: LoRA, DoRA), or GGUF file, merged into the weights; repeatable.",
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="NAME{k=v,…}",
    help="A further pass on the fused graph; repeatable. See llmc passes.",
)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after every pass."
)
@click.option(
    "--calib",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text that calibrated schemes learn from: UTF-8, or *.jsonl of chats and texts.  "
    "[default: built in]",
)
@click.option(
    "--calib-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens to calibrate on.  [default: what the scheme does well with, 16384 or 32768]",
)
@click.option(
    "--max-ram",
    metavar="SIZE",
    help="Cap of memory, all processes together: 1.5GB (10⁹ bytes), 4GiB (2³⁰ bytes). Refused where it "
    "cannot be kept.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Refuse where the KL divergence from the source is larger, in nats a token.",
)
@click.option(
    "--max-ppl-increase",
    metavar="P%",
    help="Refuse where the perplexity of held-out text rises by more than P percent.",
)
@click.option("--no-verdict", is_flag=True, help="Do not measure what quantization cost.")
@click.option(
    "--tune",
    type=click.IntRange(min=0),
    default=0,
    metavar="SECONDS",
    help="Search for the sizes of kernels that are fastest on this processor; what was found is kept in the "
    "cache folder (LLMC_CACHE) for later.",
)
@click.option(
    "--adapters",
    is_flag=True,
    help="Make places for LoRA adapters that requests choose among (llmc serve --adapter); tvm-cpu and "
    "tvm-cuda.",
)
@click.option("--resume", is_flag=True, help="Go on with the calibrated work that an interrupted run left.")
@json_option
def command(
    model: str,
    output: Path,
    as_json: bool,
    calib: Path | None,
    calib_tokens: int | None,
    max_ram: str | None,
    resume: bool,
    max_kl: float | None,
    max_ppl_increase: str | None,
    no_verdict: bool,
    **options: Any,
) -> None:
    """Compile MODEL (a Hugging Face folder, a hub id, or a GGUF file) into the artifact OUT.llmc.

    The artifact gets its name only when it is complete; an existing one is replaced then and not before.

    What quantization cost (perplexity, KL divergence from the source, top-1 agreement, the error of each
    layer) is measured on held-out text and kept in the artifact as quality.json. A limit that is passed is an
    error (exit 1), and leaves no artifact.
    """
    from ..codegen.calibrate import CalibrationOptions
    from ..codegen.driver import compile_model
    from ..codegen.memory import parse_size
    from ..codegen.verdict import VerdictOptions
    from ..runtime.chat_template import render_once
    from ..runtime.tool_calls import detect_once

    began = time.perf_counter()
    cap = None if max_ram is None else parse_size(max_ram)
    calibration = CalibrationOptions(calib, calib_tokens, resume)
    verdict = VerdictOptions.parse(verdict=not no_verdict, max_kl=max_kl, max_ppl_increase=max_ppl_increase)
    with Progress() as progress:
        report = compile_model(
            model,
            output,
            calibration=calibration,
            max_ram=cap,
            verdict=verdict,
            progress=progress,
            say=progress.say,
            render=render_once,
            detect=detect_once,
            **options,
        )
    result = {
        "artifact": str(output),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "weight_bytes": report.weight_bytes,
        "bits_per_weight": report.bits_per_weight,
        "quality": report.quality,
        "notes": report.notes,
    }
    emit(result, as_json=as_json, text=_text(result))


def _text(result: dict[str, Any]) -> str:
    lines = facts(
        [
            ("artifact", result["artifact"]),
            ("time", f"{result['seconds']:.1f} s"),
            ("peak memory", size(result["peak_rss_bytes"])),
            ("weights", f"{size(result['weight_bytes'])}, {result['bits_per_weight']:.2f} bits each"),
            *verdict_facts(result["quality"]),
        ]
    )
    return "\n".join([lines, *(f"note: {text}" for text in result["notes"])])
