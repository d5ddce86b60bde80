"""Tensor operations without a kernel of ours: TIR functions → WGSL by TVM, a thread an element.

WGSL has no whole numbers of 64 bits: all of a function become 32 (indices of tokens, positions and experts).
Neither has it arrays of truth values, which are arrays of whole numbers (`width_of`), nor everywhere floats
of 16 bits: what is stored so is float32 here.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ....ir.dtypes import itemsize
from ....ir.errors import CompileError
from ..gpu.generic import device_text, generic_code
from ..gpu.source import Code
from ..untyped import tvm
from .text import template

_OURS = {"sin": "sin_of", "cos": "cos_of", "tanh": "safe_tanh", "erf": "erf_of", "pow": "pow_of"}
"""Functions of WGSL that are too coarse, overflow, know no negative numbers or are not there, and ours."""
_MOST_ARRAYS = 24
"""That a kernel binds: of those a driver takes at least so many, where it takes more than WebGPU asks for."""
_HELD = {"int32", "int64", "float32", "float16", "bfloat16"}
"""Dtypes that kernels hold in 32 bits."""
_WORDS = """
abs acos array asin atan atan2 binding bitcast bool builtin ceil clamp cosh exp exp2 f32 floor fma fn for
fract group i32 if infinity inverseSqrt is_nan log log2 max min not_a_number return round select sign sinh
sqrt stage tan trunc u32 while workgroup_size
"""
_KNOWN = frozenset((*_WORDS.split(), *_OURS.values()))
"""What may stand before a bracket: functions of WGSL and ours, types, words of the language."""


def wgsl_generic(function: Any, target: Any) -> Code:
    """See `gpu/generic.py`. Raises CompileError for what WGSL cannot express."""
    return generic_code(narrowed(function), target, _source, width_of)


def width_of(dtype: str) -> int:
    """Bytes of an element between kernels."""
    return 4 if dtype in ("bool", "int64", "float16", "bfloat16") else itemsize(dtype)


def narrowed(function: Any) -> Any:
    """A TIR function with 32 bits for 64 in whole numbers, and for 16 in floats. TVM's own passes narrow
    indices, but no arrays; its Python has no rewriter of expressions, so the text is read back. Constants
    beyond 32 bits become the largest there are. Raises CompileError for numbers of other widths.
    """
    text = function.script()
    strange = set(re.findall(r"\"((?:u?int|float|bfloat)\d+\w*)\"", text)) - _HELD
    if strange:
        raise CompileError(
            f"tvm-webgpu has no tensor operations over {', '.join(sorted(strange))}",
            remedy="compile for tvm-cpu or tvm-cuda",
        )
    text = re.sub(r"T\.int64\((-?\d+)\)", lambda m: f"T.int32({_within_32_bits(int(m[1]))})", text)
    text = text.replace("T.int64(", "T.int32(").replace('"int64"', '"int32"')
    text = re.sub(r'"b?float16"', '"float32"', re.sub(r"T\.b?float16\(", "T.float32(", text))
    text = re.sub(r"T\.float32\((-?[\d.e+-]+)\)", _exact, text)
    return tvm.script.from_source(text.replace("private=True, ", ""))


def _within_32_bits(value: int) -> int:
    return max(-(1 << 31), min((1 << 31) - 1, value))


def _exact(constant: re.Match[str]) -> str:
    """A constant of float32, by its bits where the seven digits that TVM writes are others."""
    value = np.float32(constant[1])
    if np.float32(f"{value:.6e}") == value or not np.isfinite(value):
        return constant[0]
    return f'T.reinterpret(T.int32({int(value.view(np.int32))}), dtype="float32")'


def _source(callee: Any, target: Any) -> str:
    """WGSL of one stage."""
    try:
        text = device_text(callee, target)
    except tvm.error.InternalError as error:
        last = str(error).strip().splitlines()[-1]
        raise CompileError(
            f"WGSL cannot express a tensor operation of this model ({last})",
            remedy="compile for tvm-cpu or tvm-cuda",
        ) from None
    text = text[text.index("@group") :].replace("-2147483648i", "(-2147483647i - 1i)")
    text = _with_tests_of_numbers(_with_numbers_for_truths(text))
    for name, ours in _OURS.items():
        text = re.sub(rf"\b{name}\(", f"{ours}(", text)
    text = re.sub(r"\binff\b", "infinity()", re.sub(r"\bnanf\b", "not_a_number()", text))
    arrays = len(re.findall(r"@binding", text)) - 1
    if arrays > _MOST_ARRAYS:
        raise CompileError(
            f"a tensor operation of this model reads and writes {arrays} arrays, tvm-webgpu's at most "
            f"{_MOST_ARRAYS}",
            remedy="compile for tvm-cpu or tvm-cuda",
        )
    strange = set(re.findall(r"\b([A-Za-z_]\w*)\(", text)) - _KNOWN
    if strange:
        raise CompileError(
            f"WGSL has no function {', '.join(sorted(strange))}", remedy="compile for tvm-cpu or tvm-cuda"
        )
    text = re.sub(r"\bstage\(", "main(", text, count=1)
    helpers = [template("angles")] if "sin_of(" in text or "cos_of(" in text else []
    if any(f"{name}(" in text for name in ("infinity", "not_a_number", "is_nan")):
        helpers.append(template("limits"))
    if any(f"{name}(" in text for name in ("safe_tanh", "erf_of", "pow_of")):
        helpers.append(template("functions"))
    return "\n".join([text, *helpers])


def _with_numbers_for_truths(text: str) -> str:
    """Arrays of truth values, which TVM writes as arrays of i8, as arrays of i32."""
    for name in re.findall(r"(\w+) : array<i8>", text):
        text = text.replace(f"{name} : array<i8>", f"{name} : array<i32>")
        text = re.sub(rf"^(\s*{name}\[.*\] = )(bool\(.*\));$", r"\1i32(\2);", text, flags=re.MULTILINE)
    return text


def _with_tests_of_numbers(text: str) -> str:
    """x != x, which a compiler may take for false, by the bits of x."""
    at = text.find(" != ")
    while at >= 0:
        left, right = _operand(text[:at][::-1], ")("), _operand(text[at + 4 :], "()")
        if left[::-1] == right:
            text = f"{text[: at - len(left)]}is_nan({right}){text[at + 4 + len(right) :]}"
        at = text.find(" != ", at + 1)
    return text


def _operand(text: str, brackets: str) -> str:
    """What stands before the bracket that closes around it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == brackets[0]) - (c == brackets[1])
        if depth < 0 or (depth == 0 and c in " ,;"):
            return text[:i]
    return text
