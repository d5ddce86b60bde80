"""Small functions in LLVM IR that the kernels call: what TIR cannot say, or says differently on each machine.

All work on vectors of 16 lanes and are inlined. They are the only place where levels differ in
meaning-bearing code: `llmc_fma` rounds once where the machine can, and `llmc_dot*` adds 4 products of bytes
in the way that the level offers (exactly on each; `Operands.taken` says where `llmc_dot8` takes 128 off each
weight). Sums across lanes add in a fixed tree, so that they are the same on all levels.
"""

from __future__ import annotations

from functools import cache

from . import intrinsics_arm
from .intrinsics_codes import codes
from .intrinsics_tiles import tiles
from .isa import Isa, get_isa

_DEFINE = "define linkonce_odr hidden"
_V = "<16 x float>"
_I = "<16 x i32>"


def _lanes(indices: list[int]) -> str:
    return "<" + ", ".join(f"i32 {i}" for i in indices) + ">"


def _across(name: str, combine: list[str]) -> str:
    """A reduction of 16 lanes of float by halves.

    `combine` are instructions that make %R from %A and %B (all {vector}).
    """
    lines, value = [f"{_DEFINE} float @{name}({_V} %v) alwaysinline {{"], "%v"
    for step in (8, 4, 2, 1):
        moved = f"%m{step}"
        mask = _lanes([(i + step) % 16 for i in range(16)])
        lines.append(f"  {moved} = shufflevector {_V} {value}, {_V} poison, <16 x i32> {mask}")
        names = {"A": value, "B": moved, "R": f"%r{step}", "C": f"%c{step}", "vector": _V}
        lines += ["  " + text.format(**names) for text in combine]
        value = f"%r{step}"
    return "\n".join([*lines, f"  %out = extractelement {_V} {value}, i64 0", "  ret float %out", "}"])


def _combine(name: str, out: str, a: str, b: str) -> list[str]:
    """`out` = a + b or the larger of both, in the form that `_across` uses."""
    if name == "sum":
        return [f"{out} = fadd {_V} {a}, {b}"]
    bit = out.replace("%", "%c.")
    return [f"{bit} = fcmp ogt {_V} {a}, {b}", f"{out} = select <16 x i1> {bit}, {_V} {a}, {_V} {b}"]


def _of_four(name: str, values: list[str], tag: str) -> tuple[list[str], str]:
    """Instructions that reduce four vectors at once; lanes 0, 2, 4 and 6 of the result belong to vectors 0 …
    3.

    Halves of two vectors are put side by side and combined once. Each vector's lanes are added in the pairs
    of `_across`.
    """

    def both(out: str, a: str, b: str, left: list[int], right: list[int]) -> list[str]:
        lines = [
            f"{out}l = shufflevector {_V} {a}, {_V} {b}, <16 x i32> {_lanes(left)}",
            f"{out}r = shufflevector {_V} {a}, {_V} {b}, <16 x i32> {_lanes(right)}",
        ]
        return lines + _combine(name, out, f"{out}l", f"{out}r")

    low, high = list(range(8)), list(range(8, 16))
    lines = both(f"%{tag}a", values[0], values[1], low + [16 + i for i in low], high + [16 + i for i in high])
    lines += both(
        f"%{tag}b", values[2], values[3], low + [16 + i for i in low], high + [16 + i for i in high]
    )
    # a = 8 lanes of vector 0, then 8 of vector 1; the quarters of 0, 1, 2, 3 come to stand in order.
    first = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]
    lines += both(f"%{tag}q", f"%{tag}a", f"%{tag}b", first, [i + 4 for i in first])
    pairs = [4 * (i // 2 % 4) + i % 2 for i in range(16)]
    lines += both(f"%{tag}d", f"%{tag}q", "poison", pairs, [i + 2 for i in pairs])
    lines += both(f"%{tag}s", f"%{tag}d", "poison", list(range(16)), [i ^ 1 for i in range(16)])
    return lines, f"%{tag}s"


def _many(name: str, count: int) -> str:
    """`count` vectors (a multiple of 4, at most 16) → one, lane i of which is the reduction of vector i;
    others 0.
    """
    lines: list[str] = []
    quads: list[str] = []
    for j in range(0, count, 4):
        more, result = _of_four(name, [f"%v{i}" for i in range(j, j + 4)], f"g{j}")
        lines += more
        quads.append(result)
    value = "zeroinitializer"
    for j, quad in enumerate(quads):
        mask = [16 + 2 * (i - 4 * j) if i // 4 == j else i for i in range(16)]
        lines.append(f"%o{j} = shufflevector {_V} {value}, {_V} {quad}, <16 x i32> {_lanes(mask)}")
        value = f"%o{j}"
    arguments = ", ".join(f"{_V} %v{i}" for i in range(count))
    body = "\n".join(f"  {line}" for line in lines)
    return f"{_DEFINE} {_V} @llmc_{name}_{count}({arguments}) alwaysinline {{\n{body}\n  ret {_V} {value}\n}}"


def _reduction_i32(name: str, operation: str) -> str:
    reduce = f"@llvm.vector.reduce.{operation}.v16i32({_I}"
    return f"""declare i32 {reduce})
{_DEFINE} i32 @llmc_{name}_i32({_I} %v) alwaysinline {{
  %r = call i32 {reduce} %v)
  ret i32 %r
}}"""


def _reductions() -> list[str]:
    return [
        _across("llmc_sum", ["{R} = fadd {vector} {A}, {B}"]),
        _across(
            "llmc_max",
            ["{C} = fcmp ogt {vector} {A}, {B}", "{R} = select <16 x i1> {C}, {vector} {A}, {vector} {B}"],
        ),
        # Integers are the same in any order.
        *(_reduction_i32(name, operation) for name, operation in (("sum", "add"), ("max", "smax"))),
    ]


def _fma(isa: Isa) -> list[str]:
    texts: list[str] = []
    for name, kind, suffix in (("llmc_fma", _V, "v16f32"), ("llmc_fma1", "float", "f32")):
        head = f"{_DEFINE} {kind} @{name}({kind} %a, {kind} %b, {kind} %c) alwaysinline {{"
        if isa.fma:
            body = f"  %r = call {kind} @llvm.fma.{suffix}({kind} %a, {kind} %b, {kind} %c)"
            texts.append(f"declare {kind} @llvm.fma.{suffix}({kind}, {kind}, {kind})")
        else:
            body = f"  %p = fmul {kind} %a, %b\n  %r = fadd {kind} %p, %c"
        texts.append(f"{head}\n{body}\n  ret {kind} %r\n}}")
    return texts


def _round() -> str:
    """To the nearest integer, ties to even, for |x| < 2^22: beside 1.5 · 2^23 there are no bits below 1."""
    magic = f"splat (float {float(3 << 22)!r})"
    return f"""{_DEFINE} {_V} @llmc_round({_V} %x) alwaysinline {{
  %s = fadd {_V} %x, {magic}
  %r = fsub {_V} %s, {magic}
  ret {_V} %r
}}"""


def _hadamard() -> str:
    """16 lanes times Sylvester's matrix of that order: sums and differences of lanes 1, 2, 4 and 8 apart."""
    lines, value = [f"{_DEFINE} {_V} @llmc_hadamard16({_V} %v) alwaysinline {{"], "%v"
    for step in (1, 2, 4, 8):
        mask = _lanes([i ^ step for i in range(16)])
        signs = ", ".join(f"float {-1.0 if i & step else 1.0}" for i in range(16))
        lines.append(f"  %m{step} = shufflevector {_V} {value}, {_V} poison, <16 x i32> {mask}")
        lines.append(f"  %r{step} = call {_V} @llmc_fma({_V} {value}, {_V} <{signs}>, {_V} %m{step})")
        value = f"%r{step}"
    return "\n".join([*lines, f"  ret {_V} {value}", "}"])


def _transpose() -> str:
    """16 rows of 16 words at one place become columns at another: words 8, 4, 2 and 1 apart change places."""
    w, rows = "<16 x i32>", [f"%r{i}" for i in range(16)]
    lines = [f"{_DEFINE} i32 @llmc_transpose_words(ptr %from, ptr %to) alwaysinline {{"]
    for i, row in enumerate(rows):
        lines.append(f"  %f{i} = getelementptr i8, ptr %from, i64 {64 * i}")
        lines.append(f"  {row} = load {w}, ptr %f{i}, align 4")
    for step in (8, 4, 2, 1):
        lower = _lanes([16 + lane - step if lane & step else lane for lane in range(16)])
        upper = _lanes([16 + lane if lane & step else lane + step for lane in range(16)])
        for i in range(16):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = f"{a}.{step}", f"{b}.{step}"
                lines.append(f"  {rows[i]} = shufflevector {w} {a}, {w} {b}, <16 x i32> {lower}")
                lines.append(f"  {rows[i + step]} = shufflevector {w} {a}, {w} {b}, <16 x i32> {upper}")
    for i, row in enumerate(rows):
        lines.append(f"  %t{i} = getelementptr i8, ptr %to, i64 {64 * i}")
        lines.append(f"  store {w} {row}, ptr %t{i}, align 4")
    return "\n".join([*lines, "  ret i32 0", "}"])


# TIR would simplify x + c - c.
_ADD = f"""{_DEFINE} {_V} @llmc_add({_V} %x, {_V} %y) alwaysinline {{
  %r = fadd {_V} %x, %y
  ret {_V} %r
}}"""


def _prefetch(name: str, write: int, cache: int = 1) -> str:
    """To the nearest cache (1) or to the second (2); LLVM counts from the other end."""
    return f"""{_DEFINE} i32 @{name}(ptr %p) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %p, i32 {write}, i32 {4 - cache}, i32 1)
  ret i32 0
}}"""


def _prefetches(isa: Isa) -> list[str]:
    return [
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        _prefetch("llmc_prefetch", 0, isa.fetched_to),
        _prefetch("llmc_prefetch_second", 0, 2),
        _prefetch("llmc_prefetch_to_write", 1),
    ]


_HALF_HARDWARE = f"""{_DEFINE} {_V} @llmc_from_half(<16 x i16> %h) alwaysinline {{
  %x = bitcast <16 x i16> %h to <16 x half>
  %r = fpext <16 x half> %x to {_V}
  ret {_V} %r
}}
{_DEFINE} <16 x i16> @llmc_to_half({_V} %x) alwaysinline {{
  %h = fptrunc {_V} %x to <16 x half>
  %r = bitcast <16 x half> %h to <16 x i16>
  ret <16 x i16> %r
}}"""

# Without hardware LLVM would call a function of the compiler's runtime library, which is not linked. From
# half: the exponent is moved by multiplying with 2^112, which is right for subnormal numbers too. To half:
# the float's own rounding is made to happen at the right bit by adding a power of two (subnormal), or the
# tie-to-even carry is added.
_HALF_PLAIN = f"""{_DEFINE} {_V} @llmc_from_half(<16 x i16> %h) alwaysinline {{
  %w = zext <16 x i16> %h to {_I}
  %m = and {_I} %w, splat (i32 32767)
  %s = shl {_I} %m, splat (i32 13)
  %f = bitcast {_I} %s to {_V}
  %n = fmul {_V} %f, splat (float 0x46F0000000000000)
  %b = bitcast {_V} %n to {_I}
  %special = icmp ugt {_I} %m, splat (i32 31743)
  %e = or {_I} %s, splat (i32 2139095040)
  %v = select <16 x i1> %special, {_I} %e, {_I} %b
  %hi = and {_I} %w, splat (i32 32768)
  %sign = shl {_I} %hi, splat (i32 16)
  %o = or {_I} %v, %sign
  %r = bitcast {_I} %o to {_V}
  ret {_V} %r
}}
{_DEFINE} <16 x i16> @llmc_to_half({_V} %x) alwaysinline {{
  %w = bitcast {_V} %x to {_I}
  %m = and {_I} %w, splat (i32 2147483647)
  %a = bitcast {_I} %m to {_V}
  %small = fadd {_V} %a, splat (float 5.000000e-01)
  %sb = bitcast {_V} %small to {_I}
  %sub = sub {_I} %sb, splat (i32 1056964608)
  %q = lshr {_I} %m, splat (i32 13)
  %odd = and {_I} %q, splat (i32 1)
  %c1 = add {_I} %m, %odd
  %c2 = add {_I} %c1, splat (i32 -939520001)
  %norm = lshr {_I} %c2, splat (i32 13)
  %tiny = icmp ult {_I} %m, splat (i32 947912704)
  %v1 = select <16 x i1> %tiny, {_I} %sub, {_I} %norm
  %big = icmp ugt {_I} %m, splat (i32 1199566847)
  %v2 = select <16 x i1> %big, {_I} splat (i32 31744), {_I} %v1
  %nan = icmp ugt {_I} %m, splat (i32 2139095040)
  %v3 = select <16 x i1> %nan, {_I} splat (i32 32256), {_I} %v2
  %hs = lshr {_I} %w, splat (i32 16)
  %sign = and {_I} %hs, splat (i32 32768)
  %o = or {_I} %v3, %sign
  %r = trunc {_I} %o to <16 x i16>
  ret <16 x i16> %r
}}"""


# To the nearest, ties to even; a NaN stays one, its payload cut off.
_TO_BFLOAT = f"""{_DEFINE} <16 x i16> @llmc_to_bfloat({_V} %x) alwaysinline {{
  %w = bitcast {_V} %x to {_I}
  %u = lshr {_I} %w, splat (i32 16)
  %odd = and {_I} %u, splat (i32 1)
  %c1 = add {_I} %w, splat (i32 32767)
  %c2 = add {_I} %c1, %odd
  %near = lshr {_I} %c2, splat (i32 16)
  %quiet = or {_I} %u, splat (i32 64)
  %nan = fcmp uno {_V} %x, %x
  %v = select <16 x i1> %nan, {_I} %quiet, {_I} %near
  %r = trunc {_I} %v to <16 x i16>
  ret <16 x i16> %r
}}"""


# Products of pairs of bfloat16, the odd ones added first (Intel SDM vol. 2, VDPBF16PS: each sum is rounded to
# the nearest, numbers below the normal ones are zeros); and 16 floats as 8 words of two neighbours.
_BFLOAT_WORDS = f"""declare {_V} @llvm.x86.avx512bf16.dpbf16ps.512({_V}, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512({_V})
{_DEFINE} {_V} @llmc_dot_bfloat({_V} %acc, {_V} %x, {_V} %y) alwaysinline {{
  %a = bitcast {_V} %x to <32 x bfloat>
  %b = bitcast {_V} %y to <32 x bfloat>
  %r = call {_V} @llvm.x86.avx512bf16.dpbf16ps.512({_V} %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret {_V} %r
}}
{_DEFINE} <8 x float> @llmc_bfloat_words({_V} %x) alwaysinline {{
  %h = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512({_V} %x)
  %r = bitcast <16 x bfloat> %h to <8 x float>
  ret <8 x float> %r
}}"""


def _split_dot(name: str, lines: list[str]) -> str:
    """A dot function that works on two halves of 8 lanes: `lines` make %r{{h}} from %acc{{h}}, %w{{h}} and
    %a.
    """
    text = [
        f"{_DEFINE} {_I} @{name}({_I} %acc, <64 x i8> %w, i32 %x) alwaysinline {{",
        "  %xv = insertelement <8 x i32> poison, i32 %x, i64 0",
        "  %xs = shufflevector <8 x i32> %xv, <8 x i32> poison, <8 x i32> zeroinitializer",
        "  %a = bitcast <8 x i32> %xs to <32 x i8>",
    ]
    for h in (0, 1):
        words, parts = _lanes(list(range(8 * h, 8 * h + 8))), _lanes(list(range(32 * h, 32 * h + 32)))
        text.append(f"  %acc{h} = shufflevector {_I} %acc, {_I} poison, <8 x i32> {words}")
        text.append(f"  %w{h} = shufflevector <64 x i8> %w, <64 x i8> poison, <32 x i32> {parts}")
        text += ["  " + line.replace("{h}", str(h)) for line in lines]
    joined = _lanes(list(range(16)))
    text.append(f"  %r = shufflevector <8 x i32> %r0, <8 x i32> %r1, <16 x i32> {joined}")
    return "\n".join([*text, f"  ret {_I} %r", "}"])


_VNNI512 = f"""declare {_I} @llvm.x86.avx512.vpdpbusd.512({_I}, <64 x i8>, <64 x i8>)
{_DEFINE} {_I} @NAME({_I} %acc, <64 x i8> %w, i32 %x) alwaysinline {{
  %xv = insertelement {_I} poison, i32 %x, i64 0
  %xs = shufflevector {_I} %xv, {_I} poison, <16 x i32> zeroinitializer
  %a = bitcast {_I} %xs to <64 x i8>
  %r = call {_I} @llvm.x86.avx512.vpdpbusd.512({_I} %acc, <64 x i8> %w, <64 x i8> %a)
  ret {_I} %r
}}"""

# The same of bytes with a sign, w, and bytes without, x.
_SIGNED = {"%w, <64 x i8> %a": "%a, <64 x i8> %w", "%w{h}, <32 x i8> %a": "%a, <32 x i8> %w{h}"}

_VNNI256 = [
    "%r{h} = call <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32> %acc{h}, <32 x i8> %w{h}, <32 x i8> %a)"
]

_MADD_DECLARATIONS = """declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8>, <32 x i8>)
declare <32 x i8> @llvm.abs.v32i8(<32 x i8>, i1)"""

# Two products of a 4-bit and an 8-bit number fit into int16, so the saturating pmaddubsw is exact.
_MADD4 = [
    "%p{h} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %w{h}, <32 x i8> %a)",
    "%s{h} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %p{h}, <16 x i16> splat (i16 1))",
    "%r{h} = add <8 x i32> %acc{h}, %s{h}",
]

# The same with sums kept in int16, 8 of which are the most that fit (8 · 2 · 15 · 127 < 2^15), and their
# widening.
_MADD4_NARROW = [
    "%p{h} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %w{h}, <32 x i8> %a)",
    "%n{h} = bitcast <8 x i32> %acc{h} to <16 x i16>",
    "%s{h} = add <16 x i16> %n{h}, %p{h}",
    "%r{h} = bitcast <16 x i16> %s{h} to <8 x i32>",
]
_WIDEN = [
    "%n{h} = bitcast <32 x i8> %w{h} to <16 x i16>",
    "%s{h} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %n{h}, <16 x i16> splat (i16 1))",
    "%r{h} = add <8 x i32> %acc{h}, %s{h}",
]

# The same of an 8-bit weight less 128: its magnitude by the activation, which is given the weight's sign, so
# that 2 · 128 · 127 < 2^15 is the most.
_MADD8 = [
    "%u{h} = xor <32 x i8> %w{h}, splat (i8 -128)",
    "%m{h} = call <32 x i8> @llvm.abs.v32i8(<32 x i8> %u{h}, i1 false)",
    "%g{h} = call <32 x i8> @llvm.x86.avx2.psign.b(<32 x i8> %a, <32 x i8> %u{h})",
    "%p{h} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %m{h}, <32 x i8> %g{h})",
    "%s{h} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %p{h}, <16 x i16> splat (i16 1))",
    "%r{h} = add <8 x i32> %acc{h}, %s{h}",
]

# x, of which LLVM then knows nothing: it unrolls no loop that ends there, and takes no two reads for one.
_OPAQUE = f"""{_DEFINE} i32 @llmc_opaque(i32 %x) alwaysinline {{
  %r = call i32 asm "", "=r,0"(i32 %x)
  ret i32 %r
}}"""


def _signed(text: str) -> str:
    for old, new in _SIGNED.items():
        text = text.replace(old, new)
    return text


def _plain_dot(name: str) -> str:
    lines = [
        f"{_DEFINE} {_I} @{name}({_I} %acc, <64 x i8> %w, i32 %x) alwaysinline {{",
        "  %xv = insertelement <16 x i32> poison, i32 %x, i64 0",
        "  %xs = shufflevector <16 x i32> %xv, <16 x i32> poison, <16 x i32> zeroinitializer",
        "  %ww = bitcast <64 x i8> %w to <16 x i32>",
    ]
    value = "%acc"
    for j in range(4):
        lines += [
            f"  %wl{j} = lshr {_I} %ww, splat (i32 {8 * j})",
            f"  %w{j} = and {_I} %wl{j}, splat (i32 255)",
            f"  %xl{j} = shl {_I} %xs, splat (i32 {24 - 8 * j})",
            f"  %x{j} = ashr {_I} %xl{j}, splat (i32 24)",
            # At most 8 bits by 8 bits: 16-bit products, which LLVM then does with pmaddwd.
            f"  %p{j} = mul nsw {_I} %w{j}, %x{j}",
            f"  %s{j} = add {_I} {value}, %p{j}",
        ]
        value = f"%s{j}"
    return "\n".join([*lines, f"  ret {_I} {value}", "}"])


def _dots(isa: Isa) -> list[str]:
    names = ("llmc_dot4", "llmc_dot8")
    match isa.dot:
        case "vnni512":
            declaration, _, body = _VNNI512.partition("\n")
            signed = _signed(body.replace("NAME", "llmc_dot_signed"))
            return [declaration, *(body.replace("NAME", name) for name in names), signed]
        case "vnni256":
            declaration = "declare <8 x i32> @llvm.x86.avx512.vpdpbusd.256(<8 x i32>, <32 x i8>, <32 x i8>)"
            signed = _split_dot("llmc_dot_signed", [_signed(line) for line in _VNNI256])
            return [declaration, *(_split_dot(name, _VNNI256) for name in names), signed]
        case "maddubs":
            functions = {
                names[0]: _MADD4,
                names[1]: _MADD8,
                "llmc_narrow4": _MADD4_NARROW,
                "llmc_widen": _WIDEN,
            }
            return [
                _MADD_DECLARATIONS,
                *(_split_dot(name, lines) for name, lines in functions.items()),
            ]
        case "sdot" | "usdot":
            return intrinsics_arm.dots(isa)
        case _:
            return [_plain_dot(name) for name in names]


@cache
def library(isa_name: str) -> str:
    """LLVM IR text of all functions for a level."""
    isa = get_isa(isa_name)
    halves = _HALF_HARDWARE if isa.half else _HALF_PLAIN
    many = [_many(name, count) for name in ("sum", "max") for count in (4, 8, 12, 16)]
    others = (_round(), _hadamard(), _transpose(), _ADD, _OPAQUE, *_prefetches(isa), halves, _TO_BFLOAT)
    registers = tiles() if isa.tiles else []
    words = [_BFLOAT_WORDS] if isa.bfloat else []
    return "\n".join(
        [*_fma(isa), *_reductions(), *many, *others, *_dots(isa), *codes(isa), *registers, *words]
    )
