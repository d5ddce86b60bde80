"""ATen operators over neighbouring tokens of one sequence (see `aten_table.py`): convolutions, padding, and
what stands some tokens back. What sees no later tokens becomes `causal_conv1d`, which keeps the tokens that
it needs between steps; what does, slices of padded rows, for which a step must take one whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.ops import math as m
from ..ir.ops import shape
from ..ir.ops.nn import Linear
from ..ir.ops.state import CausalConv1d
from ..ir.types import Dim, DimExpr
from .aten_shapes import reshaped
from .aten_table import aten

if TYPE_CHECKING:
    from .importer import Importer


@aten("conv1d.default")
def _conv1d(
    c: Importer,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Value:
    """A convolution over the tokens of one sequence, [1, C, T]: each token with those before it. What is
    before the first token are columns that the model has put there, or as much padding on either side, of
    which the model then takes the first T columns alone. Any other one sees tokens on both sides.
    """
    behind = weight.shape[-1] - 1
    assert isinstance(behind, int)
    if tuple(stride) != (1,) or tuple(dilation) != (1,) or x.type.rank != 3:
        raise c.unsupported("a convolution with steps or gaps")
    if x.shape[0] != 1:
        raise c.unsupported("a convolution over the tokens of several sequences")
    count, lead, tokens = _led(x)
    (around,) = padding
    first = behind and around == behind and all(_takes_first(u, x.shape[-1], c) for u in c.node.users)
    if first and not count:
        count = behind
    elif around or count < behind:
        return _over_both_sides(c, x, weight, bias, around, groups)
    rows = c.emit(shape.Transpose(tokens, perm=(-1, -2)))
    if lead is not None:  # columns of one value for all of them: they add the same to every token
        added = _every_token(c, lead, weight, groups)
        bias = added if bias is None else c.emit(m.Add(added, bias))
    y = _over_the_last(c, rows, weight, bias if count == behind else None, groups)
    if count == behind:
        return c.emit(shape.Transpose(y, perm=(-1, -2)))
    return _with_lead(c, c.emit(shape.Transpose(y, perm=(-1, -2))), bias, count - behind)


def _with_lead(c: Importer, y: Value, bias: Value | None, count: int) -> Value:
    """[1, C, T] behind `count` columns, all of them the bias, or zeros."""
    channels = y.shape[1]
    if bias is None:
        lead = c.emit(shape.Expand(c.scalar(0, y.dtype), shape=(1, channels, count)))
    else:
        column = reshaped(c, bias, (1, channels, 1))
        lead = c.emit(shape.Expand(column, shape=(1, channels, count)))
        y = c.emit(m.Add(y, column))
    return c.emit(shape.Concat([lead, y], axis=-1))


def _led(x: Value) -> tuple[int, Value | None, Value]:
    """Of columns [1, C, T + n]: n; what is added to all of them, [1, C, 1], or None; and the
    columns of tokens without it.
    """
    joined = x.producer
    if not isinstance(joined, shape.Concat) or joined.axis != -1 or len(joined.xs) != 2:
        return 0, None, x
    lead, tokens = joined.xs
    count, made, added = lead.shape[-1], lead.producer, tokens.producer
    if not isinstance(count, int):
        return 0, None, x
    if is_zero(lead):
        return count, None, tokens
    if isinstance(made, shape.Expand) and isinstance(added, m.Add) and added.b is made.x:
        return count, made.x, added.a
    return 0, None, x


def _over_the_last(c: Importer, rows: Value, weight: Value, bias: Value | None, groups: int) -> Value:
    """The convolution over rows [1, T, C], before which there are zeros."""
    channels, per_group, width = weight.shape
    assert isinstance(width, int)
    if per_group == 1 and channels == groups:
        filters = c.emit(shape.Transpose(reshaped(c, weight, (channels, width)), perm=(-1, -2)))
        return c.emit(CausalConv1d(rows, filters, bias, []))
    total: Value | None = None
    for w in range(width):
        back = width - 1 - w
        seen = rows if back == 0 else earlier(c, rows, back)
        y = _by_groups(c, seen, weight, w, bias if back == 0 else None, groups)
        total = y if total is None else c.emit(m.Add(total, y))
    assert total is not None
    return total


def _over_both_sides(
    c: Importer, x: Value, weight: Value, bias: Value | None, around: int, groups: int
) -> Value:
    """The convolution over columns [1, C, T] with `around` zeros on either side, as each of its W places does
    it: [1, N, T + 2 · around + 1 - W].
    """
    channels, per_group, width = weight.shape
    assert isinstance(width, int)
    padded = _pad(c, c.emit(shape.Transpose(x, perm=(-1, -2))), (0, 0, around, around))
    length = padded.shape[-2] - (width - 1)
    total: Value | None = None
    for w in range(width):
        rows = c.emit(shape.Slice(padded, axis=-2, start=w, stop=length + w))
        if per_group == 1 and channels == groups:
            filters = c.emit(shape.Slice(weight, axis=-1, start=w, stop=w + 1))
            y = c.emit(m.Mul(rows, reshaped(c, filters, (channels,))))
        else:
            y = _by_groups(c, rows, weight, w, None, groups)
        total = y if total is None else c.emit(m.Add(total, y))
    assert total is not None
    total = total if bias is None else c.emit(m.Add(total, bias))
    return c.emit(shape.Transpose(total, perm=(-1, -2)))


@aten("im2col.default")
def _im2col(
    c: Importer,
    x: Value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """unfold: [..., C, H, W] → of each place what a window of K elements sees there, [..., C · K, places]."""
    if any(step != 1 for step in stride):
        raise c.unsupported("unfolding with steps")
    (high, wide), (down, right) = kernel_size, padding
    x = _pad(c, x, (right, right, down, down))
    *lead, channels, rows, columns = x.shape
    ends = rows - dilation[0] * (high - 1), columns - dilation[1] * (wide - 1)
    seen: list[Value] = []
    for at in itertools.product(range(high), range(wide)):
        part = x
        for axis, place, gap, end in zip((-2, -1), at, dilation, ends, strict=True):
            part = c.emit(shape.Slice(part, axis=axis, start=place * gap, stop=end + place * gap))
        seen.append(reshaped(c, part, (*lead, channels, 1, ends[0] * ends[1])))
    together = c.emit(shape.Concat(seen, axis=-2))
    return reshaped(c, together, (*lead, channels * len(seen), ends[0] * ends[1]))


def _every_token(c: Importer, row: Value, weight: Value, groups: int) -> Value:
    """What the convolution makes of a column [1, C, 1] that every token has: [N]. Of products and sums, which
    are computed once where the column is a weight.
    """
    outputs, columns, width = weight.shape
    assert isinstance(outputs, int)
    each = reshaped(c, weight, (groups, outputs // groups, columns, width))
    product = c.emit(m.Mul(each, reshaped(c, row, (groups, 1, columns, 1))))
    return reshaped(c, c.emit(m.ReduceSum(product, axes=(-2, -1), keepdim=False)), (outputs,))


def _by_groups(c: Importer, x: Value, weight: Value, place: int, bias: Value | None, groups: int) -> Value:
    """What one place of the filters [N, C / groups, W] makes of rows [..., T, C]: a linear layer, or one of
    each group of channels.
    """
    outputs, columns, _ = weight.shape
    assert isinstance(outputs, int) and isinstance(columns, int)
    at = c.emit(shape.Slice(weight, axis=-1, start=place, stop=place + 1))
    matrix = reshaped(c, at, (outputs, columns))
    if groups == 1:
        return c.emit(Linear(x, matrix, bias))

    def part(v: Value, axis: int, number: int, size: int) -> Value:
        return c.emit(shape.Slice(v, axis=axis, start=number * size, stop=(number + 1) * size))

    made: list[Value] = []
    for i in range(groups):
        rows = outputs // groups
        own = None if bias is None else part(bias, -1, i, rows)
        made.append(c.emit(Linear(part(x, -1, i, columns), part(matrix, -2, i, rows), own)))
    return c.emit(shape.Concat(made, axis=-1))


def _takes_first(node: Any, count: Dim, c: Importer) -> bool:
    """Whether a node is a slice of the first `count` columns."""
    if str(node.target) != "aten.slice.Tensor" or node.args[1] not in (2, -1):
        return False
    length = node.meta["val"].shape[-1]
    return node.args[2] in (None, 0) and c.dim(length) == count


@aten("constant_pad_nd.default", "pad.default")
def _pad(
    c: Importer, x: Value, widths: Sequence[Dim], mode: Any = "constant", value: float | None = None
) -> Value:
    """`widths`: before and behind, of the last axis, of the one before it, …; below zero they cut. Zeros
    before the tokens and as many of the last ones cut off are tokens from further back.
    """
    mode, value = ("constant", mode) if isinstance(mode, int | float) else (mode, value)
    if mode != "constant":
        raise c.unsupported(f"padding by {mode}")
    known = [n for n in widths if isinstance(n, int)]
    if len(known) != len(widths):
        raise c.unsupported("padding by as much as there are tokens")
    for axis, before, behind in zip(itertools.count(-1, -1), known[::2], known[1::2], strict=False):
        if before > 0 and behind == -before and not value and _tokens_along(x, axis):
            x = earlier(c, x, before)
            continue
        length = x.shape[axis]
        if before < 0 or behind < 0:
            end = length + min(behind, 0)
            x = c.emit(shape.Slice(x, axis=axis, start=max(-before, 0), stop=end))
        left, right = (_sides(c, x, axis, count, value or 0) for count in (before, behind))
        x = c.emit(shape.Concat([*left, x, *right], axis=axis)) if left or right else x
    return x


def _sides(c: Importer, x: Value, axis: int, count: int, number: float) -> list[Value]:
    """A number `count` times along an axis, to join with a value; nothing where it is not above zero."""
    if count <= 0:
        return []
    side = (*x.shape[:axis], count, *x.shape[x.type.rank + axis + 1 :])
    return [c.emit(shape.Expand(c.scalar(number, x.dtype), shape=side))]


@aten("cat.default", "concat.default", "concatenate.default")
def _cat(c: Importer, xs: Sequence[Value], dim: int = 0) -> Value:
    dtype = c.result_dtype()
    # torch leaves out what has the shape [0] whatever the others' rank is: a cache that is still empty.
    xs = [x for x in xs if x.shape != (0,)] or xs
    axis = c.axis(dim, xs[0])
    if len(xs) == 1:
        return c.cast(xs[0], dtype)
    count = xs[0].shape[axis]
    if len(xs) == 2 and isinstance(count, int) and is_zero(xs[0]):
        whole = _all_but_last(xs[1], count, axis)
        if whole is not None:
            return c.cast(earlier(c, whole, count), dtype)
    return c.emit(shape.Concat([c.cast(x, dtype) for x in xs], axis=axis))


def _all_but_last(x: Value, count: int, axis: int) -> Value | None:
    """The tokens of which a value holds all but the last `count`."""
    cut = x.producer
    if not isinstance(cut, shape.Slice) or not _tokens_along(cut.x, axis):
        return None
    first = cut.axis == axis and cut.start == 0 and cut.step == 1
    return cut.x if first and cut.stop + count == cut.x.shape[axis] else None


def is_zero(x: Value) -> bool:
    """Whether a value is known to be zero everywhere."""
    made = x.producer
    while isinstance(made, shape.Expand | shape.Reshape) or (isinstance(made, Linear) and made.bias is None):
        made = made.x.producer
    return isinstance(made, shape.Full) and made.value == 0


def _tokens_along(x: Value, axis: int) -> bool:
    """Whether the tokens of one sequence lie along an axis, the one before the last: [1, T, C]."""
    rows, channels = x.shape[-2:] if x.type.rank == 3 else (0, 0)
    return axis == -2 and x.shape[0] == 1 and isinstance(rows, DimExpr) and isinstance(channels, int)


def earlier(c: Importer, x: Value, count: int) -> Value:
    """[1, T, C] → the same, of each token what stands `count` before it, and zeros where there is none."""
    channels = x.shape[-1]
    taken = c.emit(shape.Full(value=1.0, dtype=x.dtype, shape=(channels,)))
    left = c.emit(shape.Full(value=0.0, dtype=x.dtype, shape=(count * channels,)))
    filters = c.emit(shape.Concat([taken, left], axis=-1))
    return c.emit(CausalConv1d(x, reshaped(c, filters, (count + 1, channels)), None, []))
