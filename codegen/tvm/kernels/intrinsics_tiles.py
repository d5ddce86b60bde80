"""LLVM IR for AMX's tile registers (Intel SDM vol. 1, chapter 18), and for the words that they multiply;
`tile_registers` is what kernels call.

LLVM takes the numbers of registers as they stand, and moves no access to memory across these calls.
"""

from __future__ import annotations

_DEFINE = "define linkonce_odr hidden"

_V = "<16 x float>"

_Shape = tuple[str, str]
"""(bytes a row, rows) of a tile: i8 values."""


def _configure(name: str, lines: list[str], shapes: dict[int, _Shape]) -> str:
    """A function of an int32 that sets the shapes of this thread's tiles; `lines` compute what they name."""
    text = [
        f"{_DEFINE} i32 @llmc_tile_configure_{name}(i32 %given) alwaysinline {{",
        *(f"  {line}" for line in lines),
        "  %c = alloca [64 x i8], align 64",
        "  store [64 x i8] zeroinitializer, ptr %c, align 64",
    ]
    # Palette 1; from byte 16 on the tiles' bytes a row, in 16 bits, and from byte 48 on their rows.
    places = {0: "1"}
    for tile, (width, rows) in shapes.items():
        places |= {16 + 2 * tile: width, 48 + tile: rows}
    for place, value in places.items():
        text.append(f"  %p{place} = getelementptr i8, ptr %c, i64 {place}")
        text.append(f"  store i8 {value}, ptr %p{place}")
    return "\n".join([*text, "  call void @llvm.x86.ldtilecfg(ptr %c)", "  ret i32 0", "}"])


# x less the nearest whole number, 0 for infinity; a · 2^b for whole numbers b, 0 where that is too small for
# float32; and 32 neighbours as bfloat16, each rounded to its nearest.
_FLOATS = f"""declare {_V} @llvm.x86.avx512.mask.reduce.ps.512({_V}, i32 immarg, {_V}, i16, i32 immarg)
{_DEFINE} {_V} @llmc_fraction({_V} %a) alwaysinline {{
  %r = call {_V} @llvm.x86.avx512.mask.reduce.ps.512({_V} %a, i32 8, {_V} %a, i16 -1, i32 8)
  ret {_V} %r
}}
declare {_V} @llvm.x86.avx512.mask.scalef.ps.512({_V}, {_V}, {_V}, i16, i32)
{_DEFINE} {_V} @llmc_scale({_V} %a, {_V} %b) alwaysinline {{
  %r = call {_V} @llvm.x86.avx512.mask.scalef.ps.512({_V} %a, {_V} %b, {_V} %a, i16 -1, i32 4)
  ret {_V} %r
}}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512({_V}, {_V})
{_DEFINE} {_V} @llmc_bfloat_pairs({_V} %a, {_V} %b) alwaysinline {{
  %p = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512({_V} %b, {_V} %a)
  %r = bitcast <32 x bfloat> %p to {_V}
  ret {_V} %r
}}"""


def tiles() -> list[str]:
    """`llmc_tile_configure_*`, `_release` (so that the operating system need not save 8 KiB whenever it takes
    the core away), `_zero_R`, `_load_R(from, bytes between rows)`, `_store_R(to, …)`, and products
    `_bytes_C_A_B`, `_unsigned_C_A_B` and `_floats_C_A_B`: C += A · B of signed bytes, of signed and unsigned
    ones, and of pairs of bfloat16.
    """
    calls = [("release", "", "tilerelease()")]
    for r in range(8):
        calls += [
            (f"zero_{r}", "", f"tilezero(i8 {r})"),
            (f"load_{r}", "ptr %p, i64 %s", f"tileloadd64(i8 {r}, ptr %p, i64 %s)"),
            (f"store_{r}", "ptr %p, i64 %s", f"tilestored64(i8 {r}, ptr %p, i64 %s)"),
        ]
    for c in range(4):
        for a, b in ((4, 6), (5, 6), (4, 7), (5, 7)):
            calls += [(f"floats_{c}_{a}_{b}", "", f"tdpbf16ps(i8 {c}, i8 {a}, i8 {b})")]
            calls += [(f"bytes_{c}_{a}_{b}", "", f"tdpbssd(i8 {c}, i8 {a}, i8 {b})")]
            calls += [(f"unsigned_{c}_{a}_{b}", "", f"tdpbsud(i8 {c}, i8 {a}, i8 {b})")]
    multiply = "i8 immarg, i8 immarg, i8 immarg"
    declared = {
        "ldtilecfg": "ptr",
        "tilerelease": "",
        "tilezero": "i8 immarg",
        "tileloadd64": "i8 immarg, ptr, i64",
        "tilestored64": "i8 immarg, ptr, i64",
        "tdpbssd": multiply,
        "tdpbsud": multiply,
        "tdpbf16ps": multiply,
    }
    narrow = ["%depth = trunc i32 %given to i8", "%words = lshr i8 %depth, 2"]
    narrower, whole = ("64", "%rows"), ("64", "16")
    bytes_: dict[int, _Shape] = dict.fromkeys(range(4), whole)
    bytes_ |= {4: ("%depth", "16"), 5: ("%depth", "16"), 6: ("64", "%words"), 7: ("64", "%words")}
    floats: dict[int, _Shape] = {r: narrower if r < 6 else whole for r in range(8)}
    return [
        *(f"declare void @llvm.x86.{name}({types})" for name, types in declared.items()),
        _FLOATS,
        _configure("bytes", narrow, bytes_),
        _configure("floats", ["%rows = trunc i32 %given to i8"], floats),
        *(
            f"{_DEFINE} i32 @llmc_tile_{name}({parameters}) alwaysinline {{\n"
            f"  call void @llvm.x86.{intrinsic}\n  ret i32 0\n}}"
            for name, parameters, intrinsic in calls
        ),
    ]
