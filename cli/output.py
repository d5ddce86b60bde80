"""What commands print: with --json one JSON object on stdout, text otherwise; notes on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """The `--json` flag, as the parameter `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."
    )(function)


def emit(result: Mapping[str, Any], *, as_json: bool, text: str) -> None:
    """Prints the result: `result` as JSON, or `text` for a person."""
    click.echo(json.dumps(result, ensure_ascii=False, default=_plain) if as_json else text)


def _plain(value: Any) -> Any:
    """numpy scalars and paths, which json does not know."""
    return value.item() if hasattr(value, "item") else str(value)


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def notes_from_logging() -> None:
    """Sends what the package logs at INFO (the cache size chosen, the kernels picked) to stderr."""
    logger = logging.getLogger("llmc")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    logger.setLevel(logging.INFO)


def size(count: float) -> str:
    """Bytes with a decimal unit: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """Two aligned columns; rows whose value is None are left out."""
    kept = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in kept)


def tool_calls_text(entry: Mapping[str, Any] | None) -> str | None:
    """`tokenizer.tool_calls` of a manifest in words; None where there is none."""
    if entry is None:
        return None
    shown = "shown by the template" if entry.get("in_template") else "told in the system message"
    return f"{entry.get('format')}, tools are {shown}"


def rope_text(scaling: Mapping[str, Any] | None) -> str | None:
    """`model.rope_scaling` of a manifest in words; None where there is none."""
    if scaling is None:
        return None
    text = str(scaling["type"])
    if scaling.get("factor") is not None:
        text += f" × {scaling['factor']:g}"
    if scaling.get("original") is not None:
        text += f", trained on {scaling['original']} tokens"
    if scaling.get("when") == "needed":
        text += ", longer sequences only"
    if scaling.get("factors") is not None:
        text += f", its {scaling['factors']} factors"
    elif scaling.get("length") is not None:
        text += f", frequencies for {scaling['length']} tokens"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns under a header; the last column is not padded."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)
