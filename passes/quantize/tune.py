"""Scales and norms tuned on what matters in the end: KL of the next-token distribution to the source model's.

Layer-wise methods make each layer's output right and know nothing of what the layers after it do with the
error. Here the codes stay, and the parameters that cost no bits follow the gradient of the whole model's
loss by Adam (Kingma & Ba 2015), a few sequences a step:

    scale · exp(δ)      of every group of every quantized layer
    weight · exp(δ)     of every norm

Back-propagation goes block by block: forward keeps each block's inputs, backward runs the block again with
gradients and hands on those of its inputs. Memory is one block, its gradients, and the inputs of all blocks
for one sequence. The loss goes through the head in pieces of the vocabulary (`head.py`).

The rate is small on purpose: at three times this rate, or with one sequence a step, a small model's
perplexity on the calibration's own kind of text fell further while KL on other text rose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Value
from ...ir.ops.nn import LayerNorm, RmsNorm
from ...ir.weights import ArrayTensor
from .blocks import Block, first_values, read_weight, run_ops, split_blocks, whole_weights
from .calibrated import Array, Walked, as_coded
from .grid import Grid, storable
from .head import LARGE, Cache, DiskCache, Head, find_head, token_losses
from .moe_calibrated import dequantized

if TYPE_CHECKING:
    import torch

RATE = 1e-3
BATCH = 4  # sequences a step
WARM_UP = 3  # steps
BETAS = (0.9, 0.99)
EPSILON = 1e-8


@dataclass
class Parameter:
    """Logarithms δ of the factors of one tensor, with the gradient so far and Adam's moments; float32 of one
    shape.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor

    @staticmethod
    def zeros(shape: Sequence[int]) -> Parameter:
        import torch

        return Parameter(*(torch.zeros(tuple(shape)) for _ in range(4)))

    def step(self, rate: float, count: int) -> None:
        """Adam's update number `count` (from 1)."""
        gradient = self.gradient / BATCH
        self.gradient.zero_()
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        mean = self.mean / (1 - BETAS[0] ** count)
        square = self.square / (1 - BETAS[1] ** count)
        self.value.addcdiv_(mean, square.sqrt_().add_(EPSILON), value=-rate)


@dataclass
class Tuning:
    """δ by weight: [N, G] of a quantized one, the weight's own shape of a norm's.

    `seen` counts sequences; `share` of δ is applied.
    """

    graph: Graph
    found: Walked
    head: Head
    blocks: list[Block]
    parameters: dict[Value, Parameter] = field(default_factory=dict[Value, Parameter])
    seen: int = 0
    share: float = 1.0
    cache: Cache = field(default_factory=dict[Any, Any])
    """Rows of the head."""

    @staticmethod
    def start(graph: Graph, found: Walked, folder: Path | None = None) -> Tuning:
        """Untuned. The rows of a large head are kept in `folder`."""
        head = find_head(graph)
        tuning = Tuning(graph, found, head, [_before_head(b, head.layer) for b in split_blocks(graph)])
        if folder is not None and head.nbytes > LARGE:
            tuning.cache = DiskCache(folder)
        for weight, parts in found.coded.items():
            if parts["q"].ndim > 2:
                continue  # experts: a token moves the scales of a few of them, and the others would be noise
            tuning.parameters[weight] = Parameter.zeros(parts["scale"].shape)
        for op in graph:
            for value in op.operands if isinstance(op, (RmsNorm, LayerNorm)) else ():
                if value.weight is not None and value not in tuning.parameters:
                    tuning.parameters[value] = Parameter.zeros(value.weight.shape)
        return tuning

    def arrays(self) -> dict[str, Array]:
        """Everything that a later process needs to go on."""
        found: dict[str, Array] = {"seen": np.array([self.seen], np.int64)}
        for value, p in self.parameters.items():
            for part in ("value", "gradient", "mean", "square"):
                found[f"{part}.{value.name}"] = getattr(p, part).numpy()
        return found

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """The inverse of `arrays`."""
        import torch

        self.seen = int(arrays["seen"][0])
        for value, p in self.parameters.items():
            for part in ("value", "gradient", "mean", "square"):
                setattr(p, part, torch.from_numpy(np.array(arrays[f"{part}.{value.name}"])).clone())

    def finish(self) -> None:
        """Write the tuned scales into the walk's result, and the norms into the graph."""
        import torch

        if not self.share:
            return
        for value, p in self.parameters.items():
            factor = torch.exp(self.share * p.value)
            if value in self.found.coded:
                parts = dict(self.found.coded[value])
                scale = torch.from_numpy(parts["scale"].astype(np.float32)) * factor
                parts["scale"] = storable(scale).numpy().astype(np.float16)
                self.found.coded[value] = parts
            else:
                assert value.weight is not None
                tuned = (read_weight(value).float() * factor).numpy()
                value.weight = ArrayTensor(tuned, f"tuned({value.weight.source})")


class _Weights:
    """The weights of one block as tensors; those that are tuned carry gradients where asked."""

    def __init__(self, tuning: Tuning, block: Block, *, gradients: bool) -> None:
        self.leaves: dict[Value, torch.Tensor] = {}
        self._tensors: dict[Value, torch.Tensor] = {}
        for value in whole_weights(block.ops):
            if value not in tuning.parameters:
                self._tensors[value] = _untuned(tuning.found, value)
                continue
            delta = tuning.share * tuning.parameters[value].value.detach()
            if gradients:
                self.leaves[value] = delta.requires_grad_(True)
            if value in tuning.found.coded:
                self._tensors[value] = scaled(tuning.found.coded[value], tuning.found.grids[value], delta)
            else:
                self._tensors[value] = read_weight(value).float() * delta.exp()

    def __call__(self, value: Value) -> torch.Tensor:
        return self._tensors[value]


def _untuned(found: Walked, value: Value) -> torch.Tensor:
    """A weight as it is; experts are coded, and not tuned."""
    if value in found.coded:
        return dequantized(found.coded[value], found.grids[value])
    return read_weight(value)


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
    *,
    rate: float = RATE,
    after: Callable[[float], None] = lambda loss: None,
) -> None:
    """Go on until every sequence was seen once. A last batch that is incomplete is left out.

    Args:
        sequences: token ids int64 [L] each.
        source: the source model's hidden states before the head [L, D] of a sequence by number.
        after: told the mean KL of each sequence, in nats, before the update.
    """
    steps = len(sequences) // BATCH
    while tuning.seen < steps * BATCH:
        loss = _accumulate(tuning, sequences[tuning.seen], source(tuning.seen))
        tuning.seen += 1
        if tuning.seen % BATCH == 0:
            count = tuning.seen // BATCH
            warm = min(1.0, count / WARM_UP)
            now = rate * warm * 0.5 * (1 + math.cos(math.pi * (count - 1) / steps))
            for parameter in tuning.parameters.values():
                parameter.step(now, count)
        after(loss)


def _accumulate(tuning: Tuning, ids: Array, source: torch.Tensor) -> float:
    """One forward and backward pass of one sequence, gradients added up; its mean KL."""
    kept, hidden, dims = _forward(tuning, ids)
    loss, gradient = _divergence(tuning, source, hidden, dims)
    gradients: dict[Value, torch.Tensor] = {tuning.head.x: gradient[None]}
    for block, inputs in reversed(kept):
        if block.name != "prologue":
            gradients = _backward(tuning, block, inputs, gradients, dims)
    return loss


def divergence(tuning: Tuning, ids: Array, source: torch.Tensor) -> float:
    """Mean KL(source || tuned) of one sequence, in nats."""
    import torch

    _, hidden, dims = _forward(tuning, ids)
    sides = (tuning.head, source), (tuning.head, hidden)
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    return float(token_losses(*sides, targets, dims, (tuning.cache, tuning.cache)).kl.mean())


def _forward(
    tuning: Tuning, ids: Array
) -> tuple[list[tuple[Block, dict[Value, Any]]], torch.Tensor, dict[str, int]]:
    """Each block with its inputs, the hidden states before the head [L, D], and the dimensions."""
    import torch

    values, dims = first_values(tuning.graph, ids)
    kept: list[tuple[Block, dict[Value, Any]]] = []
    with torch.no_grad():
        for block in tuning.blocks:
            kept.append((block, values))
            fetch = read_weight if block.name == "prologue" else _Weights(tuning, block, gradients=False)
            wanted = [v for v in block.outputs if v not in values]
            made = run_ops(block.ops, values, wanted, dims, fetch)
            values = {v: made[v] if v in made else values[v] for v in block.outputs}
    return kept, values[tuning.head.x][0], dims


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
) -> dict[Value, torch.Tensor]:
    """Add up a block's gradients; those of the loss with respect to its inputs."""
    import torch

    weights = _Weights(tuning, block, gradients=True)
    leaves = {v: t.detach().requires_grad_(True) if t.is_floating_point() else t for v, t in inputs.items()}
    wanted = [v for v in gradients if v not in inputs]
    with torch.enable_grad():
        made = run_ops(block.ops, leaves, wanted, dims, weights)
        # A number that several blocks use (a scale of queries) may be made in one: nothing led there.
        led = [v for v in wanted if made[v].requires_grad]
        torch.autograd.backward([made[v] for v in led], [gradients[v] for v in led])
    with torch.no_grad():
        for value, leaf in weights.leaves.items():
            if leaf.grad is not None:
                tuning.parameters[value].gradient += leaf.grad
    through = {v: g for v, g in gradients.items() if v in inputs}
    for v, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
            through[v] = through[v] + leaf.grad if v in through else leaf.grad
    return through


def _divergence(
    tuning: Tuning, source: torch.Tensor, hidden: torch.Tensor, dims: Mapping[str, int]
) -> tuple[float, torch.Tensor]:
    """Mean KL(source || tuned) in nats over tokens, and its gradient with respect to `hidden` [T, D].

    Two passes over the vocabulary: the sums, then softmax(q) − softmax(p) through the head's weight.
    """
    import torch

    head, cache = tuning.head, tuning.cache
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
