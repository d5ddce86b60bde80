"""A kernel of a step as its launches on the GPU, and the text that NVRTC compiles.

Sizes that a step decides are expressions in text over the kernel's symbols ("(T + 7) // 8"): whole numbers,
+ - * // %, min, max. `runtime/executor/gpu_program.py` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..untyped import tirx

Size = int | str

_C_TYPES = {
    "float32": "float",
    "float16": "u16",
    "bfloat16": "u16",
    "int32": "int",
    "int64": "i64",
    "int8": "i8",
    "uint8": "u8",
}


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: an array [shape] of `dtype` that it reads, or where `written` writes."""

    name: str
    shape: tuple[Size, ...]
    dtype: str
    written: bool = False

    @property
    def c_type(self) -> str:
        return f"{'' if self.written else 'const '}{_C_TYPES[self.dtype]}*"


@dataclass(frozen=True)
class Launch:
    """One launch. `call` is a function template of the headers; `arguments` names what it is given: the
    kernel's own arrays, scratch arrays, and symbols.
    """

    name: str
    call: str
    arguments: tuple[str, ...]
    grid: tuple[Size, Size, Size]
    block: int
    shared: int = 0
    """Bytes of dynamic shared memory."""
    rows: tuple[Size, int, int] | None = None
    """A size, and the least and the most of it at which this launch is made; None for any."""
    source: str = ""
    """The whole function, where it is no call of a template: its name stands as `@`."""
    constants: Mapping[str, int] = field(default_factory=dict)
    """What its template in WGSL knows beside the kernel's parameters."""


@dataclass(frozen=True)
class Code:
    """What one kernel is on the GPU."""

    arguments: tuple[Argument, ...]
    """Inputs, then outputs; what is written in place is an input that is `written`."""
    launches: tuple[Launch, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What the templates know at compile time (`P::name`)."""
    scratch: Mapping[str, tuple[str, Size]] = field(default_factory=dict)
    """Name → C type and bytes of memory that it needs while it runs."""
    symbols: tuple[str, ...] = ()
    """Of its sizes, in the order of a step's numbers; empty: in the order in which shapes name them."""
    warps: bool = False
    """Whether `P` is a template itself, over the warps of a block."""

    def stub(self) -> Any:
        """An empty PrimFunc with these parameters, which stands for the kernel in a module."""
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name("stub")
                symbols: dict[str, Any] = {}
                for a in self.arguments:
                    shape = [_extent(d, symbols) for d in a.shape]
                    T.arg(a.name, T.buffer(tuple(shape), a.dtype, buffer_name=a.name))
                T.evaluate(T.int32(0))
            stub: Any = builder.get()
            return stub.with_attrs({"op_pattern": 8, "llmc.kernel": True})

    def own_symbols(self) -> tuple[str, ...]:
        """Its symbols, in the order in which the arguments' shapes name them."""
        if self.symbols:
            return self.symbols
        found = dict.fromkeys(d for a in self.arguments for d in a.shape if isinstance(d, str))
        return tuple(found)

    def text(self, name: str) -> str:
        """Its functions, `NAME_LAUNCH`."""
        struct = f"{name}_P"
        parts = [_struct(struct, self.parameters, self.warps)] if self.parameters else []
        for launch in self.launches:
            function = f"{name}_{launch.name}"
            if launch.source:
                parts.append(launch.source.replace("@", function))
                continue
            named = [a for a in launch.arguments if a.isidentifier() and a != "nullptr"]
            parameters = ", ".join(f"{self._type(a)} {a}" for a in named)
            call = f"{launch.call.replace('<P', f'<{struct}', 1)}({', '.join(launch.arguments)})"
            parts.append(
                f"KERNEL __launch_bounds__({launch.block}, 1) {function}({parameters}) {{ {call}; }}"
            )
        return "\n".join(parts)

    def _type(self, argument: str) -> str:
        if argument in self.scratch:
            return self.scratch[argument][0]
        for a in self.arguments:
            if a.name == argument:
                return a.c_type
        return "int"


def _extent(d: Size, symbols: dict[str, Any]) -> Any:
    return d if isinstance(d, int) else symbols.setdefault(d, tirx.Var(d, "int32"))


def _struct(name: str, parameters: Mapping[str, Any], warps: bool) -> str:
    fields = ["static constexpr int warps = WARPS;"] if warps else []
    for key, value in parameters.items():
        if isinstance(value, bool):
            fields.append(f"static constexpr bool {key} = {str(value).lower()};")
        elif isinstance(value, int):
            fields.append(f"static constexpr int {key} = {value};")
        elif isinstance(value, float):
            fields.append(f"static constexpr float {key} = {value!r}f;")
        else:
            fields.append(_choice(key, value))
    return f"{'template <int WARPS> ' if warps else ''}struct {name} {{ {' '.join(fields)} }};"


def _choice(name: str, values: Sequence[float]) -> str:
    """A function from a code to its value, whole where all are: selections, which need no memory."""
    whole = all(isinstance(value, int) for value in values)
    texts = [str(value) if whole else f"{float(value)!r}f" for value in values]
    text = texts[-1]
    for code in reversed(range(len(values) - 1)):
        text = f"c == {code} ? {texts[code]} : {text}"
    return f"DEVICE {'int' if whole else 'float'} {name}(u32 c) {{ return {text}; }}"
