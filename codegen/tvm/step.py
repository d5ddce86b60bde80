"""Relax `main` over TIR functions → TIR functions that run a step; no interpreter and no VM is left.

`step_0(dims, pointers)`, `step_1`, … run the calls of `main` one after the other. `dims` holds the symbolic
dimensions as int64, in order, then a status that the caller sets to 0 and a failing kernel changes;
`pointers` holds addresses: inputs, weights, outputs, workspace. Intermediate results lie in the workspace, at
offsets computed from the dimensions (`plan.py`). `workspace(dims, pointers)` puts the bytes needed into the
last entry of `dims`. Kernels take bare pointers and the symbols of their shapes; nothing is checked inside
(the executor checks what comes from outside).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.ir import Call, GlobalVar, PointerType, PrimType

from ...ir.dtypes import itemsize
from ...ir.errors import CompileError
from .plan import ALIGNMENT, Interval, plan
from .untyped import Module, relax, tirx, tvm

_CALLS = 48
"""Calls in a part of the step."""
_TYPICAL = {"T": 128, "B": 4, "R": 4, "P": 64, "N": 256}
"""Sizes by which values are sorted into slots; any others would be right too."""


@dataclass
class _Memory:
    """What a Relax variable's data lies in."""

    kind: str
    """"argument" (a pointer of the caller) or "intermediate"."""
    index: int
    type: Any


@dataclass
class _Call:
    function: GlobalVar
    operands: list[_Memory]
    """Inputs, then outputs."""
    shapes: list[list[Any]]
    scalars: list[Any]
    """Explicit symbolic arguments, in the order of the function's own scalar parameters."""


@dataclass
class _Program:
    calls: list[_Call] = field(default_factory=list)
    intermediates: list[_Memory] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """The functions of a kernel library, and what runs in a step, in order."""

    module: Module
    parts: tuple[str, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    """Kernel and the numbers of its operands among the step's arguments. After a call `llmc_mark` is told its
    place in this list (`threads.ll`, "Profile").
    """


def build_step(module: Module, symbols: Sequence[str]) -> Step:
    """The module with the step's parts and `workspace` in place of Relax's `main`.

    Raises CompileError where `main` holds anything but calls, tuples and reshapes (a bug in the passes
    before).
    """
    program, main = _Reader(module).read()
    variables = {name: tirx.Var(name, "int64") for name in symbols}
    rename = {v: variables[v.name] for v in _symbols_of(main)}
    arguments = len(main.params) + len(_outputs(main))
    writer = _Writer(program, [variables[name] for name in symbols], rename, arguments)
    parts = writer.parts(module)
    out = tvm.IRModule({callee.name: callee.function for callee in writer.callees.values()})
    for name, function in parts.items():
        out[GlobalVar(name)] = function
    out[GlobalVar("workspace")] = writer.workspace_function()
    return Step(out, tuple(parts), tuple(_site(call) for call in program.calls))


def _site(call: _Call) -> tuple[str, tuple[int, ...]]:
    arguments = tuple(m.index for m in call.operands if m.kind == "argument")
    return call.function.name_hint.rstrip("0123456789"), arguments


def _symbols_of(main: Any) -> list[Any]:
    """The TIR variables of main's parameter shapes."""
    found: dict[Any, None] = {}
    for parameter in main.params:
        for d in _shape(parameter.ty):
            for v in _variables(d):
                found[v] = None
    return list(found)


def _variables(expression: Any) -> list[Any]:
    return [] if isinstance(expression, int) else list(tirx.analysis.undefined_vars(expression))


def _shape(type: Any) -> list[Any]:
    return list(type.shape.values)


def _fields(expression: Any) -> list[Any]:
    return list(expression.fields) if isinstance(expression, relax.Tuple) else [expression]


def _outputs(main: Any) -> list[Any]:
    """The variables that `main` returns; several are returned as a variable bound to a tuple."""
    body = main.body.body
    for block in main.body.blocks:
        for binding in block.bindings:
            if binding.var.same_as(body) and isinstance(binding.value, relax.Tuple):
                return list(binding.value.fields)
    return _fields(body)


def _is_reshape(value: Any) -> bool:
    callee: Any = value.op if isinstance(value, Call) else None
    return isinstance(callee, tvm.ir.Op) and callee.name == "relax.reshape"


class _Reader:
    """Walks `main` and turns its bindings into calls over memory."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.program = _Program()
        self.memory: dict[Any, Any] = {}

    def read(self) -> tuple[_Program, Any]:
        main = self.module["main"]
        for i, parameter in enumerate(main.params):
            self.memory[parameter] = _Memory("argument", i, parameter.ty)
        self.outputs = self._output_indices(main)
        for block in main.body.blocks:
            for binding in block.bindings:
                self.memory[binding.var] = self._bind(binding.var, binding.value)
        for field_ in _outputs(main):
            memory = self.memory[field_]
            assert memory.kind == "argument" and memory.index >= len(main.params), field_
        return self.program, main

    def _output_indices(self, main: Any) -> dict[Any, int]:
        """Variables that name an output, followed back through copies of names and reshapes → its argument
        number.
        """
        names: dict[Any, Any] = {}
        for block in main.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Var):
                    names[binding.var] = binding.value
                elif _is_reshape(binding.value):  # the same bytes
                    names[binding.var] = binding.value.args[0]
        found: dict[Any, int] = {}
        for i, variable in enumerate(_outputs(main)):
            while variable in names:
                found[variable] = len(main.params) + i
                variable = names[variable]
            found[variable] = len(main.params) + i
        return found

    def _bind(self, variable: Any, value: Any) -> Any:
        if isinstance(value, relax.Var):
            return self.memory[value]
        if isinstance(value, relax.Tuple):
            return [self.memory[f] for f in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self.memory[value.tuple_value][value.index]
        callee: Any = value.op if isinstance(value, Call) else None
        name = callee.name if isinstance(callee, tvm.ir.Op) else ""
        if _is_reshape(value):
            whole = self.memory[value.args[0]]
            return _Memory(whole.kind, whole.index, variable.ty)
        if name == "relax.call_tir":
            return self._call(variable, value)
        if name == "relax.call_tir_inplace":
            return self._inplace(variable, value)
        raise CompileError(
            f"tvm-cpu: {name or type(value).__name__} is left in the Relax function",
            remedy="report this model",
        )

    def _result(self, variable: Any, type: Any) -> _Memory:
        if variable in self.outputs:
            return _Memory("argument", self.outputs[variable], type)
        memory = _Memory("intermediate", len(self.program.intermediates), type)
        self.program.intermediates.append(memory)
        return memory

    def _call(self, variable: Any, value: Any) -> Any:
        if isinstance(variable.ty, relax.TupleType):
            results = [self._result(None, t) for t in variable.ty.fields]
        else:
            results = [self._result(variable, variable.ty)]
        self._append(value, results)
        return results if isinstance(variable.ty, relax.TupleType) else results[0]

    def _inplace(self, variable: Any, value: Any) -> _Memory:
        (place,) = value.attrs.inplace_indices
        self._append(value, [])
        whole = self.memory[value.args[1].fields[int(place)]]
        return _Memory(whole.kind, whole.index, variable.ty)

    def _append(self, value: Any, results: list[_Memory]) -> None:
        operands: list[_Memory] = []
        scalars: list[Any] = []
        for argument in _fields(value.args[1]):
            if argument in self.memory:
                operands.append(self.memory[argument])
            else:
                scalars.append(argument)
        if len(value.args) > 2:
            scalars += list(value.args[2].values)
        everything = operands + results
        self.program.calls.append(
            _Call(value.args[0], everything, [_shape(m.type) for m in everything], scalars)
        )


class _Writer:
    """Emits the TIR of `step` and `workspace`."""

    def __init__(self, program: _Program, symbols: list[Any], rename: dict[Any, Any], arguments: int) -> None:
        self.program = program
        self.callees: dict[Any, _Callee] = {}
        self.symbols = symbols
        self.arguments = arguments
        self.analyzer = _substitution(rename)
        self.typical = _substitution(
            {v: tirx.IntImm("int64", _TYPICAL.get(v.name, 64)) for v in [*symbols, *rename]}
        )
        self.plan = plan(self._intervals())
        self.offsets: list[Any] = []

    def _expression(self, e: Any) -> Any:
        """An expression over main's symbols as one over the step's own."""
        if isinstance(e, int):
            return tirx.IntImm("int64", e)
        return self.analyzer.simplify(e)

    def _bytes(self, type: Any) -> Any:
        total: Any = tirx.IntImm("int64", itemsize(str(type.dtype)))
        for d in _shape(type):
            total = total * self._expression(d)
        return self.analyzer.simplify(total)

    def _intervals(self) -> list[Interval]:
        spans: dict[int, list[int]] = {}
        for when, call in enumerate(self.program.calls):
            for memory in call.operands:
                if memory.kind == "intermediate":
                    spans.setdefault(memory.index, []).append(when)
        intervals: list[Interval] = []
        for index, times in spans.items():
            size = self._bytes(self.program.intermediates[index].type)
            nominal = int(self.typical.simplify(size))
            intervals.append(Interval(index, times[0], times[-1], size, nominal))
        return intervals

    # -- statements ----------------------------------------------------------------------------------------
    def _prologue(self) -> tuple[list[Any], list[Any], Any, Any]:
        """Parameters, statements that read the symbols and compute the offsets, and the two arrays."""
        raw = [tirx.Var(name, PointerType(PrimType("void"))) for name in ("dims_raw", "pointers_raw")]
        dims = _array("dims", len(self.symbols) + 1, "int64", raw[0])
        pointers = _array("pointers", self.arguments + 1, "uint64", raw[1])
        body: list[Any] = [dims[1], pointers[1]]
        body += [tirx.Bind(v, dims[0][i]) for i, v in enumerate(self.symbols)]
        total: Any = tirx.IntImm("int64", 0)
        self.offsets = []
        for number, slot in enumerate(self.plan.slots):
            size: Any = slot.sizes[0]
            for other in slot.sizes[1:]:
                size = tirx.max(size, other)
            begin, end = tirx.Var(f"slot_{number}", "int64"), tirx.Var(f"end_{number}", "int64")
            rounded = tirx.floordiv(total + size + (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT
            body += [tirx.Bind(begin, total), tirx.Bind(end, rounded)]
            self.offsets.append(begin)
            total = end
        self.total = total
        return raw, body, dims[0], pointers[0]

    def workspace_function(self) -> Any:
        raw, body, dims, _ = self._prologue()
        body.append(tirx.BufferStore(dims, self.total, [len(self.symbols)]))
        return _exported("workspace", raw, body)

    def parts(self, module: Module) -> dict[str, Any]:
        """Name → function, each with some of the calls: LLVM's time and memory grow with the square of a
        function.
        """
        calls = self.program.calls
        starts = range(0, max(1, len(calls)), _CALLS)
        return {
            f"step_{i}": self._part(f"step_{i}", first, calls[first : first + _CALLS], module)
            for i, first in enumerate(starts)
        }

    def _part(self, name: str, first: int, calls: Sequence[_Call], module: Module) -> Any:
        """A function of some calls, the number of the first among all calls being `first`."""
        raw, body, dims, pointers = self._prologue()
        status = [len(self.symbols)]
        for number, call in enumerate(calls, first):
            callee = self.callees.get(call.function)
            if callee is None:
                callee = _Callee(module[call.function], call.function.name_hint)
                self.callees[call.function] = callee
            addresses = [self._address(memory, pointers) for memory in call.operands]
            values = callee.symbol_values(call.shapes, call.scalars)
            pairs = zip(callee.symbols, values, strict=True)
            scalars = [_as(self._expression(value), symbol.ty) for symbol, value in pairs]
            result = Call(callee.name, addresses + scalars, ret_ty="int32")
            # A kernel fails only where it gets no scratch memory; the calls after it are harmless then.
            failed = tirx.bitwise_or(tirx.BufferLoad(dims, status), tirx.Cast("int64", result))
            body.append(tirx.BufferStore(dims, failed, status))
            mark = tirx.call_extern("int32", "llmc_mark", tirx.IntImm("int32", number))
            body.append(tirx.Evaluate(mark))
        return _exported(name, raw, body)

    def _address(self, memory: _Memory, pointers: Any) -> Any:
        index = memory.index if memory.kind == "argument" else self.arguments
        base = tirx.reinterpret("handle", pointers[index])
        if memory.kind == "intermediate":
            base = tirx.handle_add_byte_offset(base, self.offsets[self.plan.slot_of[memory.index]])
        element = PointerType(PrimType(str(memory.type.dtype)), "global")
        return tirx.reinterpret(element, base)


def _array(name: str, length: int, dtype: str, raw: Any) -> tuple[Any, Any]:
    """A buffer over a bare pointer, and the statement that declares it."""
    data = tirx.reinterpret(PointerType(PrimType(dtype), "global"), raw)
    buffer = tirx.decl_buffer((length,), dtype, name, layout=None)
    return buffer, tirx.DeclBuffer(buffer, data=data)


def _exported(name: str, parameters: list[Any], body: list[Any]) -> Any:
    function = tirx.PrimFunc(parameters, tirx.SeqStmt(body))
    return function.with_attrs({"global_symbol": name, "s_tir": True})


def _substitution(values: dict[Any, Any]) -> Any:
    """An analyzer whose `simplify` puts values for variables."""
    analyzer = tvm.sym.Analyzer()
    for variable, value in values.items():
        analyzer.bind(variable, value)
    return analyzer


class _Callee:
    """A kernel as a function of bare pointers and int64 symbols that returns 0, or -1 where it failed."""

    def __init__(self, function: Any, name: str) -> None:
        self.name = GlobalVar(f"kernel_{name}")
        self.buffers = [p for p in function.params if tirx.is_buffer_var(p)]
        self.given = [p for p in function.params if not tirx.is_buffer_var(p)]
        shapes = [list(p.ty.shape) for p in self.buffers]
        symbols: dict[Any, None] = dict.fromkeys(self.given)
        for shape in shapes:
            for d in shape:
                symbols.update(dict.fromkeys(_variables(d)))
        self.symbols = list(symbols)
        self.shapes = shapes
        pointers = [tirx.Var(f"{p.name}_data", tirx.buffer_data_pointer_type(p)) for p in self.buffers]
        declared = [tirx.DeclBuffer(b, data=data) for b, data in zip(self.buffers, pointers, strict=True)]
        body = tirx.SeqStmt([*declared, function.body, tirx.Return(tirx.IntImm("int32", 0))])
        attributes = {
            k: v for k, v in function.attrs.items() if k not in ("global_symbol", "op_pattern", "llmc.kernel")
        }
        new = tirx.PrimFunc([*pointers, *self.symbols], body, ret_type=PrimType("int32"))
        self.function = new.with_attrs({"s_tir": True, **attributes})

    def symbol_values(self, shapes: list[list[Any]], scalars: list[Any]) -> list[Any]:
        """A value for each symbol: given, or read off the operands' shapes where a dimension is that symbol
        alone.
        """
        values: dict[Any, Any] = dict(zip(self.given, scalars, strict=True))
        for pattern, shape in zip(self.shapes, shapes, strict=True):
            for d, actual in zip(pattern, shape, strict=True):
                if isinstance(d, tirx.Var) and d not in values:
                    values[d] = actual
        missing = [s.name for s in self.symbols if s not in values]
        if missing:
            raise CompileError(
                f"tvm-cpu: {self.name.name_hint} needs {', '.join(missing)}, which no operand gives",
                remedy="report this model",
            )
        return [values[s] for s in self.symbols]


def _as(value: Any, type: Any) -> Any:
    return value if value.ty.dtype == type.dtype else tirx.Cast(type.dtype, value)
