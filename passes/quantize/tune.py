"""Scales and norms tuned on what matters in the end: KL of the next-token distribution to the source model's.

Layer-wise methods make each layer's output right and know nothing of what the layers after it do with the
error. Here the codes stay, and the parameters that cost no bits follow the gradient of the whole model's
loss by Adam (Kingma & Ba 2015), one sequence a step:

    scale · exp(δ)      of every group of every quantized layer
    norm weights        (and biases) of every block

Back-propagation goes block by block: forward keeps each block's inputs, backward runs the block again with
gradients and hands on those of its inputs. A block's parameters are updated as soon as its gradients are
there, so that memory is one block, its gradients, and the inputs of all blocks for one sequence. The loss
goes through the head in pieces of the vocabulary (`head.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.nn import LayerNorm, RmsNorm
from ...ir.weights import ArrayTensor
from .blocks import Block, first_values, read_weight, run_ops, segment_weights, split_blocks
from .calibrated import Array, Walked, as_coded
from .grid import Grid, storable
from .head import find_head

if TYPE_CHECKING:
    import torch

RATE = 1e-3
WARM_UP = 5  # steps
BETAS = (0.9, 0.99)
EPSILON = 1e-8


@dataclass
class Parameter:
    """A tuned tensor with Adam's moments; float32 of one shape."""

    value: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor

    @staticmethod
    def of(value: torch.Tensor) -> Parameter:
        import torch

        return Parameter(value, torch.zeros_like(value), torch.zeros_like(value))

    def step(self, gradient: torch.Tensor, rate: float, count: int) -> None:
        """Adam's update number `count` (from 1)."""
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        mean = self.mean / (1 - BETAS[0] ** count)
        square = self.square / (1 - BETAS[1] ** count)
        self.value.addcdiv_(mean, square.sqrt_().add_(EPSILON), value=-rate)


@dataclass
class Tuning:
    """What is tuned: δ [N, G] by quantized weight, and norm weights by value."""

    graph: Graph
    found: Walked
    deltas: dict[Value, Parameter] = field(default_factory=dict[Value, Parameter])
    norms: dict[Value, Parameter] = field(default_factory=dict[Value, Parameter])
    steps: int = 0

    @staticmethod
    def start(graph: Graph, found: Walked) -> Tuning:
        import torch

        tuning = Tuning(graph, found)
        for weight, parts in found.coded.items():
            tuning.deltas[weight] = Parameter.of(torch.zeros(parts["scale"].shape))
        for op in graph:
            if isinstance(op, (RmsNorm, LayerNorm)):
                for value in op.operands:
                    if value.is_weight and value not in tuning.norms:
                        tuning.norms[value] = Parameter.of(read_weight(value).float().clone())
        return tuning

    def arrays(self) -> dict[str, Array]:
        """Everything that a later process needs to go on."""
        found: dict[str, Array] = {"steps": np.array([self.steps], np.int64)}
        for kind, group in (("delta", self.deltas), ("norm", self.norms)):
            for value, p in group.items():
                for part in ("value", "mean", "square"):
                    found[f"{kind}.{part}.{value.name}"] = getattr(p, part).numpy()
        return found

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """The inverse of `arrays`."""
        import torch

        self.steps = int(arrays["steps"][0])
        for kind, group in (("delta", self.deltas), ("norm", self.norms)):
            for value, p in group.items():
                for part in ("value", "mean", "square"):
                    stored = torch.from_numpy(np.array(arrays[f"{kind}.{part}.{value.name}"]))
                    setattr(p, part, stored.clone())

    def finish(self) -> None:
        """Write the tuned scales into the walk's result, and the norms into the graph."""
        import torch

        for weight, p in self.deltas.items():
            parts = self.found.coded[weight]
            scale = torch.from_numpy(parts["scale"].astype(np.float32)) * torch.exp(p.value)
            parts["scale"] = storable(scale).numpy().astype(np.float16)
        for value, p in self.norms.items():
            assert value.weight is not None
            value.weight = ArrayTensor(p.value.numpy().astype(np.float32), f"tuned({value.weight.source})")


class _Weights:
    """The weights of one block as tensors; those that are tuned carry gradients where asked."""

    def __init__(self, tuning: Tuning, block: Block, *, gradients: bool) -> None:
        self.leaves: dict[Value, torch.Tensor] = {}
        self._tensors: dict[Value, torch.Tensor] = {}
        for value in dict.fromkeys(v for s in block.segments for v in segment_weights(s)):
            if value in tuning.norms:
                leaf = tuning.norms[value].value.detach().clone()
                self._tensors[value] = self._leaf(value, leaf, gradients)
            elif value in tuning.deltas:
                delta = self._leaf(value, tuning.deltas[value].value.detach().clone(), gradients)
                parts, grid = tuning.found.coded[value], tuning.found.grids[value]
                self._tensors[value] = scaled(parts, grid, delta)
            else:
                self._tensors[value] = read_weight(value)

    def _leaf(self, value: Value, tensor: torch.Tensor, gradients: bool) -> torch.Tensor:
        if gradients:
            self.leaves[value] = tensor.requires_grad_(True)
        return tensor

    def __call__(self, value: Value) -> torch.Tensor:
        return self._tensors[value]


def scaled(parts: Mapping[str, Array], grid: Grid, delta: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] = (code − zero) · scale · exp(δ)."""
    import torch

    coded = as_coded(parts)
    n, k = coded.codes.shape
    whole = grid.pad(coded.codes - grid.spread(coded.zero, k))
    return (whole * (coded.scale * torch.exp(delta))[..., None]).reshape(n, -1)[:, :k]


def tune(
    tuning: Tuning,
    sequences: Sequence[Array],
    source: Callable[[int], torch.Tensor],
    steps: int,
    *,
    rate: float = RATE,
    after_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Go on until `steps` steps are done.

    Args:
        sequences: token ids int64 [L] each; step s takes number s modulo their count.
        source: the source model's hidden states before the head [L, D] of a sequence by number.
        after_step: told the mean KL of the step's sequence, in nats.
    """
    blocks = split_blocks(tuning.graph)
    cache: dict[Any, Any] = {}
    while tuning.steps < steps:
        number = tuning.steps % len(sequences)
        warm = min(1.0, (tuning.steps + 1) / WARM_UP)
        now = rate * warm * 0.5 * (1 + math.cos(math.pi * tuning.steps / steps))
        tuning.steps += 1
        after_step(_step(tuning, blocks, sequences[number], source(number), now, cache))


def _step(
    tuning: Tuning,
    blocks: Sequence[Block],
    ids: Array,
    source: torch.Tensor,
    rate: float,
    cache: dict[Any, Any],
) -> float:
    """One forward and backward pass of one sequence; its mean KL before the update."""
    import torch

    head = find_head(tuning.graph)
    values, dims = first_values(tuning.graph, ids)
    kept: list[tuple[Block, dict[Value, Any]]] = []
    with torch.no_grad():
        for block in blocks:
            block = _before_head(block, head.layer)
            kept.append((block, values))
            fetch = read_weight if block.name == "prologue" else _Weights(tuning, block, gradients=False)
            wanted = [v for v in block.outputs if v not in values]
            made = run_ops(block.ops, values, wanted, dims, fetch)
            values = {v: made[v] if v in made else values[v] for v in block.outputs}
        loss, gradient = _divergence(head, source, values[head.x][0], dims, cache)
    gradients: dict[Value, torch.Tensor] = {head.x: gradient[None]}
    for block, inputs in reversed(kept):
        if block.name != "prologue":
            gradients = _backward(tuning, block, inputs, gradients, dims, rate)
    return loss


def _before_head(block: Block, layer: Any) -> Block:
    """The block without the head and what follows it."""
    segments = [s for s in block.segments if layer not in s.layers]
    return block if len(segments) == len(block.segments) else Block(block.name, tuple(segments))


def _backward(
    tuning: Tuning,
    block: Block,
    inputs: Mapping[Value, Any],
    gradients: Mapping[Value, torch.Tensor],
    dims: Mapping[str, int],
    rate: float,
) -> dict[Value, torch.Tensor]:
    """Update a block's parameters; the loss's gradients with respect to its inputs."""
    import torch

    weights = _Weights(tuning, block, gradients=True)
    leaves = {v: t.detach().requires_grad_(True) if t.is_floating_point() else t for v, t in inputs.items()}
    wanted = [v for v in gradients if v not in inputs]
    with torch.enable_grad():
        made = run_ops(block.ops, leaves, wanted, dims, weights)
        torch.autograd.backward([made[v] for v in wanted], [gradients[v] for v in wanted])
    with torch.no_grad():
        for value, leaf in weights.leaves.items():
            if leaf.grad is not None:
                parameter = tuning.norms.get(value) or tuning.deltas[value]
                parameter.step(leaf.grad, rate, tuning.steps)
    through = {v: g for v, g in gradients.items() if v in inputs}
    for v, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
            through[v] = through[v] + leaf.grad if v in through else leaf.grad
    return through


def _divergence(
    head: Any, source: torch.Tensor, hidden: torch.Tensor, dims: Mapping[str, int], cache: dict[Any, Any]
) -> tuple[float, torch.Tensor]:
    """Mean KL(source || tuned) in nats over tokens, and its gradient with respect to `hidden` [T, D].

    Two passes over the vocabulary: the sums, then softmax(q) − softmax(p) through the head's weight.
    """
    import torch

    from .head import token_losses

    targets = torch.zeros(len(hidden), dtype=torch.int64)
    losses = token_losses((head, source), (head, hidden), targets, dims, (cache, cache))
    gradient = torch.zeros_like(hidden)
    p_lse, q_lse = losses.lse_source, losses.lse
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        for p, q in zip(head.logits(source, dims, cache), head.logits(leaf, dims, cache), strict=True):
            push = torch.exp(q.detach() - q_lse[:, None]) - torch.exp(p.detach() - p_lse[:, None])
            (part,) = torch.autograd.grad(q, leaf, push / len(hidden))
            gradient += part
    return float(losses.kl.mean()), gradient
