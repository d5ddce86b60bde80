"""Choosing among values: what routers of experts are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, op
from ..errors import CompileError
from ..types import TensorType

Dims = Mapping[str, int]


@op("top_k")
class TopK(Op):
    """Where the k largest of the last axis stand: x [..., N] → int64 [..., k], the largest first.

    Equal values come in the order in which they stand, so that a choice depends on nothing else; 0 equals
    -0, and NaN is above all numbers. The values are `gather(x, top_k(x))`.
    """

    x: Operand
    k: int

    def infer(self) -> list[TensorType]:
        width = self.x.shape[-1] if self.x.type.rank else 0
        if not isinstance(width, int) or not 1 <= self.k <= width:
            raise CompileError(
                f"top_k: {self.k} of {self.x.type} ({self.loc or 'no module'})",
                remedy="k must be 1 … the length of the last axis, which must be known",
            )
        return [TensorType("int64", (*self.x.shape[:-1], self.k))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        # A stable sort, which torch.topk is not.
        return args[0].sort(dim=-1, descending=True, stable=True).indices[..., : self.k]
