"""A kernel's code → WGSL, one module a launch, from the templates `*.wgsl`.

Lines of a template that begin with # are for `_expanded`:

    #include NAME      NAME.wgsl, once
    #type NAME TYPE    what the elements of an array are, where it is not the scalar that its dtype says
    #if NAME           a parameter that is not 0; !NAME for one that is; NAME == VALUE for one of several
    #else, #endif

A template has `fn kernel(block: vec3<i32>, thread: i32)`. It finds its arrays under their names, the sizes
of a step in `sizes`, its parameters as constants in capital letters, and for each array `get_NAME(at)`, an
element as float32, be it of 8, 16 or 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....ir.errors import CompileError
from ..gpu.source import Code, Launch

MARK = "//// "
"""What the line begins with that names the function of the module below."""
_SCALARS = {"float32": "f32", "int32": "i32", "int64": "i32"}
"""What an element of an array is; whole numbers of 64 bits are kept as 32 (`generic.py`)."""
_PACKED = {
    "float16": "unpack2x16float({0}[at >> 1])[at & 1]",
    "bfloat16": "bitcast<f32>(({0}[at >> 1] >> u32(16 * (at & 1))) << 16)",
    "uint8": "f32(({0}[at >> 2] >> u32(8 * (at & 3))) & 255)",
}
_RESERVED = frozenset({"active"})
"""Of WGSL; an array of such a name has _ behind it."""


def wgsl_text(code: Code, name: str) -> str:
    """The modules of a kernel, each below a line `//// NAME_LAUNCH`."""
    return "\n".join(f"{MARK}{name}_{launch.name}\n{_module(code, launch)}" for launch in code.launches)


def _module(code: Code, launch: Launch) -> str:
    if launch.source:
        return launch.source
    parameters = {**code.parameters, **launch.constants, "threads": launch.block}
    names = {name.upper(): value for name, value in parameters.items()}
    lines, types = _expanded(launch.call, names, set())
    arrays = [a for a in launch.arguments if a in code.scratch or a in {x.name for x in code.arguments}]
    parts = [_binding(code, name, i, types.get(name)) for i, name in enumerate(arrays)]
    numbers = [a for a in launch.arguments if a not in arrays and a != "nullptr" and not a.isdigit()]
    fields = "".join(f"  {name.partition(':')[0]}: i32,\n" for name in numbers)
    parts.append(f"struct Sizes {{\n{fields}  last: u32\n}}")
    parts.append(f"@group(0) @binding({len(arrays)}) var<uniform> sizes: Sizes;")
    parts += [_constant(name, value) for name, value in names.items() if not isinstance(value, list | str)]
    text = "\n".join(lines)
    for name, value in names.items():
        if isinstance(value, list):
            text = text.replace(f"= {name};", f"= array({', '.join(f'{float(v)!r}f' for v in value)});")
    return "\n".join([*parts, text, _entry(launch), ""])


def _binding(code: Code, name: str, place: int, element: str | None) -> str:
    """The declaration of an array, and the function that reads an element of a packed one."""
    written, dtype = True, "float32"
    for argument in code.arguments:
        if argument.name == name:
            written, dtype = argument.written, argument.dtype
    if dtype not in _SCALARS and dtype not in _PACKED:
        raise CompileError(
            f"tvm-webgpu has no arrays of {dtype}",
            remedy="pass --kv-dtype float16, or compile for tvm-cpu",
        )
    own = f"{name}_" if name in _RESERVED else name
    text = (
        f"@group(0) @binding({place}) var<storage, {'read_write' if written else 'read'}> "
        f"{own}: array<{element or _SCALARS.get(dtype, 'u32')}>;"
    )
    if element is not None:
        return text
    if dtype in _PACKED:
        return f"{text}\nfn get_{name}(at: i32) -> f32 {{ return {_PACKED[dtype].format(own)}; }}"
    return f"{text}\nfn get_{name}(at: i32) -> f32 {{ return f32({own}[at]); }}"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"const {name}: bool = {str(value).lower()};"
    if isinstance(value, int):
        return f"const {name}: i32 = {value};"
    return f"const {name}: f32 = {value!r}f;"


def _entry(launch: Launch) -> str:
    """The entry point. A grid of one axis may go on along the third where it is longer than axes are."""
    block = "vec3<i32>(group)"
    lines: Sequence[str] = ()
    if launch.grid[1:] == (1, 1):
        lines = ["  let at = group.z * many.x + group.x;", "  if (at > sizes.last) { return; }"]
        block = "vec3(i32(at), 0, 0)"
    return "\n".join(
        [
            f"@compute @workgroup_size({launch.block})",
            "fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) many: vec3<u32>,",
            "        @builtin(local_invocation_index) thread: u32) {",
            *lines,
            f"  kernel({block}, i32(thread));",
            "}",
        ]
    )


def template(name: str) -> str:
    return (Path(__file__).parent / f"{name}.wgsl").read_text(encoding="utf-8")


def _expanded(name: str, names: Mapping[str, Any], seen: set[str]) -> tuple[list[str], dict[str, str]]:
    """The lines of a template that its parameters leave, and the types that it names."""
    found: list[str] = []
    types: dict[str, str] = {}
    taken = [True]
    for line in template(name).splitlines():
        word, _, rest = line.partition(" ")
        match word:
            case "#if":
                taken.append(taken[-1] and _holds(rest, names))
                taken.append(
                    taken[-1]
                )  # whether the branch at hand is taken; below it, whether the first was
            case "#else":
                taken[-1] = taken[-3] and not taken[-2]
            case "#endif":
                del taken[-2:]
            case _ if not taken[-1]:
                pass
            case "#include":
                if rest not in seen:
                    seen.add(rest)
                    lines, more = _expanded(rest, names, seen)
                    found += lines
                    types |= more
            case "#type":
                array, _, element = rest.partition(" ")
                types[array] = element
            case _:
                found.append(line)
    return found, types


def _holds(condition: str, names: Mapping[str, Any]) -> bool:
    name, equals, value = condition.partition(" == ")
    if equals:
        return str(names[name]) == value
    return not names[name[1:]] if name.startswith("!") else bool(names[name])
