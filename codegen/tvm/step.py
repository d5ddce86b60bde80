"""Relax `main` over TIR functions → kernels, and a table of their calls that a step runs through.

A step has an array of 64-bit words, its *values*: a status (0, or what a failing kernel put there), the
symbolic dimensions, the caller's addresses (inputs, weights, outputs, workspace), the addresses of
intermediate results, and numbers computed from the dimensions. `begin(values)` fills in the last two.
Intermediate results lie in the workspace, at offsets computed from the dimensions (`plan.py`).

Each kernel has a function `run_KERNEL(values, row)`, where `row` says which values are its operands; the
step itself is a list of (function, row), so that a model of many layers costs no more code than one of few.
The loop over it is `llmc_step` (`build.py`). `workspace(dims, pointers)` puts the bytes needed into the last
entry of `dims`, the dimensions and a status. Kernels take bare pointers and the symbols of their shapes;
nothing is checked inside (the executor checks what comes from outside).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.ir import Call, GlobalVar, PointerType, PrimType

from ...ir.dtypes import itemsize
from ...ir.errors import CompileError
from .plan import ALIGNMENT, Interval, plan
from .untyped import Module, relax, tirx, tvm

_TYPICAL = {"T": 128, "B": 4, "R": 4, "P": 64, "N": 256, "S": 4}
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
    symbols: int
    arguments: int
    """Addresses of the caller, that of the workspace included."""
    values: int
    """Words of the step's array."""
    rows: tuple[tuple[str, tuple[int, ...]], ...]
    """Function and row of each call."""
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    """Kernel and the numbers of its operands among the step's arguments. After a call `llmc_mark` is told its
    place in this list (`threads.ll`, "Profile").
    """


def build_step(module: Module, symbols: Sequence[str]) -> Step:
    """The module with kernels, the functions that call them, `begin` and `workspace` in place of Relax's
    `main`.

    Raises CompileError where `main` holds anything but calls, tuples and reshapes (a bug in the passes
    before).
    """
    program, main = Reader(module).read()
    variables = {name: tirx.Var(name, "int64") for name in symbols}
    rename = {v: variables[v.name] for v in symbols_of(main)}
    arguments = len(main.params) + len(outputs_of(main)) + 1
    writer = Writer(program, [variables[name] for name in symbols], rename, arguments)
    rows = writer.rows(module)
    out = tvm.IRModule({callee.name: callee.function for callee in writer.callees.values()})
    for callee in writer.callees.values():
        out[GlobalVar(callee.run_name)] = callee.run_function()
    out[GlobalVar("begin")] = writer.begin_function()
    out[GlobalVar("workspace")] = writer.workspace_function()
    calls = tuple(_site(call) for call in program.calls)
    return Step(out, len(symbols), arguments, writer.count, tuple(rows), calls)


def add_entry(module: Module, name: str, kernel: Any) -> int:
    """Add a kernel that is called by itself, outside of the step, as `run_NAME(values, row)`; the length of
    its row. Its values: a status, the addresses of its buffers in their order, its symbols in the order in
    which the buffers' shapes name them.
    """
    callee = Callee(kernel.without_attr("global_symbol"), name)
    module[callee.name] = callee.function
    module[GlobalVar(callee.run_name)] = callee.run_function()
    return len(callee.buffers) + len(callee.symbols)


def _site(call: _Call) -> tuple[str, tuple[int, ...]]:
    arguments = tuple(m.index for m in call.operands if m.kind == "argument")
    return call.function.name_hint.rstrip("0123456789"), arguments


def symbols_of(main: Any) -> list[Any]:
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


def outputs_of(main: Any) -> list[Any]:
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


def _written(value: Any) -> Any:
    """The variable that a call writes in place and that is its only result; None for other expressions."""
    call: Any = value
    callee: Any = call.op if isinstance(value, Call) else None
    if not isinstance(callee, tvm.ir.Op) or callee.name != "relax.call_tir_inplace":
        return None
    first, *others = call.attrs.inplace_indices
    return None if others else call.args[1].fields[int(first)]


class Reader:
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
        for field_ in outputs_of(main):
            memory = self.memory[field_]
            assert memory.kind == "argument" and memory.index >= len(main.params), field_
        return self.program, main

    def _output_indices(self, main: Any) -> dict[Any, int]:
        """Variables that name an output, followed back through copies of names, reshapes and calls that write
        in place → its argument number.
        """
        names: dict[Any, Any] = {}
        for block in main.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Var):
                    names[binding.var] = binding.value
                elif _is_reshape(binding.value):  # the same bytes
                    names[binding.var] = binding.value.args[0]
                elif _written(binding.value) is not None:
                    names[binding.var] = _written(binding.value)
        found: dict[Any, int] = {}
        for i, variable in enumerate(outputs_of(main)):
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

    def _inplace(self, variable: Any, value: Any) -> Any:
        """A call that writes an operand, and maybe a result of its own (place -1)."""
        several = isinstance(variable.ty, relax.TupleType)
        types = list(variable.ty.fields) if several else [variable.ty]
        results: list[_Memory] = []
        for place, type_ in zip(map(int, value.attrs.inplace_indices), types, strict=True):
            if place < 0:
                results.append(self._result(None, type_))
                continue
            whole = self.memory[value.args[1].fields[place]]
            results.append(_Memory(whole.kind, whole.index, type_))
        own = [r for r, p in zip(results, value.attrs.inplace_indices, strict=True) if int(p) < 0]
        self._append(value, own)
        return results if several else results[0]

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


class Writer:
    """Numbers the values of a step, and emits `begin` and `workspace`."""

    def __init__(
        self,
        program: _Program,
        symbols: list[Any],
        rename: dict[Any, Any],
        arguments: int,
        width: Callable[[str], int] = itemsize,
    ) -> None:
        """`width`: bytes of an element of a dtype."""
        self.program, self._width = program, width
        self.callees: dict[Any, Callee] = {}
        self.symbols = symbols
        self.arguments = arguments
        self.analyzer = _substitution(rename)
        self.typical = _substitution(
            {v: tirx.IntImm("int64", _TYPICAL.get(v.name, 64)) for v in [*symbols, *rename]}
        )
        self.plan = plan(self._intervals())
        self._addresses = 1 + len(symbols)  # the status and the dimensions come first
        self._slots = self._addresses + arguments
        self._numbers: dict[str, tuple[int, Any]] = {}
        """Text of an expression → its place among the values, and the expression."""

    @property
    def count(self) -> int:
        """How many values there are."""
        return self._slots + len(self.plan.slots) + len(self._numbers)

    @property
    def slots(self) -> int:
        """Where the slots' addresses stand among the values: after the status, the symbols, the arguments."""
        return self._slots

    @property
    def numbers(self) -> list[Any]:
        """The expressions whose values stand after the slots' addresses."""
        return [expression for _, expression in self._numbers.values()]

    def _expression(self, e: Any) -> Any:
        """An expression over main's symbols as one over the step's own."""
        if isinstance(e, int):
            return tirx.IntImm("int64", e)
        return self.analyzer.simplify(e)

    def _bytes(self, type: Any) -> Any:
        total: Any = tirx.IntImm("int64", self._width(str(type.dtype)))
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

    # -- calls ---------------------------------------------------------------------------------------------
    def rows(self, module: Module) -> list[tuple[str, tuple[int, ...]]]:
        """Function and row of each call."""
        rows: list[tuple[str, tuple[int, ...]]] = []
        for call in self.program.calls:
            callee = self.callees.get(call.function)
            if callee is None:
                callee = Callee(module[call.function], call.function.name_hint)
                self.callees[call.function] = callee
            numbers = [self._expression(e) for e in callee.symbol_values(call.shapes, call.scalars)]
            row = [self._place_of(memory) for memory in call.operands]
            rows.append((callee.run_name, (*row, *map(self._number, numbers))))
        return rows

    def _place_of(self, memory: _Memory) -> int:
        if memory.kind == "argument":
            return self._addresses + memory.index
        return self._slots + self.plan.slot_of[memory.index]

    def _number(self, expression: Any) -> int:
        """The place of a number among the values."""
        for i, symbol in enumerate(self.symbols):
            if expression.same_as(symbol):
                return 1 + i
        first = self._slots + len(self.plan.slots)
        key = str(expression)
        return self._numbers.setdefault(key, (first + len(self._numbers), expression))[0]

    # -- functions -----------------------------------------------------------------------------------------
    def _offsets(self) -> tuple[list[Any], list[Any], Any]:
        """Statements that compute the slots' offsets, these, and the bytes of all."""
        body: list[Any] = []
        offsets: list[Any] = []
        total: Any = tirx.IntImm("int64", 0)
        for number, slot in enumerate(self.plan.slots):
            size: Any = slot.sizes[0]
            for other in slot.sizes[1:]:
                size = tirx.max(size, other)
            end = tirx.Var(f"end_{number}", "int64")
            rounded = tirx.floordiv(total + size + (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT
            body.append(tirx.Bind(end, rounded))
            offsets.append(total)
            total = end
        return body, offsets, total

    def begin_function(self) -> Any:
        """Fills in the addresses of intermediate results and the numbers."""
        raw = [tirx.Var(name, PointerType(PrimType("void"))) for name in ("values_raw", "unused")]
        values, declared = _array("values", self.count, "int64", raw[0])
        body: list[Any] = [declared]
        body += [tirx.Bind(v, values[1 + i]) for i, v in enumerate(self.symbols)]
        statements, offsets, _ = self._offsets()
        body += statements
        workspace = values[self._addresses + self.arguments - 1]
        body += [
            tirx.BufferStore(values, workspace + offset, [self._slots + i])
            for i, offset in enumerate(offsets)
        ]
        for place, expression in self._numbers.values():
            body.append(tirx.BufferStore(values, _as(expression, values.ty.dtype), [place]))
        return _exported("begin", raw, body)

    def workspace_function(self) -> Any:
        raw = [tirx.Var(name, PointerType(PrimType("void"))) for name in ("dims_raw", "unused")]
        dims, declared = _array("dims", len(self.symbols) + 1, "int64", raw[0])
        body: list[Any] = [declared]
        body += [tirx.Bind(v, dims[i]) for i, v in enumerate(self.symbols)]
        statements, _, total = self._offsets()
        body += [*statements, tirx.BufferStore(dims, total, [len(self.symbols)])]
        return _exported("workspace", raw, body)


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


class Callee:
    """A kernel as a function of bare pointers and int64 symbols that returns 0, or -1 where it failed."""

    def __init__(self, function: Any, name: str) -> None:
        self.name = GlobalVar(f"kernel_{name}")
        self.run_name = f"run_{name}"
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

    def run_function(self) -> Any:
        """`run_KERNEL(values, row)`: calls the kernel with the values that the row names. A kernel fails only
        where it gets no scratch memory; the calls after it are harmless then.
        """
        raw = [tirx.Var(name, PointerType(PrimType("void"))) for name in ("values_raw", "row_raw")]
        count = len(self.buffers) + len(self.symbols)
        row, row_declared = _array("row", count, "int32", raw[1])
        values, values_declared = _array("values", 1 << 30, "int64", raw[0])
        words = [values[row[i]] for i in range(count)]
        addresses = [
            tirx.reinterpret(tirx.buffer_data_pointer_type(buffer), tirx.reinterpret("handle", word))
            for buffer, word in zip(self.buffers, words, strict=False)
        ]
        numbers = [
            _as(word, symbol.ty) for symbol, word in zip(self.symbols, words[len(addresses) :], strict=True)
        ]
        failed = tirx.Cast("int64", Call(self.name, [*addresses, *numbers], ret_ty="int32"))
        store = tirx.BufferStore(values, tirx.bitwise_or(values[0], failed), [0])
        return _exported(self.run_name, raw, [row_declared, values_declared, store])

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
