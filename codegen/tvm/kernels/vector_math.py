"""exp, tanh and activation functions in 16 lanes of float32, as polynomials: TIR's own call libm for each
lane.

Relative errors, against float64: exp 2e-7 for |x| < 86, tanh 4e-7, silu, gelu and softplus 5e-7; of `ROUGH`
3e-4. The coefficients are least-maximum fits of the relative error on the interval named beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from tvm.script.ir_builder import tirx as T

from .builder import LANES, Expr, call, f32s, fma, i32s, let

BESIDE = 1.5 * 2.0**23
"""Beside it float32 has no bits below 1, and the lowest bits are those of a whole number."""
_LOG2E = 1.4426950408889634
# ln 2 in two parts, the first with few bits, so that n · ln 2 is subtracted without rounding (Cody & Waite
# 1980).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4

_EXP2 = (1.0, 0.69314698, 0.24022242, 0.05550734, 0.00967151, 0.00132647)  # 2^r, |r| ≤ 1/2
_EXP2_ROUGH = (1.0, 0.6932829, 0.24221095, 0.055008933)
_EXP = tuple(c * _LOG2E**i for i, c in enumerate(_EXP2))  # e^r, |r| ≤ ln 2 / 2
_TANH = (-0.3333334, 0.1333322, -0.0538959, 0.021157313, -0.0062836641)  # (tanh u / u - 1) / u², |u| ≤ 0.625
# e^(x²/2) · (1 - Φ(x)) in t = 1 / (1 + 0.3 x), 0 ≤ x ≤ 9.5; Φ is the normal distribution function.
_TAIL = (
    -9.1896727e-06,
    0.11974851,
    0.12016246,
    0.10122937,
    0.12778874,
    -0.055892982,
    0.21116994,
    -0.16091496,
    0.036718126,
)

_LOG1P = (
    1.0,
    -0.49999982,
    0.3333256,
    -0.24987271,
    0.19890748,
    -0.16105698,
    0.12418435,
    -0.08244173,
    0.04147821,
    -0.013407521,
    0.0020302394,
)  # log(1 + u) / u, 0 ≤ u ≤ 1


def _polynomial(coefficients: tuple[float, ...], x: Expr) -> Expr:
    value = f32s(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = let(fma(value, x, f32s(c)))
    return value


def _whole(lifted: Expr, more: int = 0) -> tuple[Expr, Expr]:
    """Of x + 1.5 · 2^23 + more (even), where there are no bits below 1: the nearest whole number n, and
    (n + more) << 23, which added to the bits of a float multiplies it by 2^(n + more).
    """
    lifted = let(lifted)
    power = T.shift_left(T.reinterpret(lifted, dtype="int32x16"), i32s(23))
    return let(lifted - f32s(BESIDE + more)), let(power)


def _times(p: Expr, power: Expr) -> Expr:
    return T.reinterpret(T.reinterpret(p, dtype="int32x16") + power, dtype="float32x16")


def exp2(x: Expr, more: int = 0, *, rough: bool = False) -> Expr:
    """2^(x + more), x + more not rounded, for x + more ≤ 127; between 0 and 2^-126 where that is below -126,
    and 0 from -127 on, if more is 0. NaN stays NaN.

    rough: to 1e-4, for what is rounded to bfloat16 or 8 bits.
    """
    x = let(x)
    x = let(T.Select(x < f32s(-127), f32s(-127), x))
    n, power = _whole(call("float32x16", "llmc_add", x, f32s(BESIDE + more)), more)
    return _times(_polynomial(_EXP2_ROUGH if rough else _EXP2, let(x - n)), power)


def power_of_two(x: Expr) -> Expr:
    """`exp2` of x ≤ 127, rough, by AVX-512's scaling: 0 where that is too small for float32, as of -infinity.
    NaN stays NaN.
    """
    x = let(x)
    r = let(call("float32x16", "llmc_fraction", x))
    return let(call("float32x16", "llmc_scale", _polynomial(_EXP2_ROUGH, r), let(x - r)))


def exp(x: Expr) -> Expr:
    """e^x, with x held to -86.6 … 87. NaN stays NaN."""
    x = let(x)
    x = let(T.Select(x < f32s(-86.6), f32s(-86.6), x))
    x = let(T.Select(x > f32s(87), f32s(87), x))
    n, power = _whole(fma(x, f32s(_LOG2E), f32s(BESIDE)))
    r = let(fma(n, f32s(-_LN2_HIGH), x))
    r = let(fma(n, f32s(-_LN2_LOW), r))
    return _times(_polynomial(_EXP, r), power)


def _minus_reciprocal(d: Expr, *, rough: bool = False) -> Expr:
    """-1 / d for 1 ≤ d < 10^38, to 1e-7: a division takes as long as eight products. NaN stays NaN.

    The first guess takes the exponent's complement, and is off by 5% at most; the error of the next is the
    third power of that, of the last (which a rough one is without) the second.
    """
    d = let(d)
    guess = let(
        T.reinterpret(i32s(0xFEF30000 - 2**32) - T.reinterpret(d, dtype="int32x16"), dtype="float32x16")
    )
    rest = let(fma(d, guess, f32s(1)))
    guess = let(fma(guess, let(fma(rest, rest, rest)), guess))
    return guess if rough else let(fma(guess, let(fma(d, guess, f32s(1))), guess))


def _minus_logistic(minus: Expr) -> Expr:
    """-1 / (1 + e^minus)."""
    return _minus_reciprocal(f32s(1) + exp(minus))


def _rough_minus_logistic(minus: Expr) -> Expr:
    """The same to 3e-4, for what is rounded to 8 bits."""
    power = let(minus * f32s(_LOG2E))
    power = let(T.Select(power > f32s(125), f32s(125), power))
    return _minus_reciprocal(f32s(1) + exp2(power, rough=True), rough=True)


def tanh(x: Expr) -> Expr:
    """tanh x: a polynomial near 0, where the formula by exp would lose its digits."""
    x = let(x)
    square = let(x * x)
    near = let(fma(let(_polynomial(_TANH, square) * square), x, x))
    e = exp(x + x)
    far = let(fma(f32s(2), _minus_reciprocal(e + f32s(1)), f32s(1)))
    small = square < f32s(0.625 * 0.625)
    return let(T.Select(small, near, far))


_Function = Callable[[Expr], Expr]


def sigmoid(x: Expr, minus_logistic: _Function = _minus_logistic) -> Expr:
    return let(f32s(0) - minus_logistic(f32s(0) - x))


def silu(x: Expr, minus_logistic: _Function = _minus_logistic) -> Expr:
    minus = let(f32s(0) - x)
    return let(minus * minus_logistic(minus))


def softplus(x: Expr) -> Expr:
    """log(1 + e^x), written max(x, 0) + log(1 + e^-|x|) so that nothing overflows."""
    x = let(x)
    small = exp(T.Select(x < f32s(0), x, f32s(0) - x))
    return let(fma(small, _polynomial(_LOG1P, small), relu(x)))


def gelu_tanh(x: Expr, minus_logistic: _Function = _minus_logistic) -> Expr:
    """x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), written x · sigmoid(2u) so that nothing cancels."""
    x = let(x)
    square = let(x * x)
    twice = 2 * math.sqrt(2 / math.pi)
    u = let(x * fma(square, f32s(0.044715 * twice), f32s(twice)))
    return let((f32s(0) - x) * minus_logistic(f32s(0) - u))


def gelu(x: Expr) -> Expr:
    """x · Φ(x) from the tail of the normal distribution, which is accurate on both sides."""
    x = let(x)
    size = let(T.Select(x < f32s(0), f32s(0) - x, x))
    t = let(f32s(1) / fma(size, f32s(0.3), f32s(1)))
    tail = let(exp(size * size * f32s(-0.5)) * _polynomial(_TAIL, t))
    return let(T.Select(x < f32s(0), x * tail, x * (f32s(1) - tail)))


def relu(x: Expr) -> Expr:
    x = let(x)
    return let(T.Select(x < f32s(0), f32s(0), x))


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "sigmoid": sigmoid}
"""By the names of `llmc.ir.ops.nn.ACTIVATIONS`."""
ROUGH: dict[str, _Function] = {
    **ACTIVATIONS,
    **{
        name: partial(function, minus_logistic=_rough_minus_logistic)
        for name, function in (("silu", silu), ("gelu_tanh", gelu_tanh), ("sigmoid", sigmoid))
    },
}
"""The same for results that are rounded to 8 bits, in steps of 0.8 % of the largest."""

__all__ = [
    "ACTIVATIONS",
    "LANES",
    "ROUGH",
    "exp",
    "exp2",
    "gelu",
    "gelu_tanh",
    "power_of_two",
    "relu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]
