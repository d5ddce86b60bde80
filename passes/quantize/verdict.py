"""What quantization cost, measured on held-out text: perplexity, KL, top-1 agreement, and the error of each
layer.

    x_f ── float model ────────────► x_f'      logits p ┐
    x_q ── quantized model ────────► x_q'      logits q ┴─ perplexity, KL(p || q), agreement
    x_f ── quantized layer ────────► y         error of the layer: y against x_f'

Both models run block by block over the same sequences, so that memory is a block of each, and the values
between two blocks lie on disk. Weights are those that ship; activations and arithmetic are float32, whatever
the target does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.ops.nn import Embedding
from ...ir.ops.quant import QuantizedEmbedding, QuantizedLinear, dequantized
from ..base import Progress, no_progress
from .blocks import Activations, Block, read_weight, run_ops, split_blocks
from .head import Head, TokenLoss, find_head, token_losses

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

# The output head stays in memory between sequences where it is no larger than this, and is read again for
# each of them where it is.
_HEAD_BYTES = 256 << 20
_LAYER_SEQUENCES = 2  # that layers are compared on: their errors vary little between texts
_HEAD_ROWS = 64  # tokens that the head's own error is measured on
_NO_LOGITS = (math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's output, relative to the float layer's, both given the float model's input:
    root of the mean over tokens of |y − x|² / |x|². None where the two could not be compared.
    """

    name: str
    error: float | None


@dataclass(frozen=True)
class Measured:
    """Means over `tokens` predictions; `kl` is D(source || quantized) in nats, `agreement` a share. All are
    NaN for a model without logits. `output_error` is that of the model's hidden states before the head (its
    output where there is none), each model given its own inputs.
    """

    tokens: int
    ppl: float
    ppl_source: float
    kl: float
    agreement: float
    output_error: float
    layers: tuple[LayerError, ...]


class _Part:
    """A block of one of the two models, its linear layers' weights as float32 once they were needed."""

    def __init__(
        self, name: str, ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]
    ) -> None:
        self.name, self.ops, self.inputs = name, ops, inputs
        self.made = [v for v in outputs if v not in inputs]
        self._dense: dict[Value, torch.Tensor] = {}

    def _weight(self, value: Value) -> torch.Tensor:
        if value not in self._dense:
            self._dense[value] = read_weight(value)
        return self._dense[value]

    def _matrix(self, op: QuantizedLinear) -> torch.Tensor:
        """The layer's matrix [N, K]; the three parts that it is stored in are not kept."""
        if op.q not in self._dense:
            assert op.q.type.quant is not None
            codes = read_weight(op.q)  # first: round to nearest keeps what else it found for the next reads
            scale = read_weight(op.scale)
            zero = None if op.zero_point is None else read_weight(op.zero_point)
            self._dense[op.q] = dequantized(op.q.type.quant, codes, scale, zero)
        return self._dense[op.q]

    def run(self, values: Mapping[Value, Any], dims: Mapping[str, int]) -> dict[Value, torch.Tensor]:
        """What the block makes of its inputs."""
        import torch

        known = dict(values)
        with torch.no_grad():
            for op in self.ops:
                if isinstance(op, QuantizedLinear) and op.x in known:
                    bias = None if op.bias is None else self._weight(op.bias)
                    x = known[op.x]
                    known[op.result] = torch.nn.functional.linear(x, self._matrix(op).to(x.dtype), bias)
                else:
                    table = isinstance(op, (Embedding, QuantizedEmbedding))
                    known.update(
                        run_ops([op], known, op.results, dims, read_weight if table else self._weight)
                    )
        return {v: known[v] for v in self.made}


class _Model:
    """One of the two models, as it walks through its blocks."""

    def __init__(self, graph: Graph, folder: Path, sequences: Sequence[Array]) -> None:
        self.graph = graph
        self.head = find_head(graph) if graph.facts.get("kind") == "causal_lm" else None
        self.parts = [self._part(block) for block in split_blocks(graph)]
        self.parts = [part for part in self.parts if part.ops]
        self.values = Activations(folder)
        self.values.begin(graph, sequences)

    def _part(self, block: Block) -> _Part:
        """A block, ending before the head."""
        ops = block.ops
        if self.head is None or self.head.layer not in ops:
            tables = any(isinstance(op, (Embedding, QuantizedEmbedding)) for op in ops)
            name = "embedding" if block.name == "prologue" and tables else block.name
            return _Part(name, ops, block.inputs, block.outputs)
        before = ops[: ops.index(self.head.layer)]
        return _Part(block.name, before, block.inputs, [self.head.x])

    @property
    def last(self) -> list[Value]:
        """Hidden states before the head, or the outputs."""
        return list(self.graph.outputs) if self.head is None else [self.head.x]

    def advance(self, part: _Part, sequence: int) -> dict[Value, torch.Tensor]:
        """Run a block on one sequence; its inputs stay where they are until `drop`."""
        inputs = self.values.load(sequence, part.inputs)
        made = part.run(inputs, self.values.dims[sequence])
        self.values.save(sequence, made)
        return made

    def drop(self, part: _Part, kept: Iterable[Value]) -> None:
        """Forget what no later block reads."""
        later = set(kept) | set(self.last)
        self.values.drop(v for v in (*part.inputs, *part.made) if v not in later)


def measure(
    reference: Graph,
    graph: Graph,
    sequences: Sequence[Array],
    folder: Path,
    progress: Progress = no_progress,
) -> Measured:
    """Compare a quantized graph with the float one that it was made from.

    Args:
        reference, graph: fused graphs of one input, token ids [1, T].
        sequences: held-out token ids, int64 [T] each.
        folder: for the values between blocks; what is made there is removed again.
    Raises:
        CompileError: a causal language model whose output is no logits of a linear layer.
    """
    with ExitStack() as stack:
        source = _Model(reference, folder / "source", sequences)
        stack.callback(source.values.close)
        quantized = _Model(graph, folder / "quantized", sequences)
        stack.callback(quantized.values.close)
        layers = _walk(source, quantized, progress)
        finals = [
            (source.values.load(i, source.last), quantized.values.load(i, quantized.last))
            for i in range(len(sequences))
        ]
    output = _error((list(p.values()), list(q.values())) for p, q in finals)
    if source.head is None or quantized.head is None:
        return Measured(0, *_NO_LOGITS, output if output is not None else math.nan, tuple(layers))
    progress("measuring: logits", 0.8)
    hidden = [(p[source.head.x][0], q[quantized.head.x][0]) for p, q in finals]
    dims = source.values.dims[0]
    layers.append(LayerError("head", _head_error(source.head, quantized.head, hidden[0][0], dims)))
    losses = _losses((source.head, quantized.head), hidden, sequences, dims)
    count = sum(len(one.kl) for one in losses)

    def mean(name: str) -> float:
        return float(sum(getattr(one, name).double().sum() for one in losses)) / count

    ppl, ppl_source = math.exp(mean("nll")), math.exp(mean("nll_source"))
    output = math.nan if output is None else output
    return Measured(count, ppl, ppl_source, mean("kl"), mean("agree"), output, tuple(layers))


def _walk(source: _Model, quantized: _Model, progress: Progress) -> list[LayerError]:
    """Run both models up to their heads; the errors of the layers."""
    layers: list[LayerError] = []
    alike = [part.name for part in source.parts] == [part.name for part in quantized.parts]
    count = max(len(source.parts), len(quantized.parts))
    for number, (p, q) in enumerate(zip_longest(source.parts, quantized.parts)):
        progress(f"measuring: {(p or q).name}", 0.8 * number / count)
        errors: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        twins = _twins(p, q) if alike else None
        for i in range(len(source.values)):
            made = source.advance(p, i) if p is not None else {}
            if q is None:
                continue
            own = quantized.advance(q, i)
            if p is not None and twins is not None and i < _LAYER_SEQUENCES:
                if number:  # the first block's inputs are the token ids, the same for both
                    inputs = source.values.load(i, p.inputs)
                    own = q.run(
                        {v: inputs[twin] for v, twin in twins.items() if twin in inputs},
                        quantized.values.dims[i],
                    )
                errors.append(([made[twins[v]] for v in q.made], [own[v] for v in q.made]))
        for model, part, rest in ((source, p, source.parts), (quantized, q, quantized.parts)):
            if part is not None:
                model.drop(part, [v for later in rest[number + 1 :] for v in later.inputs])
                rest[number] = _Part(part.name, (), (), ())  # its weights are no longer needed
        if q is not None and not _is_head(quantized, number):
            layers.append(LayerError(q.name, _error(errors)))
    return layers


def _is_head(model: _Model, number: int) -> bool:
    """Whether a block is what stands before the head alone: its error is reported as the head's."""
    return model.head is not None and number == len(model.parts) - 1 and model.parts[number].name == "head"


def _twins(p: _Part, q: _Part) -> dict[Value, Value] | None:
    """The source's value for each value at a quantized block's borders, by their order. None where they are
    not alike: a pass has changed what passes from one block to the next.
    """
    pairs: dict[Value, Value] = {}
    for ours, theirs in ((q.inputs, p.inputs), (q.made, p.made)):
        if len(ours) != len(theirs) or any(
            a.shape != b.shape or a.dtype != b.dtype for a, b in zip(ours, theirs, strict=True)
        ):
            return None
        pairs |= dict(zip(ours, theirs, strict=True))
    return pairs


def _error(pairs: Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> float | None:
    """Relative error over (source's values, quantized's values) of each sequence; tokens count alike, however
    large they are (in many models the first one's values are a thousand times all others'). Values that are
    the same (tables of positions, masks) are not counted beside those that differ. None of nothing.
    """
    total, differing, same = 0.0, 0, 0
    for source, quantized in pairs:
        for x, y in zip(source, quantized, strict=True):
            if not x.is_floating_point() or not x.ndim:
                continue
            length = x.double().square().sum(-1)
            ratio = (y.double() - x.double()).square().sum(-1) / length.clamp(min=1e-30)
            ratio = ratio[length > 0]
            error = float(ratio.sum())
            total += error
            differing += ratio.numel() if error else 0
            same += 0 if error else ratio.numel()
    return math.sqrt(total / (differing or same)) if differing or same else None


def _head_error(source: Head, quantized: Head, hidden: torch.Tensor, dims: Mapping[str, int]) -> float:
    """The head's own error: its logits of the float model's hidden states."""
    import torch

    step = max(1, len(hidden) // _HEAD_ROWS)
    rows = hidden[::step]
    length = torch.zeros(len(rows), dtype=torch.float64)
    error = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(source.logits(rows, dims), quantized.logits(rows, dims), strict=True):
            length += p.double().square().sum(-1)
            error += (q.double() - p.double()).square().sum(-1)
    return float((error / length.clamp(min=1e-30)).mean().sqrt())


def _losses(
    heads: tuple[Head, Head],
    hidden: Sequence[tuple[torch.Tensor, torch.Tensor]],
    sequences: Sequence[Array],
    dims: Mapping[str, int],
) -> list[TokenLoss]:
    """Losses of every prediction: a token's hidden state predicts the next token."""
    import torch

    small = heads[0].vocab_size * hidden[0][0].shape[-1] * 5 <= _HEAD_BYTES
    caches: tuple[dict[Any, Any], dict[Any, Any]] | None = ({}, {}) if small else None
    return [
        token_losses(
            (heads[0], p[:-1]),
            (heads[1], q[:-1]),
            torch.from_numpy(np.ascontiguousarray(ids[1:], np.int64)),
            dims,
            caches,
        )
        for (p, q), ids in zip(hidden, sequences, strict=True)
    ]
