"""`llmc check`: what compiling would give, from configuration and headers alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from .compile import (
    bits_option,
    context_option,
    kv_dtype_option,
    quant_head_option,
    quant_option,
    rope_scaling_option,
    target_option,
)
from .output import emit, facts, json_option, rope_text, size, tool_calls_text


@click.command("check", short_help="Say what compiling would give, in seconds.")
@click.argument("model")
@target_option
@quant_option
@quant_head_option
@bits_option
@context_option
@rope_scaling_option
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
        "tool_calls": _tool_calls(model) if report.facts["task"] == "causal_lm" else None,
        "seconds": round(time.perf_counter() - began, 3),
    }
    emit(result, as_json=as_json, text=_text(result))


def _tool_calls(model: str) -> dict[str, Any] | None:
    """How the chat template writes tool calls, as `llmc compile` would record it; None without a template."""
    from ..frontend.template_file import published_template
    from ..frontend.tokenizer import check_chat_template
    from ..runtime.chat_template import render_once
    from ..runtime.tool_calls import detect_once

    found = published_template(Path(model))
    if found is None:
        return None
    check_chat_template(found.text, found.special_tokens, Path(model).name, render_once)
    return detect_once(found.text, found.special_tokens)


def _text(result: dict[str, Any]) -> str:
    model: dict[str, Any] = result["facts"]
    lines = facts(
        [
            ("model", f"{model['name']} ({model['kind']}, {model['task']})"),
            ("architecture", model.get("architecture")),
            ("layers", model.get("num_layers")),
            ("context", model.get("context")),
            ("rope scaling", rope_text(model.get("rope_scaling"))),
            ("graph", f"{result['ops']} ops, {result['attention_layers']} attention layers"),
            ("tool calls", tool_calls_text(result["tool_calls"])),
            ("cache a token", size(result["kv_bytes_per_token"])),
            ("weights", f"{size(result['weight_bytes'])} in the artifact"),
            ("peak memory", f"{size(result['peak_bytes'])} while compiling"),
            ("supported", f"yes (checked in {result['seconds']:.1f} s)"),
        ]
    )
    return "\n".join([lines, *(f"note: {text}" for text in result["notes"])])
