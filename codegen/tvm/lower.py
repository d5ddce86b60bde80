"""IR graph → Relax module: one function `main` over kernels in TIR.

Operations of language models become calls of the hand-written kernels (`kernels/`); all other tensor
operations go through Relax's own operators, or a tensor expression where Relax has none, and are fused and
scheduled afterwards (`optimize.py`). An op may be left to another's kernel: an addition to the product before
it (`residuals`), `rope` to what reads the heads (`turned`). The parameters of `main` are the graph's inputs,
then its weights in their stored layout (`weights.py`); its results are the graph's outputs.

    %1 = rms_norm(%0, @norm)             lv1 = R.call_tir(cls.rms_norm, (lv0, norm), ...)
    %2 = linear(%1, @w)             →    lv2 = R.call_tir(cls.linear, (lv1, w, lv0), ...)
    %3 = add(%0, %2)
    %4 = append_kv(%k, %v, %pages, %s)   lv3 = R.call_tir_inplace(cls.append_kv, (k, v, s, pages), [3])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...ir.core import Graph, Op, Value
from ...ir.errors import CompileError, UnsupportedError
from ...ir.ops.nn import Linear, Rope
from ...ir.ops.quant import QuantizedLinear
from ...ir.types import Dim, Shape
from ...plugins.entries import blaming
from ..extensions import import_emitters
from .kernels import stored_dtype
from .kernels.heads import turns_whole_vectors
from .kernels.isa import Isa
from .kernels.schedule import Schedule
from .untyped import Module, relax, te, tirx, tvm
from .weights import Role, page_values, stored_shape, stored_type, weight_roles

Emitter = Callable[["Lowering", Any], Any]
EMITTERS: dict[str, Emitter] = {}
"""IR op name → what emits it: (lowering, op) → the Relax expression of its result."""


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register an emitter for the ops of these names."""

    def register(emitter: Emitter) -> Emitter:
        for name in names:
            if name in EMITTERS:
                raise CompileError(f"tvm-cpu emits {name} already", remedy="give the op another name")
            EMITTERS[name] = emitter
        return emitter

    return register


SCHEDULED = frozenset({"quantized_linear", "quantized_gated_mlp"})
"""Kernels whose sizes can be searched for (`tune.py`)."""


def schedule_key(name: str, static: Mapping[str, Any]) -> str:
    """What a kernel's schedule is found under: its name and static parameters."""
    return f"{name} {json.dumps(static, sort_keys=True)}"


_TURNING = {("paged_attention", 0), ("append_kv", 0)}
"""Ops, and which of their operands, whose kernels turn heads as they read them (`kernels/heads.py`)."""

Buffer = tuple[str, tuple[Any, ...], str]
"""A kernel's parameter: its name, extents (numbers of TIR or its variables) and dtype."""


def _fits(given: tuple[Any, ...], declared: tuple[Any, ...]) -> bool:
    fixed = tirx.IntImm
    return len(given) == len(declared) and all(
        int(a) == int(b)
        for a, b in zip(given, declared, strict=True)
        if isinstance(a, fixed) and isinstance(b, fixed)
    )


def _text(extents: tuple[Any, ...], dtype: str) -> str:
    named = (str(int(e)) if isinstance(e, tirx.IntImm) else str(e) for e in extents)
    return f"{dtype}[{', '.join(named)}]"


@dataclass(frozen=True)
class Lowered:
    """A Relax module and what its caller has to know."""

    module: Module
    symbols: tuple[str, ...]
    """Symbolic dimensions, sorted."""
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    scheduled: Mapping[str, tuple[str, Callable[..., Any]]]
    """Key of each kernel of `SCHEDULED` → its name in the module, and its maker, which takes a schedule (None
    is what is shipped).
    """


class Lowering:
    """One pass over a graph. Emitters use `get`, `kernel`, `te` and `type_of`."""

    target = "tvm-cpu"
    """Whose emitters other packages' ops are asked for."""

    def __init__(self, graph: Graph, isa: Isa, schedules: Mapping[str, Schedule] | None = None) -> None:
        self.graph = graph
        self.isa = isa
        self.schedules = schedules or {}
        self.scheduled: dict[str, tuple[str, Callable[..., Any]]] = {}
        self.builder = relax.BlockBuilder()
        self.symbols: dict[str, Any] = {}
        self.roles: dict[Value, Role] = weight_roles(graph)
        self.absorbed = residuals(graph)
        self.turned = turned(graph)
        self.pages = page_values(graph)
        self._values: dict[Value, Any] = {}
        self._kernels: dict[Any, Any] = {}
        self._declared: dict[str, list[Buffer]] = {}
        self.shared: dict[Any, Any] = {}
        """Results that several ops share, by whatever key an emitter chooses (quantized activations)."""

    # -- shapes and types ----------------------------------------------------------------------------------
    def dim(self, d: Dim) -> Any:
        """A dimension as an int or an int64 TIR expression."""
        if isinstance(d, int):
            return d
        total: Any = 0
        for monomial, coefficient in d.terms:
            factor: Any = tirx.IntImm("int64", coefficient)
            for name in monomial:
                factor = factor * self.symbols.setdefault(name, tirx.Var(name, "int64"))
            total = total + factor
        return tvm.sym.Analyzer().simplify(total)

    def shape(self, shape: Shape) -> list[Any]:
        return [self.dim(d) for d in shape]

    def type_of(self, value: Value) -> Any:
        """The Relax type of a value as it lies in memory."""
        return self.tensor(self.shape(stored_type(value, value in self.pages).shape), value.dtype)

    def tensor(self, shape: list[Any], dtype: str) -> Any:
        return relax.TensorType(shape, stored_dtype(dtype))

    # -- values --------------------------------------------------------------------------------------------
    def get(self, value: Value) -> Any:
        """The Relax expression of a value."""
        return self._values[value]

    def scalar(self, value: Value) -> Any:
        """Like `get`, but a rank-0 constant stays a literal, which kernels then hold as an immediate."""
        op = value.producer
        if op is not None and op.opname == "full" and not value.shape:
            return relax.const(op.value, value.dtype)  # type: ignore[attr-defined]
        return self.get(value)

    def operands(self, a: Value, b: Value) -> tuple[Any, Any]:
        """Both operands of an elementwise op, a constant scalar as a literal (not both: Relax wants a
        tensor).
        """
        left, right = self.scalar(a), self.scalar(b)
        if isinstance(left, tvm.ir.Constant) and isinstance(right, tvm.ir.Constant):
            left = self.get(a)
        return left, right

    def emit(self, expression: Any) -> Any:
        return self.builder.emit(expression)

    def reshape(self, x: Any, shape: list[Any]) -> Any:
        """A view of `x`; no data moves."""
        return self.emit(relax.op.reshape(x, shape))

    def rows(self, value: Value, width: int) -> Any:
        """A value [..., width] as [rows, width]."""
        x = self.get(value)
        if value.type.rank == 2:
            return x
        total: Any = 1
        for d in value.shape[:-1]:
            total = d * total
        return self.reshape(x, [self.dim(total), width])

    def te(self, name: str, function: Callable[..., Any], *tensors: Any, dims: Shape = ()) -> Any:
        """Emit the tensor expression `function(dims, *tensors)`.

        It may use no symbol but those of its arguments, hence `dims`: whatever dimensions it needs.
        """
        symbolic = [self.dim(d) for d in dims if not isinstance(d, int)]

        def build(*arguments: Any) -> Any:
            given = iter(arguments[: len(symbolic)])
            return function(
                [d if isinstance(d, int) else next(given) for d in dims], *arguments[len(symbolic) :]
            )

        return self.builder.emit_te(build, *symbolic, *tensors, primfunc_name_hint=name)

    def kernel(
        self, name: str, make: Callable[..., Any], static: dict[str, Any], args: list[Any], out: Any
    ) -> Any:
        """Call the kernel that `make(**static, isa=…)` builds; one function for equal static parameters."""
        function = self._kernel(name, make, static)
        self._check(function, [*args, *(out if isinstance(out, list) else [out])])
        return self.emit(relax.call_tir(function, args, out))

    def kernel_inplace(
        self,
        name: str,
        make: Callable[..., Any],
        static: dict[str, Any],
        args: list[Any],
        place: int,
        out: Any,
    ) -> Any:
        """Call a kernel that writes its operand number `place`; the result is that operand. Where `out` is a
        list of two types, a tuple of that operand and a result of its own.
        """
        places = [place, -1] if isinstance(out, list) else [place]
        function = self._kernel(name, make, static)
        self._check(function, [*args, *(out[1:] if isinstance(out, list) else [])])
        return self.emit(relax.call_tir_inplace(function, args, places, out))

    def _kernel(self, name: str, make: Callable[..., Any], static: dict[str, Any]) -> Any:
        key = (name, tuple(sorted((k, repr(v)) for k, v in static.items())))
        if key not in self._kernels:
            make = partial(make, **static, isa=self.isa.name)
            which = schedule_key(name, static) if name in SCHEDULED else ""
            function = make(schedule=self.schedules.get(which)) if which else make()
            # Opaque to fusion (8), and none of the generic scheduler's business.
            function = function.with_attrs({"op_pattern": 8, "llmc.kernel": True}).without_attr(
                "global_symbol"
            )
            self._kernels[key] = self.add(function, name)
            if which:
                self.scheduled[which] = (self._kernels[key].name_hint, make)
        return self._kernels[key]

    def add(self, function: Any, name: str) -> Any:
        """Add a kernel to the module; the name by which it is called."""
        called = self.builder.add_func(function, name)
        self._declared[called.name_hint] = [
            (p.name, tuple(p.ty.shape), str(p.ty.dtype)) for p in function.params if tirx.is_buffer_var(p)
        ]
        return called

    def _check(self, function: Any, given: list[Any]) -> None:
        """Raise CompileError unless a kernel's buffers are of the dtypes, ranks and fixed extents of what it
        is called with: TVM compares none of them, and a kernel would read whatever lies there.
        """
        declared = self._declared[function.name_hint]
        types = [getattr(g, "ty", g) for g in given]
        if len(types) != len(declared):
            raise CompileError(
                f"the kernel {function.name_hint} declares {len(declared)} buffers and is called with "
                f"{len(types)}",
                remedy="its emitter has to give it as many operands as it takes",
            )
        for (name, shape, dtype), type in zip(declared, types, strict=True):
            extents = tuple(type.shape.values) if type.shape is not None else shape
            if str(type.dtype) == dtype and _fits(extents, shape):
                continue
            raise CompileError(
                f"the kernel {function.name_hint} declares its buffer {name} as {_text(shape, dtype)}, and "
                f"is called with {_text(extents, str(type.dtype))}",
                remedy="its emitter has to convert the operand, or the kernel to take it as it is",
            )

    # -- the whole graph -----------------------------------------------------------------------------------
    def run(self) -> Lowered:
        graph = self.graph
        parameters = [self._parameter(v, v.name, self.type_of(v)) for v in graph.inputs]
        for name, v in graph.weights.items():
            shape, dtype = self.stored(v)
            parameters.append(self._parameter(v, f"weight.{name}", relax.TensorType(shape, dtype)))
        with self.builder.function("main", parameters):
            with self.builder.dataflow():
                for op in graph:
                    if op not in self.absorbed.values() and op.result not in self.turned:
                        self._values[op.result] = self._emit_op(op)
                outputs = [self.builder.emit_output(self._output(i)) for i in range(len(graph.outputs))]
            self.builder.emit_func_output(relax.Tuple(outputs))
        return Lowered(
            self.builder.get(),
            tuple(sorted(self.symbols)),
            tuple(v.name for v in graph.inputs),
            tuple(graph.weights),
            tuple(graph.output_names),
            self.scheduled,
        )

    def _parameter(self, value: Value, name: str, type: Any) -> Any:
        self._values[value] = relax.Var(name, type)
        return self._values[value]

    def emitter(self, op: Op) -> Emitter | None:
        """What emits an op; None where nothing does."""
        if op.opname not in EMITTERS:
            import_emitters(op, self.target)
        return EMITTERS.get(op.opname)

    def stored(self, weight: Value) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a weight in memory."""
        return stored_shape(weight, self.roles[weight])

    def _emit_op(self, op: Op) -> Any:
        emitter = self.emitter(op)
        if emitter is None:
            raise UnsupportedError(
                f"target {self.target} cannot emit {op.opname} ({op.loc or 'no module'})",
                remedy="add an emitter to codegen/tvm or a decomposition to codegen/legalize.py",
            )
        with blaming(f"{self.target}'s emitter of {op.opname}", emitter):
            return emitter(self, op)

    def _output(self, index: int) -> Any:
        """An output of its own memory: what is an input, a view or another output too is copied."""
        value = self.graph.outputs[index]
        producer = value.producer
        moved = producer is not None and producer.opname not in ("reshape", "append_kv")
        if moved and value not in self.graph.outputs[:index]:
            return self.get(value)
        return self.te(
            "copy", lambda _, x: te.compute(x.shape, lambda *i: x(*i), name="copy"), self.get(value)
        )


def residuals(graph: Graph) -> dict[Op, Op]:
    """add → the linear op that does the addition in its epilogue, where that is its only use."""
    found: dict[Op, Op] = {}
    order = {op: i for i, op in enumerate(graph)}
    for op in graph:
        if op.opname != "add" or op.operands[0].type != op.operands[1].type:
            continue
        linears = [
            v.producer
            for v in op.operands
            if isinstance(v.producer, Linear | QuantizedLinear)
            and len(v.uses) == 1
            and not graph.output_uses(v)
            and v.dtype == "float32"
        ]
        if linears:
            found[op] = max(linears, key=lambda linear: order[linear])
    return found


def turned(graph: Graph) -> dict[Value, Op]:
    """Results of `rope` → the op, where what reads them turns them itself: queries of attention, and keys on
    their way into the cache.
    """
    found: dict[Value, Op] = {}
    for op in graph:
        # By its name as well: another package's op may be a kind of `Rope`.
        if not isinstance(op, Rope) or op.opname != "rope" or op.interleaved:
            continue
        rows, _, width = op.x.shape if op.x.type.rank == 3 else (None, None, None)
        if not isinstance(width, int) or op.cos.shape != (rows, op.rotary_dim):
            continue
        reads = {(reader.opname, index) for reader, index in op.result.uses}
        if graph.output_uses(op.result) or not reads <= _TURNING:
            continue
        if turns_whole_vectors(width, op.rotary_dim):
            found[op.result] = op
    return found


def lower(graph: Graph, isa: Isa, schedules: Mapping[str, Schedule] | None = None) -> Lowered:
    """The Relax module of a legalized graph for one ISA level. `schedules`: by the kernel's key, where they
    are not those that are shipped.

    Raises UnsupportedError for an op without emitter.
    """
    from . import emit_llm, emit_moe, emit_state, emit_tensor

    # Imported for the emitters that they register.
    assert all(module.__name__ for module in (emit_llm, emit_moe, emit_state, emit_tensor))
    return Lowering(graph, isa, schedules).run()
