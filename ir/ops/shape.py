"""Operations that move or make data without arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, Operands, op
from ..errors import CompileError, VerifyError
from ..types import Dim, Shape, TensorType, broadcast, evaluate, product
from .math import torch_dtype

Dims = Mapping[str, int]


def _torch() -> Any:
    import torch

    return torch


@op("full")
class Full(Op):
    """A tensor of one value; rank 0 stands for a scalar constant."""

    value: float | int | bool
    dtype: str
    shape: Shape = ()

    def infer(self) -> list[TensorType]:
        return [TensorType(self.dtype, self.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().full(
            [evaluate(d, dims) for d in self.shape], self.value, dtype=torch_dtype(self.dtype)
        )


@op("dim_value")
class DimValue(Op):
    """A dimension as a rank-0 number."""

    dim: Dim
    dtype: str = "int64"

    def infer(self) -> list[TensorType]:
        return [TensorType(self.dtype, ())]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().tensor(evaluate(self.dim, dims), dtype=torch_dtype(self.dtype))


@op("arange")
class Arange(Op):
    """start, start + step, ... : `length` numbers."""

    length: Dim
    start: int = 0
    step: int = 1
    dtype: str = "int64"

    def infer(self) -> list[TensorType]:
        return [TensorType(self.dtype, (self.length,))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        n = evaluate(self.length, dims)
        return _torch().arange(n, dtype=torch_dtype(self.dtype)) * self.step + self.start


@op("reshape")
class Reshape(Op):
    """Same elements in row-major order under another shape: view, unsqueeze, squeeze, flatten."""

    x: Operand
    shape: Shape

    def infer(self) -> list[TensorType]:
        if product(self.x.shape) != product(self.shape):
            raise CompileError(
                f"reshape of {self.x.type} to {self.shape} changes the number of elements ({self.loc})",
                remedy="the frontend must resolve -1",
            )
        return [self.x.type.with_shape(self.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].reshape([evaluate(d, dims) for d in self.shape])


@op("transpose")
class Transpose(Op):
    """Axes permuted; `perm` holds negative axes: result axis i (from the right as well) is operand axis
    perm[i].
    """

    x: Operand
    perm: tuple[int, ...]

    def infer(self) -> list[TensorType]:
        n = len(self.perm)
        if sorted(self.perm) != list(range(-n, 0)) or n > self.x.type.rank:
            raise CompileError(
                f"transpose: {self.perm} is no permutation of the last axes of {self.x.type}",
                remedy="use negative axes",
            )
        lead = self.x.shape[: self.x.type.rank - n]
        return [self.x.type.with_shape((*lead, *(self.x.shape[p] for p in self.perm)))]

    def full_perm(self) -> list[int]:
        """The permutation over all axes, non-negative."""
        rank = self.x.type.rank
        return list(range(rank - len(self.perm))) + [rank + p for p in self.perm]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].permute(self.full_perm())


@op("expand")
class Expand(Op):
    """Broadcast to a shape."""

    x: Operand
    shape: Shape

    def infer(self) -> list[TensorType]:
        if broadcast(self.x.shape, self.shape) != self.shape:
            raise CompileError(
                f"expand: {self.x.type} does not broadcast to {self.shape}", remedy="reshape it first"
            )
        return [self.x.type.with_shape(self.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].expand([evaluate(d, dims) for d in self.shape])


@op("slice")
class Slice(Op):
    """x[..., start:stop:step, ...] along one axis; both ends in range and non-negative."""

    x: Operand
    axis: int
    start: Dim
    stop: Dim
    step: int = 1

    def infer(self) -> list[TensorType]:
        shape = list(self.x.shape)
        length = self.stop - self.start
        if self.step != 1:
            if not isinstance(length, int):
                raise CompileError("slice: a step over a symbolic length", remedy="slice with step 1")
            length = -(-length // self.step)
        shape[self.axis] = length
        return [self.x.type.with_shape(shape)]

    def verify(self) -> None:
        if self.axis >= 0 or self.step < 1:
            raise VerifyError("slice: axis must be negative and step positive", remedy="normalise them")

    def reference(self, dims: Dims, *args: Any) -> Any:
        index = [slice(None)] * args[0].ndim
        index[self.axis] = slice(evaluate(self.start, dims), evaluate(self.stop, dims), self.step)
        return args[0][tuple(index)]


@op("concat")
class Concat(Op):
    xs: Operands
    axis: int

    def infer(self) -> list[TensorType]:
        shape = list(self.xs[0].shape)
        total: Dim = 0
        for x in self.xs:
            rest = [d for i, d in enumerate(x.shape) if i != len(shape) + self.axis]
            if rest != [d for i, d in enumerate(shape) if i != len(shape) + self.axis]:
                raise CompileError(
                    f"concat: shapes {[str(v.type) for v in self.xs]} differ ({self.loc})",
                    remedy="only one axis may differ",
                )
            total = total + x.shape[self.axis]
        shape[self.axis] = total
        return [self.xs[0].type.with_shape(shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().cat(args[0], self.axis)


@op("index")
class Index(Op):
    """Advanced indexing of the leading axes: x[i0, i1, ...] with integer tensors that broadcast together."""

    x: Operand
    indices: Operands

    def infer(self) -> list[TensorType]:
        shape: Shape | None = ()
        for i in self.indices:
            shape = broadcast(shape, i.shape) if shape is not None else None
        if shape is None or len(self.indices) > self.x.type.rank:
            raise CompileError(
                f"index: indices {[str(i.type) for i in self.indices]} do not fit {self.x.type}",
                remedy="broadcast them",
            )
        return [self.x.type.with_shape((*shape, *self.x.shape[len(self.indices) :]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0][tuple(i.long() for i in args[1])]


@op("gather")
class Gather(Op):
    """Elements along the last axis: out[..., j] = x[..., index[..., j]]; leading axes of x and index are
    equal, or index has one axis and serves every row (a permutation of columns).
    """

    x: Operand
    index: Operand

    def infer(self) -> list[TensorType]:
        if self.index.type.rank not in (1, self.x.type.rank):
            raise CompileError(f"gather: {self.x.type} by {self.index.type}", remedy="ranks must agree")
        lead = self.x.shape[:-1] if self.index.type.rank == 1 else self.index.shape[:-1]
        return [self.x.type.with_shape((*lead, self.index.shape[-1]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        x, index = args[0], args[1].long()
        return x[..., index] if index.dim() == 1 else x.gather(-1, index)
