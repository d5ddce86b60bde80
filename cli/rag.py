"""`llmc rag`: answers from one's own documents. Its commands stand in modules of their own."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "index": "rag_index",
    "sync": "rag_index",
    "add": "rag_documents",
    "update": "rag_documents",
    "delete": "rag_documents",
    "embed": "rag_index",
    "query": "rag_query",
    "eval": "rag_eval",
    "documents": "rag_documents",
    "show": "rag_documents",
    "stats": "rag_store",
    "vacuum": "rag_store",
    "dump": "rag_store",
    "export-graph": "rag_store",
}
"""Command → the module of this package that holds it, as a function of its name (or `command`)."""


class _Group(click.Group):
    """Imports a command's module when that command is asked for (all of them, for the list in `--help`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name]}", __package__)
        name = cmd_name.replace("-", "_")
        return getattr(module, name if hasattr(module, name) else "command")


@click.group("rag", cls=_Group, short_help="Search your documents, and answer from them.")
def command() -> None:
    """Index a folder of documents, search it, and answer from it with citations, all in one process.

    KB is the store: a file, postgresql://…, or the folder that was indexed (its store is NAME.kb in the
    current directory or beside the folder). txt, md, html, pdf, docx, csv, json lines and source code are
    read. Every command takes --json.
    """
