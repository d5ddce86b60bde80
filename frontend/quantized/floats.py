"""Weights in floats of eight or four bits with scales beside them: what importers of such formats share.

    E4M3, eight bits   w[n, k] = value · scale of its block of rows and columns; read as float32, since no
                       kernel here multiplies by such floats
    E2M1, four bits    two in a byte, the even column in the low half; w[n, k] = value · scale of its group of
                       columns: codes of a table, which kernels multiply by
    E8M0               a scale in a byte: 2^(byte - 127), 255 is no number

OCP Microscaling Formats 1.0, sections 5.3 and 5.4.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ...ir.codebooks import E2M1_PLACES
from ...ir.dtypes import FLOAT8
from ...ir.errors import InputError
from ...ir.types import Quantization
from ...ir.weights import DequantizedTensor, LazyTensor, QuantizedTensors
from ..weights import TransformedTensor
from .checks import disagree, expect_shape

Array = np.ndarray[Any, Any]
Block = tuple[int, int]
SCALES: Final = ("float32", "bfloat16", "float16", FLOAT8, "uint8")
"""Element types of scales; bytes are E8M0."""
_PAIRS: Final = np.stack([E2M1_PLACES[np.arange(256) & 15], E2M1_PLACES[np.arange(256) >> 4]], axis=1)


def scale_values(stored: Array, source: str) -> Array:
    """Scales as float32. Raises InputError where one is no finite number."""
    if stored.dtype == np.uint8:
        finite = stored != 255
        values = np.ldexp(np.float32(1), np.where(finite, stored, 0).astype(np.int32) - 127)
    else:
        values = stored.astype(np.float32)
        finite = np.isfinite(values)
    if not finite.all():
        raise InputError(f"{source} holds NaN or infinite scales", remedy="the checkpoint is damaged")
    return values


class ScaledFloat8:
    """Float8 matrices [N, K], or several stacked, [E, N, K], times the scales of their blocks: float32.

    Args:
        scale: [(E,) ceil(N / rows), ceil(K / columns)]; or one number for all.
        block: rows and columns that share a scale; None: what the number of scales divides the matrix into.
    Raises:
        InputError: scales of another shape.
    """

    dtype: str = "float32"

    def __init__(self, values: LazyTensor, scale: LazyTensor, block: Block | None) -> None:
        if values.dtype != FLOAT8 or len(values.shape) not in (2, 3) or 0 in values.shape:
            raise disagree(values, f"is {values.dtype}{list(values.shape)}, not {FLOAT8} matrices")
        if scale.dtype not in SCALES:
            raise disagree(scale, f"is {scale.dtype}, not {' or '.join(SCALES)}")
        self._values, self._scale = values, scale
        self.shape, self.source = values.shape, values.source
        self._one = int(np.prod(scale.shape)) == 1
        self._block = self._fitting(block)

    def _fitting(self, block: Block | None) -> Block:
        *stack, n, k = self.shape
        if self._one:
            return n, k
        held = self._scale.shape
        if list(held[:-2]) == stack and len(held) == len(self.shape) and 0 not in held:
            if block is not None and held[-2:] == (-(-n // block[0]), -(-k // block[1])):
                return block
            if n % held[-2] == 0 and k % held[-1] == 0:
                return n // held[-2], k // held[-1]
        sizes = "" if block is None else f" in blocks of {list(block)}"
        raise disagree(
            self._scale, f"has the shape {list(held)}, which fits no {list(self.shape)}{sizes} of weights"
        )

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        first, last, _ = slice(start, stop).indices(self.shape[0])
        last = max(first, last)
        values = self._values.read(first, last).astype(np.float32)
        if self._one:
            return values * scale_values(self._scale.read(), self._scale.source).reshape(())
        n, k = self.shape[-2:]
        rows, columns = self._block
        matrices = len(self.shape) == 3
        span = (first, last) if matrices else (first // rows, -(-last // rows))
        scale = scale_values(self._scale.read(*span), self._scale.source)
        scale = np.repeat(scale, rows, axis=-2)
        scale = scale[:, :n] if matrices else scale[first - span[0] * rows :][: last - first]
        return values * np.repeat(scale, columns, axis=-1)[..., :k]

    def __repr__(self) -> str:
        return f"ScaledFloat8({list(self.shape)}, {self.source!r})"


class Float4Codes:
    """Codes uint8 [(E,) N, K] of pairs of E2M1 floats in bytes, uint8 [(E,) N, K / 2]."""

    dtype: str = "uint8"

    def __init__(self, pairs: LazyTensor) -> None:
        self._pairs = pairs
        self.shape: tuple[int, ...] = (*pairs.shape[:-1], 2 * pairs.shape[-1])
        self.source = pairs.source

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        pairs = self._pairs.read(start, stop)
        return _PAIRS[pairs].reshape(*pairs.shape[:-1], self.shape[-1])


def float4(
    pairs: LazyTensor, scale: LazyTensor, group: int, *, factor: float = 1.0, divisor: float = 1.0
) -> DequantizedTensor:
    """A weight of E2M1 floats, with its codes.

    Args:
        pairs: uint8 [(E,) N, K / 2].
        scale: [(E,) N, K / group], one of `SCALES`.
        factor, divisor: of all scales.
    Raises:
        InputError: other shapes or dtypes.
    """
    if pairs.dtype != "uint8" or 0 in pairs.shape:
        raise disagree(pairs, f"is {pairs.dtype}{list(pairs.shape)}, not bytes with two floats each")
    if scale.dtype not in SCALES:
        raise disagree(scale, f"is {scale.dtype}, not {' or '.join(SCALES)}")
    *rows, half = pairs.shape
    expect_shape(scale, (*rows, -(-2 * half // group)), f"groups of {group} columns")
    if not np.isfinite([factor, divisor]).all() or divisor == 0:
        raise disagree(scale, f"has the factor {factor}, divided by {divisor}")

    def scaled(stored: Array) -> Array:
        values = scale_values(stored, scale.source) * np.float32(factor) / np.float32(divisor)
        return values / np.float32(2)  # the table has doubled values

    scales = TransformedTensor(scale, scaled, by_row=True)
    quant = Quantization(4, group, True, "float32", codebook="mxfp4")
    return DequantizedTensor(QuantizedTensors(quant, Float4Codes(pairs), scales), pairs.source)
