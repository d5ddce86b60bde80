"""The nodes of an exported program → ops, one at a time, by the handlers of `aten.TABLE`."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..ir.core import Graph, Op, Value
from ..ir.errors import UnsupportedError
from ..ir.ops.math import Cast
from ..ir.ops.shape import Concat, DimValue, Full, Reshape, Slice
from ..ir.types import Dim, DimExpr, Shape, sym
from ..plugins.entries import blaming
from . import aten
from .aten_complex import Complex, complex_handler
from .aten_table import REGISTERED, TABLE
from .constants import Constants
from .export import OtherSize, relation_holds
from .held import size_in
from .repeats import NAMESPACE, Bodies, CannotRepeat, Repeats
from .sameness import same

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Importer:
    """Turns the nodes of an exported program into ops. Handlers of `aten.TABLE` see this object."""

    def __init__(self, graph: Graph, repeats: Repeats | None = None, *, settles: bool = False) -> None:
        self.graph = graph
        self.settles = settles
        self.symbols: dict[str, str] = {}  # torch's symbol → ours
        self.ranges: Any = {}  # torch's symbol → what it may be
        self.sizes: dict[str, Dim] = {}  # torch's symbol of what is in a tensor → the size that it is
        self.bodies = None if repeats is None else Bodies(graph, repeats)
        self.values: dict[Any, Any] = {}
        self.constants = Constants({})
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
        self.ranges = d.node.shape_env.var_to_range
        return self.expression(d.node.expr)

    def prove(self, node: Any) -> None:
        """Raise UnsupportedError where a relation of sizes does not hold for every number of tokens."""
        relation = getattr(getattr(node, "meta", {}).get("val"), "node", None)
        if relation is None:
            return
        ranges, read = relation.shape_env.var_to_range, _read_off(relation.expr)
        if any(str(s) not in self.sizes for s in read):
            return  # about what is in a tensor: the model checks its inputs
        sizes = {s: self.as_torch(self.sizes[str(s)], ranges) for s in read}
        if relation_holds(relation.expr.xreplace(sizes), ranges) is False:
            raise UnsupportedError(
                f"{self.location() or 'the model'} holds only for some numbers of tokens: {relation.expr}",
                remedy="control flow and shapes must not depend on the number of tokens",
            )

    def as_torch(self, size: Dim, ranges: Any) -> Any:
        """A size as torch's expression."""
        theirs = {self.symbols[str(s)]: s for s in ranges if str(s) in self.symbols}
        terms = [((), size)] if isinstance(size, int) else size.terms
        nothing = 0 * next(iter(ranges))  # a number of the same library
        products = (math.prod((theirs[name] for name in names), start=number) for names, number in terms)
        return sum(products, start=nothing)

    def never_negative(self, size: Dim) -> bool:
        """Whether a size is known to be at least 0 for every number of tokens."""
        if isinstance(size, int):
            return size >= 0
        return relation_holds(self.as_torch(size, self.ranges) >= 0, self.ranges) is True

    def take_size(self, node: Any) -> None:
        """Note which size a number is that the model reads off a tensor."""
        value = self.values.get(node.args[0])
        size = size_in(value, self.look) if isinstance(value, Value) else None
        if size is not None:
            self.is_size(node.meta["val"], size)

    def is_open(self, size: Any) -> bool:
        """Whether one of torch's sizes stands for what is in a tensor, and none knows which it is."""
        e = getattr(getattr(size, "node", None), "expr", None)
        return e is not None and e.is_Symbol and bool(_read_off(e)) and str(e) not in self.sizes

    def is_size(self, size: Any, known: Dim) -> None:
        """Note which size one of torch's is, if it is open."""
        if self.is_open(size):
            self.sizes[str(size.node.expr)] = known

    def look(self, value: Value) -> None:
        """Raise CannotRepeat where what follows from a value's producer need not be so in a layer's copy."""
        if self.bodies is not None and self.bodies.is_given(value):
            raise CannotRepeat

    def chosen(self, e: Any) -> Any:
        """Max or Min of two sizes, as the one that it is for every number of tokens; None where none is."""
        from torch.utils._sympy.value_ranges import bound_sympy

        if type(e).__name__ not in ("Max", "Min") or len(e.args) != 2:
            return None
        first, second = e.args if type(e).__name__ == "Max" else e.args[::-1]
        difference = bound_sympy(e.args[0] - e.args[1], self.ranges)
        if difference.lower >= 0:  # the first argument is the larger one
            return first
        return second if difference.upper <= 0 else None

    def expression(self, e: Any) -> Dim:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol and str(e) in self.sizes:
            return self.sizes[str(e)]
        if e.is_Symbol and _read_off(e):
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
        one = self.chosen(e)
        if one is not None:
            return self.expression(one)
        raise OtherSize(
            f"the size {e} in {self.location() or 'the model'} is no polynomial of the token count",
            remedy="report the model",
            fewer=_turn(e),
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
            if str(node.target) in ("aten.item.default", "aten._local_scalar_dense.default"):
                self.take_size(node)
            return  # sizes: read from their meta value where they are used
        name = str(node.target)
        if self.bodies is not None and name.startswith(NAMESPACE):
            values, place = self.argument(node.args[0]), node.args[1]
            if any(isinstance(one, Complex) for one in values):
                raise CannotRepeat
            self.values[node] = self.bodies.run(name.split(".")[1], values, place)
            return
        if name in REGISTERED:
            given = {key: self.argument(a) for key, a in node.kwargs.items()}
            with blaming(f"the handler of operator {name}", REGISTERED[name]):
                self.values[node] = REGISTERED[name](self, *[self.argument(a) for a in node.args], **given)
            return
        if name == "aten._assert_scalar.default":
            self.prove(node.args[0])
            return
        if not name.startswith("aten."):
            raise self.unsupported(f"operator {name}")
        self.run_aten(node, name.removeprefix("aten."))

    def run_aten(self, node: Any, name: str) -> None:
        """One of torch's own operators, "add.Tensor"."""
        changes = name.partition(".")[0].endswith("_") and name not in aten.TABLE
        part = changes and _is_part(node.args[0])
        if part and name == "copy_.default":
            self.write_part(node, self.values[node.args[1]])
            return
        if name not in TABLE and not changes and self.number(node):
            return
        if changes:
            if not part:
                self.check_in_place(node)
            name = name.replace("_.", ".", 1)
        given = [self.argument(a) for a in node.args]
        plain = not any(_is_complex(one) for one in given)
        handler = aten.lookup(name, self.location()) if plain else complex_handler(self, name)
        kwargs = {
            k: self.argument(v)
            for k, v in node.kwargs.items()
            if k not in ("device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking")
        }
        if "dtype" in node.kwargs and node.kwargs["dtype"] is not None and "softmax" in name:
            kwargs["dtype"] = node.kwargs["dtype"]
        with blaming(f"the handler of operator aten.{name}", handler):
            self.values[node] = handler(self, *given, **kwargs)
        if part:
            self.write_part(node, self.values[node])
        elif changes:
            self.values[node.args[0]] = self.values[node]

    def number(self, node: Any) -> bool:
        """Take a node that computes numbers from numbers as what it computes, if it is one."""
        import torch

        made = self.constants.of(node)
        several = made if isinstance(made, list | tuple) else [made]
        if not all(isinstance(one, torch.Tensor) and one.numel() == 1 for one in several):
            return False
        shapes = self.result_shapes()
        found = [self.scalar(one.item(), dtype_name(one.dtype)) for one in several]
        found = [v if not s else self.emit(Reshape(v, shape=s)) for v, s in zip(found, shapes, strict=True)]
        self.values[node] = tuple(found) if isinstance(made, list | tuple) else found[0]
        return True

    def check_in_place(self, node: Any) -> None:
        """An operator that changes its first operand is taken as one that makes a new value, which is right
        where no other name shares the operand's memory.
        """
        changed, memory = node.args[0], _memory(node.args[0])
        if self.bodies is not None and self.bodies.is_given(self.values[memory]):
            raise CannotRepeat
        if memory.op == "placeholder":
            if self.may_settle(memory, changed):
                return
            raise UnsupportedError(
                f"{self.graph.name} changes {self.values[memory].name} while it runs",
                remedy="a compiled function keeps no state",
            )
        if _is_read_after(node, changed):
            raise self.unsupported(f"operator {node.target} on a part of another tensor")

    def may_settle(self, memory: Any, changed: Any) -> bool:
        """Whether what is written to is a whole weight that no other name of the program holds and that
        nothing has read, of a model that changes its weights once.
        """
        value = self.values[memory]
        once = sum(other is value for other in self.values.values()) == 1
        unread = all(user >= self.node for user in memory.users)
        weight = self.settles and changed is memory and once and unread and value.weight is not None
        if weight and self.bodies is not None:
            raise CannotRepeat
        return weight

    def write_part(self, node: Any, source: Value) -> None:
        """A value written into a slice of one that the model made: the whole becomes a new value, with what
        was written between what stands before and behind it. What stands there already changes nothing.
        """
        part = node.args[0]
        if same(self.values[part], self.cast(source, self.values[part].dtype)):
            self.values[node] = self.values[part]
            return
        whole = part.args[0]
        if self.bodies is not None and self.bodies.is_given(self.values[whole]):
            raise CannotRepeat
        if whole.op == "placeholder" or _is_view(whole) or _is_read_after(node, whole):
            raise self.unsupported(f"operator {node.target} on a part of a tensor that is read in parts")
        x, written = self.values[whole], self.cast(source, self.values[whole].dtype)
        cut = self.values[part].producer
        if not isinstance(cut, Slice) or cut.step != 1 or written.shape != cut.result.shape:
            raise self.unsupported(f"operator {node.target} on a part with gaps, or of another shape")
        before, after = (self.part(x, cut.axis, a, b) for a, b in ((0, cut.start), (cut.stop, None)))
        pieces = [*before, written, *after]
        self.values[node] = self.values[part] = written
        self.values[whole] = self.emit(Concat(pieces, axis=cut.axis)) if len(pieces) > 1 else written

    def part(self, x: Value, axis: int, start: Dim, stop: Dim | None) -> list[Value]:
        """What stands from start to stop along an axis, in pieces; of joined values those that lie there."""
        end = x.shape[axis] if stop is None else stop
        if start == end:
            return []
        joined = x.producer
        if start == 0 and end == x.shape[axis]:
            return [x]
        if not isinstance(joined, Concat) or joined.axis != axis:
            return [self.emit(Slice(x, axis=axis, start=start, stop=end))]
        sizes = [size for piece in joined.xs if isinstance(size := piece.shape[axis], int)]
        if len(sizes) < len(joined.xs) or not isinstance(start, int) or not isinstance(end, int):
            return [self.emit(Slice(x, axis=axis, start=start, stop=end))]
        found: list[Value] = []
        for piece, size, last in zip(joined.xs, sizes, itertools.accumulate(sizes), strict=True):
            a, b = max(start, last - size), min(end, last)
            found += self.part(piece, axis, a - last + size, b - last + size) if a < b else []
        return found


def _read_off(e: Any) -> list[Any]:
    """The symbols of torch's expression that stand for what is in a tensor."""
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    kinds = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
    return [s for s in e.free_symbols if symbol_is_type(s, kinds)]


def _turn(e: Any) -> int | None:
    """Up to how many tokens the smaller of a number and a number of tokens is that of the tokens."""
    if type(e).__name__ != "Min" or len(e.args) != 2:
        return None
    number, tokens = e.args if e.args[0].is_Integer else e.args[::-1]
    return int(number) if number.is_Integer and tokens.is_Symbol else None


def unread(nodes: Any) -> set[Any]:
    """Of a program's nodes those that nothing comes of: nobody reads them, or what they write into."""
    found: set[Any] = set()
    lie: dict[Any, list[Any]] = {}  # by the node that made the memory
    for node in nodes:
        lie.setdefault(_memory(node), []).append(node)
    before = -1
    while len(found) > before:  # what is written into memory that nobody reads is not read either
        before = len(found)
        for node in reversed(nodes):
            schema = getattr(node.target, "_schema", None)
            pure = schema is not None and bool(schema.returns) and not schema.is_mutable
            if node.op != "call_function" or not (pure or node.target is operator.getitem):
                continue
            own = {node, *lie.get(node, [])}
            if found >= set(node.users):
                found.add(node)
            elif all(u in found or u in own for one in own for u in one.users) and all(
                map(_writes_first, own)
            ):
                found.update(own)
    return found


def _writes_first(node: Any) -> bool:
    """Whether a node writes, if it does, into its first operand alone."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable or schema.name.endswith("_")


def _is_part(node: Any) -> bool:
    return node.op == "call_function" and str(node.target) == "aten.slice.Tensor"


def _is_complex(argument: Any) -> bool:
    """Whether an operator's argument is complex, or a list with something complex in it."""
    if isinstance(argument, list | tuple):
        return any(map(_is_complex, cast("Sequence[Any]", argument)))
    return isinstance(argument, Complex)


def _shares(node: Any) -> bool:
    """Whether a node's result lies in its first operand's memory: a view, or what was written in place."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _shares(node.args[0])  # one of several views
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _writes(node: Any) -> bool:
    """Whether a node that shares memory has written there."""
    schema = getattr(node.target, "_schema", None)
    returns = () if schema is None else schema.returns
    return any(r.alias_info is not None and r.alias_info.is_write for r in returns)


def _is_view(node: Any) -> bool:
    """Whether a node is a view, or what was written into one."""
    while _shares(node):
        if not _writes(node):
            return True
        node = node.args[0]
    return False


def _memory(node: Any) -> Any:
    """The node whose result lies where a node's does and that made it."""
    while _shares(node):
        node = node.args[0]
    return node


def written(nodes: Any) -> set[Any]:
    """Of a program's nodes those whose memory an operator writes to: the ones that made it."""
    return {_memory(node) for node in nodes if _writes(node) and str(node.target) != "aten.detach_.default"}


def _is_read_after(node: Any, whole: Any) -> bool:
    """Whether something that lies in the memory of `whole`, which `node` writes to, is read behind it under
    another name than `whole`: a view of it from before, or a view of such a view.
    """
    first = _memory(whole)
    open_, seen = [first], {first}
    while open_:
        for user in open_.pop().users:
            if user < node and user not in seen and _shares(user) and user.args[0] in seen:
                seen.add(user)
                open_.append(user)
    return any(user > node for one in seen - {whole} for user in one.users)
