"""The output head in pieces of the vocabulary: losses over logits that never exist as a whole.

For a token with logits p (source) and q (quantized), with lse = log Σ exp:

    nll  = lse(q) − q[target]
    KL   = Σ softmax(p) · (p − q) − lse(p) + lse(q)           D(source || quantized), nats

Both sums run over the vocabulary once, with running maxima. Their gradient takes a second run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import CompileError
from ...ir.interpreter import to_torch
from ...ir.ops.nn import Linear, linear
from ...ir.ops.quant import Hadamard, dequantized
from .blocks import Fetch, LinearOp, run_ops
from .nearest import QuantizedPart, QuantizedWeight

if TYPE_CHECKING:
    import torch

CHUNK = 16384  # rows of the head at a time: 32 MB of logits for 512 tokens
LARGE = 128 << 20  # bytes of a head in float32 from which on its rows are kept on disk

Cache = MutableMapping[Any, Any]
"""Tensors of the head by what they are, kept between calls."""


class DiskCache(MutableMapping[Any, Any]):
    """A cache whose tensors are files of a folder: a large head is read again from there, not dequantized."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._names: dict[Any, int] = {}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.npy"

    def __getitem__(self, key: Any) -> Any:
        return to_torch(np.load(self._path(self._names[key])))

    def __setitem__(self, key: Any, tensor: Any) -> None:
        number = self._names.setdefault(key, len(self._names))
        np.save(self._path(number), tensor.numpy())

    def __delitem__(self, key: Any) -> None:
        self._path(self._names.pop(key)).unlink()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Head:
    """The last linear layer, a rotation of what it reads, and what comes after it, element by element (a soft
    cap).
    """

    layer: LinearOp
    after: tuple[Op, ...]

    @property
    def x(self) -> Value:
        """The hidden states that it reads [1, T, D], before they are rotated."""
        return self.before[0].x if self.before else self.layer.x

    @property
    def before(self) -> tuple[Hadamard, ...]:
        """What rotates the hidden states, if that is done."""
        op = self.layer.x.producer
        return (op,) if isinstance(op, Hadamard) else ()

    @property
    def nbytes(self) -> int:
        """Bytes of its weight in float32."""
        width = self.x.shape[-1]
        assert isinstance(width, int)
        return 4 * self.vocab_size * width

    @property
    def vocab_size(self) -> int:
        n = self.layer.result.shape[-1]
        assert isinstance(n, int)
        return n

    def logits(
        self, hidden: torch.Tensor, dims: Mapping[str, int], cache: Cache | None = None
    ) -> Iterator[torch.Tensor]:
        """Logits [..., rows of the vocabulary] of hidden states [..., D], CHUNK rows at a time.

        `cache` keeps the head's rows between calls.
        """
        return (logits for _, logits in self.pieces(hidden, dims, cache))

    def pieces(
        self, hidden: torch.Tensor, dims: Mapping[str, int], cache: Cache | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `logits`, each with what the linear layer made before the ops after it."""
        for start in range(0, self.vocab_size, CHUNK):
            stop = min(start + CHUNK, self.vocab_size)

            def fetch(v: Value, start: int = start, stop: int = stop) -> Any:
                key = (v, start if self._by_row(v) else None)
                if cache is not None and key in cache:
                    return cache[key]
                tensor = self.read(v, start, stop)
                if cache is not None:
                    cache[key] = tensor
                return tensor

            out = self.after[-1].result if self.after else self.layer.result
            wanted = [self.layer.result, out]
            found = run_ops((*self.before, self.layer, *self.after), {self.x: hidden}, wanted, dims, fetch)
            yield found[self.layer.result], found[out]

    def _by_row(self, value: Value) -> bool:
        """Whether a weight has a row for each entry of the vocabulary."""
        return bool(value.shape) and value.shape[0] == self.vocab_size

    def read(self, value: Value, start: int, stop: int) -> torch.Tensor:
        """What rows [start:stop) of the vocabulary need of a weight."""
        assert value.weight is not None
        return to_torch(value.weight.read(start, stop) if self._by_row(value) else value.weight.read())


class HeadRows:
    """Rows [start:stop) of a head, which are read once, and dequantized once, for any number of hidden
    states. A head that rounds the weight of another, `source`, takes the rows from there.
    """

    def __init__(self, head: Head, start: int, stop: int, source: HeadRows | None = None) -> None:
        self.head, self.start, self.stop = head, start, stop
        self._source = source
        self._kept: dict[Value, torch.Tensor] = {}

    def _weight(self, value: Value) -> torch.Tensor:
        if value not in self._kept:
            self._kept[value] = self.head.read(value, self.start, self.stop)
        return self._kept[value]

    @cached_property
    def matrix(self) -> torch.Tensor:
        """Float [stop − start, D]."""
        layer, source = self.head.layer, self._source
        rounding = rounding_of(layer)
        if source is not None and rounding is not None:
            weight = source.head.layer.operands[1].weight
            if weight is rounding.base:
                return rounded(rounding, source.matrix.clone())
        return dense(layer, partial(self.head.read, start=self.start, stop=self.stop))

    def logits(self, hidden: torch.Tensor, dims: Mapping[str, int]) -> torch.Tensor:
        """Logits [..., stop − start] of hidden states [..., D]."""
        layer, after = self.head.layer, self.head.after
        if self.head.before:
            hidden = run_ops(self.head.before, {self.head.x: hidden}, [layer.x], dims, self._weight)[layer.x]
        made = linear(hidden, self.matrix, None if layer.bias is None else self._weight(layer.bias))
        if not after:
            return made
        out = after[-1].result
        return run_ops(after, {layer.result: made}, [out], dims, self._weight)[out]


def dense(layer: LinearOp, read: Fetch) -> torch.Tensor:
    """The matrix [N, K] of a linear layer by what `read` gives of its parts, which are not kept."""
    if isinstance(layer, Linear):
        return read(layer.weight)
    assert layer.q.type.quant is not None
    codes = read(layer.q)  # first: round to nearest keeps what else it found for the next reads
    scale = read(layer.scale)
    zero = None if layer.zero_point is None else read(layer.zero_point)
    return dequantized(layer.q.type.quant, codes, scale, zero)


def rounding_of(layer: LinearOp) -> QuantizedWeight | None:
    """What rounds a layer's weight to nearest as it is read; None for other layers."""
    part = layer.operands[1].weight
    return part.weight if isinstance(part, QuantizedPart) else None


def rounded(rounding: QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, K] of what `rounding` rounds, rounded; float32 ones are written over."""
    rows = rows.float()
    rounding.round(rows.numpy())
    return rows


def find_head(graph: Graph) -> Head:
    """The head of a causal language model. CompileError where the graph's output is none."""
    layer = graph.outputs[0].producer
    while layer is not None and not isinstance(layer, LinearOp):
        layer = next((v.producer for v in layer.operands if v.type.rank and not v.is_weight), None)
    needed = set() if layer is None else _between(graph.outputs[0], layer.result)
    if layer is None or any(op.result.type.rank and op.result.shape != layer.result.shape for op in needed):
        raise CompileError(
            f"{graph.name} does not end with logits of a linear layer", remedy="it has no perplexity"
        )
    return Head(layer, tuple(op for op in graph if op in needed))


def _between(output: Value, start: Value) -> set[Op]:
    """The ops that `output` is made by, up to and without the one that makes `start`; constants too."""
    found: set[Op] = set()
    open_ = [output]
    while open_:
        value = open_.pop()
        op = value.producer
        if value is not start and op is not None and op not in found:
            found.add(op)
            open_ += op.operands
    return found


@dataclass
class TokenLoss:
    """By token, float32 [T]: negative log-likelihoods of the target by both, KL in nats, whether the most
    likely token is the same (bool), and the logits' log Σ exp.
    """

    nll: Any
    nll_source: Any
    kl: Any
    agree: Any
    lse: Any
    lse_source: Any


class _Sums:
    """log Σ exp over pieces of the vocabulary, the largest logit and its place, and the target's logit."""

    def __init__(self, targets: torch.Tensor) -> None:
        import torch

        n = len(targets)
        self.targets = targets
        self.max = torch.full((n,), float("-inf"))
        self.sum = torch.zeros(n)
        self.best = torch.zeros(n, dtype=torch.int64)
        self.hit = torch.zeros(n)

    def add(self, logits: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in logits [T, rows]; the factor by which earlier sums shrink, [T], and exp(logits − max)."""
        import torch

        top, place = logits.max(-1)
        better = top > self.max
        self.best = torch.where(better, place + start, self.best)
        largest = torch.maximum(self.max, top)
        shrink = torch.exp(self.max - largest)
        powers = torch.sub(logits, largest[:, None]).exp_()
        self.sum = self.sum * shrink + powers.sum(-1)
        self.max = largest
        here = (self.targets >= start) & (self.targets < start + logits.shape[-1])
        index = (self.targets - start).clamp(0, logits.shape[-1] - 1)
        self.hit = torch.where(here, logits.gather(1, index[:, None])[:, 0], self.hit)
        return shrink, powers

    @property
    def lse(self) -> torch.Tensor:
        return self.max + self.sum.log()


class LossSums:
    """The losses of tokens, from pieces of their logits; `targets` int64 [T] are the tokens that came."""

    def __init__(self, targets: torch.Tensor) -> None:
        import torch

        self._source, self._quantized = _Sums(targets), _Sums(targets)
        self._cross = torch.zeros(len(targets))

    def add(self, source: torch.Tensor, quantized: torch.Tensor, start: int) -> None:
        """Take in both models' logits [T, rows] of the vocabulary from row `start` on, in order."""
        import torch

        shrink, powers = self._source.add(source, start)
        _, spare = self._quantized.add(quantized, start)
        gap = torch.sub(source, quantized, out=spare)
        self._cross = self._cross * shrink + powers.mul_(gap).sum(-1)

    def losses(self) -> TokenLoss:
        """Once all of the vocabulary was taken in."""
        p, q = self._source, self._quantized
        kl = self._cross / p.sum - p.lse + q.lse
        return TokenLoss(q.lse - q.hit, p.lse - p.hit, kl.clamp(min=0), q.best == p.best, q.lse, p.lse)


def token_losses(
    source: tuple[Head, torch.Tensor],
    quantized: tuple[Head, torch.Tensor],
    targets: torch.Tensor,
    dims: Mapping[str, int],
    caches: tuple[Cache, Cache] | None = None,
) -> TokenLoss:
    """Losses of hidden states [T, D] by their heads; `targets` int64 [T] are the tokens that came."""
    import torch

    sums, start = LossSums(targets), 0
    kept = caches or (None, None)
    with torch.no_grad():
        for p, q in zip(
            source[0].logits(source[1], dims, kept[0]),
            quantized[0].logits(quantized[1], dims, kept[1]),
            strict=True,
        ):
            sums.add(p, q, start)
            start += p.shape[-1]
    return sums.losses()
