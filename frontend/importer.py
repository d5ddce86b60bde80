"""The nodes of an exported program → ops, one at a time, by the handlers of `aten.TABLE`."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from ..ir.core import Graph, Op, Value
from ..ir.errors import UnsupportedError
from ..ir.ops.math import Cast
from ..ir.ops.shape import DimValue, Full
from ..ir.types import Dim, DimExpr, Shape, sym
from . import aten
from .repeats import NAMESPACE, Bodies, CannotRepeat, Repeats

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Importer:
    """Turns the nodes of an exported program into ops. Handlers of `aten.TABLE` see this object."""

    def __init__(self, graph: Graph, repeats: Repeats | None = None) -> None:
        self.graph = graph
        self.symbols: dict[str, str] = {}  # torch's symbol → ours
        self.bodies = None if repeats is None else Bodies(graph, repeats)
        self.values: dict[Any, Any] = {}
        self.node: Any = None

    # -- what handlers use
    # -----------------------------------------------------------------------------------------------
    def emit(self, op: Op) -> Value:
        op.loc = op.loc or self.location()
        self.graph.append(op)
        return op.result

    def scalar(self, value: Any, dtype: str) -> Value:
        if isinstance(value, DimExpr):
            return self.emit(DimValue(dim=value, dtype=dtype))
        number: float | int | bool = (
            float(value)
            if dtype.startswith(("float", "bfloat"))
            else bool(value)
            if dtype == "bool"
            else int(value)
        )
        return self.emit(Full(value=number, dtype=dtype))

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.emit(Cast(x, dtype=dtype))

    def promote(self, a: Any, b: Any) -> tuple[Value, Value]:
        """Two operands (values, numbers or dimensions) in one dtype by torch's rules; numbers take the
        tensor's kind.
        """
        import torch

        def kind(v: Any) -> Any:
            return (
                torch.empty((1,) if v.type.rank else (), dtype=getattr(torch, v.dtype))
                if isinstance(v, Value)
                else (1 if isinstance(v, DimExpr) else v)
            )

        dtype = dtype_name(torch.result_type(kind(a), kind(b)))
        left = self.cast(a, dtype) if isinstance(a, Value) else self.scalar(a, dtype)
        right = self.cast(b, dtype) if isinstance(b, Value) else self.scalar(b, dtype)
        return left, right

    def axis(self, axis: int, x: Value) -> int:
        """A negative axis."""
        return axis if axis < 0 else axis - max(x.type.rank, 1)

    def result_shapes(self) -> list[Shape]:
        value = self.node.meta["val"]
        return [
            tuple(self.dim(d) for d in v.shape)
            for v in (value if isinstance(value, (list, tuple)) else [value])
        ]

    def result_shape(self) -> Shape:
        return self.result_shapes()[0]

    def result_dtype(self) -> str:
        value = self.node.meta["val"]
        return dtype_name((value[0] if isinstance(value, (list, tuple)) else value).dtype)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{what} in {self.location() or 'the model'} is not supported", remedy="report the model"
        )

    # -- torch's objects → ours
    # --------------------------------------------------------------------------------------------
    def location(self) -> str:
        stack = self.node.meta.get("nn_module_stack") if self.node is not None else None
        if not stack:
            return ""
        path = str(list(stack.values())[-1][0])
        return path.removeprefix("L['self']").lstrip(".").removeprefix("model_.").removeprefix("model_")

    def dim(self, d: Any) -> Dim:
        if isinstance(d, int):
            return d
        return self.expression(d.node.expr)

    def expression(self, e: Any) -> Dim:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol and str(e).startswith("u"):
            raise UnsupportedError(
                f"a size in {self.location() or 'the model'} depends on the values of a tensor",
                remedy="rewrite the module so that shapes follow from shapes",
            )
        if e.is_Symbol:
            return sym(self.symbols.setdefault(str(e), "T" if not self.symbols else f"T{len(self.symbols)}"))
        if e.is_Add or e.is_Mul:
            parts = [self.expression(a) for a in e.args]
            total = parts[0]
            for p in parts[1:]:
                total = total + p if e.is_Add else total * p
            return total
        if e.is_Pow and e.args[1].is_Integer and int(e.args[1]) > 0:
            base = self.expression(e.args[0])
            total = base
            for _ in range(int(e.args[1]) - 1):
                total = total * base
            return total
        raise UnsupportedError(
            f"the size {e} in {self.location() or 'the model'} is no polynomial of the token count",
            remedy="report the model",
        )

    def argument(self, a: Any) -> Any:
        import torch

        if isinstance(a, torch.fx.Node):
            if a in self.values:
                return self.values[a]
            return self.dim(a.meta["val"]) if not isinstance(a.meta["val"], (float, bool)) else a.meta["val"]
        if isinstance(a, (list, tuple)):
            return [self.argument(x) for x in a]
        if isinstance(a, torch.SymInt):
            return self.dim(a)
        return a

    def run_node(self, node: Any) -> None:
        import torch

        self.node = node
        if node.target is operator.getitem:
            source, index = node.args
            several = self.values[source]
            if not isinstance(several, tuple) or (several[index] is None and node.users):
                raise self.unsupported(f"result {index} of operator {source.target}")
            self.values[node] = several[index]
            return
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat, int, bool, float)):
            return  # sizes: read from their meta value where they are used
        name = str(node.target)
        if self.bodies is not None and name.startswith(NAMESPACE):
            values, place = node.args
            self.values[node] = self.bodies.run(name.split(".")[1], self.argument(values), place)
            return
        if not name.startswith("aten."):
            raise self.unsupported(f"operator {name}")
        name = name.removeprefix("aten.")
        changes = name.partition(".")[0].endswith("_") and name not in aten.TABLE
        if changes:
            self.check_in_place(node)
            name = name.replace("_.", ".", 1)
        handler = aten.lookup(name, self.location())
        kwargs = {
            k: self.argument(v)
            for k, v in node.kwargs.items()
            if k not in ("device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking")
        }
        if "dtype" in node.kwargs and node.kwargs["dtype"] is not None and "softmax" in name:
            kwargs["dtype"] = node.kwargs["dtype"]
        self.values[node] = handler(self, *[self.argument(a) for a in node.args], **kwargs)
        if changes:
            self.values[node.args[0]] = self.values[node]

    def check_in_place(self, node: Any) -> None:
        """An operator that changes its first operand is taken as one that makes a new value, which is right
        where no other name shares the operand's memory.
        """
        changed = node.args[0]
        if self.bodies is not None and self.bodies.is_given(self.values[changed]):
            raise CannotRepeat
        if changed.op == "placeholder":
            raise UnsupportedError(
                f"{self.graph.name} changes {self.values[changed].name} while it runs",
                remedy="a compiled function keeps no state",
            )
        earlier = [user for user in changed.users if user < node]
        if _is_view(changed) or any(_is_view(user) for user in earlier):
            raise self.unsupported(f"operator {node.target} on a part of another tensor")


def _is_view(node: Any) -> bool:
    """Whether a node's result shares memory with an operand."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
