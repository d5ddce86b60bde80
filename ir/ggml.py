"""GGML's quantized block types: raw bytes ↔ codes, scales and minimums. Arrays in, arrays out.

A row of a matrix is stored as blocks of 32 values (Q4_0 …) or of 256 (the K types and most IQ types, with a
scale for every 16 or 32 values inside; `ggml_grids.py` unpacks those with grids). The layouts are those of
ggml-common.h (`block_q4_0` … `block_iq4_xs`) in https://github.com/ggml-org/ggml; the meaning of the numbers
is `dequantize_row_*` in ggml-quants.c.

Unpacking gives the parts of `types.Quantization`, and scale · code + minimum (or scale · (code - 2^(bits-1)),
or scale · codebook[code]) of these parts in float32 equals ggml's own float32 values bit for bit: the same
products are rounded in the same order. A type whose effective scale is a product itself (d · sc) has float32
scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from . import ggml_grids as grids
from .codebooks import E2M1_PLACES
from .errors import InputError
from .types import Quantization
from .weights import QuantizedTensors

Array = np.ndarray[Any, Any]
Scales = tuple[Array, Array | None]

SUPER: Final = 256  # QK_K: values of a K block


@dataclass(frozen=True)
class BlockType:
    """One block type.

    Attributes:
        block_size, type_size: values and bytes of a block.
        quant: what its parts mean.
        minimum: whether it has a float minimum (`zero_point`), of the scales' dtype.
        codes: blocks uint8 [n, type_size] → codes uint8 [n, block_size].
        scales: blocks → (scale, minimum or None), each [n, block_size / group_size].
    """

    name: str
    block_size: int
    type_size: int
    quant: Quantization
    minimum: bool
    codes: Callable[[Array], Array]
    scales: Callable[[Array], Scales]

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` values, a multiple of the block size."""
        return k // self.block_size * self.type_size

    def _blocks(self, raw: Array) -> Array:
        return raw.reshape(-1, self.type_size)

    def unpack_codes(self, raw: Array) -> Array:
        """Rows of blocks, uint8 [rows, bytes] → codes uint8 [rows, K]."""
        return np.ascontiguousarray(self.codes(self._blocks(raw))).reshape(len(raw), -1)

    def unpack_scales(self, raw: Array) -> Scales:
        """Rows of blocks, uint8 [rows, bytes] → scale and minimum (or None), each [rows, G]."""
        scale, minimum = self.scales(self._blocks(raw))
        return (
            np.ascontiguousarray(scale).reshape(len(raw), -1),
            None if minimum is None else np.ascontiguousarray(minimum).reshape(len(raw), -1),
        )


def _shifted(packed: Array, chunk: int, shifts: tuple[int, ...], mask: int) -> Array:
    """[n, bytes] in chunks of `chunk` bytes; of each chunk first all lowest fields, then the next ones:
    [n, values].
    """
    n = len(packed)
    by = np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return ((packed.reshape(n, -1, 1, chunk) >> by) & np.uint8(mask)).reshape(n, -1)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _single(blocks: Array, at: int) -> Array:
    return _half(blocks, at).astype(np.float32)


def _fifth_bits(blocks: Array, at: int) -> Array:
    """32 single bits from byte `at` on, least first, as 0 or 16: [n, 32]."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_codes(at: int) -> Callable[[Array], Array]:
    return lambda b: _shifted(b[:, at : at + 16], 16, (0, 4), 15)


def _q5_codes(at: int) -> Callable[[Array], Array]:
    return lambda b: _shifted(b[:, at + 4 : at + 20], 16, (0, 4), 15) | _fifth_bits(b, at)


def _scale_only(b: Array) -> Scales:
    return _half(b, 0), None


def _scale_minimum(b: Array) -> Scales:
    return _half(b, 0), _half(b, 2)


def _k_scales(b: Array) -> Scales:
    """Q4_K and Q5_K: d, dmin, then 6-bit scales and minimums of eight groups in twelve bytes."""
    sc, m = unpack_six_bits(b[:, 4:16])
    return _single(b, 0) * sc.astype(np.float32), -(_single(b, 2) * m.astype(np.float32))


def unpack_six_bits(packed: Array) -> tuple[Array, Array]:
    """Twelve bytes [n, 12] → scales and minimums, uint8 0 … 63, [n, 8] each (`get_scale_min_k4`)."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimums = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return scales, minimums


def pack_six_bits(scales: Array, minimums: Array) -> Array:
    """Inverse of `unpack_six_bits`."""
    low = scales[:, :4] | ((scales[:, 4:] & 48) << np.uint8(2))
    mid = minimums[:, :4] | ((minimums[:, 4:] & 48) << np.uint8(2))
    high = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << np.uint8(4))
    return np.concatenate([low, mid, high], axis=1)


def _q5_k_codes(b: Array) -> Array:
    high = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    return _shifted(b[:, 48:176], 32, (0, 4), 15) | (high << np.uint8(4)).reshape(len(b), -1)


def _q6_k_codes(b: Array) -> Array:
    low = _shifted(b[:, :128], 64, (0, 4), 15)
    return low | (_shifted(b[:, 128:192], 32, (0, 2, 4, 6), 3) << np.uint8(4))


def _q6_k_scales(b: Array) -> Scales:
    return _single(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32), None


def _q2_k_scales(b: Array) -> Scales:
    packed = b[:, :16]
    scale = _single(b, 80) * (packed & np.uint8(15)).astype(np.float32)
    return scale, -(_single(b, 82) * (packed >> np.uint8(4)).astype(np.float32))


def _q3_k_codes(b: Array) -> Array:
    # A set bit of the mask takes nothing away: code - 4 is the low bits, less 4 where the bit is clear.
    high = (b[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    return _shifted(b[:, 32:96], 32, (0, 2, 4, 6), 3) | (high << np.uint8(2)).reshape(len(b), -1)


def _q3_k_scales(b: Array) -> Scales:
    low = _shifted(b[:, 96:104], 8, (0, 4), 15)
    high = _shifted(b[:, 104:108], 4, (0, 2, 4, 6), 3)
    scales = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    return _single(b, 108) * scales.astype(np.float32), None


def _mxfp4_codes(b: Array) -> Array:
    return E2M1_PLACES[_shifted(b[:, 1:17], 16, (0, 4), 15)]


def _mxfp4_scales(b: Array) -> Scales:
    """2^(e - 128): half of the exponent's power, since the table has doubled values."""
    return np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128), None


def _nvfp4_codes(b: Array) -> Array:
    return E2M1_PLACES[_shifted(b[:, 4:36], 8, (0, 4), 15)]


def _nvfp4_scales(b: Array) -> Scales:
    """Half of four floats with 4 bits of exponent and 3 of mantissa, and no sign; their not-a-number is 0 in
    ggml.
    """
    exponent, mantissa = (b[:, :4] >> np.uint8(3)).astype(np.int32) & 15, b[:, :4] & np.uint8(7)
    # Without an exponent a step is 2^-9, as with the smallest one.
    steps = (mantissa + np.where(exponent > 0, np.uint8(8), np.uint8(0))).astype(np.float32)
    scales = np.ldexp(steps, np.maximum(exponent, 1) - 11)
    return np.where(b[:, :4] == 0x7F, np.float32(0), scales).astype(np.float32), None


def _iq4_xs_scales(b: Array) -> Scales:
    low = ((b[:, 4:8, None] >> np.array([0, 4], np.uint8)) & np.uint8(15)).reshape(len(b), 8)
    high = np.ascontiguousarray(b[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    scales = (low | ((high & 3) << 4).astype(np.uint8)).astype(np.int8) - np.int8(32)
    return _single(b, 0) * scales.astype(np.float32), None


def _symmetric(bits: int, group: int, scale: str = "float16") -> Quantization:
    return Quantization(bits, group, True, scale, super_group=_super(scale))


def _affine(bits: int, group: int, scale: str = "float16") -> Quantization:
    return Quantization(bits, group, False, scale, super_group=_super(scale))


def _codebook(group: int, scale: str) -> Quantization:
    return Quantization(4, group, True, scale, codebook="iq4_nl", super_group=_super(scale))


def _table_of(name: str, group: int, super_group: int = 0) -> Quantization:
    return Quantization(4, group, True, "float32", codebook=name, super_group=super_group)


_MXFP4: Final = _table_of("mxfp4", 32)


def _super(scale: str) -> int:
    """Columns that share a factor of their scales: those of a K block, whose scales are products."""
    return SUPER if scale == "float32" else 0


def _table() -> dict[str, BlockType]:
    f32 = "float32"
    kinds = (
        BlockType("Q4_0", 32, 18, _symmetric(4, 32), False, _q4_codes(2), _scale_only),
        BlockType("Q4_1", 32, 20, _affine(4, 32), True, _q4_codes(4), _scale_minimum),
        BlockType("Q5_0", 32, 22, _symmetric(5, 32), False, _q5_codes(2), _scale_only),
        BlockType("Q5_1", 32, 24, _affine(5, 32), True, _q5_codes(4), _scale_minimum),
        BlockType("Q8_0", 32, 34, _symmetric(8, 32), False, lambda b: b[:, 2:] ^ np.uint8(128), _scale_only),
        BlockType(
            "Q2_K", SUPER, 84, _affine(2, 16, f32), True,
            lambda b: _shifted(b[:, 16:80], 32, (0, 2, 4, 6), 3), _q2_k_scales,
        ),
        BlockType("Q3_K", SUPER, 110, _symmetric(3, 16, f32), False, _q3_k_codes, _q3_k_scales),
        BlockType(
            "Q4_K", SUPER, 144, _affine(4, 32, f32), True,
            lambda b: _shifted(b[:, 16:144], 32, (0, 4), 15), _k_scales,
        ),
        BlockType("Q5_K", SUPER, 176, _affine(5, 32, f32), True, _q5_k_codes, _k_scales),
        BlockType("Q6_K", SUPER, 210, _symmetric(6, 16, f32), False, _q6_k_codes, _q6_k_scales),
        BlockType("IQ4_NL", 32, 18, _codebook(32, "float16"), False, _q4_codes(2), _scale_only),
        BlockType(
            "IQ4_XS", SUPER, 136, _codebook(32, f32), False,
            lambda b: _shifted(b[:, 8:136], 16, (0, 4), 15), _iq4_xs_scales,
        ),
        BlockType("MXFP4", 32, 17, _MXFP4, False, _mxfp4_codes, _mxfp4_scales),
        # Their scales are products of a float16 and half a step, which is no float16 times an integer.
        BlockType(
            "IQ2_XXS", SUPER, 66, _table_of("iq2", 32), False, grids.iq2_xxs_codes, grids.iq2_xxs_scales
        ),
        BlockType("IQ2_XS", SUPER, 74, _table_of("iq2", 16), False, grids.iq2_xs_codes, grids.iq2_xs_scales),
        BlockType("IQ2_S", SUPER, 82, _table_of("iq2", 16), False, grids.iq2_s_codes, grids.iq2_s_scales),
        BlockType(
            "IQ3_XXS", SUPER, 98, _table_of("iq3_xxs", 32), False, grids.iq3_xxs_codes, grids.iq3_xxs_scales
        ),
        BlockType(
            "IQ3_S", SUPER, 110, _table_of("iq3_s", 32, SUPER), False, grids.iq3_s_codes, grids.iq3_s_scales
        ),
        BlockType(
            "IQ1_S", SUPER, 50, Quantization(2, 32, False, f32), True, grids.iq1_s_codes, grids.iq1_s_scales
        ),
        BlockType("IQ1_M", SUPER, 56, _table_of("iq1_m", 16), False, grids.iq1_m_codes, grids.iq1_m_scales),
        BlockType("NVFP4", 64, 36, _table_of("mxfp4", 16), False, _nvfp4_codes, _nvfp4_scales),
        BlockType("TQ1_0", SUPER, 54, _affine(2, SUPER), True, grids.tq1_0_codes, grids.tq1_0_scales),
        BlockType("TQ2_0", SUPER, 66, _affine(2, SUPER), True, grids.tq2_0_codes, grids.tq2_0_scales),
    )  # fmt: skip
    return {kind.name: kind for kind in kinds}


BLOCK_TYPES: Final = _table()


class BlockRows(Protocol):
    """A matrix [N, K], or several stacked, [E, N, K], that are stored as rows of blocks."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def ggml_type(self) -> str: ...

    @property
    def factor(self) -> Array | None:
        """What the blocks' values are multiplied by: float32 [1], or [E] for stacked matrices; None: 1."""
        ...

    def blocks(self, start: int = 0, stop: int | None = None) -> Array:
        """Raw bytes of rows [start:stop) of axis 0, uint8 [rows, …, bytes of a row]."""
        ...


class BlockPart:
    """Codes, scales or minimums of matrices in blocks as a lazy tensor; a read unpacks the rows asked for.

    Attributes:
        tensor: the matrices with their blocks.
        part: "codes", "scale" or "zero_point".
    """

    def __init__(self, tensor: BlockRows, part: str) -> None:
        self.tensor, self.part = tensor, part
        self._type = BLOCK_TYPES[tensor.ggml_type]
        *rows, k = tensor.shape
        quant = self._type.quant
        self.shape: tuple[int, ...] = (*rows, k if part == "codes" else k // quant.group_size)
        self.dtype = "uint8" if part == "codes" else quant.scale_dtype
        self.source = f"{part}({tensor.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        raw = self.tensor.blocks(start, stop)
        if not len(raw):
            return np.empty((0, *self.shape[1:]), self.dtype)
        shape, rows = (len(raw), *self.shape[1:]), raw.reshape(-1, raw.shape[-1])
        if self.part == "codes":
            return self._type.unpack_codes(rows).reshape(shape)
        found = self._type.unpack_scales(rows)[self.part == "zero_point"]
        assert found is not None
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.tensor.source} holds NaN or infinite scales",
                remedy="the file is damaged: get it again",
            )
        return times(self.tensor.factor, found.reshape(shape), start)

    def __repr__(self) -> str:
        return f"BlockPart({self.dtype}{list(self.shape)}, {self.source!r})"


def times(factor: Array | None, rows: Array, start: int) -> Array:
    """Rows of axis 0, from number `start` on, of values that a factor belongs to (`BlockRows.factor`)."""
    if factor is None:
        return rows
    if len(factor) > 1:
        factor = factor[start : start + len(rows)].reshape(-1, *[1] * (rows.ndim - 1))
    return rows * factor


def block_parts(tensor: BlockRows) -> QuantizedTensors | None:
    """The parts of one matrix or of several in blocks; None where their type is none of `BLOCK_TYPES` or they
    are no matrices.
    """
    kind = BLOCK_TYPES.get(tensor.ggml_type)
    if kind is None or len(tensor.shape) not in (2, 3):
        return None
    minimum = BlockPart(tensor, "zero_point") if kind.minimum else None
    return QuantizedTensors(kind.quant, BlockPart(tensor, "codes"), BlockPart(tensor, "scale"), minimum)
