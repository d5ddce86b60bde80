"""Keys that move to an earlier position: turned back by the angles that a rotary embedding gave them.

A key at position p was turned by p · f radians in each of its pairs (Su et al. 2021, arXiv:2104.09864,
section 3.2.2), f the pair's frequency; turned by -s · f more, it is the key of position p - s. Which elements
make pairs and how fast they turn is in the manifest (`model.rotary`, docs/architecture.md), so this is the
same for every model. Arithmetic is float32, angles float64; a cache of fewer bits is rounded once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import FLOAT8, FLOAT8_LARGEST, KV_SCALE_BYTES, to_numpy
from ...ir.errors import ArtifactError, InputError

_SMALLEST_SCALED = np.float32(1e-30)  # as `append_kv` has it: what is smaller is stored as zeros


@dataclass(frozen=True, slots=True)
class Rotary:
    """Elements `start` … `start + dim - 1` of a key turn, in pairs (2i, 2i + 1) if `interleaved`, else in
    pairs (i, i + dim / 2).
    """

    start: int
    dim: int
    interleaved: bool
    frequencies: tuple[float, ...]
    """Radians a position of each pair, [dim / 2]."""

    def turn_back(self, keys: np.ndarray, shift: int) -> None:
        """Turn keys [.., head_dim, n] float32 back by `shift` positions, in place."""
        angles = np.asarray(self.frequencies, np.float64)[:, None] * shift
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        end, half = self.start + self.dim, self.dim // 2
        if self.interleaved:
            first, second = keys[..., self.start : end : 2, :], keys[..., self.start + 1 : end : 2, :]
        else:
            first = keys[..., self.start : self.start + half, :]
            second = keys[..., self.start + half : end, :]
        with np.errstate(invalid="ignore", over="ignore"):  # a key that is not finite stays so
            turned = first * cos + second * sin
            second[...] = second * cos - first * sin
        first[...] = turned


def read_rotary(artifact: Artifact) -> list[Rotary | None]:
    """Of each layer with a cache, how its keys turn; None where they hold no position.

    Raises InputError where keys cannot be moved, or where the artifact does not say; ArtifactError where what
    it says makes no sense.
    """
    facts = artifact.model.get("rotary")
    if facts is None:
        raise InputError(
            f"{artifact.root} does not say how its keys hold positions: it is of an older version, or of a "
            "model that generates nothing",
            remedy="leave sinks out, or compile it again",
        )
    if "refused" in facts:
        raise InputError(
            f"{artifact.root}: tokens cannot be evicted from its cache: {facts['refused']}",
            remedy="leave sinks out",
        )
    try:
        tables = [_table(entry) for entry in facts["tables"]]
        found = [None if number is None else tables[number] for number in facts["layers"]]
        sizes = [int(layer["head_dim"]) for layer in artifact.model["kv"]]
        fits = all(r is None or r.start + r.dim <= size for r, size in zip(found, sizes, strict=True))
    except (KeyError, TypeError, ValueError, IndexError):
        fits, found = False, []
    if not fits:
        raise ArtifactError(
            f"{artifact.root}: the manifest's model.rotary makes no sense", remedy="compile the model again"
        )
    return found


def _table(entry: Mapping[str, Any]) -> Rotary:
    frequencies = tuple(float(f) for f in entry["frequencies"])
    dim, start = int(entry["dim"]), int(entry["start"])
    if 2 * len(frequencies) != dim or start < 0 or not np.isfinite(frequencies).all():
        raise ValueError("frequencies")
    return Rotary(start, dim, bool(entry["interleaved"]), frequencies)


def turn_codes(rotary: Rotary, codes: np.ndarray, scales: np.ndarray, shift: int) -> None:
    """Turn keys of int8 in place: codes [.., head_dim, n] int8, scales [.., n] float32 (x = scale · code).
    The result is rounded as `append_kv` rounds (ir/ops/cache.py, `quantize_heads`).
    """
    keys = codes.astype(np.float32) * scales[..., None, :]
    rotary.turn_back(keys, shift)
    largest = np.abs(keys).max(axis=-2)
    finite = np.isfinite(largest)
    scaled = finite & (largest >= _SMALLEST_SCALED)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=scaled)
    rounded = np.rint(np.clip(np.where(scaled[..., None, :], keys, 0) * inverse[..., None, :], -127, 127))
    codes[...] = rounded.astype(np.int8)
    divided = np.divide(largest, np.float32(127), out=np.zeros_like(largest), where=scaled)
    scales[...] = np.where(finite, divided, np.float32(np.nan))


def turn_keys(rotary: Rotary, keys: np.ndarray, shift: int) -> np.ndarray:
    """Keys [.., head_dim, n] of floats turned back, as a new array of their dtype."""
    turned = keys.astype(np.float32)
    rotary.turn_back(turned, shift)
    with np.errstate(over="ignore"):
        if keys.dtype == to_numpy(FLOAT8):  # what is larger would be NaN; `append_kv` stores the largest then
            turned = np.clip(turned, -FLOAT8_LARGEST, FLOAT8_LARGEST)
        return turned.astype(keys.dtype)


def turn_pages(
    rotary: Rotary, pages: np.ndarray, numbers: Sequence[int], shift: int, *, head_dim: int
) -> None:
    """Turn the keys of some pages of a cache as tvm-cpu lays it out (codegen/tvm/kernels/cache.py), in place.

    `pages` is [N, heads, page_size, width] of keys alone, `numbers` which of them; a width beyond `head_dim`
    holds the scales of int8.
    """
    where = np.asarray(numbers, np.intp)
    count, heads, size = len(where), pages.shape[1], pages.shape[2]
    flat = pages[where].reshape(count, heads, -1)
    if pages.dtype == np.int8:
        assert pages.shape[3] == head_dim + KV_SCALE_BYTES
        codes = flat[..., : size * head_dim].reshape(count, heads, head_dim, size)
        scales = np.ascontiguousarray(flat[..., size * head_dim :]).view(np.float32)
        turn_codes(rotary, codes, scales, shift)
        flat[..., : size * head_dim] = codes.reshape(count, heads, -1)
        flat[..., size * head_dim :] = scales.view(np.int8)
    elif pages.dtype.name == "bfloat16" and head_dim % 2 == 0:  # words of two neighbours
        words = flat.reshape(count, heads, head_dim // 2, size, 2).swapaxes(-1, -2)
        keys = turn_keys(rotary, words.reshape(count, heads, head_dim, size), shift)
        flat = keys.reshape(count, heads, head_dim // 2, 2, size).swapaxes(-1, -2)
    else:
        flat = turn_keys(rotary, flat.reshape(count, heads, head_dim, size), shift)
    pages[where] = flat.reshape(count, *pages.shape[1:])


def turn_rows(
    rotary: Rotary, keys: np.ndarray, scales: np.ndarray | None, numbers: Sequence[int], shift: int
) -> None:
    """Turn the keys of some pages of a cache of rows, in place: `keys` [heads, N, page_size, head_dim], of
    int8 with `scales` [heads, N, page_size].
    """
    where = np.asarray(numbers, np.intp)
    chosen = keys[:, where].swapaxes(-1, -2)  # the last axis of `turn_back` counts tokens
    if scales is None:
        keys[:, where] = turn_keys(rotary, chosen, shift).swapaxes(-1, -2)
        return
    codes, factors = np.ascontiguousarray(chosen), scales[:, where]
    turn_codes(rotary, codes, factors, shift)
    keys[:, where], scales[:, where] = codes.swapaxes(-1, -2), factors


__all__ = ["Rotary", "read_rotary", "turn_codes", "turn_keys", "turn_pages", "turn_rows"]
