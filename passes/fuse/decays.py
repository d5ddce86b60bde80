"""Linear attention whose weights decay with the distance, in its parallel form → a recurrence.

    matmul(matmul(q, kᵀ) · decays [H, n, n] cut to [H, T, T], v)  →  ssd_scan(x = v, dt = 1, b = k, c = q, a)

    decays[h, i, j] = exp(a[h] · (i - j)) for j ≤ i, else 0

Retention (Sun et al. 2023, arXiv:2307.08621, section 2.1), lightning attention (Qin et al. 2024,
arXiv:2405.04658). What a table holds is found by comparing it with the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any as Anything
from weakref import WeakKeyDictionary

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import UnsupportedError
from ...ir.ops import math as m
from ...ir.ops.shape import Expand, Full, Reshape, Slice, Transpose
from ...ir.ops.state import SsdScan
from ...ir.rewriter import Any, Match, P, Rewriter, Rule
from ...ir.types import DimExpr
from ...ir.weights import ArrayTensor, LazyTensor, LongerTensor, ShapeOnlyTensor
from .rope import SWAP_HEADS, token_major

LAST_TWO = (-1, -2)
_TOLERANCE = 2e-5
"""Of a table of float32, whose largest element is 1."""

Array = np.ndarray[Anything, Anything]
_known: WeakKeyDictionary[LazyTensor, Array | None] = WeakKeyDictionary()
"""What was found of tables: a rule looks at one when it checks and when it rewrites, some thousand rows."""


def keys_of(kt: Value) -> tuple[Value, bool] | None:
    """The keys from kt [B, H, D, T]: head-major k [B, H, T, D], or (true) token-major k [B, T, H, D] where
    the transposes were merged.
    """
    op = kt.producer
    if isinstance(op, Transpose) and op.perm == LAST_TWO:
        return op.x, False
    if isinstance(op, Transpose) and op.perm == (-2, -1, -3):
        return op.x, True
    return None


def _table(v: Value) -> Value | None:
    """The stored table that a value [..., T, T] is cut from, from its first row and column on."""
    while not v.is_weight:
        op = v.producer
        cut = isinstance(op, Slice) and op.axis in LAST_TWO and (op.start, op.step) == (0, 1)
        seen = isinstance(op, Expand | Reshape) and op.x.shape[-3:] == v.shape[-3:]
        if op is None or not (cut or seen):
            return None
        v = op.operands[0]
    return v


def rates(table: Array) -> Array | None:
    """a [H] of a table [H, n, n] of decays; None where it is none."""
    heads, n, _ = table.shape
    column = table[:, :, 0].astype(np.float64)
    if n < 2 or not (np.isfinite(column).all() and (column[:, 1] > 0).all()):
        return None
    # Far from the diagonal rounding counts least, as long as the numbers are not too small for their bits.
    last = np.maximum((np.minimum.accumulate(column, 1) > 1e-6).sum(1) - 1, 1)
    a = np.log(column[np.arange(heads), last]) / last
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    for h in range(heads):  # one after the other: float64, and some thousand rows
        wanted = np.where(distance >= 0, np.exp(a[h] * np.maximum(distance, 0)), 0.0)
        if not np.abs(table[h] - wanted).max() <= _TOLERANCE * max(1.0, float(wanted.max())):
            return None
    return a.astype(np.float32)


def _rates_of(table: Value) -> Array | None:
    """a [H] of a weight that is a table of decays; None where it is none."""
    data = table.weight
    if data is None:
        return None
    if data not in _known:
        values = _read(table)
        _known[data] = None if values is None else rates(values)
    return _known[data]


def _read(v: Value) -> Array | None:
    """A weight as a table [H, n, n]; None where it has no values, or another shape."""
    data: LazyTensor | None = v.weight
    data = data.base if isinstance(data, LongerTensor) else data
    if data is None or isinstance(data, ShapeOnlyTensor) or len(data.shape) < 3:
        return None
    *lead, heads, n, columns = data.shape
    return data.read().reshape(heads, n, n) if n == columns and set(lead) <= {1} else None


class FuseDecayedAttention(Rule):
    """matmul(matmul(q, kᵀ) · decays, v) → ssd_scan"""

    pattern = P(m.MatMul, P(m.Mul, P(m.MatMul, Any("q"), Any("kt")), Any("decays")), Any("v"))

    def check(self, found: Match) -> str | None:
        q, v, table = found.value("q"), found.value("v"), _table(found.value("decays"))
        keys = keys_of(found.value("kt"))
        if table is None or keys is None:
            return "what products of queries and keys are multiplied by is no stored table"
        k, turned = keys
        heads, tokens = (k.shape[-2], k.shape[-3]) if turned else (k.shape[-3], k.shape[-2])
        if not (q.type.rank == v.type.rank == k.type.rank == 4) or not isinstance(tokens, DimExpr):
            return f"linear attention over tensors of rank {q.type.rank}, not [B, H, T, D]"
        if q.shape[1:3] != (heads, tokens) or v.shape[1:3] != (heads, tokens):
            return "linear attention whose heads differ in number, or whose lengths"
        a = _rates_of(table)
        if a is None or len(a) != heads:
            return f"the table {table.name} holds no decays of one rate a head"
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        table, keys = _table(found.value("decays")), keys_of(found.value("kt"))
        a = None if table is None else _rates_of(table)
        if table is None or keys is None or a is None:
            return None
        k, turned = keys
        name = f"{table.name}.rates"
        rate = rw.graph.weights.get(name) or rw.graph.add_weight(name, ArrayTensor(a, name))
        x = token_major(rw, found.value("v"))
        dt = rw.insert(Full(value=1.0, dtype=x.dtype, shape=x.shape[:-1]))
        b = k if turned else token_major(rw, k)
        y = rw.insert(SsdScan(x, dt, b, token_major(rw, found.value("q")), rate, None, []))
        return [rw.insert(Transpose(y, perm=SWAP_HEADS))]


def check_tables(graph: Graph) -> None:
    """Raises UnsupportedError where tables for blocks of any length are left: nothing is stored of them."""
    for v in graph.weights.values():
        if isinstance(v.weight, LongerTensor) and v.uses:
            op, _ = next(iter(v.uses))
            raise UnsupportedError(
                f"{op.loc or graph.name} goes over blocks of tokens, and what it does within one is not "
                "known",
                remedy="linear attention whose weights decay by one rate a head is; or report the model",
            )
