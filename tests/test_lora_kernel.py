"""The kernels of `lora` and of experts against the operation's own meaning and a plain product in float64; a
row's bits do not depend on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import pytest
from llmc.codegen.tvm import kernels
from llmc.ir.errors import CompileError, VerifyError
from llmc.ir.ops.lora import LANES, Lora, LoraEmbedding, column_blocks
from llmc.ir.ops.lora_experts import LoraMoe
from llmc.ir.ops.moe import Moe

from .kernel_harness import call, close, meaning, normal, value, vector_levels

SHAPES = [((48,), 64), ((40, 7, 16), 37), ((5,), 3), ((80, 80), 130)]


def factors(
    parts: tuple[int, ...], k: int, ranks: list[list[int]], dtype: str, blocks: int
) -> tuple[list[list[tuple[np.ndarray, np.ndarray]]], list[np.ndarray]]:
    """(A, B) of each slot and part as float64, and the arrays rank, scale, a, b; what nothing may read would
    show.
    """
    rng = np.random.default_rng(5)
    slots = len(ranks)
    unread = np.nan if dtype == "float32" else 127
    scale = rng.uniform(0.5, 2, (slots, len(parts), blocks, LANES)).astype(np.float32)
    a = np.full((slots, len(parts), blocks, k, LANES), unread, dtype)
    b = np.full((slots, column_blocks(parts), blocks * LANES, LANES), unread, dtype)
    plain: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for s, of_slot in enumerate(ranks):
        plain.append([])
        block = 0
        for p, (rows, r) in enumerate(zip(parts, of_slot, strict=True)):
            large = 1 if dtype == "float32" else 40
            down = (large * rng.standard_normal((r, k))).astype(dtype)
            up = (large * rng.standard_normal((rows, r))).astype(dtype)
            scaled = down.astype(np.float64) * scale[s, p].reshape(-1)[:r, None]
            plain[-1].append((scaled, up.astype(np.float64)))
            for i in range(-(-r // LANES) * LANES):  # the rest of a block is computed too
                a[s, p, i // LANES, :, i % LANES] = down[i] if i < r else 0
            for j in range(rows):
                b[s, block + j // LANES, :r, j % LANES] = up[j]
            block += -(-rows // LANES)
    return plain, [np.array(ranks, np.int32), scale, a, b]


def run(isa: str, parts: tuple[int, ...], dtype: str, arrays: list[np.ndarray], **how: bool) -> np.ndarray:
    """`arrays`: y, x, adapter, rank, scale, a, b, and what `how` asks for. The kernel takes y as its first
    operand.
    """
    k = arrays[1].shape[1]

    tensors = [arrays[0].copy(), *arrays[1:]]
    results = call(
        kernels.make_lora,
        isa,
        {"parts": parts, "k": k, "dtype": dtype, **how},
        *tensors,
        outputs=len(tensors),
    )
    return results[0]


@vector_levels
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("parts", "k"), SHAPES)
def test_is_the_product(isa: str, dtype: str, parts: tuple[int, ...], k: int) -> None:
    ranks = [[(5 + 7 * s + 11 * p) % 34 for p in range(len(parts))] for s in range(3)]
    ranks[1][0] = 0
    plain, given = factors(parts, k, ranks, dtype, blocks=3)
    for adapter in ([0], [-1], [2, 2, -1, 0, 1], [-1] * 5, [0] * 66 + [1, -1] + [2] * 70):
        slots = np.array(adapter, np.int32)
        x, y = normal(len(slots), k), normal(len(slots), sum(parts), seed=1)
        found = run(isa, parts, dtype, [y, x, slots, *given])
        expected = y.astype(np.float64)
        for t, s in enumerate(adapter):
            start = 0
            for (down, up), rows in zip(plain[s], parts, strict=True):
                if s >= 0:
                    expected[t, start : start + rows] += up @ (down @ x[t].astype(np.float64))
                start += rows
        close(found, expected, 3e-6)
        np.testing.assert_array_equal(found[slots < 0], y[slots < 0])
        op = Lora(*map(value, (y, x, slots, *given)), parts=parts)
        close(meaning(op, y, x, slots, *given, None, None, None), expected, 3e-6)
        for t in range(0, len(slots), 13):  # alone, and in other company
            one = run(isa, parts, dtype, [y[t : t + 1], x[t : t + 1], slots[t : t + 1], *given])
            np.testing.assert_array_equal(one[0], found[t])


@vector_levels
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scales_what_the_layer_gives(isa: str, dtype: str, with_residual: bool) -> None:
    """Of parts that are scaled all but what was added since; of the others no gain is read."""
    parts, k = (40, 7, 16), 37
    plain, given = factors(parts, k, [[5, 3, 20], [0, 17, 2], [4, 4, 4]], dtype, blocks=2)
    gained = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], np.int32)
    gain = np.random.default_rng(2).uniform(0.5, 2, (3, 2, sum(parts))).astype(np.float32)
    ends = np.cumsum((0, *parts))
    for s, p in np.argwhere(gained == 0):
        gain[s, :, ends[p] : ends[p + 1]] = np.nan
    for adapter in ([0], [-1], [0] * 6 + [1, 2, -1] + [1] * 9 + [2] * 5, [1, 0, 2, 1]):
        slots = np.array(adapter, np.int32)
        x, y, rest = normal(len(slots), k), normal(len(slots), ends[-1], seed=1), normal(len(slots), ends[-1])
        rest *= 30
        y = y + rest if with_residual else y
        rows, scales = [y, x, slots], [*given, gained, gain]
        beside = [rest] if with_residual else []
        how = {"gains": True, "residual": with_residual}
        found, expected = run(isa, parts, dtype, [*rows, *scales, *beside], **how), y.astype(np.float64)
        for t, s in enumerate(adapter):
            for p, (down, up) in enumerate(plain[s] if s >= 0 else ()):
                columns = slice(ends[p], ends[p + 1])
                expected[t, columns] += up @ (down @ x[t].astype(np.float64))
                if gained[s, p]:
                    kept = rest[t, columns].astype(np.float64) if with_residual else 0
                    total = gain[s, 0, columns] * (expected[t, columns] - kept)
                    expected[t, columns] = kept + total + gain[s, 1, columns]
        close(found, expected, 3e-6)
        np.testing.assert_array_equal(found[slots < 0], y[slots < 0])
        op = Lora(*map(value, (*rows, *scales, *beside)), parts=parts)
        close(meaning(op, *rows, *scales, rest if with_residual else None), expected, 3e-6)
        for t in range(len(slots)):  # alone
            own, mine = ([one[t : t + 1] for one in several] for several in (rows, beside))
            np.testing.assert_array_equal(run(isa, parts, dtype, [*own, *scales, *mine], **how)[0], found[t])


def test_nothing_to_do() -> None:
    _, given = factors((16,), 8, [[4]], "float32", blocks=1)
    empty = [np.zeros((0, 16), np.float32), np.zeros((0, 8), np.float32), np.zeros(0, np.int32)]
    assert run("generic", (16,), "float32", [*empty, *given]).shape == (0, 16)


def test_shapes_must_agree() -> None:
    _, (rank, scale, a, b) = factors((16, 16), 8, [[4, 4]], "float32", blocks=1)
    x, slots = normal(3, 8), np.zeros(3, np.int32)
    with pytest.raises(CompileError, match=r"lora: float32\[3, 30\]"):
        Lora(*map(value, (normal(3, 30), x, slots, rank, scale, a, b)), parts=(16, 16))
    gained, gain = np.zeros((1, 2), np.int32), np.zeros((1, 2, 32), np.float32)
    given = (normal(3, 32), x, slots, rank, scale, a, b)
    with pytest.raises(VerifyError, match="gain, gained and residual"):
        Lora(*map(value, (*given, gained)), parts=(16, 16)).verify()
    with pytest.raises(CompileError, match="lora: "):
        Lora(*map(value, (*given, gained, gain[:, :, 1:])), parts=(16, 16))
    mixed = Lora(
        *map(value, (normal(3, 32), x, slots, rank, scale, a, np.zeros_like(b, np.int8))), parts=(16, 16)
    )
    with pytest.raises(VerifyError, match="float32 and int8"):
        mixed.verify()


EXPERTS, TOP_K = 3, 2


@vector_levels
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("width", "vocabulary"), [(48, 64), (7, 37), (130, 3)])
def test_rows_of_an_embedding_gain_columns_of_theirs(
    isa: str, dtype: str, width: int, vocabulary: int
) -> None:
    plain, given = factors((width,), vocabulary, [[5], [0], [34]], dtype, blocks=3)
    for adapter in ([0], [-1], [2, 2, -1, 0, 1], [-1] * 5, [0] * 66 + [1, -1] + [2] * 70):
        slots = np.array(adapter, np.int32)
        ids = (np.arange(len(slots)) * 7 % vocabulary).astype(np.int32)
        y = normal(len(slots), width)
        expected = y.astype(np.float64)
        for t, s in enumerate(adapter):
            down, up = plain[s][0]
            expected[t] += up @ down[:, ids[t]] if s >= 0 else 0
        found = embedded(isa, dtype, [y, ids, slots, *given])
        close(found, expected, 3e-6)
        np.testing.assert_array_equal(found[slots < 0], y[slots < 0])
        op = LoraEmbedding(*map(value, (y, ids, slots, *given)))
        close(meaning(op, y, ids, slots, *given), expected, 3e-6)
        for t in range(0, len(slots), 13):  # alone, and in other company
            one = embedded(isa, dtype, [y[t : t + 1], ids[t : t + 1], slots[t : t + 1], *given])
            np.testing.assert_array_equal(one[0], found[t])


def embedded(isa: str, dtype: str, arrays: list[np.ndarray]) -> np.ndarray:
    """`arrays`: y, ids, adapter, rank, scale, a, b."""
    static = {"rows": arrays[5].shape[3], "width": arrays[0].shape[1], "dtype": dtype}
    tensors = [arrays[0].copy(), *arrays[1:]]
    return call(kernels.make_lora_embedding, isa, static, *tensors, outputs=len(tensors))[0]


@vector_levels
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("rows", "parts", "k"), [(20, 2, 37), (16, 1, 8)])
@pytest.mark.parametrize("by_token", [True, False])
def test_of_the_experts_that_tokens_chose(
    isa: str, dtype: str, rows: int, parts: int, k: int, by_token: bool
) -> None:
    """Rows by expert; those of one adapter are worked on together, and alone they have the same bits."""
    count = EXPERTS * parts
    ranks = [[(5 + 7 * s + 11 * p) % 34 for p in range(count)] for s in range(3)]
    ranks[1][:parts] = [0] * parts
    plain, given = factors((rows,) * count, k, ranks, dtype, blocks=3)
    static = {"rows": rows, "parts": parts, "k": k, "experts": EXPERTS, "top_k": TOP_K}
    rng = np.random.default_rng(4)
    for adapter in ([0], [-1, -1], [2, 2, -1, 0, 1], [0] * 30 + [1, -1] + [2] * 9):
        slots, tokens = np.array(adapter, np.int32), len(adapter)
        chosen = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (tokens, 1)), axis=1)[:, :TOP_K]
        x = normal(tokens if by_token else tokens * TOP_K, k)
        y = normal(tokens * TOP_K, parts * rows, seed=1)
        how = {**static, "by_token": by_token, "dtype": dtype}

        def sorted_by_expert(first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            """The pairs of those tokens as they stand, and what the kernel makes of their rows."""
            indices = chosen[first:stop].reshape(-1)  # noqa: B023
            source = np.argsort(indices, kind="stable").astype(np.int32)
            pairs = first * TOP_K + source
            own = x[first:stop] if by_token else x[pairs]  # noqa: B023
            arrays = [y[pairs], own, source, indices, slots[first:stop], *given]  # noqa: B023
            return pairs, call(kernels.make_moe_lora, isa, how, *arrays, outputs=len(arrays))[0]  # noqa: B023

        pairs, found = sorted_by_expert(0, tokens)
        expected = y[pairs].astype(np.float64)
        for s, pair in enumerate(pairs):
            slot, expert = adapter[pair // TOP_K], chosen.reshape(-1)[pair]
            row = x[pair // TOP_K if by_token else pair].astype(np.float64)
            for p in range(parts if slot >= 0 else 0):
                down, up = plain[slot][expert * parts + p]
                expected[s, p * rows : (p + 1) * rows] += up @ (down @ row)
        close(found, expected, 3e-6)
        for t in range(0, tokens, 7):
            alone, of_token = sorted_by_expert(t, t + 1)
            for pair, row in zip(alone, of_token, strict=True):
                np.testing.assert_array_equal(row, found[pairs == pair][0])


@pytest.mark.parametrize("gated", [True, False])
def test_a_mixture_means_what_its_merged_experts_do(gated: bool) -> None:
    tokens, d, i, parts = 9, 20, 12, 2 if gated else 1
    x, weights = normal(tokens, d), np.abs(normal(tokens, TOP_K, seed=3))
    indices = np.stack([np.arange(tokens) % EXPERTS, (np.arange(tokens) + 1) % EXPERTS], 1).astype(np.int32)
    up, down = normal(EXPERTS, parts * i, d, seed=1), normal(EXPERTS, d, i, seed=2)
    biases = normal(EXPERTS, parts * i, seed=5), normal(EXPERTS, d, seed=6)
    slots = np.array([0, 0, 1, -1, 1, 1, 0, -1, 0], np.int32)
    count = EXPERTS * parts
    of_up, up_factors = factors((i,) * count, d, [[3] * count, [17] * count], "float32", 2)
    of_down, down_factors = factors((d,) * EXPERTS, i, [[0, 4, 5], [2, 20, 1]], "float32", 2)
    arrays = (x, indices, weights, up, down, *biases, slots, *up_factors, *down_factors)
    found = meaning(LoraMoe(*map(value, arrays), activation="silu", gated=gated), *arrays)
    for slot in (-1, 0, 1):
        own_up, own_down = up.astype(np.float64), down.astype(np.float64)
        if slot >= 0:
            own_up = own_up + np.stack([b @ a for a, b in of_up[slot]]).reshape(own_up.shape)
            own_down = own_down + np.stack([b @ a for a, b in of_down[slot]])
        merged = (x, indices, weights, own_up.astype(np.float32), own_down.astype(np.float32), *biases)
        wanted = meaning(Moe(*map(value, merged), activation="silu", gated=gated), *merged)
        close(found[slots == slot], wanted[slots == slot], 1e-5)
    with pytest.raises(CompileError, match=r"lora_moe: float32\[9, 20\], adapter int32\[8\]"):
        LoraMoe(*map(value, (*arrays[:7], slots[1:], *arrays[8:])), gated=gated)
    with pytest.raises(VerifyError, match="float32 and int8"):
        LoraMoe(*map(value, (*arrays[:-1], np.zeros_like(arrays[-1], np.int8))), gated=gated).verify()
