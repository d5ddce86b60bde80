"""The `llmc` command group, and the one place where errors become a line and an exit code.

Exit codes: 0 done, 1 the work failed, 2 the call or the input is wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import click
from llmc import __version__

from ..ir.errors import LlmcError

COMMANDS = (
    "compile",
    "check",
    "run",
    "chat",
    "serve",
    "agent",
    "rag",
    "eval",
    "bench",
    "inspect",
    "passes",
    "targets",
    "plugins",
    "doctor",
)
"""Each is a module of this package that holds a click command named `command`."""

DEBUG_VARIABLE = "LLMC_DEBUG"


class LazyGroup(click.Group):
    """Imports a command's module when that command is asked for (all of them, for the list in `--help`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}", __package__).command


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "--version", message="llmc %(version)s")
def llmc() -> None:
    """Compile a language model, as it is published, into one artifact, and run it.

    Every command takes --json and then prints one JSON object on stdout and nothing else. Exit codes: 0 done,
    1 the work failed, 2 the call or the input is wrong. LLMC_DEBUG=1 shows the traceback of an error.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. `arguments` are those after the program's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _replace_closed_streams()
    try:
        result: Any = llmc.main(words or ["--help"], prog_name="llmc", standalone_mode=False)
        sys.stdout.flush()
        return 2 if not words else result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader of our output has gone (`llmc run … | head`): not an error, and Python must not report
        # one when it flushes at exit.
        _discard_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (here all of them are reported)
        message, code = explain(error)
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exception(error)
    try:
        _report(message, as_json="--json" in words, code=code)
        sys.stdout.flush()
    except OSError:  # standard output takes nothing more (a full disk): the line on stderr must do
        _discard_stdout()
    return code


def script() -> None:
    """The program: `main`, and the end of the process with its exit code.

    Python takes every module apart before it ends: two seconds where torch and transformers were imported.
    What was to happen at exit happens; the memory is left to the system.
    """
    code = main()
    others = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    if others:  # Python waits for them
        sys.exit(code)
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  (as multiprocessing ends its processes)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _replace_closed_streams() -> None:
    """A stream that was closed before we began (`llmc run … >&-`) is None in Python; commands write to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (open to the end)


def _discard_stdout() -> None:
    """What is still in stdout's buffer goes nowhere, so that Python's flush at exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> tuple[str, int]:
    """One line for a person, and the exit code."""
    if isinstance(error, LlmcError):
        return str(error), error.exit_code
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "llmc"
        return f"{error.format_message().rstrip('.')}; see {path} --help", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", 1
    if isinstance(error, MemoryError):
        return "out of memory; free some, or use a smaller model, context or quantization", 1
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error), 1
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        wrong_input = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
        return f"{name}{error.strerror.lower()}", 2 if wrong_input else 1
    return _bug(error), 1


def _missing_module(error: ModuleNotFoundError) -> str:
    name = (error.name or "").split(".")[0]
    if name in {"", "llmc"}:
        return _bug(error)
    base = {
        "numpy", "ml_dtypes", "onnxruntime", "tokenizers", "jinja2", "rich", "packaging",
        "fastapi", "starlette", "pydantic", "uvicorn", "httptools", "prometheus_client", "llguidance",
    }  # fmt: skip
    extras = {
        "mcp": "tools", "anyio": "tools",
        "igraph": "rag", "scipy": "rag", "pypdf": "rag", "lxml": "rag", "Stemmer": "rag",
        "psycopg": "postgres",
    }  # fmt: skip
    extra = "llmc" if name in base else f"llmc[{extras.get(name, 'compile')}]"
    return (
        f"Python package {name!r} is not installed; pip install '{extra}' (llmc doctor lists what is missing)"
    )


def _bug(error: BaseException) -> str:
    where = ""
    trace = error.__traceback__
    while trace is not None:
        where = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{what}{where}; this is a bug in llmc, {DEBUG_VARIABLE}=1 shows the traceback to report"


def _report(message: str, *, code: int, as_json: bool) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        import json

        print(json.dumps({"error": line, "exit_code": code}))


if __name__ == "__main__":
    script()
