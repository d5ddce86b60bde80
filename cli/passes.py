"""`llmc passes`: the registered passes, their options and who brings them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import LlmcError
from .output import emit, json_option, table

if TYPE_CHECKING:
    from ..passes.registry import Registered


@click.command("passes", short_help="List the passes, with their options and origin.")
@json_option
def command(as_json: bool) -> None:
    """List the passes that change a graph and the schemes of --quant, with their options and origin."""
    from ..passes.registry import registered

    passes = [_pass(entry) for entry in registered("llmc.passes").values()]
    quantizers = [_quantizer(entry) for entry in registered("llmc.quantizers").values()]
    result = {"passes": passes, "quantizers": quantizers}
    emit(result, as_json=as_json, text=_text(passes, quantizers))


def _load(entry: Registered) -> tuple[Any, dict[str, Any]]:
    """(class or None, the row so far); a plugin that cannot be imported says so in its row."""
    from ..passes.registry import Quantizer, load_pass

    row: dict[str, Any] = {"name": entry.name, "package": entry.origin}
    try:
        found = load_pass(entry) if entry.kind == "pass" else entry.load_class(Quantizer)
    except LlmcError as error:
        return None, {**row, "error": str(error)}
    return found, {**row, "summary": _summary(found)}


def _summary(found: Any) -> str:
    return " ".join((found.__doc__ or "").strip().split("\n\n")[0].split())


def _pass(entry: Registered) -> dict[str, Any]:
    found, row = _load(entry)
    if found is None:
        return row
    options = [
        {"name": field.name, "type": str(field.type), "default": _default(field)}
        for field in dataclasses.fields(found)
    ]
    return {**row, "options": options, "requires": found.requires, "ensures": found.ensures}


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default is dataclasses.MISSING else field.default


def _quantizer(entry: Registered) -> dict[str, Any]:
    found, row = _load(entry)
    return row if found is None else {**row, "schemes": list(found.forms)}


def _text(passes: list[dict[str, Any]], quantizers: list[dict[str, Any]]) -> str:
    rows = [(_spec(row), row["package"], row.get("summary") or row.get("error", "")) for row in passes]
    schemes = [
        (
            ", ".join(row.get("schemes", [row["name"]])),
            row["package"],
            row.get("summary") or row.get("error", ""),
        )
        for row in quantizers
    ]
    return f"{table(('pass', 'from', ''), rows)}\n\n{table(('--quant', 'from', ''), schemes)}"


def _spec(row: dict[str, Any]) -> str:
    options = ",".join(f"{option['name']}={option['default']}" for option in row.get("options", []))
    return f"{row['name']}{{{options}}}" if options else row["name"]
