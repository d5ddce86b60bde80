"""Recurrences (`state.cuh`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .launches import ACTIVATIONS, present
from .source import Argument, Code, Launch, Size

Source = tuple[int, int]
THREADS = 64
"""Of a block: a sequence alone is to reach many multiprocessors."""


def _code(
    name: str,
    rows: Mapping[str, Source],
    weights: Sequence[tuple[str, tuple[int, ...], bool]],
    state: tuple[int, ...],
    out: tuple[int, ...],
    parameters: Mapping[str, Any],
) -> Code:
    """A kernel of this kind. `rows`: operands with a row a token, and where each begins in a wider one;
    `weights`: name, shape, whether it is there.
    """
    channels = 1
    for d in out:
        channels *= d
    cache: list[tuple[str, tuple[Size, ...], str]] = [
        ("state", ("S", *state), "float32"),
        ("state_slot", ("B",), "int32"),
        ("query_start", ("B1",), "int32"),
        ("context_len", ("B",), "int32"),
    ]
    arguments = [Argument(n, ("T", width), "float32") for n, (width, _) in rows.items()]
    arguments += [Argument(n, shape, "float32") for n, shape, there in weights if there]
    arguments += [Argument(n, shape, dtype, n == "state") for n, shape, dtype in cache]
    arguments.append(Argument("out", ("T", *out), "float32", True))
    given = present(
        *((n, True) for n in rows),
        *((n, there) for n, _, there in weights),
        *((n, True) for n, _, _ in cache),
        ("out", True),
    )
    places: dict[str, Any] = {}
    for n, (width, first) in rows.items():
        places |= {f"{n}_stride": width, f"{n}_first": first}
    grid: tuple[Size, Size, Size] = (-(-channels // THREADS), "B", 1)
    launch = Launch("scan", f"{name}<P>", given, grid, THREADS)
    return Code(tuple(arguments), (launch,), {**parameters, **places, "threads": THREADS})


def causal_conv1d(*, channels: int, width: int, bias: bool, activation: str | None, source: Source) -> Code:
    return _code(
        "causal_conv1d",
        {"x": source},
        [("weight", (width, channels), True), ("bias", (channels,), bias)],
        (width - 1, channels),
        (channels,),
        {
            "channels": channels,
            "width": width,
            "bias": bias,
            "activates": activation is not None,
            "activation": ACTIVATIONS[activation or "silu"],
        },
    )


def linear_recurrence(*, channels: int, x_source: Source, a_source: Source) -> Code:
    rows = {"x": x_source, "a": a_source}
    return _code("linear_recurrence", rows, [], (1, channels), (channels,), {"channels": channels})


def wkv(*, channels: int, k_source: Source, v_source: Source) -> Code:
    rows = {"k": k_source, "v": v_source}
    weights = [("decay", (channels,), True), ("first", (channels,), True)]
    return _code("wkv", rows, weights, (3, channels), (channels,), {"channels": channels})


def selective_scan(
    *, channels: int, elements: int, sources: Sequence[Source], d: bool, dt_bias: bool, softplus_of_dt: bool
) -> Code:
    return _code(
        "selective_scan",
        dict(zip(("x", "dt", "b", "c"), sources, strict=True)),
        [("a", (elements, channels), True), ("d", (channels,), d), ("dt_bias", (channels,), dt_bias)],
        (elements, channels),
        (channels,),
        {
            "channels": channels,
            "elements": elements,
            "d": d,
            "dt_bias": dt_bias,
            "softplus_of_dt": softplus_of_dt,
        },
    )


def ssd_scan(
    *, heads: int, head_dim: int, groups: int, elements: int, sources: Sequence[Source], d: bool
) -> Code:
    return _code(
        "ssd_scan",
        dict(zip(("x", "dt", "b", "c"), sources, strict=True)),
        [("a", (heads,), True), ("d", (heads,), d)],
        (heads, elements, head_dim),
        (heads, head_dim),
        {"heads": heads, "head_dim": head_dim, "groups": groups, "elements": elements, "d": d},
    )


def gated_delta_rule(
    *,
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    by_element: bool,
    scale: float,
    sources: Sequence[Source],
) -> Code:
    return _code(
        "gated_delta_rule",
        dict(zip(("q", "k", "v", "g", "beta"), sources, strict=True)),
        [],
        (heads, key_dim, value_dim),
        (heads, value_dim),
        {
            "heads": heads,
            "key_heads": key_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "by_element": by_element,
            "scale": float(scale),
        },
    )
