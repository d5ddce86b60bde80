"""`llmc chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, json_option, note, notes_from_logging
from .sampling import runtime_options, sampling_options, split

if TYPE_CHECKING:
    from ..runtime.llm import LLM
    from ..runtime.sampling_params import SamplingParams
    from .answer import Answer

_HELP = "/clear begins anew, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer."


@click.command("chat", short_help="Talk with a model.")
@click.argument("artifact", type=click.Path(path_type=Path))
@sampling_options
@runtime_options
@click.option("--system", metavar="TEXT", help="What the chat template gets as the system's message.")
@json_option
def command(artifact: Path, system: str | None, as_json: bool, **options: Any) -> None:
    """Talk with ARTIFACT. The conversation so far goes with each message.

    /clear begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops the answer and not the program. With --json the
    messages are read from standard input, a line each, and the conversation is printed at its end; a message
    that is refused (too long) is no part of it, its error stands among the answers.
    """
    from .loading import load
    from .sampling import sampling_params

    notes_from_logging()
    runtime, sampling = split(options)
    with load(artifact, max_sequences=1, **runtime) as llm:  # the cache then is one context, no more
        if llm.template is None:
            raise InputError(
                f"{artifact} has no chat template", remedy="use llmc run, which continues a text"
            )
        conversation = Conversation(llm, sampling_params(llm, sampling), system, quiet=as_json)
        conversation.loop()
    if as_json:
        emit({"messages": conversation.messages, "answers": conversation.answers}, as_json=True, text="")


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, quiet: bool) -> None:
        self._llm = llm
        self._params = params
        self._quiet = quiet
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = list(self._first)
        self.answers: list[dict[str, Any]] = []

    def loop(self) -> None:
        """Reads and answers until /exit or the end of the input."""
        if sys.stdin.isatty() and not self._quiet:
            note(_HELP)
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # gives input() history and editing
        while (line := self._read()) is not None:
            words = line.strip()
            if words in ("/exit", "/quit"):
                break
            if words == "/clear":
                self.messages = list(self._first)
            elif words.startswith("/"):
                note(_HELP)
            elif words:
                self.answer(line)

    def _read(self) -> str | None:
        while True:
            try:
                return input("> " if sys.stdin.isatty() and not self._quiet else "")
            except EOFError:
                self._write("\n" if sys.stdin.isatty() else "")
                return None
            except KeyboardInterrupt:
                note(f"\n{_HELP}")

    def answer(self, text: str) -> Answer | None:
        """Adds a message and its answer; a message that is refused (too long) is taken back."""
        from .answer import stream_answer

        self.messages.append({"role": "user", "content": text})
        try:
            answer = stream_answer(self._llm, self.messages, self._params, self._write)
        except InputError as error:
            self.messages.pop()
            self.answers.append({"error": str(error)})
            way_out = "; /clear begins anew" if len(self.messages) > len(self._first) else ""
            note(f"error: {error}{way_out}")
            return None
        self._write("" if answer.text.endswith("\n") else "\n")
        if not self._quiet:
            note(answer.speed())
        self.messages.append({"role": "assistant", "content": answer.text})
        self.answers.append(answer.result())
        return answer

    def _write(self, text: str) -> None:
        if not self._quiet:
            click.echo(text, nl=False)
            sys.stdout.flush()
