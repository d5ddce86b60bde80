"""`llmc targets`: the registered targets, their options and who brings them."""

from __future__ import annotations

from typing import Any

import click

from ..ir.errors import LlmcError
from .output import emit, json_option, table


@click.command("targets", short_help="List the targets, with their options and origin.")
@json_option
def command(as_json: bool) -> None:
    """List the targets that a model can be compiled for, with their options and origin."""
    rows = listed()
    emit({"targets": rows}, as_json=as_json, text=_text(rows))


def listed() -> list[dict[str, Any]]:
    """One entry a target; one that cannot be imported carries `error` instead of its options."""
    from ..codegen.target import list_targets

    rows: list[dict[str, Any]] = []
    for entry in list_targets():
        row: dict[str, Any] = {"name": entry.name, "package": entry.package}
        try:
            row["summary"] = (entry.load().__doc__ or "").strip().split("\n")[0]
            row["options"] = [
                {"name": option.name, "type": option.type, "default": option.default, "help": option.help}
                for option in entry.options()
            ]
        except LlmcError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def _text(rows: list[dict[str, Any]]) -> str:
    lines = [
        table(("target", "from", ""), ((row["name"], row["package"], row.get("summary", "")) for row in rows))
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"\n{row['name']}: {row['error']}")
        for option in row.get("options", []):
            spec = f"{row['name']}:{option['name']}=<{option['type']}>"
            lines.append(f"\n{spec} (default {option['default']})\n    {option['help']}")
    return "\n".join(lines)
