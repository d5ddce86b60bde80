"""The functions of `intrinsics` and `intrinsics_codes` whose instructions are aarch64's: products of bytes,
and tables of 16 values. A vector of 16 lanes is four registers of 128 bits.

Instructions: Arm Architecture Reference Manual for A-profile, DDI 0487, chapter C7 (SDOT, USDOT, TBL). In the
products LLVM takes the broadcast of an activation from a lane of a register that holds four.
"""

from __future__ import annotations

from collections.abc import Sequence

from .isa import Isa

_DEFINE = "define linkonce_odr hidden"
_V, _I, _B = "<16 x float>", "<16 x i32>", "<64 x i8>"
_QUARTERS = {_V: "<4 x float>", _I: "<4 x i32>", _B: "<16 x i8>"}
_LANES = {_V: 4, _I: 4, _B: 16}


def _mask(start: int, stop: int) -> str:
    return "<" + ", ".join(f"i32 {i}" for i in range(start, stop)) + ">"


def _constants(kind: str, values: Sequence[str]) -> str:
    return "<" + ", ".join(f"{kind} {v}" for v in values) + ">"


def _by_quarters(kind: str, operands: dict[str, str], body: list[str]) -> list[str]:
    """Instructions that make %r of type `kind` from quarters: `body` makes %r{q} from %NAME{q} of each
    operand (name → type).
    """
    lines: list[str] = []
    for q in range(4):
        for name, whole in operands.items():
            n = _LANES[whole]
            lines.append(
                f"%{name}{q} = shufflevector {whole} %{name}, {whole} poison, "
                f"<{n} x i32> {_mask(n * q, n * q + n)}"
            )
        lines += [line.replace("{q}", str(q)) for line in body]
    n, part = _LANES[kind], _QUARTERS[kind]
    half = f"<{2 * n} x {part.split()[-1][:-1]}>"
    for h in (0, 1):
        lines.append(
            f"%h{h} = shufflevector {part} %r{2 * h}, {part} %r{2 * h + 1}, <{2 * n} x i32> {_mask(0, 2 * n)}"
        )
    return [*lines, f"%r = shufflevector {half} %h0, {half} %h1, <{4 * n} x i32> {_mask(0, 4 * n)}"]


def _function(head: str, lines: Sequence[str]) -> str:
    kind = head[: head.index("@")].strip()
    text = "\n".join(f"  {line}" for line in lines)
    return f"{_DEFINE} {head} alwaysinline {{\n{text}\n  ret {kind} %r\n}}"


def _dot(name: str, body: list[str]) -> str:
    lines = [
        "%xv = insertelement <4 x i32> poison, i32 %x, i64 0",
        "%xs = shufflevector <4 x i32> %xv, <4 x i32> poison, <4 x i32> zeroinitializer",
        "%a = bitcast <4 x i32> %xs to <16 x i8>",
    ]
    lines += _by_quarters(_I, {"acc": _I, "w": _B}, body)
    return _function(f"{_I} @{name}({_I} %acc, {_B} %w, i32 %x)", lines)


def _product(instruction: str, weight: str) -> str:
    operands = f"<4 x i32> %acc{{q}}, <16 x i8> {weight}, <16 x i8> %a"
    return f"%r{{q}} = call <4 x i32> @llvm.aarch64.neon.{instruction}.v4i32.v16i8({operands})"


def dots(isa: Isa) -> list[str]:
    """`llmc_dot4` and `llmc_dot8`. Weights below 128 are signed as well as not; others are made signed by
    taking 128 off them, or are multiplied by the product of mixed signs.
    """
    signed, mixed = _product("sdot", "%w{q}"), _product("usdot", "%w{q}")
    shifted = ["%s{q} = xor <16 x i8> %w{q}, splat (i8 -128)", _product("sdot", "%s{q}")]
    used = ("sdot", "usdot", "usmmla") if isa.pairs_rows else ("sdot",)
    return [
        *(
            f"declare <4 x i32> @llvm.aarch64.neon.{name}.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)"
            for name in used
        ),
        _dot("llmc_dot4", [signed]),
        _dot("llmc_dot8", [mixed] if isa.dot == "usdot" else shifted),
        *(_of_two_rows() if isa.pairs_rows else []),
    ]


def _of_two_rows() -> list[str]:
    """Products of two rows by 16 columns in two halves of 8 columns: USMMLA multiplies two columns of 8
    unsigned bytes by two rows of 8 signed ones, and leaves column by column the sums of both rows.

        llmc_pair_low, _high    two words (4 bytes of 16 columns each) → 8 bytes of columns 0 … 7, 8 … 15
        llmc_mmla               sums of 8 columns and two rows, their weights, 8 bytes of each row → sums
        llmc_row_first, _second sums of columns 0 … 7 and 8 … 15 → those of one row
    """
    halves = [("low", 0), ("high", 8)]
    zipped = [
        _function(
            f"{_B} @llmc_pair_{name}({_B} %v, {_B} %w)",
            [
                f"%x = bitcast {_B} %v to {_I}",
                f"%y = bitcast {_B} %w to {_I}",
                f"%z = shufflevector {_I} %x, {_I} %y, <16 x i32> "
                + _constants("i32", [str(first + i // 2 + 16 * (i % 2)) for i in range(16)]),
                f"%r = bitcast {_I} %z to {_B}",
            ],
        )
        for name, first in halves
    ]
    rows = [
        _function(
            f"{_I} @llmc_row_{name}({_I} %v, {_I} %w)",
            [
                f"%r = shufflevector {_I} %v, {_I} %w, <16 x i32> "
                + _constants("i32", [str(2 * i + odd) for i in range(16)])
            ],
        )
        for name, odd in (("first", 0), ("second", 1))
    ]
    lines = [
        "%p = insertelement <2 x i64> poison, i64 %x, i64 0",
        "%q = insertelement <2 x i64> %p, i64 %y, i64 1",
        "%a = bitcast <2 x i64> %q to <16 x i8>",
        *_by_quarters(_I, {"acc": _I, "w": _B}, [_product("usmmla", "%w{q}")]),
    ]
    return [*zipped, *rows, _function(f"{_I} @llmc_mmla({_I} %acc, {_B} %w, i64 %x, i64 %y)", lines)]


TABLE_DECLARATIONS = [
    "declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)",
    "declare <16 x i8> @llvm.aarch64.neon.tbl4.v16i8(<16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>)",
]


def byte_table(name: str, table: Sequence[str]) -> list[str]:
    """`llmc_bytes_NAME`, of 16 bytes."""
    body = [
        f"%r{{q}} = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> {_constants('i8', table)}, "
        "<16 x i8> %c{q})"
    ]
    return [_function(f"{_B} @llmc_bytes_{name}({_B} %c)", _by_quarters(_B, {"c": _B}, body))]


def float_table(name: str, table: Sequence[str]) -> list[str]:
    """`llmc_floats_NAME`, of 16 floats as LLVM writes them: TBL takes from 64 bytes at most."""
    lines = [
        f"%t{q} = bitcast <4 x float> {_constants('float', table[4 * q : 4 * q + 4])} to <16 x i8>"
        for q in range(4)
    ]
    tables = ", ".join(f"<16 x i8> %t{q}" for q in range(4))
    body = [
        "%l{q} = and <4 x i32> %i{q}, splat (i32 15)",
        # Bytes 4 · code, … + 3.
        f"%m{{q}} = mul <4 x i32> %l{{q}}, splat (i32 {0x04040404})",
        f"%p{{q}} = add <4 x i32> %m{{q}}, splat (i32 {0x03020100})",
        "%b{q} = bitcast <4 x i32> %p{q} to <16 x i8>",
        f"%x{{q}} = call <16 x i8> @llvm.aarch64.neon.tbl4.v16i8({tables}, <16 x i8> %b{{q}})",
        "%r{q} = bitcast <16 x i8> %x{q} to <4 x float>",
    ]
    lines += _by_quarters(_V, {"i": _I}, body)
    return [_function(f"{_V} @llmc_floats_{name}({_I} %i)", lines)]
