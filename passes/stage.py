"""Declares the stage that a graph has reached; the manager then holds it to that stage's table."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.core import Graph
from .base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class MarkStage(Pass):
    """Set `graph.stage`. The verifier runs right after and refuses what the stage forbids."""

    name = "mark-stage"
    stage: str = "canonical"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        changed = graph.stage != self.stage
        graph.stage = self.stage
        graph.facts.pop("tied", None)  # names of the checkpoint: of what adapters change, not of what comes
        return PassResult(graph, changed)
