"""Sampling options that `run` and `chat` share, and what they mean for an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..runtime.llm import LLM
    from ..runtime.sampling_params import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

# The parameters' own names, so that a value that the runtime refuses is named as it was given.
_OPTIONS = (
    click.option("--max-tokens", type=int, default=512, show_default=True, help="Longest answer, in tokens."),
    click.option("--temperature", type=float, help="0 is greedy.  [default: the model's, or 0]"),
    click.option(
        "--top-k", type=int, help="Only the K most likely tokens; 0 is all.  [default: the model's]"
    ),
    click.option(
        "--top-p", type=float, help="Only the likeliest tokens that sum to P.  [default: the model's]"
    ),
    click.option("--min-p", type=float, help="Only tokens at least P times as likely as the likeliest."),
    click.option(
        "--repetition-penalty", type=float, help="Above 1: less of what was said.  [default: the model's]"
    ),
    click.option("--seed", type=int, help="The same seed draws the same tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable."),
    click.option(
        "--sampler", metavar="NAME[{option=value,…}]", help="A plugin's sampler.  [llmc plugins lists them]"
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end of the answer."),
)

sinks_option = click.option(
    "--sinks",
    type=click.IntRange(min=0),
    metavar="N",
    help="Go on beyond the context: evict older tokens, but not the first N (docs/long-context.md).",
)

_runtime_options = (
    click.option(
        "--target", metavar="NAME", help="Which of the artifact's targets.  [default: the first that runs]"
    ),
    click.option(
        "--context",
        type=click.IntRange(min=1),
        help="Longest sequence, in tokens.  [default: the artifact's]",
    ),
    sinks_option,
    click.option(
        "--speculate",
        type=click.IntRange(min=0, max=15),
        help="Guess N tokens at a time; the answer is the same.  [default: 0]",
    ),
    click.option(
        "--draft", metavar="ARTIFACT", help="A smaller model that guesses; else the text's own past."
    ),
    click.option(
        "--adapter", metavar="PATH", help="Answer with this LoRA adapter (PEFT's folder, or GGUF file)."
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: one a core]"
    ),
)


def sampling_options(function: F) -> F:
    """Adds the options; they arrive as keyword arguments that `sampling_params` takes."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def runtime_options(function: F) -> F:
    """`--target`, `--context`, `--threads`: keyword arguments of `llmc.load`."""
    for option in reversed(_runtime_options):
        function = option(function)
    return function


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the runtime that were given, options of sampling)."""
    names = ("target", "context", "sinks", "threads", "speculate", "draft", "adapter")
    runtime = {name: options[name] for name in names if options.get(name) is not None}
    return runtime, {name: value for name, value in options.items() if name not in names}


def sampling_params(llm: LLM, given: Mapping[str, Any]) -> SamplingParams:
    """What was given on the command line over the model's own defaults.

    Raises InputError, naming the option, for a value that makes no sense.
    """
    values = {name: value for name, value in given.items() if value is not None}
    params = llm.sampling(**values)
    params.validate(llm.executor.vocab_size)
    return params
