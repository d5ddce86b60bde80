"""quantize-kv-cache: keys and values in int8, one scale a head and token.

    kv_pages.i float32 [2, N, page_size, heads, D]  →  kv_pages.i int8 [2, N, page_size, heads, D + 4]

`append_kv` then quantizes what it writes, and `paged_attention` multiplies what it reads by the scale that
stands in the last 4 bytes (ir/ops/cache.py). The scale is that of the token's own head, so nothing needs to
be calibrated, a token's bytes depend on the token alone, and a page stays the unit of copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.core import Graph, Value
from ...ir.ops.cache import AppendKv, PagedAttention, page_width
from ...ir.types import TensorType
from ..base import Pass, PassContext, PassResult


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """The caches of a paged graph in int8: half the bytes of float16, and 4 more a head and token."""

    name: ClassVar[str] = "quantize-kv-cache"
    requires: ClassVar[str | None] = "paged"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        caches = [v for v in graph.inputs if _is_cache(v)]
        notes: list[str] = []
        changed = False
        for value in caches:
            if value.dtype == "int8":
                notes.append(f"{value.name} holds int8 already")
                continue
            *lead, width = value.shape
            value.type = TensorType("int8", (*lead, page_width("int8", width)))
            changed = True
        graph.retype_all()
        graph.facts["kv_dtype"] = "int8"
        return PassResult(graph, changed, notes)


def _is_cache(value: Value) -> bool:
    """An input that keys and values are appended to, or read from."""
    return any(isinstance(op, AppendKv | PagedAttention) and op.pages is value for op in value.users)
