"""docs/cli.md, made from the commands: `python -m llmc.cli.reference > docs/cli.md`, or `make docs`."""

from __future__ import annotations

import inspect
import sys

import click

from .main import COMMANDS, llmc

_HEAD = """# Command line

Made from the commands by `make docs`; a test compares. `llmc COMMAND --help` prints the same.
"""


def text() -> str:
    """The page, from the parameters and not from click's help, whose layout changes between versions."""
    group = click.Context(llmc, info_name="llmc")
    parts = [_HEAD, _paragraphs(llmc.help or ""), ""]
    for name in COMMANDS:
        command = llmc.get_command(group, name)
        if command is not None:
            parts.append(_command(command, name))
            parts += _subcommands(command, name)
    return "\n".join(parts)


def _subcommands(command: click.Command, name: str) -> list[str]:
    """The sections of a group's commands."""
    if not isinstance(command, click.Group):
        return []
    context = click.Context(command, info_name=name)
    found = [(word, command.get_command(context, word)) for word in command.list_commands(context)]
    return [_command(one, f"{name} {word}") for word, one in found if one is not None]


def _command(command: click.Command, name: str) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    more = ["COMMAND"] if isinstance(command, click.Group) else ["[OPTIONS]"] if options else []
    usage = " ".join(["llmc", name, *(_argument(p) for p in arguments), *more])
    lines = [f"## `{usage}`", "", _paragraphs(command.help or "")]
    if options:
        lines += ["", "| option | |", "|---|---|", *(_option(p) for p in options)]
    return "\n".join([*lines, ""])


def _paragraphs(docstring: str) -> str:
    blocks = inspect.cleandoc(docstring).replace("\b\n", "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def _argument(argument: click.Argument) -> str:
    name = argument.human_readable_name.upper()
    name = f"{name}…" if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _option(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        values = option.type.choices if isinstance(option.type, click.Choice) else None
        kind = "|".join(map(str, values)) if values else option.metavar or option.type.name.upper().split()[0]
        names += f" `{kind}`".replace("|", "\\|")
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    if option.show_default is True and not option.is_flag:
        default = option.default
        shown = ", ".join(map(str, default)) if isinstance(default, tuple | list) else default
        text += f" Default: {shown}."
    return f"| {names} | {text}{' Required.' if option.required else ''} |"


if __name__ == "__main__":
    sys.stdout.write(text())
