"""Ops that other packages bring (entry-point group `llmc.ops`: name → a module).

Importing such a module registers ops (`@op`), handlers of torch operators, and decompositions. That happens
when a compilation begins, and again in the process of the kernel compiler, which reads the graph from text.
What emits an op is imported only where an op needs it (`Op.emitters`).

A module that fails, or that claims what is registered already, leaves no trace: a warning names its package,
and models that do not need it compile as ever.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, MutableMapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..frontend.aten_table import REGISTERED, TABLE
from ..ir.core import Graph, Op
from ..ir.define import OPS
from ..ir.errors import CompileError, LlmcError
from ..ir.parser import parse
from ..plugins.entries import OURS, Registered, blaming, package_of, registered, warn
from .legalize import DECOMPOSITIONS

GROUP = "llmc.ops"


def load_module(item: Registered) -> None:
    """Import one package's module of ops. Raises InputError, naming it, where that fails; nothing of it is
    registered then.
    """
    tables: list[MutableMapping[str, Any]] = [OPS, TABLE, REGISTERED, DECOMPOSITIONS]
    before = [dict(table) for table in tables]
    try:
        item.load()
    except LlmcError:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        raise


@cache
def load_ops() -> tuple[str, ...]:
    """Import every package's module of ops, once in a process; what was wrong with those that failed."""
    failed: list[str] = []
    for item in registered(GROUP).values():
        try:
            load_module(item)
        except LlmcError as error:
            failed.append(str(error))
            warn(str(error))
    return tuple(failed)


def parse_graph(text: str) -> Graph:
    """The graph of a text, whose ops may be of other packages.

    Raises CompileError, which says what was wrong with packages of ops where an op is not known.
    """
    failed = load_ops()
    try:
        return parse(text)
    except CompileError as error:
        if not failed:
            raise
        raise CompileError(f"{error.message} ({'; '.join(failed)})", remedy=error.remedy) from error


def import_emitters(op: Op, target: str) -> bool:
    """Import the module that emits an op of another package for `target`; whether it names one. Raises
    CompileError, naming the package, where it cannot be imported.
    """
    module = op.emitters.get(target)
    if module is None:
        return False
    with blaming(f"{target}'s emitter of {op.opname}", op):
        importlib.import_module(module)
    return True


def extensions_key(ops: Iterable[Op], target: str) -> str:
    """What a kernel library depends on besides our own sources: a hash of the packages of a graph's ops and
    of their emitters; "" where all are ours.
    """
    modules: set[str] = set()
    for op in ops:
        if package_of(op) is not None:
            modules |= {type(op).__module__, op.emitters.get(target, "")} - {""}
    tops = sorted({module.partition(".")[0] for module in modules} - {OURS})
    if not tops:
        return ""
    found = hashlib.sha256()
    for top in tops:
        for path in _sources(top):
            found.update(f"{path.name} {path.stat().st_size}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _sources(top: str) -> list[Path]:
    spec = find_spec(top)
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return found or ([] if spec.origin is None else [Path(spec.origin)])
