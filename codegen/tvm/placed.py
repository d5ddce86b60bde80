"""Kernels with places for adapters: over a graph that is being compiled, or over an artifact that was
compiled without them.

The second needs the artifact's text and this machine's level alone; its weights stay where they are. Kernels
come from the library cache where they were made before.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.errors import ArtifactError, CompileError, UnsupportedError
from ...ir.ops.lora import MOST_RANK
from ...ir.parser import parse
from ...ir.printer import print_graph
from ...passes.adapt.lora_places import PlaceAdapters
from ...passes.base import PassContext
from ...passes.manager import run_passes
from ..extensions import extensions_key
from ..legalize import legalize
from .cpu import TvmCpu, interface, supports
from .libraries import Libraries
from .weights import stored_shape, weight_roles

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import Artifact


def with_places(graph: Graph) -> Graph:
    """A copy of a final graph that takes adapters. Raises UnsupportedError for what is no language model."""
    if graph.facts.get("kind") != "causal_lm":
        raise UnsupportedError(
            f"{graph.name} is no language model: requests choose no adapters for it",
            remedy="compile the adapter into it with --lora",
        )
    return run_passes(graph.clone(), [PlaceAdapters()], PassContext())[0]


@contextmanager
def placed_kernels(artifact: Artifact, isa: str) -> Generator[tuple[Mapping[str, Any], Path]]:
    """A target's entry as in the manifest, and a library of kernels that take adapters, over the weights of
    an artifact; the file is there while the `with` block runs.

    Raises UnsupportedError where TVM is not installed, ArtifactError where another version wrote the
    artifact.
    """
    again = "compile the model again, with --adapters"
    if importlib.util.find_spec("tvm") is None:
        raise UnsupportedError(
            f"the kernels of {artifact.root.name} have no places for adapters, and what makes others is not "
            "installed",
            remedy="pip install 'llmc[compile]', or compile the model with --adapters",
        )
    try:
        graph = with_places(parse(artifact.read_text("ir.txt")))
    except CompileError as error:
        raise ArtifactError(
            f"{artifact.root / 'ir.txt'} is of another version of llmc ({error.message})", remedy=again
        ) from None
    target = TvmCpu(isa=isa, adapters=True)
    legal = legalize(graph, target.emitted(), supports)
    _check_weights(artifact, legal, again)
    with tempfile.TemporaryDirectory(prefix="llmc-adapters-") as folder:
        library = Path(folder, f"{isa}.so")
        others = extensions_key(legal, target.name)
        with Libraries(print_graph(legal), {isa: library}, {isa: None}, others) as libraries:
            built = libraries.result(isa)
        entry = {
            **artifact.target(target.name),
            "kernels": [{"isa": isa, "path": library.name, "calls": built["calls"]}],
            "arguments": built["arguments"],
            "symbols": built["symbols"],
            "adapters": {**graph.facts["adapters"], "most_rank": MOST_RANK},
            **interface(legal),
        }
        yield entry, library


def _check_weights(artifact: Artifact, graph: Graph, again: str) -> None:
    """The artifact's weights must lie as this version's kernels read them."""
    stored, roles = artifact.weights("tvm-cpu"), weight_roles(graph)
    for name, value in graph.weights.items():
        shape, dtype = stored_shape(value, roles[value])
        found = stored.get(name)
        if found is None or found.shape != shape or str(found.dtype) != dtype:
            raise ArtifactError(
                f"{artifact.root}: weight {name} is stored in another way than these kernels read it",
                remedy=again,
            )


__all__ = ["placed_kernels", "with_places"]
