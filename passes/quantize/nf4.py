"""NF4 with double quantization, as bitsandbytes computes it. Arrays in, arrays out.

Dettmers et al. 2023 (QLoRA), section 3 and appendix E. The weight is flattened and cut into blocks of 64:

    absmax[b] = max |w|                                     float32, one a block
    code      = nearest of the 16 NF4 values to w / absmax  uint8, 0 … 15

and the absmax themselves are quantized, in blocks of 256, after their mean is taken off:

    offset    = mean(absmax)
    nested[c] = max |absmax - offset|                       float32, one a 256 blocks
    code      = nearest of a map of 256 values to (absmax - offset) / nested

Codes, absmax codes and dequantized weights equal those of bitsandbytes 0.50 bit for bit
(functional.quantize_4bit with compress_statistics, on CPU), which fixes the order of operations here: a full
block is multiplied by 1 / absmax, the ragged last one divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ...ir.codebooks import codebook
from ...ir.errors import InputError

Array = np.ndarray[Any, Any]
BLOCK = 64
NESTED_BLOCK = 256
_STEPS = 65535
_SMALLEST = np.float32(1e-38)


@dataclass(frozen=True)
class NestedAbsmax:
    """codes uint8 [blocks]; nested float32 [ceil(blocks / 256)]; offset float32."""

    codes: Array
    nested: Array
    offset: np.float32


@cache
def _bounds() -> Array:
    """Midpoints of the NF4 values, float32 [15]."""
    table = codebook("nf4")
    return (table[:-1] + table[1:]) / np.float32(2)


@cache
def _code_of_step() -> Array:
    """The nearest code to each of 65,536 evenly spaced numbers from -1 to 1, uint8: bitsandbytes on CPU looks
    numbers up so, which moves a decision by up to 1.5e-5.
    """
    table = dynamic_map()
    steps = (np.arange(_STEPS + 1) * (2.0 / _STEPS) - 1.0).astype(np.float32)
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    return np.searchsorted(bounds, steps, side="left").astype(np.uint8)


@cache
def dynamic_map() -> Array:
    """The map of absmax codes: 256 ascending values from -0.993 to 1, float32.

    Dynamic tree quantization (Dettmers et al. 2022, "8-bit optimizers", section 2.1): 7 powers of ten, each
    with twice the fractions of the one below.
    """
    import torch

    values = [0.0, 1.0]
    for power in range(7):
        # torch's own linspace: the last bits of the map are those of its rounding
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (power - 6) * means).tolist()
        values += (-(10 ** (power - 6)) * means).tolist()
    return np.sort(np.array(values)).astype(np.float32)


def block_absmax(rows: Iterator[Array], count: int, what: str = "weight") -> Array:
    """absmax of each block of a flattened weight, float32 [ceil(count / 64)].

    Args:
        rows: the weight in row order, in pieces of any number of rows.
        count: elements in all.
    Raises:
        InputError: NaN or Inf in the weight.
    """
    found = np.zeros(-(-count // BLOCK), np.float32)
    done = 0
    for piece in rows:
        flat = np.abs(np.asarray(piece, np.float32).reshape(-1))
        if not np.isfinite(flat).all():
            raise InputError(
                f"{what} holds NaN or infinite values",
                remedy="the checkpoint is damaged or must not be quantized (--quant none)",
            )
        first = done // BLOCK
        edges = np.arange(first + 1, -(-(done + len(flat)) // BLOCK)) * BLOCK - done
        tops = np.maximum.reduceat(flat, np.concatenate([[0], edges])) if len(flat) else flat
        here = found[first : first + len(tops)]
        np.maximum(here, tops, out=here)
        done += len(flat)
    if count % BLOCK:
        found[-1] = max(found[-1], _SMALLEST)
    return found


def quantize_rows(rows: Array, absmax: Array, start: int, count: int) -> Array:
    """Codes uint8 of some rows [n, K] of a weight.

    Args:
        absmax: of all blocks of the weight (`block_absmax`).
        start: elements of the weight before these rows. count: elements of the weight.
    """
    flat = np.asarray(rows, np.float32).reshape(-1)
    where = np.arange(start, start + len(flat))
    block = where // BLOCK
    scaled = flat * (np.float32(1) / np.maximum(absmax, _SMALLEST))[block]
    ragged = where >= count // BLOCK * BLOCK
    scaled[ragged] = flat[ragged] / absmax[-1]
    codes = np.searchsorted(_bounds(), np.clip(scaled, -1, 1), side="left")
    return codes.astype(np.uint8).reshape(rows.shape)


def quantize_absmax(absmax: Array) -> NestedAbsmax:
    """The second quantization, of absmax float32 [blocks]."""
    import torch

    # torch's own mean: its order of summation is part of the result
    offset = np.float32(torch.from_numpy(absmax).mean().item())
    rest = absmax - offset
    blocks = -(-len(rest) // NESTED_BLOCK)
    nested = np.abs(np.pad(rest, (0, blocks * NESTED_BLOCK - len(rest))).reshape(blocks, -1)).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = rest * np.repeat(np.float32(1) / nested, NESTED_BLOCK)[: len(rest)]
    flat = np.repeat(nested == 0, NESTED_BLOCK)[: len(rest)]
    scaled = np.clip(np.where(flat, np.float32(0), scaled), np.float32(-1), np.float32(1))
    step = ((scaled + np.float32(1)) * np.float32(_STEPS / 2) + np.float32(0.5)).astype(np.int32)
    codes = np.where(flat, np.uint8(0), _code_of_step()[step])
    return NestedAbsmax(codes, nested.astype(np.float32), offset)


def dequantize_absmax(stored: NestedAbsmax) -> Array:
    """absmax float32 [blocks]."""
    outer = np.repeat(stored.nested, NESTED_BLOCK)[: len(stored.codes)]
    return dynamic_map()[stored.codes] * outer + stored.offset


def quantize_nf4(w: Array, what: str = "weight") -> tuple[Array, NestedAbsmax]:
    """A whole weight [N, K]: codes uint8 [N, K], and its absmax, quantized."""
    absmax = block_absmax(iter([w]), w.size, what)
    return quantize_rows(w, absmax, 0, w.size), quantize_absmax(absmax)


def dequantize_nf4(codes: Array, stored: NestedAbsmax) -> Array:
    """float32 [N, K]."""
    absmax = dequantize_absmax(stored)
    return codebook("nf4")[codes] * absmax[np.arange(codes.size) // BLOCK].reshape(codes.shape)


def row_scales(absmax: Array, n: int, k: int, group_size: int) -> Array:
    """absmax by groups of a row, float32 [N, K / group_size]; a group must lie in one block everywhere, as
    one that divides both K and 64 does.
    """
    first = np.arange(n * k // group_size) * group_size
    return absmax[first // BLOCK].reshape(n, k // group_size)
