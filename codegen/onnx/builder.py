"""Writing ONNX nodes: names, constants, and symbolic dimensions as values.

`onnx.helper` and not an object model: the graph was analysed and rewritten as IR already, what remains is to
write it down once, and the protobuf messages are that form. Weights never pass through here (see
`weights.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from ...ir.dtypes import to_numpy
from ...ir.errors import UnsupportedError
from ...ir.types import Dim, DimExpr, Shape, TensorType

OPSET = 21  # Gelu and ReduceMax on integers need 20; onnxruntime has read 21 since 1.18, our oldest is 1.22
IR_VERSION = 10
CONTRIB = "com.microsoft"  # onnxruntime's own operators
LOCAL = "llmc"  # functions that the model defines itself

_ELEMENTS: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int16": TensorProto.INT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def element_type(dtype: str) -> int:
    """ONNX's number of an element type. Raises UnsupportedError for a name that llmc does not know."""
    to_numpy(dtype)
    return _ELEMENTS[dtype]


def constant_tensor(array: np.ndarray) -> TensorProto:
    """A small tensor held inside the model; little-endian bytes, so that every machine writes the same."""
    tensor = TensorProto(data_type=_ELEMENTS[str(array.dtype)], dims=array.shape)
    tensor.raw_data = array.tobytes()
    return tensor


class Names:
    """Fresh value names of one model: `hint`, `hint.1`, `hint.2`, … as far as they are free."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def take(self, name: str) -> bool:
        """Reserve a name of the model's interface; false where it was taken."""
        free = name not in self._taken
        self._taken.add(name)
        return free

    def fresh(self, hint: str) -> str:
        while True:
            n = self._next.get(hint, 0)
            self._next[hint] = n + 1
            name = f"{hint}.{n}" if n else hint
            if self.take(name):
                return name


class Scope:
    """The nodes of one graph, loop body or function body, in order. Values are ONNX names."""

    def __init__(self, names: Names | None = None) -> None:
        self.names = names or Names()
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    # -- nodes
    # ---------------------------------------------------------------------------------------------------
    def many(
        self, kind: str, inputs: Sequence[str | None], outputs: int, domain: str = "", **attrs: Any
    ) -> list[str]:
        """A node with several results.

        An absent optional input is None; attributes that are None are left out.
        """
        results = [self.names.fresh(kind.lower()) for _ in range(outputs)]
        given = {k: v for k, v in attrs.items() if v is not None}
        names = [x or "" for x in inputs]
        while (
            names and not names[-1]
        ):  # onnxruntime 1.32 crashes on a LayerNormalization with an empty last name
            names.pop()
        self.nodes.append(helper.make_node(kind, names, results, domain=domain, **given))
        return results

    def op(self, kind: str, *inputs: str | None, domain: str = "", **attrs: Any) -> str:
        """A node with one result."""
        return self.many(kind, inputs, 1, domain, **attrs)[0]

    def rename(self, value: str, name: str) -> None:
        """Give a value a name of the model's interface."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    # -- constants
    # -----------------------------------------------------------------------------------------------
    def constant(self, array: Any, dtype: str) -> str:
        """A constant; the same one is written once a scope."""
        data = np.asarray(array, to_numpy(dtype))
        key = (dtype, data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=constant_tensor(data))
        return self._constants[key]

    def i64(self, *values: int) -> str:
        """int64 [len(values)]."""
        return self.constant(list(values), "int64")

    def scalar(self, value: float, dtype: str = "int64") -> str:
        return self.constant(value, dtype)

    # -- what is written often
    # -----------------------------------------------------------------------------------
    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=element_type(dtype))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.i64(*axes))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps the axis, -1 is what remains (ONNX Reshape)."""
        return self.op("Reshape", x, self.i64(*shape))

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        return self.op("Slice", x, self.i64(start), self.i64(stop), self.i64(axis), self.i64(step))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def arange(self, count: str) -> str:
        """0 .. count - 1 for a rank-0 int64 `count`."""
        return self.op("Range", self.scalar(0), count, self.scalar(1))

    def body(self, inputs: Sequence[Any], outputs: Sequence[Any], name: str) -> GraphProto:
        """This scope as the body of a Loop or the main graph."""
        return helper.make_graph(self.nodes, name, list(inputs), list(outputs))


def _solve(dim: Dim) -> str | None:
    """The symbol of a dimension `a·s + b` with one symbol, from which s can be computed."""
    if isinstance(dim, int) or len(dim.symbols()) != 1:
        return None
    (name,) = dim.symbols()
    return name if all(m in ((), (name,)) for m, _ in dim.terms) else None


class Dims:
    """Values of symbolic dimensions, computed from the shapes of the graph's inputs; each once."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._sources: dict[str, tuple[str, int, DimExpr]] = {}
        self._values: dict[str, str] = {}

    def learn(self, name: str, type: TensorType) -> None:
        """Note which symbols the shape of input `name` reveals; plain symbols are preferred."""
        for axis, dim in enumerate(type.shape):
            symbol = _solve(dim)
            if symbol is None or isinstance(dim, int):
                continue
            known = self._sources.get(symbol)
            if known is None or len(str(dim)) < len(str(known[2])):
                self._sources[symbol] = (name, axis, dim)

    def symbol(self, symbol: str) -> str:
        """The symbol's value, int64 [1]."""
        if symbol not in self._values:
            if symbol not in self._sources:
                raise UnsupportedError(
                    f"no input's shape tells the dimension {symbol}",
                    remedy="give the module an input with an axis of that length",
                )
            name, axis, dim = self._sources[symbol]
            value = self._scope.op("Shape", name, start=axis, end=axis + 1)
            terms = dict(dim.terms)
            if terms.get((), 0):
                value = self._scope.op("Sub", value, self._scope.i64(terms[()]))
            if terms[(symbol,)] != 1:
                value = self._scope.op("Div", value, self._scope.i64(terms[(symbol,)]))
            self._values[symbol] = value
        return self._values[symbol]

    def value(self, dim: Dim) -> str:
        """A dimension, int64 [1]."""
        if isinstance(dim, int):
            return self._scope.i64(dim)
        key = str(dim)
        if key not in self._values:
            total: str | None = None
            for monomial, coefficient in dim.terms:
                term = self._scope.i64(coefficient)
                for s in monomial:
                    term = (
                        self.symbol(s)
                        if term == self._scope.i64(1)
                        else self._scope.op("Mul", term, self.symbol(s))
                    )
                total = term if total is None else self._scope.op("Add", total, term)
            assert total is not None
            self._values[key] = total
        return self._values[key]

    def shape(self, shape: Shape) -> str:
        """A whole shape, int64 [rank]."""
        if all(isinstance(d, int) for d in shape):
            return self._scope.constant([d for d in shape if isinstance(d, int)], "int64")
        parts = [self.value(d) for d in shape]
        return parts[0] if len(parts) == 1 else self._scope.op("Concat", *parts, axis=0)

    def reshape(self, x: str, old: Shape, new: Shape) -> str:
        """Reshape by constants where 0 (same axis) or one -1 say it all, which saves the shape arithmetic."""
        target = [
            d if isinstance(d, int) else 0 if i < len(old) and old[i] == d else -1 for i, d in enumerate(new)
        ]
        # A literal 0 would mean "same axis", and -1 cannot be inferred beside an axis of length 0.
        unknown, kept = target.count(-1), target.count(0)
        if 0 in new or unknown > 1 or (unknown and kept):
            return self._scope.op("Reshape", x, self.shape(new), allowzero=1)
        return self._scope.op("Reshape", x, self._scope.constant(target, "int64"))


def value_infos(values: Iterable[tuple[str, TensorType]]) -> list[ValueInfoProto]:
    """Names and types as ONNX writes them; symbolic dimensions by name ("T", "B+1")."""
    return [
        helper.make_tensor_value_info(
            name, element_type(t.dtype), [d if isinstance(d, int) else str(d) for d in t.shape]
        )
        for name, t in values
    ]
