"""`llmc run`: one answer to one prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from .output import emit, json_option, note, notes_from_logging
from .sampling import runtime_options, sampling_options, split


@click.command("run", short_help="Answer one prompt.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt")
@sampling_options
@runtime_options
@click.option("--system", metavar="TEXT", help="What the chat template gets as the system's message.")
@click.option("--no-chat-template", is_flag=True, help="Continue PROMPT as it stands.")
@json_option
def command(
    artifact: Path, prompt: str, system: str | None, no_chat_template: bool, as_json: bool, **options: Any
) -> int:
    """Generate with ARTIFACT from PROMPT (- reads standard input), and print the text as it comes.

    Where the artifact has a chat template, PROMPT is the user's message; otherwise it is continued. The speed
    follows on stderr.
    """
    import llmc

    from .answer import stream_answer
    from .loading import load
    from .sampling import sampling_params

    notes_from_logging()
    text = sys.stdin.read() if prompt == "-" else prompt
    runtime, sampling = split(options)
    _ = llmc.load  # imports the runtime, before the clock starts
    began = time.perf_counter()
    with load(artifact, max_sequences=1, **runtime) as llm:  # the cache then is one context, no more
        load_ms = round(1000 * (time.perf_counter() - began), 1)
        given = _prompt(text, system, chat=llm.template is not None and not no_chat_template)
        answer = stream_answer(llm, given, sampling_params(llm, sampling), _no_text if as_json else _write)
    if not as_json:
        click.echo("\n" if not answer.text.endswith("\n") else "", nl=False)
    note(answer.speed())
    if as_json:
        token_ms = round(load_ms + 1000 * answer.prefill_seconds, 1)
        emit({**answer.result(), "load_ms": load_ms, "load_to_token_ms": token_ms}, as_json=True, text="")
    return 1 if answer.finish_reason == "cancelled" else 0


def _prompt(text: str, system: str | None, *, chat: bool) -> Any:
    if not chat:
        return text
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _no_text(_: str) -> None:
    pass
