"""The recurrences of tvm-cuda, run without a GPU, against the ops' definitions in float64: sequences that
begin, go on, are empty; states in other rows than the sequences; operands in columns of wider rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from llmc.codegen.tvm.gpu import states
from llmc.codegen.tvm.gpu.source import Code

from .gpu_emulated import Device, generator

Array = np.ndarray
COUNTS, BEFORE, SLOTS, ROWS = (5, 0, 1, 9), (0, 4, 7, 0), (3, 0, 4, 1), 6
"""Of four sequences: new tokens, tokens computed before, row of the state; rows in all."""
STARTS = np.cumsum([0, *COUNTS]).astype(np.int32)
T = int(STARTS[-1])
PAD = 3


def _conv(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    seen = np.concatenate([s, t["x"]])
    width = len(w["weight"])
    y = sum(seen[i : i + len(t["x"])] * w["weight"][i] for i in range(width)) + w["bias"]
    return y / (1 + np.exp(-y)), seen[len(seen) - width + 1 :]


def _linear(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    rows: list[Array] = []
    for x, a in zip(t["x"], t["a"], strict=True):
        s = a * s + x
        rows.append(s[0])
    return np.array(rows), s


def _wkv(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    rows: list[Array] = []
    top, below, largest = s
    largest = np.where(below > 0, largest, -1e38)
    for k, v in zip(t["k"], t["v"], strict=True):
        now = np.maximum(largest, w["first"] + k)
        old, new = np.exp(largest - now), np.exp(w["first"] + k - now)
        rows.append((old * top + new * v) / (old * below + new))
        now = np.maximum(largest + w["decay"], k)
        old, new = np.exp(largest + w["decay"] - now), np.exp(k - now)
        top, below, largest = old * top + new * v, old * below + new, now
    return np.array(rows), np.array([top, below, largest])


def _selective(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    rows: list[Array] = []
    for x, dt, b, c in zip(t["x"], t["dt"], t["b"], t["c"], strict=True):
        step = np.log1p(np.exp(dt + w["dt_bias"]))
        s = np.exp(step * w["a"]) * s + step * x * b[:, None]
        rows.append(c @ s + w["d"] * x)
    return np.array(rows), s


def _ssd(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    rows: list[Array] = []
    for x, dt, b, c in zip(t["x"], t["dt"], t["b"], t["c"], strict=True):
        heads = x.reshape(4, 6)
        left, right = (np.repeat(v.reshape(2, 10), 2, 0) for v in (b, c))
        decay = np.exp(dt * w["a"])[:, None, None]
        s = decay * s + left[:, :, None] * (dt[:, None] * heads)[:, None, :]
        rows.append(np.einsum("hn,hnp->hp", right, s) + w["d"][:, None] * heads)
    return np.array(rows), s


def _delta(t: dict[str, Array], w: dict[str, Array], s: Array) -> tuple[Array, Array]:
    rows: list[Array] = []
    for q, k, v, g, beta in zip(t["q"], t["k"], t["v"], t["g"], t["beta"], strict=True):
        query, key = (np.repeat(x.reshape(2, 8), 2, 0) for x in (q, k))
        s = np.exp(g.reshape(4, -1))[:, :, None] * s
        new = beta[:, None] * (v.reshape(4, 5) - np.einsum("hk,hkv->hv", key, s))
        s = s + key[:, :, None] * new[:, None, :]
        rows.append(DELTA["scale"] * np.einsum("hk,hkv->hv", query, s))
    return np.array(rows), s


Case = tuple[Callable[..., Code], dict[str, Any], dict[str, int], dict[str, tuple[int, ...]], Any]
"""Maker, static parameters, columns of each operand, shapes of the weights, the definition."""
DELTA = {"heads": 4, "key_heads": 2, "key_dim": 8, "value_dim": 5, "scale": 0.3}
CASES: dict[str, Case] = {
    "causal_conv1d": (
        states.causal_conv1d,
        {"channels": 70, "width": 4, "bias": True, "activation": "silu"},
        {"x": 70},
        {"weight": (4, 70), "bias": (70,)},
        _conv,
    ),
    "linear_recurrence": (states.linear_recurrence, {"channels": 70}, {"x": 70, "a": 70}, {}, _linear),
    "wkv": (
        states.wkv,
        {"channels": 70},
        {"k": 70, "v": 70},
        {"decay": (70,), "first": (70,)},
        _wkv,
    ),
    "selective_scan": (
        states.selective_scan,
        {"channels": 70, "elements": 12, "d": True, "dt_bias": True, "softplus_of_dt": True},
        {"x": 70, "dt": 70, "b": 12, "c": 12},
        {"a": (12, 70), "d": (70,), "dt_bias": (70,)},
        _selective,
    ),
    "ssd_scan": (
        states.ssd_scan,
        {"heads": 4, "head_dim": 6, "groups": 2, "elements": 10, "d": True},
        {"x": 24, "dt": 4, "b": 20, "c": 20},
        {"a": (4,), "d": (4,)},
        _ssd,
    ),
    "gated_delta_rule": (
        states.gated_delta_rule,
        {**DELTA, "by_element": False},
        {"q": 16, "k": 16, "v": 20, "g": 4, "beta": 4},
        {},
        _delta,
    ),
    "delta by element": (
        states.gated_delta_rule,
        {**DELTA, "by_element": True},
        {"q": 16, "k": 16, "v": 20, "g": 32, "beta": 4},
        {},
        _delta,
    ),
}


def code_of(name: str, makers: Mapping[str, Callable[..., Code]] | None = None) -> Code:
    """Each operand begins at column PAD of rows that are wider by as much and one more. `makers`: those of
    another target.
    """
    make, static, columns, _, _ = CASES[name]
    if makers is not None:
        make = makers[make.__name__]
    places = [(width + PAD + 1, PAD) for width in columns.values()]
    match name:
        case "causal_conv1d":
            return make(**static, source=places[0])
        case "linear_recurrence":
            return make(**static, x_source=places[0], a_source=places[1])
        case "wkv":
            return make(**static, k_source=places[0], v_source=places[1])
        case _:
            return make(**static, sources=places)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Device:
    codes = {name.replace(" ", "_"): code_of(name) for name in CASES}
    return Device(codes, tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("name", list(CASES))
def test_recurrence_equals_its_definition(gpu: Device, name: str) -> None:
    """Within 1e-5 of the largest: some tens of float32 roundings."""
    _, _, columns, shapes, scan = CASES[name]
    rng, code = generator(name), gpu.codes[name.replace(" ", "_")]
    wide = {n: rng.standard_normal((T, w + PAD + 1)).astype(np.float32) for n, w in columns.items()}
    for gate in ("a", "beta"):
        if gate in wide:
            wide[gate] = 1 / (1 + np.exp(-wide[gate]))
    if "g" in wide:
        wide["g"] = -np.abs(wide["g"])
    if name == "ssd_scan":
        wide["dt"] = np.abs(wide["dt"])
    weights = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    if "decay" in weights:
        weights["decay"] = -np.abs(weights["decay"])
    if "a" in weights:
        weights["a"] = -np.abs(weights["a"])
    shape = next(a for a in code.arguments if a.name == "state").shape[1:]
    state = rng.standard_normal((ROWS, *map(int, shape))).astype(np.float32)
    if name == "wkv":  # the denominator of a sequence that goes on
        state[:, 1] = 1 + np.abs(state[:, 1])
    cache = {
        "state_slot": np.array(SLOTS, np.int32),
        "query_start": STARTS,
        "context_len": np.add(COUNTS, BEFORE).astype(np.int32),
    }
    after, out = gpu(name.replace(" ", "_"), **wide, **weights, state=state, **cache)
    wanted = state.astype(np.float64)
    exact = {n: w.astype(np.float64) for n, w in weights.items()}
    for b, slot in enumerate(SLOTS):
        first, last = STARTS[b], STARTS[b + 1]
        if first == last:
            continue
        rows = {n: w[first:last, PAD:-1].astype(np.float64) for n, w in wide.items()}
        begin = wanted[slot] if BEFORE[b] else np.zeros_like(wanted[slot])
        y, wanted[slot] = scan(rows, exact, begin)
        got = out[first:last].reshape(y.shape)
        assert np.abs(got - y).max() <= 1e-5 * max(1.0, np.abs(y).max())
    assert np.abs(after - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())
    untouched = [row for row in range(ROWS) if row not in SLOTS] + [SLOTS[1]]  # nobody's, and an empty one's
    assert np.array_equal(after[untouched], state[untouched])
