"""What codes of quantized weights mean, and what the verifier refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.codebooks import CODEBOOKS, codebook
from llmc.ir.core import Graph, Value
from llmc.ir.errors import CompileError, VerifyError
from llmc.ir.ops import quant
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.types import Quantization, TensorType
from llmc.ir.verifier import verify
from llmc.ir.weights import ArrayTensor


def by_loops(q: Quantization, codes: Any, scale: Any, zero: Any) -> np.ndarray:
    """The table of `Quantization` element by element, in float64."""
    out = np.zeros(codes.shape)
    for n, k in np.ndindex(*codes.shape):
        g, c = k // q.group_size, int(codes[n, k])
        s = float(scale[n, g])
        if q.codebook is not None:
            out[n, k] = s * CODEBOOKS[q.codebook][c]
        elif zero is None:
            out[n, k] = s * (c - 2 ** (q.bits - 1))
        elif zero.dtype == np.uint8:
            out[n, k] = s * (c - int(zero[n, g]))
        else:
            out[n, k] = s * c + float(zero[n, g])
    return out


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    group=st.integers(1, 20),
    k=st.integers(1, 33),
    form=st.sampled_from(["symmetric", "uint8", "float16", "float32", *CODEBOOKS]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 99),
)
def test_codes_mean_what_the_table_says(
    bits: int, group: int, k: int, form: str, scale_dtype: str, seed: int
) -> None:
    book = form if form in CODEBOOKS else None
    bits = 4 if book else bits
    q = Quantization(bits, group, form == "symmetric" or book is not None, scale_dtype, codebook=book)
    rng = np.random.default_rng(seed)
    shape = (3, -(-k // group))
    codes = rng.integers(0, 1 << bits, (3, k), np.uint8)
    scale = rng.standard_normal(shape).astype(scale_dtype)
    zero = None
    if form == "uint8":
        zero = rng.integers(0, 1 << bits, shape, np.uint8)
    elif form.startswith("float"):
        zero = rng.standard_normal(shape).astype(form)
    got = quant.dequantized(q, *(None if a is None else torch.from_numpy(a) for a in (codes, scale, zero)))
    np.testing.assert_allclose(got.numpy(), by_loops(q, codes, scale, zero), rtol=1e-6, atol=1e-5)


def weights(q: Quantization, scale: str = "float16", zero: str | None = None, codes: str = "uint8") -> Graph:
    g = Graph(stage="quantized")

    def add(name: str, dtype: str, columns: int, type_: TensorType | None = None) -> Value:
        return g.add_weight(name, ArrayTensor(np.ones((4, columns), dtype)), type_)

    parts = [add("q", codes, 16, TensorType(codes, (4, 16), q)), add("s", scale, 2)]
    parts += [add("z", zero, 2)] if zero else []
    g.outputs = [g.append(quant.Dequantize(*parts, *([] if zero else [None]))).result]
    g.output_names = ["w"]
    return g


@pytest.mark.parametrize(
    ("q", "options"),
    [
        (Quantization(4, 8, True, codebook="nf4"), {}),
        (Quantization(5, 8, False, "float32"), {"scale": "float32", "zero": "float32"}),
        (Quantization(2, 8, False), {"zero": "float16"}),
        (Quantization(3, 8, False), {"zero": "uint8"}),
    ],
)
def test_every_form_verifies_and_survives_its_text(q: Quantization, options: dict[str, str]) -> None:
    g = weights(q, **options)
    verify(g)
    assert equal(parse(print_graph(g)), g)


@pytest.mark.parametrize(
    ("q", "options", "sentence"),
    [
        (Quantization(9, 8, True), {}, "2 to 8 bits"),
        (Quantization(1, 8, True), {}, "2 to 8 bits"),
        (Quantization(4, 8, True), {"codes": "int8"}, "codes are uint8"),
        (Quantization(4, 8, True, codebook="nf5"), {}, "a codebook .* has 4 bits"),
        (Quantization(5, 8, True, codebook="nf4"), {}, "a codebook .* has 4 bits"),
        (Quantization(4, 8, False, codebook="nf4"), {"zero": "uint8"}, "no zero point"),
        (Quantization(4, 8, True), {"scale": "float32"}, "as the quantization says"),
        (Quantization(4, 8, True, "bfloat16"), {"scale": "float32"}, "scales are float16 or float32"),
        (Quantization(4, 8, False), {"zero": "int32"}, "for a minimum"),
        (Quantization(4, 8, True), {"zero": "uint8"}, "groups a row"),
        (Quantization(4, 4, True), {}, "4 groups a row"),
        (Quantization(4, 8, True, super_group=16), {}, "two levels"),
        (Quantization(4, 8, True, "float32", super_group=12), {"scale": "float32"}, "two levels"),
    ],
)
def test_what_no_kernel_could_read_is_refused(
    q: Quantization, options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(VerifyError, match=sentence):
        verify(weights(q, **options))


def test_codebooks_ascend_and_have_sixteen_values() -> None:
    for name in CODEBOOKS:
        table = codebook(name)
        assert table.shape == (16,) and table.dtype == np.float32 and (np.diff(table) >= 0).all()
    with pytest.raises(CompileError, match="no codebook is named 'fp4'"):
        codebook("fp4")
