"""What each op does, in numpy: `KERNELS`, name → function of (run, op, operands), an operand for each field.

What is not in the table llmc decomposes (`legalize`): norms, rope, softmax, activations become the
arithmetic that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from llmc.plugins import UnsupportedError


@dataclass
class Run:
    """One run of a graph: numbers for its symbols, and how many rows attention takes at a time."""

    dims: Mapping[str, int]
    rows: int = 256

    def size(self, dim: Any) -> int:
        """A dimension as a number."""
        return dim if isinstance(dim, int) else int(dim.substitute(dict(self.dims)))

    def shape(self, shape: Any) -> list[int]:
        return [self.size(d) for d in shape]


Kernel = Callable[[Run, Any, list[Any]], Any]
KERNELS: dict[str, Kernel] = {}


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    def register(function: Kernel) -> Kernel:
        for name in names:
            KERNELS[name] = function
        return function

    return register


def _plain(function: Callable[..., Any]) -> Kernel:
    """A numpy function of the operands alone."""
    return lambda run, op, xs: function(*xs)


_erf = np.vectorize(math.erf, otypes=[np.float32])  # numpy has none
KERNELS |= {
    name: _plain(function)
    for name, function in {
        "neg": np.negative, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin,
        "cos": np.cos, "abs": np.abs, "floor": np.floor, "logical_not": np.logical_not, "add": np.add,
        "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "floor_divide": np.floor_divide,
        "remainder": np.remainder, "pow": np.power, "maximum": np.maximum, "minimum": np.minimum,
        "less": np.less, "less_equal": np.less_equal, "greater": np.greater, "equal": np.equal,
        "greater_equal": np.greater_equal, "not_equal": np.not_equal, "logical_and": np.logical_and,
        "logical_or": np.logical_or, "where": np.where, "matmul": np.matmul, "erf": _erf,
    }.items()
}  # fmt: skip


@kernel("full")
def _full(run: Run, op: Any, xs: list[Any]) -> Any:
    return np.full(run.shape(op.shape), op.value, op.dtype)


@kernel("dim_value")
def _dim_value(run: Run, op: Any, xs: list[Any]) -> Any:
    return np.array(run.size(op.dim), op.dtype)


@kernel("arange")
def _arange(run: Run, op: Any, xs: list[Any]) -> Any:
    return np.arange(run.size(op.length)).astype(op.dtype) * np.array(op.step, op.dtype) + np.array(
        op.start, op.dtype
    )


@kernel("cast")
def _cast(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0].astype(op.dtype, copy=False)


@kernel("reshape")
def _reshape(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0].reshape(run.shape(op.shape))


@kernel("expand")
def _expand(run: Run, op: Any, xs: list[Any]) -> Any:
    return np.broadcast_to(xs[0], run.shape(op.shape))


@kernel("transpose")
def _transpose(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0].transpose(op.full_perm())


@kernel("slice")
def _slice(run: Run, op: Any, xs: list[Any]) -> Any:
    index = [slice(None)] * xs[0].ndim
    index[op.axis] = slice(run.size(op.start), run.size(op.stop), op.step)
    return xs[0][tuple(index)]


@kernel("concat")
def _concat(run: Run, op: Any, xs: list[Any]) -> Any:
    return np.concatenate(xs[0], axis=op.axis)


@kernel("index")
def _index(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0][tuple(xs[1])]


@kernel("gather")
def _gather(run: Run, op: Any, xs: list[Any]) -> Any:
    x, index = xs
    return x[..., index] if index.ndim == 1 else np.take_along_axis(x, index, -1)


@kernel("gather_last")
def _gather_last(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0][xs[1]]


@kernel("reduce_sum")
def _reduce_sum(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0].sum(axis=tuple(op.axes), keepdims=op.keepdim, dtype=xs[0].dtype)


@kernel("reduce_max")
def _reduce_max(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[0].max(axis=tuple(op.axes), keepdims=op.keepdim)


@kernel("embedding")
def _embedding(run: Run, op: Any, xs: list[Any]) -> Any:
    return xs[1][xs[0]]


@kernel("linear")
def _linear(run: Run, op: Any, xs: list[Any]) -> Any:
    x, weight, bias = xs
    y = x @ weight.T
    return y if bias is None else y + bias


def dequantized(quant: Any, q: Any, scale: Any, zero: Any) -> Any:
    """float32 [N, K] by the table of `llmc.plugins.Quantization`."""
    if quant.codebook is not None:
        raise UnsupportedError(
            f"numpy-cpu has no codebook {quant.codebook}",
            remedy="choose a scheme of integers, such as int4-g64",
        )

    def spread(part: Any) -> Any:
        return np.repeat(part.astype(np.float32), quant.group_size, axis=-1)[..., : q.shape[-1]]

    codes = q.astype(np.float32)
    if zero is None:
        return (codes - float(1 << (quant.bits - 1))) * spread(scale)
    if zero.dtype == np.uint8:
        return (codes - spread(zero)) * spread(scale)
    return codes * spread(scale) + spread(zero)


@kernel("dequantize")
def _dequantize(run: Run, op: Any, xs: list[Any]) -> Any:
    return dequantized(op.q.type.quant, *xs)


@kernel("append_kv")
def _append_kv(run: Run, op: Any, xs: list[Any]) -> Any:
    """In place: nobody reads the cache as it was before."""
    k, v, pages, slots = xs
    page, offset = np.divmod(slots, pages.shape[2])
    pages[0, page, offset], pages[1, page, offset] = k, v
    return pages


@kernel("paged_attention")
def _paged_attention(run: Run, op: Any, xs: list[Any]) -> Any:
    given = dict(zip((f.name for f in op.operand_fields), xs, strict=True))
    q, pages, starts = given["q"], given["pages"], given["query_start"]
    out = np.zeros_like(q)
    for b, n in enumerate(given["context_len"].tolist()):
        first, last = int(starts[b]), int(starts[b + 1])
        if first == last:
            continue
        table = given["block_table"][b, : -(-n // pages.shape[2])]
        k, v = (pages[i, table].reshape(-1, *pages.shape[3:])[:n].astype(np.float32) for i in (0, 1))
        for begin in range(first, last, run.rows):
            end = min(begin + run.rows, last)
            place = np.arange(n - (last - begin), n - (last - end))
            out[begin:end] = _attend(op, q[begin:end], k, v, place, given.get("sinks"), given.get("slopes"))
    return out


def _attend(op: Any, q: Any, k: Any, v: Any, place: Any, sinks: Any, slopes: Any) -> Any:
    """q [t, H, D] at positions `place` over all keys [n, Hkv, D] of the sequence."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,nhd->htn", q, k, optimize=True) * np.float32(op.scale)
    if op.softcap is not None:
        scores = np.tanh(scores / np.float32(op.softcap)) * np.float32(op.softcap)
    distance = place[:, None] - np.arange(len(k))[None, :]
    if slopes is not None:
        scores -= slopes[:, None, None] * distance[None].astype(np.float32)
    seen = distance >= 0 if op.causal else np.ones(distance.shape, bool)
    if op.window is not None:
        seen &= np.abs(distance) < op.window
    scores = np.where(seen, scores, -np.inf)
    most = scores.max(-1, keepdims=True)
    if sinks is not None:
        most = np.maximum(most, sinks[:, None, None])
    weights = np.exp(scores - most)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - most)
    return np.einsum("htn,nhd->thd", weights / total, v, optimize=True)
