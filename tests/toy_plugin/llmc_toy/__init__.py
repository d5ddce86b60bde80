"""A plugin of llmc: each class is all that its kind needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from llmc.codegen.target import Target
from llmc.ir.core import Graph
from llmc.passes.base import Pass, PassContext, PassResult
from llmc.passes.quantize.walk import QuantizeRtn
from llmc.passes.registry import Quantizer


@dataclass(frozen=True)
class Rename(Pass):
    """Give the graph another name."""

    name = "toy-rename"
    to: str = "toy"
    loud: bool = False

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        graph.name = self.to.upper() if self.loud else self.to
        return PassResult(graph, True, [f"renamed to {graph.name}"])


@dataclass(frozen=True)
class ToyTarget(Target):
    """Counts ops."""

    name: ClassVar[str] = "toy"
    width: int = field(default=4, metadata={"help": "lanes"})

    def compile(self, graph: Graph, writer: Any, *, progress: Any) -> dict[str, Any]:
        writer.path("targets/toy/ops.txt").write_text(str(len(graph.ops)))
        return {"options": self.options(), "batch_invariant": True, "ops": "targets/toy/ops.txt"}


class Halves(Quantizer):
    """`toy-int4`: groups of eight."""

    forms = ("toy-int4",)

    def passes(self, scheme: str) -> list[Pass] | None:
        return [QuantizeRtn(bits=4, group=8)] if scheme == "toy-int4" else None
