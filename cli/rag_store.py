"""`llmc rag stats`, `vacuum`, `dump`, `export-graph`: a store as a whole."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option, size
from .rag_options import kb_argument, open_kb

if TYPE_CHECKING:
    pass

_FORMATS = ("graphml", "json")


@click.command("stats", short_help="Say what a store holds.")
@kb_argument
@json_option
def stats(kb: str, as_json: bool) -> None:
    """Say how much KB holds, and what it was made with."""
    with contextlib.ExitStack() as stack:
        found = open_kb(stack, kb, embedder="none").stats()
    shown: dict[str, Any] = {**found, "bytes": None if found["bytes"] is None else size(found["bytes"])}
    rows = [(name.replace("_", " "), value) for name, value in shown.items()]
    emit({"kb": found["location"], **found}, as_json=as_json, text=facts(rows))


@click.command("vacuum", short_help="Give space back.")
@kb_argument
@json_option
def vacuum(kb: str, as_json: bool) -> None:
    """Give the space of deleted documents back."""
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        before = opened.stats()["bytes"]
        opened.vacuum()
        after = opened.stats()["bytes"]
        result = {"kb": opened.store.location, "bytes_before": before, "bytes": after}
    text = "done" if after is None else f"{size(before)} → {size(after)}"
    emit(result, as_json=as_json, text=text)


@click.command("dump", short_help="Write what a store holds.")
@kb_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Into this file, not to stdout.")
@json_option
def dump(kb: str, output: Path | None, as_json: bool) -> None:
    """Write the logical content of KB as JSON lines: equal for equal documents, in whatever order they came.

    Arrays stand there as their sha256. With --json it is one object {"lines": [...]}, or where -o is given
    how many lines were written.
    """
    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        lines = opened.store.dump()
        if output is not None:
            count = _write(output, lines)
            result = {"kb": opened.store.location, "output": str(output), "lines": count}
            emit(result, as_json=as_json, text=f"{count} lines in {output}")
        elif as_json:
            parsed = [json.loads(line) for line in lines]
            emit({"kb": opened.store.location, "lines": parsed}, as_json=True, text="")
        else:
            for line in lines:
                click.echo(line)


def _write(path: Path, lines: Iterator[str]) -> int:
    with path.open("w", encoding="utf-8") as file:
        return sum(bool(file.write(line + "\n")) for line in lines)


@click.command("export-graph", short_help="Write the graph of passages and entities.")
@kb_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Into this file, not to stdout.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(_FORMATS),
    help="[default: as the file is called, or graphml]",
)
@json_option
def export_graph(kb: str, output: Path | None, kind: str | None, as_json: bool) -> None:
    """Write the graph of KB, as GraphML or JSON, for Gephi, networkx and their like.

    Nodes are documents, passages and entities; edges say which passage is of which document, names which
    entity, and which relations were found, each with the passage that it comes from.
    """
    if kind is None:
        json_wanted = as_json if output is None else output.suffix == ".json"
        kind = "json" if json_wanted else "graphml"
    if as_json and output is None and kind != "json":
        raise InputError("--json prints JSON, not GraphML", remedy="name a file: -o FILE.graphml")
    from ..runtime.rag.graph_export import graph_of, write_graphml

    with contextlib.ExitStack() as stack:
        opened = open_kb(stack, kb, embedder="none")
        graph = graph_of(opened.store)
        if output is None and kind == "json":
            emit({"kb": opened.store.location, **graph}, as_json=True, text="")
            return
        if output is None:
            write_graphml(graph, sys.stdout)
            return
        with output.open("w", encoding="utf-8") as file:
            if kind == "json":
                json.dump(graph, file, ensure_ascii=False)
            else:
                write_graphml(graph, file)
        counts = {"nodes": len(graph["nodes"]), "edges": len(graph["edges"])}
        result = {"kb": opened.store.location, "output": str(output), "format": kind, **counts}
    emit(result, as_json=as_json, text=f"{counts['nodes']} nodes, {counts['edges']} edges in {output}")
