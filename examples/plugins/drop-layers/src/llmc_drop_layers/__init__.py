"""Two passes that make a model shallower.

    x1 = layer_0(x0); x2 = layer_1(x1); x3 = layer_2(x2)
    →   drop-layers{first=1,count=1}   x1 = layer_0(x0); x3 = layer_2(x1)

`drop-layers` takes the layers that it is told, `drop-idle-layers` those whose output is most like their input
(block influence: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect", section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmc.plugins import Graph, InputError, Pass, PassContext, PassResult

from .layers import Layer, find_layers, influence

__all__ = ["DropIdleLayers", "DropLayers"]


@dataclass(frozen=True)
class DropLayers(Pass):
    """Leave out `count` layers from layer `first` on, counted from 0."""

    name = "drop-layers"
    requires = "fused"
    first: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if self.first < 0 or self.count < 1:
            raise InputError(
                f"pass {self.name}: first={self.first}, count={self.count}",
                remedy="give the first layer from 0 on, and at least one layer",
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        layers = find_layers(graph)
        _check_count(self.name, self.first + self.count, self.count, len(layers))
        chosen = range(self.first, self.first + self.count)
        _drop(graph, [layers[i] for i in chosen])
        return PassResult(graph, True, [f"left out layers {', '.join(map(str, chosen))} of {len(layers)}"])


@dataclass(frozen=True)
class DropIdleLayers(Pass):
    """Leave out the `count` layers that change their input least, measured on calibration text; the first and
    the last layer stay.
    """

    name = "drop-idle-layers"
    requires = "fused"
    needs_calibration = True
    calibration_tokens = 8 * 512
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"pass {self.name}: count={self.count}", remedy="leave out at least one layer")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        layers = find_layers(graph)
        _check_count(self.name, self.count + 2, self.count, len(layers))
        assert context.calibration is not None, "the compiler gives it to a pass that needs it"
        scores = influence(graph, layers, context.calibration.sequences, context.progress)
        inner = sorted(range(1, len(layers) - 1), key=lambda i: scores[i])
        chosen = sorted(inner[: self.count])
        _drop(graph, [layers[i] for i in chosen])
        shown = ", ".join(f"{i} ({scores[i]:.3f})" for i in chosen)
        return PassResult(graph, True, [f"left out layers {shown} of {len(layers)}, by their influence"])


def _check_count(name: str, needed: int, count: int, found: int) -> None:
    if needed > found or count >= found:
        raise InputError(
            f"pass {name}: {count} layers cannot be left out of {found}", remedy="ask for fewer layers"
        )


def _drop(graph: Graph, layers: list[Layer]) -> None:
    """From the last to the first: what a layer reads may be what the one before it gives."""
    for layer in reversed(layers):
        graph.replace_uses(layer.after, layer.before)
    graph.drop_dead()
