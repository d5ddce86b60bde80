"""Packed weights as kernels read them: 64 bytes of codes a word, scales and zero points of 16 outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from .builder import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Shape,
    call,
    f32s,
    fma,
    i32s,
    let,
    load_float,
    prefetch,
    prefetch_to_write,
    put,
    register_i32,
    splat,
    vec,
)
from .isa import Isa
from .layout import Plane, QuantLayout
from .linear import store_block

LIFT = float(3 << 22)
"""1.5 · 2^23. Floats between 2^23 and 2^24 are whole numbers, and neighbours differ by 1 as integers too: the
bits of LIFT plus a total below 2^22 are the bits of the float LIFT + total.
"""

_ALL_128 = T.int32(-0x7F7F7F80)
"""Four bytes of 128."""


@dataclass(frozen=True)
class Held:
    """Where results stay that are not yet what a kernel gives: float32 [rows, columns] of this thread. Row t
    is held in t modulo `rows`, and blocks of the weight from `block` on from `column` on.
    """

    buffer: Buffer
    rows: int
    block: Expr
    column: int

    def row(self, row: Expr) -> Expr:
        return T.floormod(row, T.int32(self.rows))


@dataclass(frozen=True)
class Operands:
    """The buffers of one kernel.

    a, sums and a_scale are None where activations are floats, out where results are `held`.
    """

    layout: QuantLayout
    isa: Isa
    a: Buffer
    sums: Buffer
    a_scale: Buffer
    weight: Buffer
    scale: Buffer
    zero_point: Buffer | None
    bias: Buffer | None
    residual: Buffer | None
    out: Buffer
    apart: int = 0
    """How many activations of each row are kept apart, as in `Quantized`."""
    signed: bool = False
    """Whether weights are spread to bytes less their zero points."""
    shifted: bool = False
    """Whether a is uint8: 128 more than the activations; only where `signed`."""
    as_they_lie: bool = False
    """Whether tile registers take weights from where they lie in memory; only where `signed`."""
    paired: bool = False
    """Whether the words of unpacked panels lie two by two, for products of two rows at once."""
    held: Held | None = None
    ahead: int = 2048
    """As in `Schedule`."""
    origin: Expr = 0
    """The block of the weight whose results are the first columns of `out`."""

    def expect(self, row: Expr, block: Expr) -> None:
        """16 outputs of a row will be written: fetch their cache line meanwhile."""
        if self.held is None:
            prefetch_to_write(self.out, row, (block - self.origin) * LANES)

    def expect_residual(self, row: Expr, block: Expr) -> None:
        """The same for what is added to them."""
        if self.residual is not None:
            prefetch(self.residual, row, (block - self.origin) * LANES)

    def write(self, value: Expr, row: Expr, block: Expr) -> None:
        """16 outputs of a row, bias and residual added."""
        if self.held is None:
            column = block - self.origin
            store_block(value, self.out, row, column, self.layout.n, self.bias, self.residual)
            return
        if self.bias is not None:
            value = value + vec(self.bias, block * LANES)
        column = (block - self.held.block) * LANES + self.held.column
        put(self.held.buffer, value, self.held.row(row), column)

    @property
    def corrects(self) -> bool:
        """Whether totals are corrected by a zero point that an operand gives, or minima are added."""
        return self.zero_point is not None and (self.minimum or not self.signed)

    @property
    def minimum(self) -> bool:
        """Whether the zero point is added after scaling."""
        return self.layout.zero_point not in (None, "uint8")

    @property
    def constant(self) -> int:
        """What is to be taken off each code, beside zero points that an operand gives."""
        return self.middle - self.taken

    @property
    def middle(self) -> int:
        """The code of 0, beside zero points that an operand gives."""
        lay = self.layout
        if lay.codebook is not None:
            return 128  # what `llmc_bytes_*` adds
        return 1 << (lay.bits - 1) if lay.zero_point is None else 0

    @property
    def taken(self) -> int:
        """What `dot` itself takes off each byte."""
        return self.isa.dot8_takes if self.dot == "llmc_dot8" else 0

    @property
    def float_correction(self) -> bool:
        """Whether sums and products of a group are exact in float32 (below 2^24)."""
        return self.layout.real_group * 127 * ((1 << self.layout.bits) - 1) < 1 << 24

    @property
    def lifted(self) -> bool:
        """Whether totals are counted from LIFT, which saves their conversion to float.

        They must stay below 2^22, and scale · LIFT must be exact, for which the 11 bits of a scale (19 of one
        of two levels) are few enough. Where a product of 8-bit weights is several instructions, registers are
        short; totals from tile registers (`signed`, not `shifted`) start at zero, but for those of weights as
        they lie.
        """
        lay = self.layout
        levels = 256 if lay.codebook is not None else 1 << lay.bits
        top = max(self.middle, levels - 1 - self.middle)
        if lay.zero_point == "uint8":  # which may be more than a code
            top = 15 if lay.bits <= 4 else 255
        exact = lay.scale_dtype != "float32" or lay.super_group > 0
        pays = self.isa.dot != "maddubs" or self.dot == "llmc_dot4"
        fits = exact and lay.real_group * 127 * top < 1 << 22
        from_zero = self.signed and not self.shifted and not self.as_they_lie
        return self.isa.fma and not self.minimum and not from_zero and fits and pays

    @property
    def dot(self) -> str:
        """The product of bytes: that of nibbles is exact up to 7 bits (2 · 127 · 127 < 2^15)."""
        if self.signed:
            return "llmc_dot_signed"
        return "llmc_dot8" if self.layout.bits == 8 or self.layout.codebook is not None else "llmc_dot4"

    @property
    def narrow(self) -> bool:
        """Whether 8 words' products fit into int16."""
        return self.layout.bits <= 4 and self.layout.codebook is None

    def word(self, row: Expr, index: Expr) -> Expr:
        """Activations 4·index … 4·index+3 of a row, as the int32 that a dot product broadcasts."""
        return T.reinterpret(vec(self.a, row, index * 4, lanes=4), dtype="int32")

    def scales(self, block: Expr, group: Expr) -> Expr:
        return self._floats(self.scale, self.layout.scale_dtype, block, group)

    def _floats(self, buffer: Buffer, dtype: str, block: Expr, group: Expr) -> Expr:
        """Scales or minima of 16 outputs."""
        lay = self.layout
        if not lay.super_group:
            return load_float(buffer, dtype, block, group, 0)
        at, part = T.floordiv(group, lay.per_super), T.floormod(group, lay.per_super)
        bits = T.reinterpret(vec(buffer, block, at, 0, lanes=2 * LANES), dtype="uint16x16")
        whole = T.reinterpret(vec(buffer, block, at, (2 + part) * LANES), dtype="int8x16")
        factor = T.Cast("float32x16", T.Cast("int32x16", whole))
        return let(call("float32x16", "llmc_from_half", bits)) * factor

    def byte_zeros(self, block: Expr, group: Expr) -> Expr:
        """Zero points of 16 outputs, each 4 times, as they lie in a word; zeros where there are minima."""
        if self.zero_point is None or self.minimum:
            return T.broadcast(T.uint8(self.constant), 64)
        return T.reinterpret(self.whole_zeros(block, group) * i32s(0x01010101), dtype="uint8x64")

    def whole_zeros(self, block: Expr, group: Expr) -> Expr:
        """Zero points of 16 outputs, int32."""
        if self.layout.packs_zero_points:
            return call("int32x16", "llmc_halves", vec(self.zero_point, block, group, 0, lanes=8))
        return T.Cast("int32x16", vec(self.zero_point, block, group, 0))

    def zeros(self, block: Expr, group: Expr) -> Expr:
        """Minima; or negative zero points of 16 outputs, float32 or int32 as the correction wants them."""
        lay = self.layout
        if self.minimum:
            return self._floats(self.zero_point, str(lay.zero_point), block, group)
        negative = i32s(0) - self.whole_zeros(block, group)
        return T.Cast("float32x16", negative) if self.float_correction else negative


@dataclass(frozen=True)
class Column:
    """Where the codes of a column are: in that word of all, from bit `bit` of its 32-bit lanes on."""

    group: Expr
    word: Expr
    bit: Expr

    @staticmethod
    def of(lay: QuantLayout, column: Expr) -> Column:
        """`column`: int32, one that there is."""
        return Column(
            let(T.floordiv(column, T.int32(lay.group))),
            let(T.shift_right(column, T.int32(2))),
            let(T.shift_left(T.bitwise_and(column, T.int32(3)), T.int32(3))),
        )


def weight_arguments(kernel: Kernel, lay: QuantLayout) -> tuple[Buffer, Buffer, Buffer | None]:
    """The parameters weight, scale and zero_point of a kernel."""
    return (
        kernel.argument("weight", lay.weight_shape, "uint8"),
        kernel.argument("scale", lay.scale_shape, lay.scale_storage),
        None if lay.zero_storage is None else kernel.argument("zero_point", lay.zero_shape, lay.zero_storage),
    )


def _field(v: Expr, start: int, width: int, to: int) -> Expr:
    """Bits start … start + width - 1 of bytes, moved to bit `to`."""
    if start != to:
        by = T.broadcast(T.uint8(abs(start - to)), 64)
        v = T.shift_right(v, by) if start > to else T.shift_left(v, by)
    if start + width == 8 and to == 0:
        return v
    return T.bitwise_and(v, T.broadcast(T.uint8(((1 << width) - 1) << to), 64))


def pair_steps(layout: QuantLayout) -> int:
    """Steps that hold whole pairs of words: 1 or 2; 0 where a group has an odd number of words."""
    if layout.words % 2 == 0:
        return 1
    return 2 if layout.steps % 2 == 0 else 0


class Packed:
    """Blocks first … first + count - 1, read as they lie in memory."""

    def __init__(self, ops: Operands, first: Expr, count: int) -> None:
        self.ops, self.first, self.count = ops, first, count

    def words(self, group: Expr, step: Expr) -> list[list[Expr]]:
        """The words of one step: [word][block] of uint8x64."""
        blocks = [self._block_words(self.first + c, group, step) for c in range(self.count)]
        return [list(word) for word in zip(*blocks, strict=True)]

    def _block_words(self, block: Expr, group: Expr, step: Expr) -> list[Expr]:
        lay = self.ops.layout
        planes = [self._plane(plane, block, group, step) for plane in lay.planes]
        words: list[Expr] = []
        for parts in zip(*planes, strict=True):
            word = parts[0]
            for part in parts[1:]:
                word = T.bitwise_or(word, part)
            if lay.codebook is not None:
                word = call("uint8x64", f"llmc_bytes_{lay.codebook}", word)
            words.append(let(word) if lay.bits != 8 else word)
        return words

    def _plane(self, plane: Plane, block: Expr, group: Expr, step: Expr) -> list[Expr]:
        """This plane's bits, in their place, of the words of a step."""
        lay = self.ops.layout
        size = 64 * lay.words * plane.width // 8  # bytes of a step
        start = plane.offset + step * size
        if self.ops.ahead:
            # A block is read from its first byte to the last; then the next panel is, past the other blocks
            # of this one. Of several planes each is read group by group.
            unit = 64 if len(lay.planes) == 1 else lay.weight_shape[-1]
            whole = lay.groups * lay.weight_shape[-1]
            ahead = min(max(unit, self.ops.ahead // unit * unit), whole)
            later = let(group * lay.weight_shape[-1] + start + ahead)
            skipped = T.Select(later >= whole, T.int32((self.count - 1) * whole), T.int32(0))
            for v in range(-(-size // 64)):
                prefetch(self.ops.weight, block, T.int32(0), later + skipped + 64 * v)
        if plane.width == 1:
            half = vec(self.ops.weight, block, group, start, lanes=32)
            vectors = [let(call("uint8x64", "llmc_spread_bits", half))]
        else:
            vectors = [
                let(vec(self.ops.weight, block, group, start + 64 * v, lanes=64)) for v in range(size // 64)
            ]
        if plane.width == 8:
            return vectors
        return [
            _field(v, w * plane.width, plane.width, plane.shift) for v in vectors for w in range(plane.words)
        ]

    def scale(self, group: Expr, c: int) -> Expr:
        return self.ops.scales(self.first + c, group)

    def lift(self, group: Expr, c: int) -> Expr:
        """-scale · LIFT, exactly."""
        return self.ops.scales(self.first + c, group) * f32s(-LIFT)

    def zero(self, group: Expr, c: int) -> Expr:
        return self.ops.zeros(self.first + c, group)

    def add_apart(self, totals: list[Expr], row: Expr, columns: Iterable[Expr]) -> list[Expr]:
        """A row's results by those blocks, with the activations that are kept apart times their weights."""
        ops = self.ops
        for at in range(ops.layout.groups, ops.layout.groups + ops.apart):
            column = Column.of(ops.layout, let(T.Cast("int32", ops.sums[row, at])))
            value = let(splat(ops.a_scale[row, at]))
            parts = zip(totals, columns, strict=True)
            totals = [let(fma(value, self._column(column, c), total)) for total, c in parts]
        return totals

    def _column(self, column: Column, c: Expr) -> Expr:
        """16 weights of a column as floats: scale · (code - zero point), or scale · code + minimum, rounded
        once.
        """
        ops, group = self.ops, column.group
        scale, codes = self.scale(group, c), T.Cast("float32x16", self._codes(column, c))
        # As in `_finish_group`, a fused multiply-add with 0 is a rounded product.
        return fma(scale, codes, self.zero(group, c) if ops.minimum else f32s(0))

    def _codes(self, column: Column, c: Expr) -> Expr:
        """16 codes of a column less their zero points, int32."""
        lay, block = self.ops.layout, self.first + c
        word = column.word - column.group * (lay.group // 4)  # of the group
        codes: Expr = None
        for plane in lay.planes:
            size = 8 * plane.width * plane.words  # bytes that hold `plane.words` words
            at = plane.offset + T.floordiv(word, T.int32(plane.words)) * size
            part = vec(self.ops.weight, block, column.group, at, lanes=size)
            if plane.width == 1:
                part = call("uint8x64", "llmc_spread_bits", part)
            first = column.bit + T.floormod(word, T.int32(plane.words)) * plane.width
            bits = _bits(part, let(first), plane.width)
            codes = bits if codes is None else T.bitwise_or(codes, T.shift_left(bits, i32s(plane.shift)))
        if lay.codebook is not None:
            bytes_ = call("uint8x64", f"llmc_bytes_{lay.codebook}", T.reinterpret(codes, dtype="uint8x64"))
            codes = _bits(bytes_, T.int32(0), 8)
        return self._less_zeros(codes, column, c)

    def _less_zeros(self, codes: Expr, column: Column, c: Expr) -> Expr:
        ops = self.ops
        if ops.zero_point is not None and not ops.minimum:
            return codes - ops.whole_zeros(self.first + c, column.group)
        return codes - i32s(ops.middle) if ops.middle else codes


def _bits(word: Expr, first: Expr, width: int) -> Expr:
    """`width` bits from `first` on of 32-bit lanes."""
    lanes = T.shift_right(T.reinterpret(word, dtype="int32x16"), splat(first))
    return T.bitwise_and(lanes, i32s((1 << width) - 1))


class Unpacked(Packed):
    """A panel of weights spread to bytes, scales and zero points widened, in memory of this thread.

    Where `Operands.signed`, the bytes are q - zero_point, and the totals need no correction for each token;
    where activations are a + 128 (`Operands.shifted`), they start at -128 · Σ (q - zero_point).
    """

    def __init__(self, ops: Operands, first: Expr, count: int) -> None:
        super().__init__(ops, first, count)
        lay = ops.layout
        shape: Shape = (count, lay.k_padded // 4, 64)
        each = (lay.groups, count, LANES)
        self.bytes = T.alloc_buffer(shape, "uint8")
        self.wide = T.alloc_buffer(each, "float32")
        self.lifts: Buffer = T.alloc_buffer(each, "float32") if ops.lifted else None
        self.starts: Buffer = T.alloc_buffer(each, "int32") if ops.shifted else None
        self.offset: Buffer = None
        if ops.corrects:
            kind = "float32" if ops.float_correction or ops.minimum else "int32"
            self.offset = T.alloc_buffer(each, kind)
        with T.serial(0, lay.groups) as g:
            for c in range(count):
                put(self.wide, super().scale(g, c), g, c, 0)
                if self.lifts is not None:
                    put(self.lifts, super().lift(g, c), g, c, 0)
                if self.offset is not None:
                    put(self.offset, super().zero(g, c), g, c, 0)
            self._spread(g)

    def _spread(self, g: Expr) -> None:
        """The bytes of a group, and where its totals start."""
        lay, ops = self.ops.layout, self.ops
        columns = range(self.count)
        less = [let(ops.byte_zeros(self.first + c, g)) for c in columns] if ops.signed else []
        sums = [register_i32(i32s(0)) for _ in columns] if ops.shifted else []
        if ops.paired:
            self._spread_pairs(g)
            return
        with T.serial(0, lay.steps) as s:
            for word, blocks in enumerate(super().words(g, s)):
                for c, w in enumerate(blocks):
                    if ops.signed:
                        w = let(w - less[c])
                    if ops.shifted:
                        put(sums[c], call("int32x16", ops.dot, vec(sums[c], 0), w, _ALL_128), 0)
                    put(self.bytes, w, c, self._word(g, s, word), 0, lanes=64)
        start = T.reinterpret(f32s(LIFT), dtype="int32x16") if ops.lifted else i32s(0)
        for c, total in enumerate(sums):
            put(self.starts, start - vec(total, 0), g, c, 0)

    def _spread_pairs(self, g: Expr) -> None:
        """Of each two words, columns 0 … 7 of both, then columns 8 … 15."""
        lay = self.ops.layout
        unit = pair_steps(lay)
        with T.serial(0, lay.steps // unit) as u:
            steps = [u * unit + j for j in range(unit)]
            words = [word for s in steps for word in super(Unpacked, self).words(g, s)]
            for i in range(0, len(words), 2):
                for c, (first, second) in enumerate(zip(words[i], words[i + 1], strict=True)):
                    for j, half in enumerate(("low", "high")):
                        both = call("uint8x64", f"llmc_pair_{half}", first, second)
                        step, word = divmod(i + j, lay.words)
                        put(self.bytes, both, c, self._word(g, steps[step], word), 0, lanes=64)

    def words(self, group: Expr, step: Expr) -> list[list[Expr]]:
        return [
            [let(vec(self.bytes, c, self._word(group, step, word), 0, lanes=64)) for c in range(self.count)]
            for word in range(self.ops.layout.words)
        ]

    def _word(self, group: Expr, step: Expr, word: int) -> Expr:
        lay = self.ops.layout
        return (group * lay.steps + step) * lay.words + word

    def _codes(self, column: Column, c: Expr) -> Expr:
        if self.ops.paired:
            return super()._codes(column, c)
        word = vec(self.bytes, c, column.word, 0, lanes=64)
        if not self.ops.signed:
            return self._less_zeros(_bits(word, column.bit, 8), column, c)
        lanes = T.shift_left(T.reinterpret(word, dtype="int32x16"), splat(T.int32(24) - column.bit))
        return T.shift_right(lanes, i32s(24))

    def start(self, group: Expr, c: int) -> Expr:
        """Where the totals of 16 outputs start; for `Operands.shifted`."""
        return vec(self.starts, group, c, 0)

    def scale(self, group: Expr, c: int) -> Expr:
        return vec(self.wide, group, c, 0)

    def lift(self, group: Expr, c: int) -> Expr:
        return vec(self.lifts, group, c, 0)

    def zero(self, group: Expr, c: int) -> Expr:
        return vec(self.offset, group, c, 0)
