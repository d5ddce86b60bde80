"""Lazy tensors that keep what a later read wants: rows that threads read at the same time are the right ones.
The verdict on a quantized model reads an embedding's rows so, a sequence a thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llmc.frontend.quantized.awq import GemmCodes
from llmc.frontend.quantized.packing import PackedAlongColumns
from llmc.ir.types import Quantization
from llmc.ir.weights import ArrayTensor, LazyTensor
from llmc.passes.quantize.moe import StackedRows
from llmc.passes.quantize.nearest import QuantizedPart, QuantizedWeight
from llmc.passes.quantize.nf4_pass import Nf4Codes, Nf4Scales, Nf4Weight

ROWS, K = 64, 64


def _nearest(values: np.ndarray) -> list[LazyTensor]:
    weight = QuantizedWeight(ArrayTensor(values), Quantization(4, 32, False))
    return [QuantizedPart(weight, part) for part in ("codes", "scale", "zero_point")]


def _nf4(values: np.ndarray) -> list[LazyTensor]:
    weight = Nf4Weight(ArrayTensor(values))
    return [Nf4Codes(weight), Nf4Scales(weight)]


def _words(values: np.ndarray) -> ArrayTensor:
    return ArrayTensor(np.ascontiguousarray(values).view(np.int32))


MAKERS: dict[str, Callable[[np.ndarray], list[LazyTensor]]] = {
    "nearest": _nearest,
    "nf4": _nf4,
    "experts": lambda values: [StackedRows(ArrayTensor(values.reshape(4, ROWS // 4, K)))],
    "gptq": lambda values: [PackedAlongColumns(_words(values), 4, 8 * ROWS)],
    "awq": lambda values: [GemmCodes(_words(values))],
}


@pytest.fixture
def hasty() -> Generator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_threads_read_the_rows_that_they_asked_for(kind: str, hasty: None) -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, K)).astype(np.float32)
    alone = [part.read() for part in MAKERS[kind](values)]

    for seed in range(20):
        parts = MAKERS[kind](values)

        def wrong(thread: int, parts: list[LazyTensor] = parts, seed: int = seed) -> int:
            """How many reads of rows here and there, the last ones among them, gave others."""
            draw = np.random.default_rng([seed, thread])
            found = 0
            for _ in range(40):
                start = int(draw.integers(0, parts[0].shape[0]))
                stop = min(start + int(draw.integers(1, 12)), parts[0].shape[0])
                for part, whole in zip(parts, alone, strict=True):
                    found += not np.array_equal(part.read(start, stop), whole[start:stop])
            return found

        with ThreadPoolExecutor(3) as pool:
            assert sum(pool.map(wrong, range(3))) == 0
