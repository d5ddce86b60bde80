"""Choosing among values: what routers of experts are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, op
from ..errors import CompileError
from ..types import Dim, TensorType, evaluate

Dims = Mapping[str, int]


@op("top_k")
class TopK(Op):
    """Where the k largest of the last axis stand: x [..., N] → int64 [..., k], the largest first.

    Equal values come in the order in which they stand, so that a choice depends on nothing else; 0 equals
    -0, and NaN is above all numbers. The values are `gather(x, top_k(x))`.
    """

    x: Operand
    k: Dim
    """A number; or the length of the last axis, where that is not known: all of it, in order."""

    def infer(self) -> list[TensorType]:
        width = self.x.shape[-1] if self.x.type.rank else 0
        known = isinstance(width, int) and isinstance(self.k, int) and 1 <= self.k <= width
        if not known and (self.k != width or width == 0):
            raise CompileError(
                f"top_k: {self.k} of {self.x.type} ({self.loc or 'no module'})",
                remedy="k must be 1 … the length of the last axis, or that length",
            )
        return [TensorType("int64", (*self.x.shape[:-1], self.k))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        # A stable sort, which torch.topk is not.
        return args[0].sort(dim=-1, descending=True, stable=True).indices[..., : evaluate(self.k, dims)]
