"""`llmc agent`: a model that calls tools until it has an answer."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..ir.errors import InputError, LlmcError
from .output import emit, json_option, note, notes_from_logging
from .sampling import runtime_options, sampling_options, split

if TYPE_CHECKING:
    from ..runtime.chat import ChatModel
    from ..runtime.tools.agent import Agent, AgentResult
    from ..runtime.tools.base import RunnableTool
    from ..runtime.tools.registry import ToolBox

_HELP = "/clear begins anew, /exit leaves (so does Ctrl-D), Ctrl-C stops an answer."
_SHOWN = 1000  # characters of a result on the screen; of arguments that a person decides about, all


@click.command("agent", short_help="Let a model call tools.")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.argument("prompt", required=False)
@click.option(
    "--tools",
    multiple=True,
    metavar="FILE.py|mcp:COMMAND|NAME",
    help="Functions of a Python file, an MCP server to start, or tools of an installed package; repeatable.",
)
@click.option(
    "--documents", metavar="KB", help="Let it search these documents (llmc rag index) with search_documents."
)
@click.option("--no-builtin", is_flag=True, help="Without the built-in tool calculate.")
@click.option("--system", metavar="TEXT", help="What the chat template gets as the system's message.")
@click.option(
    "--max-steps", type=int, default=8, show_default=True, help="Answers of the model, calls included."
)
@click.option("--max-seconds", type=float, default=300.0, show_default=True, help="Of a whole run.")
@click.option(
    "--max-total-tokens", type=int, default=8192, show_default=True, help="Generated in a whole run."
)
@click.option("--yes", is_flag=True, help="Call tools that change something without asking.")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="Record everything in this file, as JSON lines."
)
@click.option("--replay", type=click.Path(path_type=Path), help="Run a record again, without the model.")
@click.option("--live-tools", is_flag=True, help="With --replay: call the tools, instead of what they gave.")
@sampling_options
@runtime_options
@json_option
def command(
    artifact: Path | None,
    prompt: str | None,
    tools: tuple[str, ...],
    documents: str | None,
    no_builtin: bool,
    system: str | None,
    max_steps: int,
    max_seconds: float,
    max_total_tokens: int,
    yes: bool,
    trace: Path | None,
    replay: Path | None,
    live_tools: bool,
    as_json: bool,
    **options: Any,
) -> int | None:
    """Answer PROMPT (- reads standard input) with ARTIFACT, which may call tools; without one, talk with it.

    Each call and its result are shown on stderr; the answer goes to stdout. Tools that change something ask
    first, and are refused where nobody can be asked. What goes wrong in a tool is told to the model. The run
    ends with an error at a limit, or when the model makes the same call for the third time.

    --tools FILE.py executes the file and takes the functions that it marks with @tool (of
    llmc), or else its public functions whose parameters all have types. --tools
    mcp:COMMAND starts an MCP server over standard input and output; it gets few environment variables, others
    as in "mcp:env TOKEN=x server".

    --replay needs neither ARTIFACT nor PROMPT; it says where the run differs from its record.
    """
    notes_from_logging()
    with contextlib.ExitStack() as stack:
        # What a tool prints must not stand among the results.
        output = sys.stdout
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if replay is not None:
            box = _toolbox(stack, tools, documents, builtin=not no_builtin) if live_tools else None
            return _replay(replay, box, yes=yes, output=output, as_json=as_json)
        if artifact is None:
            raise InputError("no artifact was given", remedy="llmc agent ARTIFACT [PROMPT], or --replay FILE")
        from ..runtime.tools.agent import Agent, Limits

        limits = Limits(max_steps, max_seconds, max_total_tokens)
        limits.validate()
        box = _toolbox(stack, tools, documents, builtin=not no_builtin)
        shown = _Shown(stack, trace, output if output.isatty() and not as_json else None)
        chat = _chat(stack, artifact, options, box, shown)
        confirm = _allow_all if yes else _Question(sys.stdin.isatty() and prompt != "-")
        agent = Agent(chat, box, limits, confirm, shown, about={"artifact": artifact.name})
        session = _Session(agent, shown, system, output)
        if prompt is None:
            session.loop(quiet=as_json)
            result = {"messages": session.messages, "answers": session.answers}
        else:
            result = session.answer(sys.stdin.read() if prompt == "-" else prompt, quiet=as_json)
    if as_json:
        emit(result, as_json=True, text="")
    return None


def _toolbox(
    stack: contextlib.ExitStack, specs: Sequence[str], documents: str | None, *, builtin: bool
) -> ToolBox:
    from ..runtime.tools.registry import MCP_PREFIX, ToolBox

    box = stack.enter_context(ToolBox())
    if builtin:
        box.add_builtin()
    if documents is not None:
        from ..runtime.rag.knowledge import KnowledgeBase, locate
        from ..runtime.tools.search_documents import search_documents

        box.add(search_documents(stack.enter_context(KnowledgeBase.open(locate(documents)))))
    # Servers last: their tools give way where a name is taken.
    for spec in sorted(specs, key=lambda spec: spec.startswith(MCP_PREFIX)):
        box.load(spec)
    return box


def _chat(
    stack: contextlib.ExitStack, artifact: Path, options: Mapping[str, Any], box: ToolBox, shown: _Shown
) -> Any:
    from ..runtime.chat import ChatModel
    from ..runtime.tools.local_chat import local_chat
    from .loading import load
    from .sampling import sampling_params

    runtime, sampling = split(options)
    llm = stack.enter_context(load(artifact, max_sequences=1, **runtime))
    if llm.template is None:
        raise InputError(f"{artifact} has no chat template", remedy="use llmc run, which continues a text")
    model = ChatModel(llm)
    _leave_out(box, model)
    return local_chat(model, sampling_params(llm, sampling), on_text=shown.text)


def _leave_out(box: ToolBox, model: ChatModel) -> None:
    """A server's tool whose schema cannot be kept to should not stand in the way of the others."""
    from ..runtime.tools.mcp import McpTool

    for tool in list(box):
        if isinstance(tool, McpTool):
            try:
                model.llm.grammars.json_schema(tool.spec.parameters)
            except InputError as error:
                note(f"left out: {tool.spec.name} of {tool.origin}: {error}")
                box.remove(tool.spec.name)


# What is shown, and asked ----------------------------------------------------------------------------------


class _Shown:
    """Shows what happens, and records it."""

    def __init__(self, stack: contextlib.ExitStack, trace: Path | None, screen: IO[str] | None) -> None:
        from ..runtime.tools.trace import TraceFile

        self._file = stack.enter_context(TraceFile(trace)) if trace is not None else None
        self._screen = screen
        self.streamed = False
        """Whether the last answer is on the screen already."""

    def text(self, text: str) -> None:
        if self._screen is not None:
            self.streamed = True
            click.echo(text, nl=False, file=self._screen)
            self._screen.flush()

    def __call__(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file(event)
        if event["event"] == "answer" and self.streamed and event["message"].get("tool_calls"):
            click.echo("", file=self._screen)
            self.streamed = False
        elif event["event"] == "call":
            note(f"→ {visible(event['name'])}({visible(event['arguments'], _SHOWN)})")
        elif event["event"] == "result":
            note(f"← {visible(event['message']['content'], _SHOWN)}")


class _Question:
    """Asks a person about a call; where there is none to ask, refuses."""

    def __init__(self, possible: bool) -> None:
        self._possible = possible

    def __call__(self, tool: RunnableTool, arguments: Mapping[str, Any]) -> bool:
        name = f"{tool.spec.name} (of {visible(tool.origin)})"
        if not self._possible:
            note(f"refused: {name} changes something, and nobody can be asked; --yes allows it")
            return False
        written = json.dumps(arguments, ensure_ascii=False)
        click.echo(f"? {name} changes something. Call it with {visible(written)}? [y/N] ", nl=False, err=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def _allow_all(tool: RunnableTool, arguments: Mapping[str, Any]) -> bool:
    return True


def visible(text: str, limit: int | None = None) -> str:
    """Text that a stranger may have written, for a terminal: what would move the cursor, colour or reorder it
    is written as an escape.
    """
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in (text if limit is None else text[:limit])
    )
    left = 0 if limit is None else max(0, len(text) - limit)
    return f"{shown}… ({left} more characters)" if left else shown


# Running ---------------------------------------------------------------------------------------------------


class _Session:
    """The conversation so far."""

    def __init__(self, agent: Agent, shown: _Shown, system: str | None, output: IO[str]) -> None:
        self._agent = agent
        self._shown = shown
        self._output = output
        self._first: list[dict[str, Any]] = (
            [{"role": "system", "content": system}] if system is not None else []
        )
        self.messages = list(self._first)
        self.answers: list[dict[str, Any]] = []

    def answer(self, text: str, *, quiet: bool) -> dict[str, Any]:
        """Answers a message; one that ends in an error is no part of the conversation."""
        result = self._agent.run([*self.messages, {"role": "user", "content": text}])
        self.messages = result.messages
        if not quiet:
            self._write(result.text)
        if result.reason == "length":
            note("the answer was cut off; --max-tokens allows longer ones")
        steps = f"{result.steps} step{'s' if result.steps > 1 else ''}"
        tokens = f"prompts {result.prompt_tokens} tokens, answers {result.generated_tokens} tokens"
        note(f"[{steps}, {tokens}, {result.seconds:.1f} s]")
        return as_result(result)

    def _write(self, text: str) -> None:
        rest = "" if self._shown.streamed else text
        click.echo(rest + ("" if text.endswith("\n") else "\n"), nl=False, file=self._output)
        self._output.flush()
        self._shown.streamed = False

    def loop(self, *, quiet: bool) -> None:
        """Reads and answers until /exit or the end of the input."""
        asks = sys.stdin.isatty() and not quiet
        if asks:
            note(_HELP)
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # gives input() history and editing
        while (line := self._read(asks)) is not None:
            words = line.strip()
            if words in ("/exit", "/quit"):
                break
            if words == "/clear":
                self.messages = list(self._first)
            elif words.startswith("/"):
                note(_HELP)
            elif words:
                self._try(words, quiet=quiet)

    def _read(self, asks: bool) -> str | None:
        while True:
            try:
                with contextlib.redirect_stdout(self._output):  # where input() edits lines
                    return input("> " if asks else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                note(f"\n{_HELP}")

    def _try(self, text: str, *, quiet: bool) -> None:
        try:
            self.answers.append(self.answer(text, quiet=quiet))
        except LlmcError as error:
            self.answers.append({"error": str(error)})
            note(f"error: {error}")
        except KeyboardInterrupt:
            self.answers.append({"error": "interrupted"})
            note("\ninterrupted")
        self._shown.streamed = False


def as_result(result: AgentResult) -> dict[str, Any]:
    """The JSON of a run."""
    return {
        "text": result.text,
        "reason": result.reason,
        "steps": result.steps,
        "calls": [
            {
                "step": record.step,
                "name": record.call.name,
                "arguments": record.call.arguments,
                "kind": record.result.kind,
                "result": record.result.text,
                "seconds": record.result.seconds,
            }
            for record in result.calls
        ],
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "seconds": round(result.seconds, 3),
    }


def _replay(path: Path, box: ToolBox | None, *, yes: bool, output: IO[str], as_json: bool) -> int:
    from ..runtime.tools.trace import replay

    confirm = _allow_all if yes else _Question(sys.stdin.isatty())
    found = replay(path, toolbox=box, confirm=confirm)
    result = {
        "same": found.same,
        "complete": found.complete,
        "runs": found.runs,
        "steps": found.steps,
        "calls": found.calls,
        "differences": found.differences,
        "texts": found.texts,
    }
    counts = f"{found.runs} run(s), {found.steps} step(s), {found.calls} call(s)"
    lines = [f"as recorded: {counts}"] if found.same else [f"{counts}, which differ:", *found.differences]
    if not found.complete:
        lines.append("the record ends before a run does")
    with contextlib.redirect_stdout(output):
        emit(result, as_json=as_json, text=visible("\n".join(lines)))
    return 0 if found.same else 1
