"""The paged KV cache (Kwon et al.

2023) over a ragged batch. See docs/architecture.md, "The paged step interface".

The element type of the pages says how they hold a token's key (or value) of one head, D elements:

    float32, float16, …  D elements, rounded to the nearest; float8_e4m3fn: no further than its largest, 448
    int8                 D codes, then the float32 scale of this head and token in 4 bytes: x = scale · code
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..dtypes import FLOAT8, FLOAT8_LARGEST, KV_SCALE_BYTES, DType
from ..errors import CompileError
from ..types import Dim, TensorType
from .attention import attend, check_per_head

Dims = Mapping[str, int]
SMALLEST_SCALED = 1e-30
"""A head whose largest magnitude is below this is stored as zeros: 127 / magnitude must be a float32."""


def page_width(dtype: str, head_dim: Dim) -> Dim:
    """Elements that a page holds for one token and head."""
    return head_dim + KV_SCALE_BYTES if dtype == "int8" else head_dim


def quantize_heads(x: Any) -> Any:
    """Heads [..., D] → int8 [..., D + 4]: codes, then their float32 scale = max |x| / 127.

    All in float32, so that any other implementation can give the same bytes. A head that holds a NaN or an
    infinity gets the scale NaN: whatever attends to it is NaN, as it would be with a cache of floats.
    """
    import torch

    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scaled = largest >= SMALLEST_SCALED
    inverse = torch.where(scaled, 127.0 / largest, 0.0)
    codes = (x * inverse).clamp(-127.0, 127.0).round().nan_to_num(0.0).to(torch.int8)
    scale = torch.where(scaled, largest / 127.0, 0.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return torch.cat((codes, scale.view(torch.int8)), -1)


def dequantize_heads(stored: Any) -> Any:
    """Inverse of `quantize_heads` up to rounding: int8 [..., D + 4] → float32 [..., D]."""
    import torch

    codes, scale = stored[..., :-KV_SCALE_BYTES], stored[..., -KV_SCALE_BYTES:]
    # A copy: one that is contiguous where it stands may begin between two floats.
    return codes.float() * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)


def to_cache(x: Any, dtype: DType) -> Any:
    """Heads [..., D] as a cache of that element type holds them, [..., page_width(dtype, D)]."""
    import torch

    if dtype == "int8":
        return quantize_heads(x)
    if dtype == FLOAT8:  # torch would make NaN of what is larger
        x = x.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return x.to(getattr(torch, dtype))


@op("append_kv")
class AppendKv(Op):
    """Write k, v [T, Hkv, D] into the slots [T] of `pages` [2, P, page_size, Hkv, D]; slot = page · page_size
    + offset. Pages of int8 are [2, P, page_size, Hkv, D + 4] and get quantized heads (`quantize_heads`).

    The result is the cache after the write. A target may write in place: `pages` must not be read after this
    op but through its result.
    """

    k: Operand
    v: Operand
    pages: Operand
    slot_mapping: Operand

    def infer(self) -> list[TensorType]:
        p = self.pages.shape
        if len(p) != 5 or any(
            (x.shape[-2], page_width(self.pages.dtype, x.shape[-1])) != p[-2:] for x in (self.k, self.v)
        ):
            raise CompileError(
                f"append_kv: k {self.k.type}, v {self.v.type} into {self.pages.type}",
                remedy="heads and D must agree; pages of int8 hold D + 4 elements",
            )
        return [self.pages.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        k, v, pages, slots = args
        out = pages.clone()
        # torch assigns no rows of float8: as bytes.
        flat = out.view(2, -1, *pages.shape[3:]).view(torch.uint8)
        for i, x in enumerate((k, v)):
            new = to_cache(x, self.pages.dtype).contiguous()
            assert new.dtype == pages.dtype, f"pages of {pages.dtype} where the graph has {self.pages.dtype}"
            flat[i, slots.long()] = new.view(torch.uint8)
        return out


@op("paged_attention")
class PagedAttention(Op):
    """Attention of a ragged batch over the cache: q [T, H, D] → [T, H, D].

    Sequence b owns rows query_start[b] … query_start[b+1]-1 of q, the last ones of its context of
    context_len[b] tokens, which lie in pages block_table[b]. Fields as in `attention`; with causal false
    every token of the context is seen.
    """

    q: Operand
    pages: Operand
    query_start: Operand
    context_len: Operand
    block_table: Operand
    sinks: OptionalOperand
    slopes: OptionalOperand
    distances: OptionalOperand
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def verify(self) -> None:
        check_per_head(self)

    def infer(self) -> list[TensorType]:
        if self.pages.shape[-1] != page_width(self.pages.dtype, self.q.shape[-1]):
            raise CompileError(
                f"paged_attention: q {self.q.type} over {self.pages.type}",
                remedy="D must agree; pages of int8 hold D + 4 elements",
            )
        return [self.q.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        q, pages, query_start, context_len, block_table, sinks, slopes, distances = args
        out = torch.zeros_like(q)
        size = pages.shape[2]
        for b in range(context_len.shape[0]):
            first, last, n = int(query_start[b]), int(query_start[b + 1]), int(context_len[b])
            if first == last:
                continue
            table = block_table[b, : -(-n // size)].long()
            k, v = (pages[i, table].flatten(0, 1)[:n] for i in (0, 1))
            if self.pages.dtype == "int8":
                k, v = dequantize_heads(k), dequantize_heads(v)
            elif self.pages.dtype == FLOAT8:  # torch multiplies no numbers of 8 bits
                k, v = k.float(), v.float()
            where = (torch.arange(n - (last - first), n), torch.arange(n))
            out[first:last] = attend(
                q[first:last],
                k,
                v,
                sinks,
                where,
                scale=self.scale,
                causal=self.causal,
                window=self.window,
                softcap=self.softcap,
                slopes=slopes,
                distances=distances,
            ).to(q.dtype)
        return out


@op("gather_last")
class GatherLast(Op):
    """The wanted rows: x [T, D], index [R] → [R, D].

    Everything after it runs on those rows only.
    """

    x: Operand
    index: Operand

    def infer(self) -> list[TensorType]:
        return [self.x.type.with_shape((*self.index.shape, *self.x.shape[1:]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0][args[1].long()]
