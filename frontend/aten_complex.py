"""Complex numbers, as pairs of real values: rotary embedding is written so by some models.

polar(r, angle)         → r · cos(angle), r · sin(angle)
view_as_complex(x)      → x[..., 0], x[..., 1]
a · b                   → re a · re b - im a · im b, re a · im b + im a · re b
view_as_real(z)         → both, beside each other in a last axis of length 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.ops import math as m
from ..ir.ops.shape import Concat, Slice
from .aten_shapes import reshaped
from .aten_table import aten, lookup

if TYPE_CHECKING:
    from .importer import Importer

PART_DTYPES = {"complex64": "float32", "complex128": "float64"}


@dataclass(frozen=True)
class Complex:
    """A complex tensor: its real and imaginary parts, of one shape."""

    real: Value
    imag: Value


@aten("polar.default")
def _polar(c: Importer, size: Value, angle: Value) -> Complex:
    real, imag = (c.emit(m.Mul(size, c.emit(f(angle)))) for f in (m.Cos, m.Sin))
    return Complex(real, imag)


@aten("complex.default")
def _complex(c: Importer, real: Value, imag: Value) -> Complex:
    return Complex(real, imag)


@aten("view_as_complex.default")
def _view_as_complex(c: Importer, x: Value) -> Complex:
    return Complex(*(reshaped(c, _part(c, x, i), x.shape[:-1]) for i in range(2)))


def _part(c: Importer, x: Value, i: int) -> Value:
    return c.emit(Slice(x, axis=-1, start=i, stop=i + 1))


def _product(c: Importer, a: Any, b: Any) -> Complex:
    if not isinstance(a, Complex) or not isinstance(b, Complex):
        z, factor = (a, b) if isinstance(a, Complex) else (b, a)
        return Complex(*(c.emit(m.Mul(*c.promote(part, factor))) for part in (z.real, z.imag)))
    real = c.emit(m.Sub(c.emit(m.Mul(a.real, b.real)), c.emit(m.Mul(a.imag, b.imag))))
    return Complex(real, c.emit(m.Add(c.emit(m.Mul(a.real, b.imag)), c.emit(m.Mul(a.imag, b.real)))))


def _view_as_real(c: Importer, z: Complex) -> Value:
    columns = [reshaped(c, part, (*part.shape, 1)) for part in (z.real, z.imag)]
    return c.emit(Concat(columns, axis=-1))


def _conjugate(c: Importer, z: Complex) -> Complex:
    return Complex(z.real, c.emit(m.Neg(z.imag)))


def _converted(c: Importer, z: Complex, *_: Any, **__: Any) -> Complex:
    dtype = PART_DTYPES.get(c.result_dtype())
    if dtype is None:
        raise c.unsupported(f"a complex tensor as {c.result_dtype()}")
    return Complex(c.cast(z.real, dtype), c.cast(z.imag, dtype))


_OF_COMPLEX: dict[str, Callable[..., Any]] = {
    "mul.Tensor": _product,
    "view_as_real.default": _view_as_real,
    "real.default": lambda c, z: z.real,
    "imag.default": lambda c, z: z.imag,
    "conj.default": _conjugate,
    "_conj.default": _conjugate,
    "contiguous.default": lambda c, z, **_: z,
    "clone.default": lambda c, z, **_: z,
}
_MOVES = (
    "view", "reshape", "unsqueeze", "squeeze", "slice", "select", "expand", "transpose", "permute", "index",
    "flatten",
)  # fmt: skip


def complex_handler(c: Importer, name: str) -> Callable[..., Any]:
    """The handler of an operator some operand of which is a `Complex`; what moves elements moves both of its
    parts.
    """
    if name.startswith("_assert"):
        return lookup(name, c.location())
    if name in _OF_COMPLEX:
        return _OF_COMPLEX[name]
    if name.partition(".")[0] in ("to", "_to_copy", "type_as"):
        return _converted
    if name.partition(".")[0] not in _MOVES:
        raise c.unsupported(f"operator aten.{name} on complex numbers")

    def moved(c: Importer, z: Complex, *args: Any, **kwargs: Any) -> Complex:
        handler = lookup(name, c.location())
        return Complex(handler(c, z.real, *args, **kwargs), handler(c, z.imag, *args, **kwargs))

    return moved
