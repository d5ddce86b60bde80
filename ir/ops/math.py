"""Elementwise, comparison, reduction and matrix operations, as traced.

Axes are negative everywhere (-1 is the last): leading axes may then come and go without touching attributes.
Scalars are rank-0 `full` values. Integer and boolean tensors appear in masks and positions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..core import Op
from ..define import Operand, op
from ..errors import CompileError, VerifyError
from ..types import TensorType, broadcast

Dims = Mapping[str, int]


def _torch() -> Any:
    import torch

    return torch


def torch_dtype(name: str) -> Any:
    return getattr(_torch(), name)


class Unary(Op):
    """Elementwise function of one tensor; dtype and shape stay."""

    x: Operand
    function: ClassVar[str] = ""

    def infer(self) -> list[TensorType]:
        return [TensorType(self.x.dtype, self.x.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return getattr(_torch(), self.function)(args[0])


@op("neg")
class Neg(Unary):
    function = "neg"


@op("exp")
class Exp(Unary):
    function = "exp"


@op("log")
class Log(Unary):
    function = "log"


@op("sqrt")
class Sqrt(Unary):
    function = "sqrt"


@op("rsqrt")
class Rsqrt(Unary):
    function = "rsqrt"


@op("reciprocal")
class Reciprocal(Unary):
    function = "reciprocal"


@op("tanh")
class Tanh(Unary):
    function = "tanh"


@op("sin")
class Sin(Unary):
    function = "sin"


@op("cos")
class Cos(Unary):
    function = "cos"


@op("erf")
class Erf(Unary):
    function = "erf"


@op("sigmoid")
class Sigmoid(Unary):
    function = "sigmoid"


@op("relu")
class Relu(Unary):
    function = "relu"


@op("abs")
class Abs(Unary):
    function = "abs"


@op("floor")
class Floor(Unary):
    function = "floor"


@op("logical_not")
class LogicalNot(Unary):
    function = "logical_not"


@op("silu")
class Silu(Unary):
    """x * sigmoid(x)."""

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().nn.functional.silu(args[0])


@op("gelu")
class Gelu(Unary):
    """Gaussian error linear unit (Hendrycks & Gimpel 2016); `tanh` chooses their tanh approximation, else
    erf.
    """

    tanh: bool = False

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().nn.functional.gelu(args[0], approximate="tanh" if self.tanh else "none")


class Binary(Op):
    """Elementwise function of two tensors of one dtype, broadcast as numpy does."""

    a: Operand
    b: Operand
    function: ClassVar[str] = ""
    result_dtype: ClassVar[str] = ""

    def infer(self) -> list[TensorType]:
        shape = broadcast(self.a.shape, self.b.shape)
        if shape is None:
            raise CompileError(
                f"{self.opname}: shapes {self.a.type} and {self.b.type} do not broadcast ({self.loc})",
                remedy="the frontend must expand them",
            )
        return [TensorType(self.result_dtype or self.a.dtype, shape)]

    def verify(self) -> None:
        if self.a.dtype != self.b.dtype:
            raise VerifyError(
                f"{self.opname}: operands are {self.a.dtype} and {self.b.dtype}", remedy="insert a cast"
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        return getattr(_torch(), self.function)(args[0], args[1])


@op("add")
class Add(Binary):
    function = "add"


@op("sub")
class Sub(Binary):
    function = "sub"


@op("mul")
class Mul(Binary):
    function = "mul"


@op("div")
class Div(Binary):
    """True division of floats."""

    function = "div"


@op("floor_divide")
class FloorDivide(Binary):
    function = "floor_divide"


@op("remainder")
class Remainder(Binary):
    function = "remainder"


@op("pow")
class Pow(Binary):
    function = "pow"


@op("maximum")
class Maximum(Binary):
    function = "maximum"


@op("minimum")
class Minimum(Binary):
    function = "minimum"


class Comparison(Binary):
    result_dtype = "bool"


@op("less")
class Less(Comparison):
    function = "lt"


@op("less_equal")
class LessEqual(Comparison):
    function = "le"


@op("greater")
class Greater(Comparison):
    function = "gt"


@op("greater_equal")
class GreaterEqual(Comparison):
    function = "ge"


@op("equal")
class Equal(Comparison):
    function = "eq"


@op("not_equal")
class NotEqual(Comparison):
    function = "ne"


@op("logical_and")
class LogicalAnd(Comparison):
    function = "logical_and"


@op("logical_or")
class LogicalOr(Comparison):
    function = "logical_or"


@op("where")
class Where(Op):
    """condition ? a : b, all three broadcast."""

    condition: Operand
    a: Operand
    b: Operand

    def infer(self) -> list[TensorType]:
        shape = broadcast(self.a.shape, self.b.shape)
        shape = broadcast(shape, self.condition.shape) if shape is not None else None
        if shape is None:
            raise CompileError(
                f"where: {self.condition.type}, {self.a.type}, {self.b.type} do not broadcast",
                remedy="expand them",
            )
        return [TensorType(self.a.dtype, shape)]

    def verify(self) -> None:
        if self.condition.dtype != "bool" or self.a.dtype != self.b.dtype:
            raise VerifyError(
                "where: needs a bool condition and two branches of one dtype", remedy="insert casts"
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().where(*args)


@op("cast")
class Cast(Op):
    x: Operand
    dtype: str

    def infer(self) -> list[TensorType]:
        return [TensorType(self.dtype, self.x.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].to(torch_dtype(self.dtype))


@op("matmul")
class MatMul(Op):
    """[..., M, K] @ [..., K, N], leading axes broadcast; float32 where one of them is."""

    a: Operand
    b: Operand

    def infer(self) -> list[TensorType]:
        a, b = self.a.shape, self.b.shape
        batch = broadcast(a[:-2], b[:-2])
        if len(a) < 2 or len(b) < 2 or batch is None or a[-1] != b[-2]:
            raise CompileError(
                f"matmul: {self.a.type} @ {self.b.type} ({self.loc})", remedy="inner dimensions must agree"
            )
        dtypes = {self.a.dtype, self.b.dtype}
        return [TensorType("float32" if "float32" in dtypes else self.a.dtype, (*batch, a[-2], b[-1]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        kind = _torch().promote_types(args[0].dtype, args[1].dtype)
        return _torch().matmul(args[0].to(kind), args[1].to(kind))


class Reduce(Op):
    """Reduction over some axes."""

    x: Operand
    axes: tuple[int, ...]
    keepdim: bool = False

    def infer(self) -> list[TensorType]:
        rank = self.x.type.rank
        dropped = {a % rank for a in self.axes} if rank else set[int]()
        shape = [
            1 if i in dropped else d for i, d in enumerate(self.x.shape) if self.keepdim or i not in dropped
        ]
        return [TensorType(self.x.dtype, tuple(shape))]


@op("reduce_sum")
class ReduceSum(Reduce):
    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].sum(self.axes, keepdim=self.keepdim)


@op("reduce_mean")
class ReduceMean(Reduce):
    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].mean(self.axes, keepdim=self.keepdim)


@op("reduce_max")
class ReduceMax(Reduce):
    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].amax(self.axes, keepdim=self.keepdim)


@op("softmax")
class Softmax(Op):
    x: Operand
    axis: int = -1

    def infer(self) -> list[TensorType]:
        return [self.x.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].softmax(self.axis)


@op("cumsum")
class CumSum(Op):
    """Running sum; of booleans and int32 in int64, as torch does."""

    x: Operand
    axis: int = -1

    def infer(self) -> list[TensorType]:
        return [TensorType(self.x.dtype if self.x.dtype.startswith("float") else "int64", self.x.shape)]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return args[0].cumsum(self.axis)


@op("diff")
class Diff(Op):
    """First difference along the last axis with a value put before: out[..., i] = y[..., i+1] - y[..., i], y
    = [prepend, x].
    """

    x: Operand
    prepend: Operand

    def infer(self) -> list[TensorType]:
        return [self.x.type]

    def reference(self, dims: Dims, *args: Any) -> Any:
        return _torch().diff(args[0], dim=-1, prepend=args[1])
