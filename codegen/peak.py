"""The peak of memory of a compilation, predicted from the traced graph before anything is done.

A compilation goes through phases, of which one is in memory at a time, beside what is always there (torch,
transformers, the tokenizer's remains):

    tokenizer     the vocabulary and its reference
    sensitivity   of a block: weights, one sequence's values with gradients, second moments of its inputs
                  [K, K]; or the head: its rows, logits by pieces
    quantizing    of a block's layers [N, K] that read one value: second moments and their factors [K, K],
                  copies of the weight [N, K]
    tuning        of a block: weights twice, their gradients, one sequence's values with gradients; of the
                  whole model: four numbers for every scale
    verdict       of a block: both models' weights, values of the sequences that are computed side by side; or
                  the heads by pieces; and the kernel compilers' processes, where there is no cap
    kernels       packing of weights, and the kernel compilers' processes beside it

The whole process tree counts, pages that processes share for each of them. Constants were measured on Linux,
x86-64, with torch 2.13 for the CPU; tests compare them with real compilations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir.core import Graph, Value
from ..ir.ops.math import MatMul
from ..ir.ops.moe import Moe
from ..ir.ops.nn import Embedding, Linear
from ..ir.types import Dim
from ..passes.base import Pass
from ..passes.quantize import fisher, gptq, head, sensitivity, verdict
from ..passes.quantize.awq_pass import QuantizeAwq
from ..passes.quantize.best_pass import QuantizeBest
from ..passes.quantize.blocks import layer_name
from ..passes.quantize.calibrated import KEPT
from ..passes.quantize.gptq_pass import QuantizeGptq
from ..passes.quantize.quality import MeasureQuality
from ..passes.quantize.sensitivity import ChooseBits

IMPORTS_BYTES = 430_000_000
TOKEN_BYTES = 1700  # of the vocabulary's entries, while the tokenizer is compared with its reference
KEPT_BYTES = 1250  # of that, what stays
CHUNK_BYTES = 96 << 20  # of a weight that is packed
WORKER_BYTES = 400_000_000
_MOMENTS = 6  # float32 [K, K] while one is factored: inputs, damped and permuted ones, factors
_KEPT = 4  # of them while codes are made and scales refitted
_COPIES = 16  # float32 [N, K] then: weight, target, codes, scales and zero points by column, candidates
_MIXTURES = 3  # float32 of all experts of a mixture: as read, as coded, and what codes and scales take
_VALUES = 7  # numbers that a value between layers takes with its gradient and what the way back needs
_PIECES = 7  # float32 [T, rows of the vocabulary] while logits are compared, or derived


@dataclass(frozen=True)
class Peak:
    """Bytes that each phase of a compilation will take, by its name."""

    phases: dict[str, int]

    @property
    def bytes(self) -> int:
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The largest one."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class _Shapes:
    """What of a graph memory depends on.

    `blocks` are the (N, K) of each block's linear layers, those that read one value together; `head` is
    (rows of the vocabulary, width), (0, 0) without one; `length` counts tokens of a sequence.
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    head: tuple[int, int]
    length: int
    experts: int = 0
    """Elements of the largest mixture of experts, which is in memory as a whole; `blocks` have one expert."""

    @property
    def weights(self) -> int:
        """Elements of a block's linear layers, of the largest block."""
        return max((sum(n * k for n, k in block) for block in self.blocks), default=0)

    @property
    def moments(self) -> int:
        """Elements of all second moments of a block's inputs."""
        return max((sum(k * k for _, k in block) for block in self.blocks), default=0)

    @property
    def values(self) -> int:
        """Elements of one sequence's values in a block: inputs and results of its layers."""
        return self.length * max((sum(n + k for n, k in block) for block in self.blocks), default=0)

    @property
    def all_weights(self) -> int:
        return sum(n * k for block in self.blocks for n, k in block)

    def head_bytes(self) -> int:
        """Rows of a head that pieces are made with: all where it is small, else those of one piece."""
        rows, width = self.head
        whole = 4 * rows * width
        return whole if whole <= head.LARGE else 4 * min(rows, head.CHUNK) * width

    def piece_bytes(self) -> int:
        """Logits of one sequence by a piece of the vocabulary, as often as they are there."""
        return 4 * _PIECES * self.length * min(self.head[0], head.CHUNK)


def predict_peak(
    graph: Graph, passes: Sequence[Pass], *, vocabulary: int, length: int, kernels: int, capped: bool = True
) -> Peak:
    """The peak of compiling a traced (or fused) graph.

    Args:
        passes: that quantize and measure.
        vocabulary: entries of the tokenizer.
        length: tokens of a calibration sequence.
        kernels: kernel compilers that run at once, each in a process of its own.
        capped: whether values between layers all go to disk.
    """
    shapes = _shapes(graph, length)
    base = IMPORTS_BYTES + KEPT_BYTES * vocabulary
    largest = max((_bytes(w) for w in graph.weights.values()), default=0)
    phases = {
        "tokenizer": IMPORTS_BYTES + TOKEN_BYTES * vocabulary,
        "kernels": base + min(largest, CHUNK_BYTES) + kernels * WORKER_BYTES,
    }
    for one in passes:
        taken = [(name, take(shapes, one)) for kind, name, take in _PHASES if isinstance(one, kind)]
        if one.needs_calibration and not taken:
            taken = [("calibrating", 4 * (shapes.weights + 2 * shapes.values))]
        kept = 2 * KEPT if isinstance(one, QuantizeGptq) and not capped else 0
        for name, size in taken:
            size += kept
            if name == "verdict" and not capped:
                size += kernels * WORKER_BYTES
            phases[name] = max(phases.get(name, 0), base + size)
    return Peak(phases)


def _quantizing(shapes: _Shapes, one: Pass) -> int:
    group = getattr(one, "group", 0)
    layers = (_layer(n, k, group, shapes.length) for block in shapes.blocks for n, k in block)
    return 4 * _MIXTURES * shapes.experts + max(layers, default=0)


def _layer(n: int, k: int, group: int, length: int) -> int:
    groups = -(-k // group) if group else 1
    factoring = _MOMENTS * k * k + 4 * n * k
    refitting = _KEPT * k * k + _COPIES * n * k + 3 * min(n * groups * groups, gptq.SYSTEMS)
    return 4 * (max(factoring, refitting) + 6 * length * (n + k))


def _sensitivity(shapes: _Shapes, one: Pass) -> int:
    rounding = 6 * sensitivity.ELEMENTS
    block = 4 * (shapes.weights + _VALUES * shapes.values + shapes.moments + rounding)
    drawn = 16 * min(fisher.DRAWN, shapes.length * shapes.head[0])
    return max(block, shapes.head_bytes() + max(shapes.piece_bytes(), drawn))


def _tuning(shapes: _Shapes, one: Pass) -> int:
    group = getattr(one, "group", 0) or 1024
    scales = 4 * shapes.all_weights // group
    block = 3 * shapes.weights + _VALUES * shapes.values
    block += 2 * shapes.experts  # of both models
    return 4 * scales + max(4 * block, shapes.head_bytes() + shapes.piece_bytes())


def _verdict(shapes: _Shapes, one: Pass) -> int:
    assert isinstance(one, MeasureQuality)
    side = min(verdict.SIDE_BY_SIDE, one.sequences, os.cpu_count() or 1)
    # Heads: 16 MiB of rows, three times, and of each sequence's logits, five times.
    block = 2 * shapes.weights + (1 + side) * shapes.values + _MIXTURES * shapes.experts
    return max(4 * block, (3 + 5 * side) << 24)


_PHASES: tuple[tuple[type[Pass], str, Callable[[_Shapes, Pass], int]], ...] = (
    (ChooseBits, "sensitivity", _sensitivity),
    (QuantizeGptq, "quantizing", _quantizing),
    (QuantizeAwq, "quantizing", _quantizing),
    (QuantizeBest, "tuning", _tuning),
    (MeasureQuality, "verdict", _verdict),
)


def _shapes(graph: Graph, length: int) -> _Shapes:
    """Linear layers by block; before fusion those of one input are several, and some are products with a
    transposed weight.
    """
    found: dict[str, dict[Value, tuple[int, int]]] = {}
    rows, width, experts = 0, 0, 0
    for op in graph:
        if isinstance(op, Moe):
            experts = max(experts, _count(op.gate_up) + _count(op.down))
            e, d = _count_of(op.down.shape[0]), _count_of(op.x.shape[-1])
            i = _count(op.down) // (e * d)
            layers = found.setdefault(layer_name(op.loc) or op.loc, {})
            layers[op.gate_up], layers[op.down] = (op.gate.products * i, d), (d, i)
            continue
        weight = next((w for v in op.operands if (w := _weight(v)) is not None), None)
        if weight is None or not isinstance(op, (Linear, MatMul, Embedding)):
            continue
        n, read = op.result.shape[-1], op.operands[0]
        if not isinstance(n, int):  # weight · x, whose last axis is of tokens
            n, read = op.result.shape[-2], op.operands[1]
        assert isinstance(n, int)
        k = _count(weight) // max(1, n)
        name = layer_name(op.loc)
        if isinstance(op, Linear) and name is None:
            rows, width = n, k
        elif not isinstance(op, Embedding):
            layers = found.setdefault(name or op.loc, {})
            layers[read] = (n + layers.get(read, (0, 0))[0], k)
    blocks = tuple(tuple(layers.values()) for layers in found.values())
    return _Shapes(blocks, (rows, width), length, experts)


def _weight(value: Value) -> Value | None:
    """The matrix that a value is, or is made of by one op without other operands."""
    op = value.producer
    source = op.operands[0] if op is not None and len(op.operands) == 1 else value
    return source if source.is_weight and len(source.shape) == 2 else None


def _count_of(d: Dim) -> int:
    assert isinstance(d, int)
    return d


def _count(weight: Value) -> int:
    count = 1
    for side in weight.shape:
        assert isinstance(side, int)
        count *= side
    return count


def _bytes(weight: Value) -> int:
    return 4 * _count(weight)
