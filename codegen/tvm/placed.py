"""Kernels with places for adapters: over a graph that is being compiled, or over an artifact that was
compiled without them.

The second needs the artifact's text and this machine's level alone; its weights stay where they are. Kernels
come from the library cache where they were made before.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.errors import ArtifactError, CompileError, UnsupportedError
from ...ir.printer import print_graph
from ...passes.adapt.lora_places import PlaceAdapters
from ...passes.base import PassContext
from ...passes.manager import run_passes
from ..extensions import extensions_key, parse_graph
from .cpu import TvmCpu, step_entry
from .libraries import Libraries
from .stored import stored_weights

if TYPE_CHECKING:
    from ...ir.core import Graph, Op
    from ..artifact import Artifact


def with_places(
    graph: Graph,
    *,
    gains: bool = True,
    embeddings: bool = True,
    experts: Callable[[Op], bool] | None = None,
) -> Graph:
    """A copy of a final graph that takes adapters, DoRA too with `gains`, those of `embeddings`, and those of
    experts in mixtures that `experts` says yes to, as a target does to those that it has kernels for.

    Raises UnsupportedError for what is no language model, and for one whose layers read other numbers than
    their modules do.
    """
    if graph.facts.get("kind") != "causal_lm":
        raise UnsupportedError(
            f"{graph.name} is no language model: requests choose no adapters for it",
            remedy="compile the adapter into it with --lora",
        )
    if graph.facts.get("scaled_channels"):
        raise UnsupportedError(
            f"{graph.name} was compiled with scaled channels (AWQ): adapters know of no scales",
            remedy="compile the model in another scheme, such as gptq-int4-g32, or merge it with --lora",
        )
    return run_passes(graph.clone(), [PlaceAdapters(gains, embeddings, experts)], PassContext())[0]


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
        target = TvmCpu(isa=isa, adapters=True)
        graph = with_places(parse_graph(artifact.read_text("ir.txt")), experts=target.supports)
    except CompileError as error:
        raise ArtifactError(
            f"{artifact.root / 'ir.txt'} is of another version of llmc, or its ops are of a package that is "
            f"not installed ({error.message})",
            remedy=f"install the package, or {again}",
        ) from None
    legal = target.legal(graph)
    stored_weights(artifact, legal, again)
    with tempfile.TemporaryDirectory(prefix="llmc-adapters-") as folder:
        library = Path(folder, f"{isa}.so")
        others = extensions_key(legal, target.name)
        with Libraries(print_graph(legal), {isa: library}, {isa: None}, others) as libraries:
            built = libraries.result(isa)
        entry = {
            **artifact.target(target.name),
            "kernels": [{"isa": isa, "path": library.name, "calls": built["calls"]}],
            **step_entry(legal, built),
        }
        yield entry, library


__all__ = ["placed_kernels", "with_places"]
