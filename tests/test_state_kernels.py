"""Kernels of recurrences against the reference meanings of their ops, over a ragged batch, on each width of
vectors.

Tolerance: 2e-6 of the largest value where sums are short, 2e-5 behind long recurrences.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.kernels.state import (
    make_causal_conv1d,
    make_linear_recurrence,
    make_selective_scan,
    make_ssd_scan,
    make_wkv,
)
from llmc.codegen.tvm.kernels.state_delta import make_gated_delta_rule
from llmc.ir.core import Value
from llmc.ir.ops import state as ops

from .kernel_harness import blank, call, close, normal, value, vector_levels

# One token, none, several, and a sequence that goes on; slots out of order, one of the rows nobody's.
COUNTS = (1, 0, 5, 7)
CONTEXT = (1, 9, 12, 7)
SLOTS = (3, 1, 0, 4)
ROWS = 5


class Case:
    """An op's operands for a ragged batch, and its kernel's parameters. `tokens` and `others` are arrays."""

    def __init__(
        self, kind: type[Any], tokens: list[np.ndarray], others: list[np.ndarray | None], **attributes: Any
    ) -> None:
        self.kind, self.tokens, self.others, self.attributes = kind, tokens, others, attributes

    def op(self, state: np.ndarray | None) -> Any:
        own = [None if x is None else value(x) for x in (*self.tokens, *self.others)]
        cache: list[Value] = []
        if state is not None:
            cache = [value(state), *(value(np.zeros(ROWS, np.int32)) for _ in range(3))]
        return self.kind(*own, cache, **self.attributes)

    def state(self, seed: int) -> np.ndarray:
        made = normal(ROWS, *self.op(None).state_shape(), seed=seed)
        if self.kind is ops.Wkv:  # the denominator of a sequence that goes on is at least 1
            made[:, 1] = 1 + np.abs(made[:, 1])
        return made

    def meaning(self, state: np.ndarray, step: list[np.ndarray], rows: slice) -> list[np.ndarray]:
        own = [*(x[rows] for x in self.tokens), *self.others]
        given = [None if x is None else torch.from_numpy(x) for x in own]
        out, after = self.op(state).reference({}, *given, [torch.from_numpy(x) for x in (state, *step)])
        return [out.numpy(), after.numpy()]

    def run(
        self,
        make: Any,
        isa: str,
        parameters: dict[str, Any],
        state: np.ndarray,
        step: list[np.ndarray],
        rows: slice,
    ) -> list[np.ndarray]:
        own = [x[rows].reshape(x[rows].shape[0], -1) for x in self.tokens]
        others = [x for x in self.others if x is not None]
        shape = self.tokens[self.kind.shaped_like][rows].shape
        arrays = [*own, *others, state, *step, blank(*shape)]
        after, *_, out = call(make, isa, parameters, *arrays, outputs=5)
        return [out, after]


def step_of(counts: tuple[int, ...], context: tuple[int, ...], slots: tuple[int, ...]) -> list[np.ndarray]:
    starts = np.concatenate([[0], np.cumsum(counts)])
    return [np.array(x, np.int32) for x in (slots, starts, context)]


def source(x: np.ndarray) -> tuple[int, int]:
    return int(np.prod(x.shape[1:])), 0


T = sum(COUNTS)


def conv(channels: int, width: int, activation: str | None, bias: bool) -> tuple[Case, Any, dict[str, Any]]:
    x = normal(T, channels)
    case = Case(
        ops.CausalConv1d,
        [x],
        [normal(width, channels, seed=1), normal(channels, seed=2) if bias else None],
        activation=activation,
    )
    parameters = {
        "channels": channels,
        "width": width,
        "bias": bias,
        "activation": activation,
        "source": source(x),
    }
    return case, make_causal_conv1d, parameters


def linear(channels: int) -> tuple[Case, Any, dict[str, Any]]:
    x, a = normal(T, channels), 1 / (1 + np.exp(-normal(T, channels, seed=1)))
    case = Case(ops.LinearRecurrence, [x, a], [])
    return case, make_linear_recurrence, {"channels": channels, "x_source": source(x), "a_source": source(a)}


def wkv(channels: int) -> tuple[Case, Any, dict[str, Any]]:
    """Keys from which exponents differ by more than float32 holds."""
    k, v = 40 * normal(T, channels), normal(T, channels, seed=1)
    others: list[np.ndarray | None] = [-np.exp(normal(channels, seed=2)), 5 * normal(channels, seed=3)]
    parameters = {"channels": channels, "k_source": source(k), "v_source": source(v)}
    return Case(ops.Wkv, [k, v], others), make_wkv, parameters


def selective(channels: int, elements: int, extras: bool) -> tuple[Case, Any, dict[str, Any]]:
    tokens = [normal(T, n, seed=i) for i, n in enumerate((channels, channels, elements, elements))]
    tokens[1] = tokens[1] if extras else np.abs(tokens[1])
    others = [
        -np.exp(normal(elements, channels, seed=5)),
        normal(channels, seed=6) if extras else None,
        normal(channels, seed=7) if extras else None,
    ]
    case = Case(ops.SelectiveScan, tokens, others, softplus=extras)
    parameters = {
        "channels": channels,
        "elements": elements,
        "sources": tuple(map(source, tokens)),
        "d": extras,
        "dt_bias": extras,
        "softplus_of_dt": extras,
    }
    return case, make_selective_scan, parameters


def ssd(heads: int, dim: int, groups: int, elements: int, d: bool) -> tuple[Case, Any, dict[str, Any]]:
    tokens = [
        normal(T, heads, dim),
        np.abs(normal(T, heads, seed=1)),
        normal(T, groups, elements, seed=2),
        normal(T, groups, elements, seed=3),
    ]
    case = Case(ops.SsdScan, tokens, [-np.exp(normal(heads, seed=4)), normal(heads, seed=5) if d else None])
    parameters = {
        "heads": heads,
        "head_dim": dim,
        "groups": groups,
        "elements": elements,
        "sources": tuple(map(source, tokens)),
        "d": d,
    }
    return case, make_ssd_scan, parameters


def delta(heads: int, key_heads: int, key: int, width: int, wide: bool) -> tuple[Case, Any, dict[str, Any]]:
    tokens = [
        normal(T, key_heads, key),
        0.3 * normal(T, key_heads, key, seed=1),
        normal(T, heads, width, seed=2),
        -np.abs(normal(T, heads, key, seed=3)),
        1 / (1 + np.exp(-normal(T, heads, seed=4))),
    ]
    tokens[3] = tokens[3] if wide else tokens[3][..., 0].copy()
    parameters = {
        "heads": heads,
        "key_heads": key_heads,
        "key_dim": key,
        "value_dim": width,
        "by_element": wide,
        "scale": 0.5,
        "sources": tuple(map(source, tokens)),
    }
    return Case(ops.GatedDeltaRule, tokens, [], scale=0.5), make_gated_delta_rule, parameters


CASES = {
    "conv": conv(48, 4, "silu", True),
    "conv of odd width": conv(37, 3, None, False),
    "conv of few channels": conv(5, 2, "gelu_tanh", True),
    "conv without memory": conv(16, 1, None, True),
    "linear": linear(35),
    "wkv": wkv(32),
    "wkv, odd": wkv(21),
    "selective": selective(32, 16, True),
    "selective, plain, odd": selective(21, 3, False),
    "ssd": ssd(4, 32, 2, 8, True),
    "ssd, odd": ssd(3, 20, 1, 5, False),
    "delta": delta(4, 2, 16, 32, False),
    "delta by element, odd": delta(2, 2, 21, 19, True),
}


@pytest.mark.parametrize("name", CASES)
@vector_levels
def test_kernel_equals_its_reference_over_a_ragged_batch(name: str, isa: str) -> None:
    case, make, parameters = CASES[name]
    state, step = case.state(9), step_of(COUNTS, CONTEXT, SLOTS)
    state[3], state[4] = np.nan, np.inf  # of sequences that begin here: whatever a row holds means nothing
    wanted = case.meaning(state, step, slice(0, T))
    got = case.run(make, isa, parameters, state, step, slice(0, T))
    assert np.array_equal(got[1][[1, 2]], state[[1, 2]]), "rows of nobody, and of an empty sequence, stay"
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs, 2e-6 if name.startswith("conv") else 2e-5)


@pytest.mark.parametrize("name", ["conv", "linear", "wkv, odd", "selective", "ssd, odd", "delta"])
@vector_levels
def test_rows_do_not_depend_on_chunks_or_neighbours(name: str, isa: str) -> None:
    case, make, parameters = CASES[name]
    first = slice(T - 7, T)  # the last sequence alone, which begins here, in one chunk and in three
    fresh = case.state(1)
    whole = case.run(make, isa, parameters, fresh, step_of((7,), (7,), (4,)), first)
    state, rows = case.state(2), []
    for a, b in ((0, 3), (3, 4), (4, 7)):
        part = slice(T - 7 + a, T - 7 + b)
        out, state = case.run(make, isa, parameters, state, step_of((b - a,), (b,), (2,)), part)
        rows.append(out)
    assert np.array_equal(np.concatenate(rows), whole[0])
    assert np.array_equal(state[2], whole[1][4])
    batch = case.run(make, isa, parameters, case.state(9), step_of(COUNTS, CONTEXT, SLOTS), slice(0, T))
    assert np.array_equal(batch[0][first], whole[0])


@vector_levels
def test_operand_may_stand_in_columns_of_a_wider_one(isa: str) -> None:
    case, make, parameters = CASES["selective"]
    state, step = case.state(9), step_of(COUNTS, CONTEXT, SLOTS)
    alone = case.run(make, isa, parameters, state, step, slice(0, T))
    x, dt, b, c = case.tokens
    wide = np.concatenate([normal(T, 3), c, dt, b], 1)
    sources = (source(x), (67, 19), (67, 51), (67, 3))
    others = [o for o in case.others if o is not None]
    arrays = [x, wide, wide, wide, *others, state, *step, blank(T, 32)]
    after, *_, out = call(make, isa, {**parameters, "sources": sources}, *arrays, outputs=5)
    assert np.array_equal(out, alone[0])
    assert np.array_equal(after, alone[1])
