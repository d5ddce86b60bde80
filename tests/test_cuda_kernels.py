"""The CUDA kernels, run without a GPU (`gpu_emulated.py`), against float64 and the ops' meanings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.tvm.gpu import kernels
from llmc.codegen.tvm.gpu.attention import FEW as MOST_FEW
from llmc.codegen.tvm.gpu.source import Code
from llmc.ir.dtypes import to_numpy
from llmc.ir.ops import cache as cache_ops
from llmc.ir.ops.moe import Gate, mix
from llmc.ir.ops.nn import ACTIVATIONS, activate
from llmc.ir.ops.select import TopK

from .attention_biases import WIDTH as DISTANCES
from .attention_biases import distance_table
from .gpu_emulated import Device, generator, weight
from .kernel_harness import meaning, normal, value


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device(product_codes() | small_codes() | attention_codes(), tmp_path_factory.mktemp("kernels"))


def near(actual: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """|difference| ≤ tolerance · largest |expected| of the row (the last axis)."""
    largest = np.abs(expected).max(-1, keepdims=True)
    worst = np.abs(actual.astype(np.float64) - expected) / np.maximum(largest, 1e-30)
    assert worst.max() <= tolerance, f"off by {worst.max():.2e} of the row's largest value"


# -- weights -------------------------------------------------------------------------------------------------
FORMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "float16": (72, 200, {}),
    "float16_wide": (24, 1540, {}),
    "float16_small": (7, 40, {}),
    "z4": (72, 200, {"bits": 4, "group_size": 64, "zero_point": "uint8"}),
    "s4": (40, 200, {"bits": 4, "group_size": 32}),
    "s4_wide": (24, 1540, {"bits": 4, "group_size": 128}),
    "s8": (40, 200, {"bits": 8, "group_size": 1000}),
    "z8": (40, 200, {"bits": 8, "group_size": 48, "zero_point": "uint8"}),
    "min4": (40, 200, {"bits": 4, "group_size": 32, "zero_point": "float16"}),
    "min4_long": (24, 600, {"bits": 4, "group_size": 128, "zero_point": "float32"}),
    "min8_one": (5, 100, {"bits": 8, "group_size": 1000, "zero_point": "float32"}),
    "nf4": (40, 200, {"bits": 4, "group_size": 64, "codebook": "nf4", "scale_dtype": "float32"}),
    "iq4_nl": (40, 200, {"bits": 4, "group_size": 32, "codebook": "iq4_nl"}),
    "s6": (40, 200, {"bits": 6, "group_size": 16}),
    "min5": (40, 200, {"bits": 5, "group_size": 32, "zero_point": "float32", "scale_dtype": "bfloat16"}),
    "s3": (40, 200, {"bits": 3, "group_size": 16}),
    "min2": (40, 200, {"bits": 2, "group_size": 16, "zero_point": "float16"}),
}
"""Name → N, K, form. Tiles of 16 rows are odd in number; most K are no multiple of 64 or of a group."""
BARE = ("z8", "float16_small")  # without bias and residual


TABLES = ("float32", "float16", "bfloat16")
MOES = {"float16": {}, "z4": FORMS["z4"][2], "min5": FORMS["min5"][2]}
EXPERTS, TOP_K, WIDE, HIDDEN = 5, 3, 72, 48


def product_codes(kernels: Any = kernels) -> dict[str, Code]:
    found: dict[str, Code] = {}
    for name, (n, k, form) in FORMS.items():
        both = {"bias": name not in BARE, "residual": name not in BARE}
        if form:
            found[name] = kernels.quantized_linear(n=n, k=k, **both, **form)
            found[f"rows_{name}"] = kernels.quantized_embedding(rows=n, width=k, **form)
        else:
            found[name] = kernels.linear(n=n, k=k, **both, weight_dtype="bfloat16")
            found[f"rows_{name}"] = kernels.embedding(rows=n, width=k, packed=True, weight_dtype="float16")
    for dtype in TABLES:
        found[f"table_{dtype}"] = kernels.embedding(rows=19, width=150, packed=False, weight_dtype=dtype)
    for name, form in MOES.items():
        static: dict[str, Any] = {"experts": EXPERTS, "top_k": TOP_K, **form}
        found[f"up_{name}"] = kernels.moe_product(n=2 * HIDDEN, k=WIDE, per_row=TOP_K, **static)
        found[f"down_{name}"] = kernels.moe_product(n=WIDE, k=HIDDEN, per_row=0, **static)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_products_equal_float64_and_do_not_depend_on_their_batch(gpu: Device, form: str) -> None:
    """Tokens are rounded to float16 (2^-11 of each number), which sums over K average out; codes are exact,
    sums float32. So 2e-3 of the row's largest product is ample; bias and residual are added in float32.
    """
    n, k, static = FORMS[form]
    w, arrays = weight(n, k, static, form)
    x = normal(70, k) * (10.0 ** generator(form).uniform(-6, 6, (70, 1))).astype(np.float32)
    x[2], x[4, 7], x[6, k - 1], x[8, 3] = 0, np.inf, np.nan, -np.inf
    broken = np.isin(np.arange(70), (4, 6, 8))
    more = {} if form in BARE else {"bias": normal(n, seed=1), "residual": normal(70, n, seed=2)}
    xw = x[~broken].astype(np.float64) @ w.T.astype(np.float64)
    added = sum(more.values(), np.zeros((70, n)))[~broken]
    bound = 2e-3 * np.abs(xw).max(1, keepdims=True) + 2.0**-22 * np.abs(added).max()

    def run(rows: slice) -> np.ndarray:
        cut = {key: m[rows] if key == "residual" else m for key, m in more.items()}
        return gpu(form, x=x[rows], **arrays, **cut)

    whole = run(slice(70))
    assert (np.abs(whole[~broken] - (xw + added)) <= bound).all()
    assert not np.isfinite(whole[broken]).any(), "what is broken must show"
    for tokens in (1, 7, 8, 9, 16, 20, 33):
        assert np.array_equal(run(slice(tokens)), whole[:tokens], equal_nan=True), tokens
    assert np.array_equal(run(slice(69, 70)), whole[69:]) and np.array_equal(run(slice(37, 57)), whole[37:57])


def test_rows_of_tables_are_exact(gpu: Device) -> None:
    """An index beyond the ends is held to them."""
    ids = np.array([3, -5, 0, 3, 19, 72, 2**31 - 1, -(2**31)], np.int32)
    for form, (n, k, static) in FORMS.items():
        w, arrays = weight(n, k, static, form)
        assert np.array_equal(gpu(f"rows_{form}", ids=ids, **arrays), w[ids.clip(0, n - 1)]), form
    for dtype in TABLES:
        table = normal(19, 150).astype(to_numpy(dtype))
        rows = gpu(f"table_{dtype}", ids=ids, table=table)
        assert np.array_equal(rows, table[ids.clip(0, 18)].astype(np.float32)), dtype
    x, index = normal(9, 150), np.array([8, 0, 0, 5], np.int32)
    assert np.array_equal(gpu("last", x=x, index=index), x[index])


# -- experts -------------------------------------------------------------------------------------------------
def choices(tokens: int) -> np.ndarray:
    """TOP_K experts a token, none twice; the first expert for nobody."""
    rng = np.random.default_rng(tokens)
    order = rng.permuted(np.tile(np.arange(1, EXPERTS, dtype=np.int32), (tokens, 1)), axis=1)
    return np.ascontiguousarray(order[:, :TOP_K])


def stacked(n: int, k: int, form: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    each = [weight(n, k, MOES[form], f"{form}{e}") for e in range(EXPERTS)]
    arrays = {key: np.concatenate([parts[key] for _, parts in each]) for key in each[0][1]}
    return np.stack([w for w, _ in each]), arrays


@pytest.mark.parametrize(("rows", "width", "k"), [(1, 5, 5), (40, 130, 8)])
def test_top_k_takes_equal_values_in_their_order_and_nan_first(
    gpu: Device, rows: int, width: int, k: int
) -> None:
    x = np.round(normal(rows, width), 1)  # with many equal values
    x[0, 1], x[-1, 0], x[-1, width - 1] = -np.inf, np.nan, -np.nan
    x[:, 2], x[:, 3] = 0.0, -0.0
    assert np.array_equal(gpu(f"top_k_{k}", x=x), meaning(TopK(value(x), k=k), x))
    x = np.array([[1, 2, 2, 1, 2], [np.inf, 3, np.nan, -np.inf, np.nan]], np.float32)
    assert gpu("top_k_5", x=x).tolist() == [[1, 2, 4, 0, 3], [2, 4, 0, 1, 3]]


@pytest.mark.parametrize("tokens", [1, 23, 300])
def test_pairs_are_sorted_by_expert(gpu: Device, tokens: int) -> None:
    flat = choices(tokens).reshape(-1)
    place, source, offsets, active = gpu("moe_rows", indices=flat)
    assert np.array_equal(source, np.argsort(flat, kind="stable"))
    assert np.array_equal(source[place], np.arange(flat.size))
    assert np.array_equal(offsets, np.cumsum([0, *np.bincount(flat, minlength=EXPERTS)]))
    assert active[1 : 1 + active[0]].tolist() == sorted(set(flat.tolist()))

    # An index that is no expert is held to their ends.
    place, source, offsets, _ = gpu("moe_rows", indices=np.array([9, -5, 1], np.int32))
    assert (place.tolist(), source.tolist()) == ([2, 0, 1], [1, 2, 0])
    assert offsets.tolist() == [0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("form", MOES)
def test_products_by_experts(gpu: Device, form: str) -> None:
    """`per_row` = TOP_K (a token's pairs read one row) and 0; as many tokens as each kernel takes. Tolerance
    as of the products above, and again rows are the same bits in any batch.
    """
    first: dict[tuple[str, int], np.ndarray] = {}
    for tokens in (1, 9, 20, 40):
        chosen = choices(40)[:tokens]
        _, source, offsets, _ = gpu("moe_rows", indices=chosen.reshape(-1))
        for kind, n, k in (("up", 2 * HIDDEN, WIDE), ("down", WIDE, HIDDEN)):
            w, arrays = stacked(n, k, form)
            pairs = tokens * TOP_K
            x = normal(40 * TOP_K, k)  # of a pair, by (token, place), so that batches agree
            x = x[:tokens] if kind == "up" else x[:pairs][source]
            out = gpu(f"{kind}_{form}", x=x, source=source, offsets=offsets, **arrays)
            rows = x[source // TOP_K] if kind == "up" else x
            own = w[chosen.reshape(-1)[source]].astype(np.float64)
            near(out, np.einsum("snk,sk->sn", own, rows), 2e-3)
            for row, pair in enumerate(source.tolist()):
                bits = first.setdefault((kind, pair), out[row])
                assert np.array_equal(bits, out[row])


GATES = {
    "silu": Gate("silu"),
    "swish": Gate("swish", alpha=1.702, limit=1.5, offset=1.0),
    "gelu": Gate("gelu_tanh", limit=0.7),
    "active": Gate("silu", limit=0.4, limits_active=True),
    "none": Gate("relu2", gated=False),
    "relu2": Gate("relu2"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_experts_and_their_sums(gpu: Device, gate: str, bias: bool) -> None:
    """The steps of a mixture around the products (here in float64) are `mix`."""
    chosen = choices(20)
    flat, weights = chosen.reshape(-1), normal(20, TOP_K, seed=5)
    place, source, _, _ = gpu("moe_rows", indices=flat)
    x = normal(20, WIDE).astype(np.float64)
    products = GATES[gate].products * HIDDEN
    up, down = normal(EXPERTS, products, WIDE, seed=1) / 8, normal(EXPERTS, WIDE, HIDDEN, seed=2) / 8
    up_bias, down_bias = normal(EXPERTS, products, seed=3), normal(EXPERTS, WIDE, seed=4)
    owner = flat[source]
    given = np.einsum("snk,sk->sn", up[owner], x[source // TOP_K]).astype(np.float32)
    more = {"source": source, "indices": flat, "up_bias": up_bias} if bias else {}
    held = gpu(f"gate_{gate}_{bias}", products=given, **more)
    expected = torch.from_numpy(given + up_bias[owner].astype(np.float64) * bias)
    near(held, GATES[gate](expected).numpy())

    y = np.einsum("snk,sk->sn", down[owner], held.astype(np.float64)).astype(np.float32)
    more = {"indices": flat, "down_bias": down_bias} if bias else {}
    out = gpu(f"combine_{bias}", y=y, place=place, weights=weights, **more)
    wide = [torch.from_numpy(a).double() for a in (x, weights, up, down, up_bias, down_bias)]
    x64, w64, up64, down64, *more64 = wide
    biases = (more64[0], more64[1]) if bias else (None, None)
    mixed = mix(x64, torch.from_numpy(chosen), w64, lambda e: (up64[e], down64[e]), GATES[gate], biases)
    near(out, mixed.numpy(), 4e-6)  # two roundings of a product's sum to float32 more


# -- rows and elements ---------------------------------------------------------------------------------------
KV = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
ROPES: dict[str, dict[str, Any]] = {
    "halves": {"interleaved": False, "rotary_dim": 32, "source": None},
    "pairs": {"interleaved": True, "rotary_dim": 32, "source": None},
    "partial": {"interleaved": False, "rotary_dim": 12, "source": (200, 40)},
    "some": {"interleaved": True, "rotary_dim": 8, "source": (200, 3)},
}


def small_codes(kernels: Any = kernels, kv: Sequence[str] = KV) -> dict[str, Code]:
    source, eps = (200, 40), 1e-5
    found = {
        "rms": kernels.rms_norm(width=300, eps=eps, weight=True),
        "rms_bare": kernels.rms_norm(width=20, eps=eps, weight=False),
        "rms_heads": kernels.rms_norm(width=40, eps=eps, weight=True, heads=3),
        "rms_source": kernels.rms_norm(width=40, eps=eps, weight=True, heads=3, source=source),
        "layer": kernels.layer_norm(width=300, eps=eps, weight=True, bias=True),
        "layer_bare": kernels.layer_norm(width=20, eps=eps, weight=False, bias=False),
        "last": kernels.gather_last(width=150),
        "top_k_5": kernels.top_k(width=5, k=5),
        "top_k_8": kernels.top_k(width=130, k=8),
        "moe_rows": kernels.moe_rows(experts=EXPERTS),
    }
    for name in ACTIVATIONS:
        found[f"each_{name}"] = kernels.activation(width=37, activation=name)
        found[f"gated_{name}"] = kernels.gated_mlp(width=37, activation=name)
    for name, rope in ROPES.items():
        found[f"rope_{name}"] = kernels.rope(heads=3, head_dim=32, **rope)
    for bias in (False, True):
        sizes = {"width": WIDE, "experts": EXPERTS, "top_k": TOP_K}
        found[f"combine_{bias}"] = kernels.moe_combine(**sizes, bias=bias)
        for name, g in GATES.items():
            fields = {key: field for key, field in asdict(g).items() if key != "interleaved"}
            found[f"gate_{name}_{bias}"] = kernels.moe_gate(
                width=HIDDEN, experts=EXPERTS, bias=bias, **fields
            )
    for dtype in kv:
        for dim in (20, 64, 256):
            static: dict[str, Any] = {"kv_heads": 2, "head_dim": dim, "kv_dtype": dtype, "page_size": 16}
            for at, part in enumerate(("k_source", "v_source")):
                static[part] = (4 * dim + 3, at * (2 * dim + 3)) if dim == 64 else None
            found[f"append_{dtype}_{dim}"] = kernels.append_kv(**static)
    return found


def test_norms(gpu: Device) -> None:
    def normed(x: np.ndarray, weight: np.ndarray | float, bias: np.ndarray | float = 0.0) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight + bias

    magnitudes = np.exp2(np.arange(9, dtype=np.float32) - 4)[:, None]
    x, w, b = normal(9, 300) * magnitudes, normal(300, seed=1), normal(300, seed=2)
    bare = x[:, :20].copy()
    bare[3] = 0
    near(gpu("rms", x=x, weight=w), normed(x.astype(np.float64), w))
    near(gpu("rms_bare", x=bare), normed(bare.astype(np.float64), 1.0))
    heads = x[:, 40:160].reshape(9, 3, 40)
    expected = normed(heads.astype(np.float64), w[:40])
    near(gpu("rms_heads", x=heads, weight=w[:40]), expected)
    near(gpu("rms_source", x=x[:, :200], weight=w[:40]), expected)
    x += 3 * magnitudes
    near(gpu("layer", x=x, weight=w, bias=b), normed(x - x.mean(-1, keepdims=True, dtype=np.float64), w, b))
    near(gpu("layer_bare", x=bare), normed(bare - bare.mean(-1, keepdims=True, dtype=np.float64), 1.0))


@pytest.mark.parametrize("name", ROPES)
def test_rope(gpu: Device, name: str) -> None:
    interleaved, rotary, source = ROPES[name].values()
    x = normal(7, 200)
    first = 0 if source is None else source[1]
    heads = np.ascontiguousarray(x[:, first : first + 96]).reshape(7, 3, 32)
    # A pair is a complex number, which an angle turns.
    angle = 9 * normal(7, rotary // 2, seed=1).astype(np.float64)
    expected = heads.astype(np.float64)
    left = slice(0, rotary, 2) if interleaved else slice(0, rotary // 2)
    right = slice(1, rotary, 2) if interleaved else slice(rotary // 2, rotary)
    z = (expected[..., left] + 1j * expected[..., right]) * np.exp(1j * angle)[:, None]
    expected[..., left], expected[..., right] = z.real, z.imag
    both = np.repeat(angle, 2, -1) if interleaved else np.tile(angle, 2)
    cosines, sines = np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)
    out = gpu(f"rope_{name}", x=heads if source is None else x, cosines=cosines, sines=sines)
    near(out, expected)
    assert np.array_equal(out[..., rotary:], heads[..., rotary:])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_gates(gpu: Device, name: str) -> None:
    x = 4 * normal(9, 74)
    x[0, :6] = [0, -0.0, 90, -90, 1e-20, 30]
    wide = torch.from_numpy(x).double()
    near(gpu(f"gated_{name}", gate_up=x), (activate(name, wide[:, :37]) * wide[:, 37:]).numpy())
    near(gpu(f"each_{name}", x=x[:, :37]), activate(name, wide[:, :37]).numpy())
    assert np.isnan(gpu(f"each_{name}", x=np.full((1, 37), np.nan, np.float32))).all()


# -- the cache and attention ---------------------------------------------------------------------------------
def to_device(pages: np.ndarray) -> np.ndarray:
    """[2, N, page_size, heads, D] as the ops say it → [2, N, heads, page_size, D]; its own inverse."""
    return np.ascontiguousarray(pages.transpose(0, 1, 3, 2, 4))


def blank_pages(dtype: str, *shape: int) -> np.ndarray:
    """Pages that hold NaN, of int8 by their scales."""
    count = int(np.prod(shape)) * to_numpy(dtype).itemsize
    return np.full(count, 0xFF, np.uint8).view(to_numpy(dtype)).reshape(shape)


@pytest.mark.parametrize("dim", [20, 64, 256])
@pytest.mark.parametrize("dtype", KV)
def test_append_kv_writes_the_bytes_of_its_meaning(gpu: Device, dtype: str, dim: int) -> None:
    merged = normal(6, 4 * dim + 3)
    merged[0, :8] = [1e-8, 6e-8, 3e-5, -1e-6, 65519, 65520, 1.00390625, 1.01171875]  # where rounding turns
    merged[5, :8] = [2**-10, 3 * 2**-10, 2**-6 - 2**-10, 1.0625, 1.1875, 463.9, 464, -480]  # and of 8 bits
    merged[1, :dim] = 0
    merged[2, :dim] *= 1e-31
    merged[3, 3], merged[3, dim] = np.nan, np.inf
    merged[4, 2 * dim + 3 : 3 * dim + 3] *= 1e20
    k, v = (np.ascontiguousarray(merged[:, s : s + 2 * dim].reshape(6, 2, dim)) for s in (0, 2 * dim + 3))
    slots = np.array([0, 17, 31, 79, 64, 5], np.int32)
    before = blank_pages(dtype, 2, 5, 16, 2, dim + 4 * (dtype == "int8"))
    given = {"k": merged, "v": merged} if dim == 64 else {"k": k, "v": v}
    after = to_device(gpu(f"append_{dtype}_{dim}", **given, slot_mapping=slots, pages=to_device(before)))
    op = cache_ops.AppendKv(value(k), value(v), value(before), value(slots))
    with np.errstate(over="ignore"):
        expected = meaning(op, k, v, before, slots)
    if dtype != "int8":  # NaNs are all alike
        for pages in (after, expected):
            pages[np.isnan(pages)] = 0
    assert np.array_equal(after.view(np.uint8), expected.view(np.uint8))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"dim": 64, "heads": (2, 2), "dtype": "float32"},
    "window": {"dim": 64, "heads": (6, 2), "dtype": "float16", "window": 20},
    "softcap": {"dim": 80, "heads": (8, 1), "dtype": "float16", "softcap": 5.0, "page_size": 32},
    "sinks": {"dim": 128, "heads": (8, 1), "dtype": "bfloat16", "sinks": True},
    "bytes": {"dim": 128, "heads": (3, 1), "dtype": "int8", "page_size": 8},
    "slopes": {"dim": 64, "heads": (32, 1), "dtype": "float16", "slopes": True},
    "wide": {"dim": 256, "heads": (8, 1), "dtype": "float16", "window": 100},
    "wide_bytes": {"dim": 256, "heads": (2, 1), "dtype": "int8", "softcap": 20.0},
    "both": {"dim": 80, "heads": (3, 3), "dtype": "int8", "causal": False},
    "both_window": {"dim": 64, "heads": (8, 1), "dtype": "float32", "causal": False, "window": 30},
    "eight": {"dim": 64, "heads": (6, 2), "dtype": "float8_e4m3fn", "window": 40},
    "eight_odd": {"dim": 20, "heads": (3, 1), "dtype": "float8_e4m3fn", "page_size": 8},
    "odd": {"dim": 20, "heads": (24, 1), "dtype": "float16", "sinks": True, "window": 1},
    "distances": {"dim": 64, "heads": (6, 2), "dtype": "float16", "causal": False, "distances": DISTANCES},
    "odd_slopes": {"dim": 33, "heads": (3, 1), "dtype": "bfloat16", "slopes": True, "window": 300},
}


USUAL = {
    "page_size": 16, "causal": True, "window": None, "softcap": None, "sinks": False, "slopes": False,
    "distances": 0,
}  # fmt: skip


def attention_codes(kernels: Any = kernels, cases: Iterable[str] = CASES) -> dict[str, Code]:
    found: dict[str, Code] = {}
    for name in cases:
        case = CASES[name]
        heads, kv_heads = case["heads"]
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": case["dim"], "kv_dtype": case["dtype"]}
        fields = {key: case.get(key, usual) for key, usual in USUAL.items()}
        found[f"attend_{name}"] = kernels.paged_attention(scale=case["dim"] ** -0.5, **sizes, **fields)
    return found


class Batch:
    """Sequences of (new tokens, context) over shuffled pages; what no token has written is NaN."""

    def __init__(self, name: str, lengths: list[tuple[int, int]]) -> None:
        case, rng = CASES[name], generator(name)
        self.name, self.lengths, self.case, size = name, lengths, case, case.get("page_size", 16)
        heads, kv_heads = case["heads"]
        dtype, dim = case["dtype"], case["dim"]
        counts = [-(-n // size) for _, n in lengths]
        order = rng.permutation(sum(counts)).astype(np.int32) + 1  # page 0 is nobody's
        self.table = np.zeros((len(lengths), max(counts) + 1), np.int32)
        wide = dim + 4 * (dtype == "int8")
        self.pages = blank_pages(dtype, 2, sum(counts) + 1, size, kv_heads, wide)
        for b, (_, n) in enumerate(lengths):
            self.table[b, : counts[b]] = order[sum(counts[:b]) : sum(counts[: b + 1])]
            x = rng.standard_normal((2, n, kv_heads, dim)).astype(np.float32)
            flat = blank_pages(dtype, 2, counts[b] * size, kv_heads, wide)
            held = cache_ops.quantize_heads(torch.from_numpy(x)).numpy() if dtype == "int8" else x
            flat[:, :n] = held.astype(flat.dtype)
            self.pages[:, self.table[b, : counts[b]]] = flat.reshape(2, counts[b], *self.pages.shape[2:])
        self.start = np.array([0, *accumulate(new for new, _ in lengths)], np.int32)
        self.context = np.array([n for _, n in lengths], np.int32)
        self.q = rng.standard_normal((int(self.start[-1]), heads, dim)).astype(np.float32)
        self.per_head = {n: normal(heads, seed=7) for n in ("sinks", "slopes") if n in case}
        if "distances" in case:
            self.per_head["distances"] = distance_table(heads)

    def run(self, device: Device, pick: tuple[int, int] | None = None) -> np.ndarray:
        """The whole step, or token `pick` (sequence, place) as a step of its own."""
        q, start, context, table = self.q, self.start, self.context, self.table
        if pick is not None:
            b, place = pick
            left = int(start[b + 1] - start[b]) - place - 1 if self.case.get("causal", True) else 0
            q, context, table = q[[start[b] + place]], context[[b]] - np.int32(left), table[[b]]
            start = np.array([0, 1], np.int32)
        pages = to_device(self.pages)
        given = {"query_start": start, "context_len": context, "block_table": table, **self.per_head}
        return device(f"attend_{self.name}", q=q, pages=pages, **given)

    def expected(self) -> np.ndarray:
        arrays = (self.q, self.pages, self.start, self.context, self.table)
        more = [self.per_head.get(name) for name in ("sinks", "slopes", "distances")]
        fields = {key: self.case.get(key, USUAL[key]) for key in ("causal", "window", "softcap")}
        operands = [None if x is None else value(x) for x in (*arrays, *more)]
        scale = self.case["dim"] ** -0.5
        return meaning(cache_ops.PagedAttention(*operands, scale=scale, **fields), *arrays, *more)


FEW = [(1, 1), (0, 20), (3, 32), (1, 600), (5, 5), (6, 258), (1, 256)]
MANY = [(1, 1), (70, 280), (0, 40), (3, 20), (2, 64)]
"""(new tokens, context) of steps with at most as many tokens as split a context, and with more."""


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_its_meaning_alone_and_in_steps_of_few_and_many(gpu: Device, name: str) -> None:
    """Queries, keys, values and probabilities are rounded to float16 (2^-11 of each): with scores of some
    units that is some 2^-10 of a result, which a context of few tokens does not average out.
    """
    few, many = Batch(name, FEW), Batch(name, MANY)
    assert few.start[-1] <= MOST_FEW < many.start[-1]
    for batch in (few, many):
        whole = batch.run(gpu)
        assert np.abs(whole - batch.expected()).max() <= 4e-3
        for b, (new, _) in enumerate(batch.lengths):
            # Only the last stands where it stood, if its context stays and it sees a window of that.
            moves = new > 22 and name not in ("both_window", "distances")
            places = {0, 22, new - 1} if moves else {new - 1}
            for place in places if new else ():
                assert np.array_equal(batch.run(gpu, (b, place))[0], whole[batch.start[b] + place]), place


@pytest.mark.parametrize("name", ["window", "both_window", "odd", "bytes"])
def test_a_broken_token_or_sequence_disturbs_no_other(gpu: Device, name: str) -> None:
    for lengths in (FEW, MANY):
        batch = Batch(name, lengths)
        whole = batch.run(gpu)
        bad = int(batch.start[2]) + 1  # of several tokens that a warp holds together
        batch.q[bad, 0, 3] = np.nan
        ends = int(batch.start[-2])
        batch.pages[:, batch.table[-1]] = batch.pages[:, :1]  # NaN
        after = batch.run(gpu)
        assert np.isnan(after[bad, 0]).all() and np.isnan(after[ends:]).all()
        after[bad, 0] = whole[bad, 0]
        assert np.array_equal(after[:ends], whole[:ends])


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("name", ["window", "both_window", "odd_slopes"])
def test_pages_before_a_window_do_not_count(gpu: Device, name: str, finite: bool) -> None:
    """The engine gives them back; their entries are 0 then: another sequence's page, maybe a broken one."""
    for lengths in (FEW, MANY):
        batch = Batch(name, lengths)
        if finite:
            batch.pages[:, 0] = 3
        whole = batch.run(gpu)
        for b, (new, n) in enumerate(lengths):
            batch.table[b, : max(0, n - new - CASES[name]["window"] + 1) // batch.pages.shape[2]] = 0
        assert np.array_equal(batch.run(gpu), whole)
