"""`llmc check`: what compiling would give, from configuration and headers alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import click

from .compile import (
    bits_option,
    context_option,
    kv_dtype_option,
    quant_head_option,
    quant_option,
    target_option,
)
from .output import emit, facts, json_option, size


@click.command("check", short_help="Say what compiling would give, in seconds.")
@click.argument("model")
@target_option
@quant_option
@quant_head_option
@bits_option
@context_option
@kv_dtype_option
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Trace MODEL without its weights and run every pass: what would be compiled, how large the artifact
    and how high the peak of memory would be. The first thing that is not supported is the error (exit 1).

    Of a Hugging Face folder or hub id only the configuration is read.
    """
    from ..codegen.driver import check_model

    began = time.perf_counter()
    report = check_model(model, **options)
    result = {
        "supported": True,
        **dataclasses.asdict(report),
        "seconds": round(time.perf_counter() - began, 3),
    }
    emit(result, as_json=as_json, text=_text(result))


def _text(result: dict[str, Any]) -> str:
    model: dict[str, Any] = result["facts"]
    lines = facts(
        [
            ("model", f"{model['name']} ({model['kind']}, {model['task']})"),
            ("architecture", model.get("architecture")),
            ("layers", model.get("num_layers")),
            ("context", model.get("context")),
            ("graph", f"{result['ops']} ops, {result['attention_layers']} attention layers"),
            ("cache a token", size(result["kv_bytes_per_token"])),
            ("weights", f"{size(result['weight_bytes'])} in the artifact"),
            ("peak memory", f"{size(result['peak_bytes'])} while compiling"),
            ("supported", f"yes (checked in {result['seconds']:.1f} s)"),
        ]
    )
    return "\n".join([lines, *(f"note: {text}" for text in result["notes"])])
