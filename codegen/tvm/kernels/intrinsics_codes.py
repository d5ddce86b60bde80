"""Functions in LLVM IR that spread packed codes: bits and halves of bytes to lanes, and tables of 16 values.

A part of `intrinsics.library`.

    llmc_spread_bits   uint8x32 → uint8x64: the bytes twice, the second time with their high halves below
    llmc_halves        uint8x8 → int32x16: the low halves of 8 bytes, then their high halves
    llmc_bytes_NAME    uint8x64 of codes < 16 → uint8x64 of CODEBOOKS[NAME] + 128, for tables of integers
    llmc_floats_NAME   int32x16, whose low 4 bits are codes → float32x16
"""

from __future__ import annotations

import struct

from ....ir.codebooks import CODEBOOKS
from . import intrinsics_arm
from .isa import Isa

_DEFINE = "define linkonce_odr hidden"
_V = "<16 x float>"
_I = "<16 x i32>"
_B = "<64 x i8>"


def _constants(kind: str, values: list[str]) -> str:
    return "<" + ", ".join(f"{kind} {v}" for v in values) + ">"


def _float(value: float) -> str:
    """A float32 as LLVM writes one: the bits of the same number as a double."""
    single = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('Q', struct.pack('d', single))[0]:016X}"


def _mask(start: int, stop: int) -> str:
    return _constants("i32", [str(i) for i in range(start, stop)])


def _spread() -> list[str]:
    twice = _constants("i32", [str(i % 32) for i in range(64)])
    shifts = _constants("i32", ["0"] * 8 + ["4"] * 8)
    eight_twice = _constants("i32", [str(i % 8) for i in range(16)])
    return [
        f"""{_DEFINE} {_B} @llmc_spread_bits(<32 x i8> %v) alwaysinline {{
  %t = shufflevector <32 x i8> %v, <32 x i8> poison, <64 x i32> {twice}
  %w = bitcast {_B} %t to {_I}
  %s = lshr {_I} %w, {shifts}
  %r = bitcast {_I} %s to {_B}
  ret {_B} %r
}}""",
        f"""{_DEFINE} {_I} @llmc_halves(<8 x i8> %v) alwaysinline {{
  %t = shufflevector <8 x i8> %v, <8 x i8> poison, <16 x i32> {eight_twice}
  %w = zext <16 x i8> %t to {_I}
  %s = lshr {_I} %w, {shifts}
  %r = and {_I} %s, splat (i32 15)
  ret {_I} %r
}}""",
    ]


def _selected(kind: str, lanes: int, code: str, table: list[str]) -> list[str]:
    """Instructions for %r = table[code], a tree of selections over the code's bits; splat constants."""
    element, vector = kind, f"<{lanes} x {kind}>"
    integer = f"<{lanes} x {'i8' if lanes == 64 else 'i32'}>"
    small = "i8" if lanes == 64 else "i32"
    lines: list[str] = []
    for bit in range(4):
        lines.append(f"%m{bit} = and {integer} {code}, splat ({small} {1 << bit})")
        lines.append(f"%b{bit} = icmp ne {integer} %m{bit}, zeroinitializer")
    values = [f"splat ({element} {v})" for v in table]
    for bit in range(4):
        chosen: list[str] = []
        for j in range(0, len(values), 2):
            name = "%r" if bit == 3 else f"%s{bit}.{j}"
            lines.append(
                f"{name} = select <{lanes} x i1> %b{bit}, {vector} {values[j + 1]}, {vector} {values[j]}"
            )
            chosen.append(name)
        values = chosen
    return lines


def _byte_table(isa: Isa, name: str) -> list[str]:
    table = [str(int(v) + 128) for v in CODEBOOKS[name]]
    if isa.arm:
        return intrinsics_arm.byte_table(name, table)
    head = f"{_DEFINE} {_B} @llmc_bytes_{name}({_B} %c) alwaysinline {{"
    if isa.vector_bits == 512:
        return [
            head,
            f"  %r = call {_B} @llvm.x86.avx512.pshuf.b.512({_B} {_constants('i8', table * 4)}, {_B} %c)",
            f"  ret {_B} %r\n}}",
        ]
    if isa.vector_bits == 256:
        lines = [head]
        for h in (0, 1):
            part = _mask(32 * h, 32 * h + 32)
            lines.append(f"  %c{h} = shufflevector {_B} %c, {_B} poison, <32 x i32> {part}")
            lines.append(
                f"  %r{h} = call <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8> {_constants('i8', table * 2)}, "
                f"<32 x i8> %c{h})"
            )
        joined = f"  %r = shufflevector <32 x i8> %r0, <32 x i8> %r1, <64 x i32> {_mask(0, 64)}"
        return [*lines, joined, f"  ret {_B} %r\n}}"]
    return [head, *(f"  {line}" for line in _selected("i8", 64, "%c", table)), f"  ret {_B} %r\n}}"]


def _float_table(isa: Isa, name: str) -> list[str]:
    table = [_float(v) for v in CODEBOOKS[name]]
    if isa.arm:
        return intrinsics_arm.float_table(name, table)
    head = f"{_DEFINE} {_V} @llmc_floats_{name}({_I} %i) alwaysinline {{"
    if isa.vector_bits == 512:
        return [
            head,
            f"  %r = call {_V} @llvm.x86.avx512.permvar.sf.512({_V} {_constants('float', table)}, {_I} %i)",
            f"  ret {_V} %r\n}}",
        ]
    if isa.vector_bits == 256:
        lines = [head]
        for h in (0, 1):
            lines.append(f"  %i{h} = shufflevector {_I} %i, {_I} poison, <8 x i32> {_mask(8 * h, 8 * h + 8)}")
            lines.append(f"  %u{h} = and <8 x i32> %i{h}, splat (i32 8)")
            lines.append(f"  %b{h} = icmp ne <8 x i32> %u{h}, zeroinitializer")
            for part, values in (("l", table[:8]), ("h", table[8:])):
                lines.append(
                    f"  %{part}{h} = call <8 x float> @llvm.x86.avx2.permps(<8 x float> "
                    f"{_constants('float', values)}, <8 x i32> %i{h})"
                )
            lines.append(f"  %r{h} = select <8 x i1> %b{h}, <8 x float> %h{h}, <8 x float> %l{h}")
        joined = f"  %r = shufflevector <8 x float> %r0, <8 x float> %r1, <16 x i32> {_mask(0, 16)}"
        return [*lines, joined, f"  ret {_V} %r\n}}"]
    return [head, *(f"  {line}" for line in _selected("float", 16, "%i", table)), f"  ret {_V} %r\n}}"]


_DECLARATIONS = {
    512: [
        f"declare {_B} @llvm.x86.avx512.pshuf.b.512({_B}, {_B})",
        f"declare {_V} @llvm.x86.avx512.permvar.sf.512({_V}, {_I})",
    ],
    256: [
        "declare <32 x i8> @llvm.x86.avx2.pshuf.b(<32 x i8>, <32 x i8>)",
        "declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)",
    ],
}


def codes(isa: Isa) -> list[str]:
    """The functions for a level."""
    declared = intrinsics_arm.TABLE_DECLARATIONS if isa.arm else _DECLARATIONS.get(isa.vector_bits, [])
    lines = [*declared, *_spread()]
    for name, table in CODEBOOKS.items():
        if all(v == int(v) for v in table):
            lines += _byte_table(isa, name)
        lines += _float_table(isa, name)
    return lines
