"""A graph → the text of its CUDA kernels, and the program that a step runs: which kernels, over what memory.

The program is data (`targets/tvm-cuda/program.json`); `runtime/executor/gpu_program.py` runs it:

    symbols   dimensions that a step's inputs have
    slots     bytes of each place for intermediate results: the largest of some sizes over the symbols
    numbers   sizes over the symbols that kernels want
    kernels   name, own symbols, scratch memory, launches (`source.py`)
    calls     [kernel, arrays, sizes]: an array is the number of a step's argument, or -1 - slot; a size is
              the number of a symbol, or past these of `numbers`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....ir.core import Graph
from ....ir.dtypes import itemsize
from ..optimize import fuse, generic_functions
from ..step import Reader, Writer, outputs_of, symbols_of
from ..untyped import tirx, tvm
from .generic import generic_code
from .lower import CudaLowering
from .sizes import text_of
from .source import Code

_CUDA = {
    "kind": "cuda",
    "arch": "sm_80",
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
"""What TVM's code generator is told; its text is the same for all architectures from this one on."""


@dataclass(frozen=True)
class Language:
    """What kernels are written in."""

    target: Mapping[str, Any]
    """What TVM's code generator is told."""
    lowering: Callable[[Graph], CudaLowering]
    generic: Callable[[Any, Any], Code]
    """A TIR function, and the target → its code."""
    text: Callable[[Code, str], str]
    """A kernel's code and name → the text of its launches."""
    width: Callable[[str], int] = itemsize
    """Bytes of an element of a dtype between kernels."""


CUDA = Language(_CUDA, CudaLowering, generic_code, Code.text)


@dataclass(frozen=True)
class Program:
    """What a step runs."""

    text: str
    """Of all kernels; CUDA C++ without what stands before them (`headers.py`)."""
    entry: Mapping[str, Any]
    arguments: tuple[str, ...]


def make_program(graph: Graph, language: Language = CUDA) -> Program:
    """The program of a legalized graph. Raises UnsupportedError for an op without emitter."""
    lowering = language.lowering(graph)
    lowered = lowering.run()
    module = fuse(lowered.module, dict(language.target))
    target = tvm.target.Target(dict(language.target), host={"kind": "llvm"})
    codes = dict(lowering.codes)
    for gv, function in generic_functions(module).items():
        codes[gv.name_hint] = language.generic(function, target)
    read, main = Reader(module).read()
    variables = {name: tirx.Var(name, "int64") for name in lowered.symbols}
    rename = {v: variables[v.name] for v in symbols_of(main)}
    count = len(main.params) + len(outputs_of(main)) + 1
    writer = Writer(read, [variables[name] for name in lowered.symbols], rename, count, language.width)
    rows = writer.rows(module)
    names = list(dict.fromkeys(call.function.name_hint for call in read.calls))
    calls: list[list[Any]] = []
    for call, (_, row) in zip(read.calls, rows, strict=True):
        kernel = names.index(call.function.name_hint)
        arrays, sizes = row[: len(call.operands)], row[len(call.operands) :]
        calls.append(
            [
                kernel,
                [_array(a, writer, len(variables)) for a in arrays],
                [_number(s, writer, len(variables)) for s in sizes],
            ]
        )
    arguments = [*lowered.inputs, *(f"weight:{name}" for name in lowered.weights)]
    arguments += [*(f"output:{name}" for name in lowered.outputs)]
    entry = {
        "symbols": list(lowered.symbols),
        "slots": [[text_of(size) for size in slot.sizes] for slot in writer.plan.slots],
        "numbers": [text_of(number) for number in writer.numbers],
        "kernels": [_kernel(name, codes[name]) for name in names],
        "calls": calls,
    }
    text = "\n".join(language.text(codes[name], name) for name in names)
    return Program(text, entry, tuple(arguments))


def _array(place: int, writer: Any, symbols: int) -> int:
    """The number of an argument, or -1 - slot, of a place among a step's values (`step.py`)."""
    return place - 1 - symbols if place < writer.slots else -1 - (place - writer.slots)


def _number(place: int, writer: Any, symbols: int) -> int:
    """The number of a symbol, or past these of a size, of a place among a step's values."""
    if place <= symbols:
        return place - 1
    return symbols + place - writer.slots - len(writer.plan.slots)


def _kernel(name: str, code: Code) -> dict[str, Any]:
    return {
        "name": name,
        "symbols": list(code.own_symbols()),
        "scratch": [str(size) for _, size in code.scratch.values()],
        "launches": [
            {
                "function": f"{name}_{launch.name}",
                "arguments": [
                    _given(a, code) for a in launch.arguments if a != "nullptr" and not a.isdigit()
                ],
                "grid": [str(size) for size in launch.grid],
                "block": launch.block,
                "shared": launch.shared,
                **({"rows": list(launch.rows)} if launch.rows else {}),
            }
            for launch in code.launches
        ],
    }


def _given(argument: str, code: Code) -> list[Any]:
    """What a launch passes: an array or a piece of scratch memory by its number, a symbol by its number as
    int32 or int64.
    """
    name, _, dtype = argument.partition(":")
    arrays = [a.name for a in code.arguments]
    if not dtype and name in arrays:
        return ["array", arrays.index(name)]
    if not dtype and name in code.scratch:
        return ["scratch", list(code.scratch).index(name)]
    return [dtype or "int32", code.own_symbols().index(name)]
