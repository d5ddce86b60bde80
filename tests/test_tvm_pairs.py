"""Products of many rows two tiles at a time (`tile_pairs`): for any number of rows the bits of few rows,
which vectors multiply, and the values of the reference.
"""

from __future__ import annotations

import numpy as np
from llmc.codegen.tvm.kernels.activation import reference_quantize_activation, whole_groups
from llmc.codegen.tvm.kernels.quantized import reference_quantized_linear
from llmc.codegen.tvm.kernels.tile_layout import as_they_lie, in_pairs

from .conftest import LONG
from .kernel_harness import close, level_cases, normal
from .test_tvm_quantized import Case, run

CASES = [
    (
        Case(304, 640, 8, 128),
        True,
    ),  # more pairs of blocks than are multiplied together, an odd block, 2 chunks
    (Case(16, 768, 8, 256), True),  # one block
    (Case(40, 320, 8, 320), True),  # one group
    (Case(24, 1152, 8, 576), True),  # more parts of a group than are written out
    (Case(48, 4096, 8, 256), True),  # rows that threads share
    (Case(40, 288, 8, 96), True),  # tiles of 48 columns
    (Case(40, 250, 8, 100), True),  # groups that are padded, and a short last one
    (Case(33, 2176, 8, 64), False),  # groups of one tile
    (Case(40, 4224, 8, 128), False),  # more groups than starts are kept for: spread
    (Case(40, 640, 4, 128, "uint8"), False),
    (Case(20, 512, 6, 256, "float16"), False),  # minima, and a panel of two blocks
]
ROWS = 150


@level_cases(
    "case,lies,apart",
    [
        (case, lies, count)
        for number, (case, lies) in enumerate(CASES)
        for count in ((0, 4) if LONG else ((0, 4)[number % 2],) if whole_groups(case.layout) else (0,))
        if count == 0 or whole_groups(case.layout)
    ],
)
def test_rows_do_not_depend_on_their_number(case: Case, lies: bool, apart: int, isa: str) -> None:
    assert as_they_lie(case.layout) is lies
    x = normal(ROWS, case.k)
    x[np.arange(ROWS), np.arange(ROWS) * 37 % case.k] *= 40
    whole = run(isa, case, x, (), apart)
    a, sums, scale = reference_quantize_activation(x, case.group, case.layout.align, apart)
    close(whole, reference_quantized_linear(case.layout, a, sums, scale, *case.parts()), 1e-6)
    for start in range(0, ROWS, 7):
        assert np.array_equal(run(isa, case, x[start : start + 7], (), apart), whole[start : start + 7])
    for rows in (16, 17, 31, 32, 33, 48, 49, 65):
        assert np.array_equal(run(isa, case, x[:rows], (), apart), whole[:rows])
    bias, residual = normal(case.n, seed=5), normal(ROWS, case.n, seed=6)
    assert np.array_equal(run(isa, case, x, (bias, residual), apart), whole + bias + residual)


def test_small_groups_are_multiplied_one_tile_at_a_time() -> None:
    assert not in_pairs(Case(40, 640, 4, 64).layout)
    assert in_pairs(Case(40, 640, 4, 128).layout)
