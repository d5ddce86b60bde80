"""Emitters of recurrences: calls of the kernels in `kernels/state.py` and `kernels/state_delta.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.core import Value
from ...ir.types import product
from . import kernels
from .lower import Lowering, emits
from .untyped import relax

Source = tuple[int, int]


def _width(value: Value) -> int:
    """Elements of a token."""
    total = product(value.shape[1:])
    assert isinstance(total, int)
    return total


def _source(low: Lowering, value: Value) -> tuple[Any, Source]:
    """A value [T, …] as [T, width], or the wider matrix of which it is columns, with its place there."""
    width = _width(value)
    flat = value
    while (op := flat.producer) is not None and op.opname == "reshape":
        before = op.operands[0]
        if before.shape[:1] != value.shape[:1] or _width(before) != width:
            break
        flat = before
    if op is not None and op.opname == "slice":
        whole, start = op.operands[0], op.start  # type: ignore[attr-defined]
        columns = op.axis == -1 and op.step == 1 and isinstance(start, int)  # type: ignore[attr-defined]
        row = whole.shape[-1]
        if columns and flat.type.rank == 2 and isinstance(row, int):
            return low.get(whole), (row, start)
    x = low.get(value)
    return (x if value.type.rank == 2 else low.reshape(x, [low.dim(value.shape[0]), width])), (width, 0)


def _call(low: Lowering, op: Any, make: Callable[..., Any], static: dict[str, Any], args: list[Any]) -> Any:
    """The kernel's rows; it writes the state in place."""
    cache = [low.get(v) for v in op.cache]
    types = [low.type_of(op.cache[0]), low.type_of(op.result)]
    both = low.kernel_inplace(op.opname, make, static, [*args, *cache], len(args), types)
    return low.emit(relax.TupleGetItem(both, 1))


def _given(low: Lowering, *values: Value | None) -> list[Any]:
    return [low.get(v) for v in values if v is not None]


@emits("causal_conv1d")
def causal_conv1d(low: Lowering, op: Any) -> Any:
    x, source = _source(low, op.x)
    static = {
        "channels": op.x.shape[-1],
        "width": op.weight.shape[0],
        "bias": op.bias is not None,
        "activation": op.activation,
        "source": source,
    }
    return _call(low, op, kernels.make_causal_conv1d, static, [x, *_given(low, op.weight, op.bias)])


@emits("linear_recurrence")
def linear_recurrence(low: Lowering, op: Any) -> Any:
    x, x_source = _source(low, op.x)
    a, a_source = _source(low, op.a)
    static = {"channels": op.x.shape[-1], "x_source": x_source, "a_source": a_source}
    return _call(low, op, kernels.make_linear_recurrence, static, [x, a])


@emits("wkv")
def wkv(low: Lowering, op: Any) -> Any:
    k, k_source = _source(low, op.k)
    v, v_source = _source(low, op.v)
    static = {"channels": op.k.shape[-1], "k_source": k_source, "v_source": v_source}
    return _call(low, op, kernels.make_wkv, static, [k, v, low.get(op.decay), low.get(op.first)])


def _sources(low: Lowering, *values: Value) -> tuple[list[Any], tuple[Source, ...]]:
    found = [_source(low, v) for v in values]
    return [x for x, _ in found], tuple(source for _, source in found)


@emits("selective_scan")
def selective_scan(low: Lowering, op: Any) -> Any:
    rows, sources = _sources(low, op.x, op.dt, op.b, op.c)
    static = {
        "channels": op.x.shape[-1],
        "elements": op.b.shape[-1],
        "sources": sources,
        "d": op.d is not None,
        "dt_bias": op.dt_bias is not None,
        "softplus_of_dt": op.softplus,
    }
    args = [*rows, *_given(low, op.a, op.d, op.dt_bias)]
    return _call(low, op, kernels.make_selective_scan, static, args)


@emits("ssd_scan")
def ssd_scan(low: Lowering, op: Any) -> Any:
    rows, sources = _sources(low, op.x, op.dt, op.b, op.c)
    static = {
        "heads": op.x.shape[-2],
        "head_dim": op.x.shape[-1],
        "groups": op.b.shape[-2],
        "elements": op.b.shape[-1],
        "sources": sources,
        "d": op.d is not None,
    }
    return _call(low, op, kernels.make_ssd_scan, static, [*rows, *_given(low, op.a, op.d)])


@emits("gated_delta_rule")
def gated_delta_rule(low: Lowering, op: Any) -> Any:
    rows, sources = _sources(low, op.q, op.k, op.v, op.g, op.beta)
    static = {
        "heads": op.v.shape[-2],
        "key_heads": op.k.shape[-2],
        "key_dim": op.k.shape[-1],
        "value_dim": op.v.shape[-1],
        "by_element": op.decays_by_element,
        "scale": op.scale,
        "sources": sources,
    }
    return _call(low, op, kernels.make_gated_delta_rule, static, rows)
