"""Declares the stage that a graph has reached; the manager then holds it to that stage's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ir.core import Graph
from .adapt.lora_embeddings import TIED
from .base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class MarkStage(Pass):
    """Set `graph.stage`. The verifier runs right after and refuses what the stage forbids."""

    name = "mark-stage"
    stage: str = "canonical"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        changed = graph.stage != self.stage
        graph.stage = self.stage
        # Names of the checkpoint's parameters: of what adapters change, not of what comes.
        tied = graph.facts.pop("tied", {})
        if graph.facts.get("kind") == "causal_lm" and TIED not in graph.facts:
            graph.facts[TIED] = _modules(graph, tied)
        return PassResult(graph, changed)


def _modules(graph: Graph, tied: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Modules that have one table, which an embedding reads."""
    shapes = {name: graph.weights[entry["of"]].shape for name, entry in tied.items()}
    read = [shapes[name] for name, entry in tied.items() if entry["embedding"]]
    return sorted(name.removesuffix(".weight") for name, shape in shapes.items() if shape in read)
