"""The options of `llmc bench --server`, and the step from them to a benchmark of a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ...ir.errors import InputError
from ..output import emit
from ..progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_TOKENS = click.IntRange(min=1, max=10_000_000)


class _Positive(click.ParamType):
    """A number above 0, `inf` too."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number > 0:
            self.fail(f"{value!r} is no number above 0", param, ctx)
        return number


_POSITIVE = _Positive()

_OPTIONS = (
    click.option("--server", metavar="URL", help="Measure this server instead of an artifact."),
    click.option("--model", metavar="NAME", help="[default: the first that the server names]"),
    click.option("--api-key", metavar="KEY", envvar="LLMC_API_KEY", help="[default: $LLMC_API_KEY]"),
    click.option(
        "--endpoint",
        type=click.Choice(["chat", "completions"]),
        default="chat",
        show_default=True,
        help="/v1/chat/completions or /v1/completions.",
    ),
    click.option(
        "--num-requests",
        type=click.IntRange(min=1, max=1_000_000),
        default=100,
        show_default=True,
        help="How many; of a trace, its first.",
    ),
    click.option(
        "--request-rate",
        type=_POSITIVE,
        metavar="R",
        help="Arrivals a second; inf: all at once. A trace is stretched to it.  [default: inf]",
    ),
    click.option(
        "--burstiness",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="Shape of the gaps' gamma distribution: 1 Poisson, less in bursts, inf evenly.",
    ),
    click.option("--trace", type=_FILE, metavar="FILE", help="Azure's CSV or Mooncake's JSON lines."),
    click.option("--time-scale", type=_POSITIVE, metavar="X", help="Stretch a trace's times X times."),
    click.option(
        "--prompts", type=_FILE, metavar="FILE", help='JSON lines of {"messages": […]} or {"prompt": …}.'
    ),
    click.option("--max-prompt-tokens", type=_TOKENS, metavar="N", help="Cut a trace's prompts to N tokens."),
    click.option(
        "--goodput",
        metavar="LIMITS",
        help="Count requests within ttft:MS,tpot:MS,e2el:MS.",
    ),
    click.option("--find-knee", is_flag=True, help="Look for the largest rate within --knee-ttft."),
    click.option(
        "--knee-ttft",
        type=_POSITIVE,
        default=2000.0,
        show_default=True,
        metavar="MS",
        help="Limit of the 95th percentile of TTFT.",
    ),
    click.option("--health", is_flag=True, help="Ask /health every 50 ms meanwhile."),
    click.option(
        "--timeout", type=_POSITIVE, default=600.0, show_default=True, metavar="S", help="Of one request."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and arrivals."),
    click.option(
        "--plot",
        type=click.Path(path_type=Path, dir_okay=False, writable=True),
        metavar="FILE.svg",
        help="Draw latencies and the run over time (llmc[plot]).",
    ),
)

SERVER_OPTIONS = (
    "server", "model", "api_key", "endpoint", "num_requests", "request_rate", "burstiness", "trace",
    "time_scale", "prompts", "max_prompt_tokens", "goodput", "find_knee", "knee_ttft", "health", "timeout",
    "seed", "plot",
)  # fmt: skip
_ARTIFACT_OPTIONS = ("repeat", "against_transformers", "profiled", "target", "context", "threads")


def load_options(function: F) -> F:
    """Adds the options; they arrive as keyword arguments named in `SERVER_OPTIONS`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_mode(context: click.Context) -> None:
    """Raises UsageError for an artifact and a server, for neither, and for options of the other one."""
    server = context.params["server"] is not None
    if server == (context.params["artifact"] is not None):
        raise click.UsageError("pass an ARTIFACT or --server URL, one of them", context)
    given = click.core.ParameterSource.COMMANDLINE
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    wrong = [
        names[name]
        for name in (_ARTIFACT_OPTIONS if server else SERVER_OPTIONS)
        if name != "server" and context.get_parameter_source(name) is given
    ]
    if wrong:
        which = "an ARTIFACT" if server else "--server"
        raise click.UsageError(f"{', '.join(wrong)}: only for {which}", context)


def bench_server(context: click.Context, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Measures the server and prints what came of it."""
    from . import plot, report
    from .session import Load, bench
    from .statistics import parse_goodput

    given = context.get_parameter_source("concurrency") is click.core.ParameterSource.COMMANDLINE
    levels = options["concurrency"] if given else ()
    if len(levels) > 1:
        raise InputError("--concurrency was given more than once", remedy="pass one with --server")
    if options["plot"] is not None:
        plot.check(options["plot"])
    load = Load(
        server=options["server"],
        concurrency=levels[0] if levels else None,
        rate=options["request_rate"],
        goodput=parse_goodput(options["goodput"]) if options["goodput"] else {},
        knee_ms=options["knee_ttft"] if options["find_knee"] else None,
        **{name: options[name] for name in _SAME_NAME},
    )
    with Progress() as progress:
        result, records = bench(load, progress)
    if options["plot"] is not None and records:
        plot.draw(options["plot"], records, result)
    emit(result, as_json=as_json, text=report.text(result))


_SAME_NAME = (
    "model", "api_key", "endpoint", "num_requests", "burstiness", "trace", "time_scale", "prompts",
    "prompt_tokens", "output_tokens", "max_prompt_tokens", "seed", "timeout", "health",
)  # fmt: skip
