"""The paged KV cache (Kwon et al.

2023) over a ragged batch. See docs/architecture.md, "The paged step interface".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..errors import CompileError
from ..types import TensorType
from .attention import attend

Dims = Mapping[str, int]


@op("append_kv")
class AppendKv(Op):
    """Write k, v [T, Hkv, D] into the slots [T] of `pages` [2, P, page_size, Hkv, D]; slot = page · page_size
    + offset.

    The result is the cache after the write. A target may write in place: `pages` must not be read after this
    op but through its result.
    """

    k: Operand
    v: Operand
    pages: Operand
    slot_mapping: Operand

    def infer(self) -> list[TensorType]:
        p = self.pages.shape
        if len(p) != 5 or self.k.shape[-2:] != p[-2:] or self.v.shape[-2:] != p[-2:]:
            raise CompileError(
                f"append_kv: k {self.k.type}, v {self.v.type} into {self.pages.type}",
                remedy="heads and D must agree",
            )
        return [self.pages.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        k, v, pages, slots = args
        out = pages.clone()
        flat = out.view(2, -1, *pages.shape[3:])
        flat[0, slots.long()] = k.to(pages.dtype)
        flat[1, slots.long()] = v.to(pages.dtype)
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
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def infer(self) -> list[TensorType]:
        return [self.q.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        q, pages, query_start, context_len, block_table, sinks = args
        out = torch.zeros_like(q)
        size = pages.shape[2]
        for b in range(context_len.shape[0]):
            first, last, n = int(query_start[b]), int(query_start[b + 1]), int(context_len[b])
            if first == last:
                continue
            table = block_table[b, : -(-n // size)].long()
            k, v = (pages[i, table].flatten(0, 1)[:n] for i in (0, 1))
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
            ).to(q.dtype)
        return out


@op("gather_last")
class GatherLast(Op):
    """The wanted rows: x [T, D], index [R] → [R, D].

    Everything after it (norm, head) runs on those rows only.
    """

    x: Operand
    index: Operand

    def infer(self) -> list[TensorType]:
        return [self.x.type.with_shape((*self.index.shape, *self.x.shape[1:]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0][args[1].long()]
