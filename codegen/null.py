"""Target `null`: no kernels and no weights, so that what surrounds a target can be tested anywhere, quickly.

Its executor (llmc.runtime.executor.null) answers with zeros of the right shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..ir import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the ops)
from ..ir.define import OPS
from .target import Progress, Target

if TYPE_CHECKING:
    from ..ir.core import Graph
    from .artifact import ArtifactWriter


@dataclass(frozen=True)
class Null(Target):
    """Takes any graph and writes nothing."""

    name: ClassVar[str] = "null"
    operations: ClassVar[frozenset[str]] = frozenset(OPS)

    def emitted(self) -> frozenset[str]:
        """Whatever there is."""
        return frozenset(OPS)

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """The manifest entry alone: the order of the inputs, and that zeros depend on no batch."""
        progress("null", 1.0)
        return {
            "options": self.options(),
            "batch_invariant": True,
            "arguments": [value.name for value in graph.inputs],
        }
