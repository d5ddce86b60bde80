"""Types of IR values: a dtype, a shape of integers and symbolic dimensions, and (for weights) how they are
quantized.

A symbolic dimension is a polynomial with integer coefficients over named, non-negative symbols ("T" tokens,
"B" sequences, ...). Two dimensions are equal exactly when their polynomials are; nothing is assumed about how
large a symbol is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import CompileError

Monomial = tuple[str, ...]  # sorted symbol names, repeated for powers; () is the constant term


@dataclass(frozen=True)
class DimExpr:
    """A non-constant polynomial.

    `terms` is sorted and holds no zero coefficient; build one with `sym` or arithmetic.
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def make(terms: Mapping[Monomial, int]) -> Dim:
        kept = {m: c for m, c in terms.items() if c}
        if not kept:
            return 0
        if len(kept) == 1 and () in kept:
            return kept[()]
        return DimExpr(tuple(sorted(kept.items(), key=lambda item: (-len(item[0]), item[0]))))

    def __add__(self, other: Dim) -> Dim:
        total = dict(self.terms)
        for m, c in _terms(other):
            total[m] = total.get(m, 0) + c
        return DimExpr.make(total)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return DimExpr.make({m: -c for m, c in self.terms})

    def __sub__(self, other: Dim) -> Dim:
        return self + (-other)

    def __rsub__(self, other: Dim) -> Dim:
        return (-self) + other

    def __mul__(self, other: Dim) -> Dim:
        total: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in _terms(other):
                m = tuple(sorted(m1 + m2))
                total[m] = total.get(m, 0) + c1 * c2
        return DimExpr.make(total)

    __rmul__ = __mul__

    def symbols(self) -> set[str]:
        return {s for m, _ in self.terms for s in m}

    def substitute(self, values: Mapping[str, Dim]) -> Dim:
        """Replace symbols; those not in `values` stay."""
        total: Dim = 0
        for m, c in self.terms:
            product: Dim = c
            for s in m:
                product = product * values.get(s, sym(s))
            total = total + product
        return total

    def __str__(self) -> str:
        text = ""
        for m, c in self.terms:
            factor = "*".join(([str(abs(c))] if abs(c) != 1 or not m else []) + list(m))
            text += (("-" if c < 0 else "+") if text or c < 0 else "") + factor
        return text


Dim = int | DimExpr
Shape = tuple[Dim, ...]


def _terms(d: Dim) -> Iterable[tuple[Monomial, int]]:
    return [((), d)] if isinstance(d, int) else d.terms


def sym(name: str) -> DimExpr:
    return DimExpr((((name,), 1),))


def evaluate(d: Dim, values: Mapping[str, int]) -> int:
    """The dimension as a number. Raises `CompileError` when a symbol has no value."""
    if isinstance(d, int):
        return d
    result = d.substitute(dict(values))
    if not isinstance(result, int):
        missing = ", ".join(sorted(result.symbols()))
        raise CompileError(
            f"dimension {d} has no value for {missing}", remedy="bind every symbol of the graph's inputs"
        )
    return result


def product(dims: Iterable[Dim]) -> Dim:
    total: Dim = 1
    for d in dims:
        total = total * d
    return total


def divide(a: Dim, b: Dim) -> Dim | None:
    """a / b where it divides exactly by one monomial (or an integer), else None."""
    if isinstance(b, int):
        if b == 0 or any(c % b for _, c in _terms(a)):
            return None
        return a // b if isinstance(a, int) else DimExpr.make({m: c // b for m, c in a.terms})
    if len(b.terms) != 1 or isinstance(a, int):
        return 0 if a == 0 else None
    (mono, coefficient), quotient = b.terms[0], {}
    for m, c in a.terms:
        rest = list(m)
        for s in mono:
            if s not in rest:
                return None
            rest.remove(s)
        if c % coefficient:
            return None
        quotient[tuple(rest)] = c // coefficient
    return DimExpr.make(quotient)


def parse_dim(text: str) -> Dim:
    """Inverse of `str(dim)`."""
    total: Dim = 0
    for term in text.replace(" ", "").replace("-", "+-").split("+"):
        if not term:
            continue
        value: Dim = -1 if term.startswith("-") else 1
        for factor in term.lstrip("-").split("*"):
            value = value * (int(factor) if factor.isdigit() else sym(factor))
        total = total + value
    return total


@dataclass(frozen=True)
class Quantization:
    """How codes q [N, K] stand for real numbers w [N, K].

    q is unsigned (0 .. 2**bits - 1, bits 2 .. 8), held one value a byte in the IR; a target packs it into its
    own layout. `scale` [N, G] and `zero_point` [N, G] are operands of the op that reads q, with
    G = ceil(K / group_size); a group is `group_size` consecutive k. Arithmetic is float32.

    zero_point               w[n, k], g = k // group_size
    none (symmetric)         scale[n, g] · (q - 2^(bits-1))
    uint8, below 2^bits      scale[n, g] · (q - zero_point[n, g])
    float16 or float32       scale[n, g] · q + zero_point[n, g]         GGML's minimum: Q4_1, Q4_K, ...
    none, with a codebook    scale[n, g] · CODEBOOK[q]                  `codebooks.py`; counts as symmetric

    `scale_dtype` is float16 or float32. A scale may be negative: a symmetric grid is one step longer on one
    side, and the sign says on which (as in GGML's Q4_0). `super_group` > 0 promises that float32 scales (and
    minima) are products of a float16, one for each `super_group` columns, and an integer of 8 bits, as in
    GGML's K types; a target may store the factors.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str = "float16"
    layout: str = "row_major"
    codebook: str | None = None
    super_group: int = 0

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        text = f"q{self.bits}:g{self.group_size}:{kind}:{self.scale_dtype}:{self.layout}"
        text += f":{self.codebook}" if self.codebook else ""
        return text + (f":super{self.super_group}" if self.super_group else "")

    @staticmethod
    def parse(text: str) -> Quantization:
        bits, group, kind, scale, layout, *more = text.split(":")
        supers = [int(part[5:]) for part in more if part.startswith("super")]
        books = [part for part in more if not part.startswith("super")]
        return Quantization(
            int(bits[1:]),
            int(group[1:]),
            kind == "sym",
            scale,
            layout,
            books[0] if books else None,
            supers[0] if supers else 0,
        )


@dataclass(frozen=True)
class TensorType:
    """dtype name (see `dtypes.py`), shape, and the quantization of integer weights."""

    dtype: str
    shape: Shape
    quant: Quantization | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    def with_shape(self, shape: Iterable[Dim]) -> TensorType:
        return TensorType(self.dtype, tuple(shape), self.quant)

    def with_dtype(self, dtype: str) -> TensorType:
        return TensorType(dtype, self.shape, None)

    def __str__(self) -> str:
        dims = ", ".join(str(d) for d in self.shape)
        return f"{self.dtype}[{dims}]" + (f"<{self.quant}>" if self.quant else "")

    @staticmethod
    def parse(text: str) -> TensorType:
        dtype, _, rest = text.partition("[")
        dims, _, tail = rest.partition("]")
        quant = Quantization.parse(tail[1:-1]) if tail else None
        return TensorType(dtype, tuple(parse_dim(d) for d in dims.split(",") if d.strip()), quant)


def broadcast(a: Shape, b: Shape) -> Shape | None:
    """Numpy broadcasting over symbolic shapes; None where the shapes cannot be shown to agree."""
    rank = max(len(a), len(b))
    left, right = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    out: list[Dim] = []
    for x, y in zip(left, right, strict=True):
        if x == y or y == 1:
            out.append(x)
        elif x == 1:
            out.append(y)
        else:
            return None
    return tuple(out)
