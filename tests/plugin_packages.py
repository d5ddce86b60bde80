"""Packages of plugins as pip leaves them: modules and a dist-info folder, on a path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.extensions import load_ops, parse_graph
from llmc.codegen.legalize import DECOMPOSITIONS
from llmc.frontend.aten_table import REGISTERED, TABLE
from llmc.ir.core import Graph
from llmc.ir.define import OPS
from llmc.plugins import entries
from llmc.plugins.version import API_VERSION
from llmc.runtime.custom_sampler import load_sampler
from llmc.runtime.tool_calls.plugin import load_format


def install(
    site: Path,
    name: str,
    files: Mapping[str, str],
    entries: Mapping[str, Mapping[str, str]],
    *,
    version: str = "1.0",
    api: str | None = None,
) -> Path:
    """Write a package into the folder `site`, which is returned.

    Args:
        files: relative path → text.
        entries: entry-point group → name → value.
        api: the version of the plugin API that it declares, besides what `entries` says; None for none.
    """
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = {group: dict(held) for group, held in entries.items()}
    if api is not None:
        groups.setdefault("llmc.plugins", {})[api] = next(iter(files)).partition("/")[0].removesuffix(".py")
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in held.items()) for g, held in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    tops = sorted({path.partition("/")[0].removesuffix(".py") for path in files})
    (info / "top_level.txt").write_text("\n".join(tops) + "\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    return site


@contextmanager
def installed(*sites: Path) -> Generator[None]:
    """Those folders at the front of the path, and what was known of packages forgotten; afterwards all is
    as before.
    """
    tables: list[dict[str, Any]] = [OPS, TABLE, REGISTERED, DECOMPOSITIONS]
    before = [dict(table) for table in tables]
    modules, path = set(sys.modules), list(sys.path)
    sys.path[:0] = map(str, sites)
    forget()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if any(file.startswith(str(site)) for site in sites):
                del sys.modules[name]
        for table, held in zip(tables, before, strict=True):
            table.clear()
            table.update(held)
        forget()


def forget() -> None:
    """What was read of installed packages is read again."""
    importlib.invalidate_caches()
    entries.registered.cache_clear()
    entries._distributions.cache_clear()
    entries._bringing.cache_clear()
    entries._warned.clear()
    load_ops.cache_clear()
    load_format.cache_clear()
    load_sampler.cache_clear()


# What the tests of broken plugins share

Use = Callable[..., Path]
SMALL = """
graph "small" stage="fused"
input %x : float32[T, 4]
%0 : float32[T, 4] = relu(%x)
return "y" = %0
"""


PASSES = {"llmc.passes": {"bad": "bad_plugin:Bad"}}
QUANTIZERS = {"llmc.quantizers": {"bad": "bad_plugin:Bad"}}


@pytest.fixture
def use(tmp_path: Path) -> Generator[Use]:
    """Installs a package of one module (or several files) and makes it known: use(text, entries, …)."""
    with ExitStack() as stack:

        def add(
            text: str,
            entries: Mapping[str, Mapping[str, str]],
            *,
            name: str = "bad-plugin",
            api: str | None = API_VERSION,
        ) -> Path:
            module = name.replace("-", "_")
            site = install(tmp_path / name, name, {f"{module}.py": text}, entries, api=api)
            stack.enter_context(installed(site))
            return site

        yield add


def small() -> Graph:
    return parse_graph(SMALL)


def a_pass(body: str, name: str = "bad") -> str:
    return f"""
from dataclasses import dataclass
from llmc.plugins import CompileError, Pass, PassResult, ops

@dataclass(frozen=True)
class Bad(Pass):
    \"\"\"A pass.\"\"\"
    name = "{name}"
    size: int = 1

    def run(self, graph, context):
        {body}
"""
