"""The output head in pieces of the vocabulary: losses over logits that never exist as a whole.

For a token with logits p (source) and q (quantized), with lse = log Σ exp:

    nll  = lse(q) − q[target]
    KL   = Σ softmax(p) · (p − q) − lse(p) + lse(q)           D(source || quantized), nats

Both sums run over the vocabulary once, with running maxima. Their gradient takes a second run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...ir.core import Graph, Op, Value
from ...ir.errors import CompileError
from ...ir.interpreter import to_torch
from .blocks import LinearOp, run_ops

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
    """The last linear layer and what comes after it, element by element (a soft cap)."""

    layer: LinearOp
    after: tuple[Op, ...]

    @property
    def x(self) -> Value:
        """The hidden states that it reads [1, T, D]."""
        return self.layer.x

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
                rows = start if v.shape and v.shape[0] == self.vocab_size else None
                key = (v, rows)
                if cache is not None and key in cache:
                    return cache[key]
                assert v.weight is not None
                tensor = to_torch(v.weight.read() if rows is None else v.weight.read(start, stop))
                if cache is not None:
                    cache[key] = tensor
                return tensor

            out = self.after[-1].result if self.after else self.layer.result
            wanted = [self.layer.result, out]
            found = run_ops((self.layer, *self.after), {self.x: hidden}, wanted, dims, fetch)
            yield found[self.layer.result], found[out]


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
    """log Σ exp over chunks, the largest logit and its place, and the target's logit."""

    def __init__(self, targets: torch.Tensor) -> None:
        import torch

        n = len(targets)
        self.targets = targets
        self.max = torch.full((n,), float("-inf"))
        self.sum = torch.zeros(n)
        self.best = torch.zeros(n, dtype=torch.int64)
        self.hit = torch.zeros(n)

    def add(self, logits: torch.Tensor, start: int) -> torch.Tensor:
        """Take in logits [T, rows]; the factor by which earlier sums shrink, [T]."""
        import torch

        top, place = logits.max(-1)
        better = top > self.max
        self.best = torch.where(better, place + start, self.best)
        largest = torch.maximum(self.max, top)
        shrink = torch.exp(self.max - largest)
        self.sum = self.sum * shrink + torch.exp(logits - largest[:, None]).sum(-1)
        self.max = largest
        here = (self.targets >= start) & (self.targets < start + logits.shape[-1])
        index = (self.targets - start).clamp(0, logits.shape[-1] - 1)
        self.hit = torch.where(here, logits.gather(1, index[:, None])[:, 0], self.hit)
        return shrink

    @property
    def lse(self) -> torch.Tensor:
        return self.max + self.sum.log()


def token_losses(
    source: tuple[Head, torch.Tensor],
    quantized: tuple[Head, torch.Tensor],
    targets: torch.Tensor,
    dims: Mapping[str, int],
    caches: tuple[Cache, Cache] | None = None,
) -> TokenLoss:
    """Losses of hidden states [T, D] by their heads; `targets` int64 [T] are the tokens that came."""
    import torch

    p_sums, q_sums = _Sums(targets), _Sums(targets)
    cross = torch.zeros(len(targets))
    start = 0
    kept = caches or (None, None)
    with torch.no_grad():
        for p, q in zip(
            source[0].logits(source[1], dims, kept[0]),
            quantized[0].logits(quantized[1], dims, kept[1]),
            strict=True,
        ):
            shrink = p_sums.add(p, start)
            q_sums.add(q, start)
            cross = cross * shrink + (torch.exp(p - p_sums.max[:, None]) * (p - q)).sum(-1)
            start += p.shape[-1]
    kl = cross / p_sums.sum - p_sums.lse + q_sums.lse
    return TokenLoss(
        q_sums.lse - q_sums.hit,
        p_sums.lse - p_sums.hit,
        kl.clamp(min=0),
        q_sums.best == p_sums.best,
        q_sums.lse,
        p_sums.lse,
    )
