"""What quantization cost, measured on held-out text: perplexity, KL, top-1 agreement, and the error of each
layer.

    x_f ── float model ────────────► x_f'      logits p ┐
    x_q ── quantized model ────────► x_q'      logits q ┴─ perplexity, KL(p || q), agreement
    x_f ── quantized layer ────────► y         error of the layer: y against x_f'

Both models run block by block over the same sequences, so that memory is a block of each, and the values
between two blocks lie on disk. Weights are those that ship; activations and arithmetic are float32, whatever
the target does. Sequences are computed side by side, a thread each: most ops are too small to be worth a
parallel region, and the numbers do not depend on how many threads there are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.ops.nn import Embedding, linear
from ...ir.ops.quant import QuantizedEmbedding
from ..base import Progress, no_progress
from .blocks import Activations, Block, LinearOp, read_weight, run_ops, split_blocks
from .head import Head, HeadRows, LossSums, TokenLoss, dense, find_head, rounded, rounding_of

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
_T = TypeVar("_T")
Together = Callable[[Callable[[int], _T], int], list[_T]]
"""(f, n) → [f(0), …, f(n - 1)], computed side by side."""

SIDE_BY_SIDE = 4
"""Sequences that are computed at a time at most: each has a block's values in memory."""
_HEAD_BYTES = 16 << 20  # rows of a head that are in memory at a time, and logits of one sequence by them
_LAYER_SEQUENCES = 2  # that layers are compared on at most, and half of all: errors vary little with the text
_HEAD_ROWS = 64  # tokens that the head's own error is measured on
_NO_LOGITS = (math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


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
    NaN for a model without logits, and so are the standard errors over predictions, of `kl` and of the
    increase of perplexity in percent. `output_error` is that of the model's hidden states before the head
    (its output where there is none), each model given its own inputs.
    """

    tokens: int
    ppl: float
    ppl_source: float
    kl: float
    agreement: float
    kl_stderr: float
    increase_stderr: float
    output_error: float
    layers: tuple[LayerError, ...]


class _Part:
    """A block of one of the two models, its linear layers' weights in memory once they were needed."""

    def __init__(
        self, name: str, ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]
    ) -> None:
        self.name, self.ops, self.inputs = name, ops, inputs
        self.made = [v for v in outputs if v not in inputs]
        self._last = {v: i for i, op in enumerate(ops) for v in op.operands}
        self._dense: dict[Value, torch.Tensor] = {}
        self._bases: dict[int, torch.Tensor] = {}  # by the id of what is rounded
        self._reading = threading.Lock()  # a weight is read by the first sequence that needs it

    def _weight(self, value: Value) -> torch.Tensor:
        with self._reading:
            if value not in self._dense:
                self._dense[value] = read_weight(value)
            return self._dense[value]

    def _matrix(self, layer: LinearOp) -> torch.Tensor:
        """The layer's matrix [N, K]; the parts that it is stored in are not kept."""
        weight = layer.operands[1]
        with self._reading:
            if weight not in self._dense:
                rounding = rounding_of(layer)
                if rounding is not None and id(rounding.base) in self._bases:
                    self._dense[weight] = rounded(rounding, self._bases.pop(id(rounding.base)))
                else:
                    self._dense[weight] = dense(layer, read_weight)
            return self._dense[weight]

    def take_weights(self, source: _Part) -> None:
        """Take from the block that this one was made from what is rounded here, which is then not read again;
        all its weights are forgotten there.
        """
        rounds = [rounding_of(op) for op in self.ops if isinstance(op, LinearOp)]
        bases = {id(one.base) for one in rounds if one is not None}
        self._bases = {id(v.weight): x for v, x in source._dense.items() if id(v.weight) in bases}
        source._dense.clear()

    def run(self, values: Mapping[Value, Any], dims: Mapping[str, int]) -> dict[Value, torch.Tensor]:
        """What the block makes of its inputs."""
        import torch

        known = dict(values)
        with torch.no_grad():
            for i, op in enumerate(self.ops):
                known |= self._run(op, known, dims)
                for v in op.operands:
                    if self._last[v] == i and v not in self.made:
                        known.pop(v, None)
        return {v: known[v] for v in self.made}

    def _run(self, op: Op, known: Mapping[Value, Any], dims: Mapping[str, int]) -> dict[Value, torch.Tensor]:
        if isinstance(op, LinearOp) and op.x in known:
            bias = None if op.bias is None else self._weight(op.bias)
            return {op.result: linear(known[op.x], self._matrix(op), bias)}
        return run_ops([op], known, op.results, dims, self._weight)


class _Model:
    """One of the two models, as it walks through its blocks."""

    def __init__(self, graph: Graph, folder: Path, sequences: Sequence[Array]) -> None:
        self.graph = graph
        self.head = find_head(graph) if graph.facts.get("kind") == "causal_lm" else None
        self.parts = [self._part(block) for block in split_blocks(graph)]
        self.parts = [part for part in self.parts if part.ops]
        self.first = self.parts[0]
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
        together = stack.enter_context(side_by_side(len(sequences)))
        source = _Model(reference, folder / "source", sequences)
        stack.callback(source.values.close)
        quantized = _Model(graph, folder / "quantized", sequences)
        stack.callback(quantized.values.close)
        layers = _walk(source, quantized, together, progress)
        finals = [
            (source.values.load(i, source.last), quantized.values.load(i, quantized.last))
            for i in range(len(sequences))
        ]
        output = _error((list(p.values()), list(q.values())) for p, q in finals)
        if source.head is None or quantized.head is None:
            return Measured(0, *_NO_LOGITS, output if output is not None else math.nan, tuple(layers))
        progress("measuring: logits", 0.8)
        hidden = [(p[source.head.x][0], q[quantized.head.x][0]) for p, q in finals]
        heads = (source.head, quantized.head)
        error, losses = _through_heads(heads, hidden, sequences, source.values.dims[0], together)
    layers.append(LayerError("head", error))
    return _summary(losses, math.nan if output is None else output, layers)


def _summary(losses: Sequence[TokenLoss], output: float, layers: Sequence[LayerError]) -> Measured:
    """Means over all predictions, and their standard errors."""
    import torch

    nll, nll_source, kl, agree = (
        torch.cat([getattr(one, name) for one in losses]).double()
        for name in ("nll", "nll_source", "kl", "agree")
    )
    count = len(kl)

    def stderr(values: torch.Tensor) -> float:
        return float(values.std()) / math.sqrt(count) if count > 1 else math.nan

    ppl, ppl_source = math.exp(nll.mean()), math.exp(nll_source.mean())
    # The increase is exp of a mean, of what the two models' likelihoods of the same token differ by.
    increase = 100 * ppl / ppl_source * stderr(nll - nll_source)
    means = (ppl, ppl_source, float(kl.mean()), float(agree.mean()))
    return Measured(count, *means, stderr(kl), increase, output, tuple(layers))


@contextmanager
def side_by_side(count: int) -> Generator[Together[Any]]:
    """A way to call a function for several numbers at once, up to `count` of them, in threads that torch does
    not divide further.
    """
    import torch

    before = torch.get_num_threads()
    workers = max(1, min(count, before, SIDE_BY_SIDE))
    with ThreadPoolExecutor(workers, "verdict", torch.set_num_threads, (1,)) as pool:
        try:
            yield lambda f, n: list(pool.map(f, range(n)))
        finally:
            torch.set_num_threads(before)


def _walk(source: _Model, quantized: _Model, together: Together[Any], progress: Progress) -> list[LayerError]:
    """Run both models up to their heads; the errors of the layers."""
    layers: list[LayerError] = []
    alike = [part.name for part in source.parts] == [part.name for part in quantized.parts]
    count = max(len(source.parts), len(quantized.parts))
    for number, (p, q) in enumerate(zip_longest(source.parts, quantized.parts)):
        progress(f"measuring: {(p or q).name}", 0.8 * number / count)
        # One model after the other: weights of one block of one of them are in memory.
        if p is not None:
            together(partial(source.advance, p), len(source.values))
        error = None
        if q is not None:
            if p is not None:
                q.take_weights(p)
            twins = _twins(p, q) if alike and p is not None else None
            pairs = together(partial(_outputs, source, quantized, (p, q), twins), len(quantized.values))
            error = _error(pair for pair in pairs if pair is not None)
        for model, part, rest in ((source, p, source.parts), (quantized, q, quantized.parts)):
            if part is not None:
                model.drop(part, [v for later in rest[number + 1 :] for v in later.inputs])
                rest[number] = _Part(part.name, (), (), ())  # its weights are no longer needed
        if q is not None and not _is_head(quantized, number):
            layers.append(LayerError(q.name, error))
    return layers


def _outputs(
    source: _Model,
    quantized: _Model,
    parts: tuple[_Part | None, _Part],
    twins: Mapping[Value, Value] | None,
    sequence: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Advance the quantized model by a block. Of some sequences, what the block of either model makes of the
    source's inputs; None of the others, or where the two cannot be compared.
    """
    p, q = parts
    own = quantized.advance(q, sequence)
    compared = max(1, min(_LAYER_SEQUENCES, len(quantized.values) // 2))
    if p is None or twins is None or sequence >= compared:
        return None
    if p is not source.first:  # whose inputs are the token ids, the same for both
        inputs = source.values.load(sequence, p.inputs)
        given = {v: inputs[twin] for v, twin in twins.items() if twin in inputs}
        own = q.run(given, quantized.values.dims[sequence])
    made = source.values.load(sequence, p.made)
    return [made[twins[v]] for v in q.made], [own[v] for v in q.made]


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


def _add_losses(
    sums: Sequence[LossSums],
    hidden: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: tuple[HeadRows, HeadRows],
    dims: Mapping[str, int],
    sequence: int,
) -> None:
    """What some rows of both heads add to the losses of a sequence."""
    import torch

    (source, quantized), (p, q) = rows, hidden[sequence]
    with torch.no_grad():
        sums[sequence].add(source.logits(p[:-1], dims), quantized.logits(q[:-1], dims), source.start)


def _through_heads(
    heads: tuple[Head, Head],
    hidden: Sequence[tuple[torch.Tensor, torch.Tensor]],
    sequences: Sequence[Array],
    dims: Mapping[str, int],
    together: Together[Any],
) -> tuple[float, list[TokenLoss]]:
    """The head's own error, on some of the float model's hidden states, and the losses of every prediction:
    a token's hidden state predicts the next token. Both heads are read once, some rows at a time.
    """
    import torch

    targets = [torch.from_numpy(np.ascontiguousarray(ids[1:], np.int64)) for ids in sequences]
    sums = [LossSums(one) for one in targets]
    few = hidden[0][0][:: max(1, len(hidden[0][0]) // _HEAD_ROWS)]
    length, error = torch.zeros(2, len(few), dtype=torch.float64)
    wide = max(max(p.shape) for p, _ in hidden)
    step, stop = max(1, _HEAD_BYTES // (4 * wide)), heads[0].vocab_size
    with torch.no_grad():
        for start in range(0, stop, step):
            source = HeadRows(heads[0], start, min(start + step, stop))
            quantized = HeadRows(heads[1], source.start, source.stop, source)
            p, q = source.logits(few, dims).double(), quantized.logits(few, dims).double()
            length += p.square().sum(-1)
            error += (q - p).square().sum(-1)
            # The rows of both heads are in memory now: threads only read them.
            together(partial(_add_losses, sums, hidden, (source, quantized), dims), len(sums))
    return float((error / length.clamp(min=1e-30)).mean().sqrt()), [one.losses() for one in sums]
