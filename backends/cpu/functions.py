"""Functions of real numbers, lane by lane: f32 by range reduction and polynomials, f64 through the C library.

All take scalars or vectors and give the same bits for both. Over all of f32, subnormal numbers, infinities and NaN included,
they err by at most 2 units in the last place; `silu` by 3.5, and `gelu` by 8, both below zero (`test_functions.py`). Polynomials
were fitted for the least largest relative error of the function that they stand for, over the interval that is said, and
rounded to f32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from tensorgraph.backends.cpu.emit import Function
from tensorgraph.backends.cpu.ir import F32, F64, I32, Type, Value

_LN2_HIGH, _LN2_LOW = 45425 / 65536, math.log(2) - 45425 / 65536  # a product of the first with 8 bits is exact
_TO_WHOLE = 1.5 * 2.0**23  # added to a small number, its last bit is worth 1
_SIGN = -0x80000000
_MOST = (2 - 2.0**-23) * 2.0**127

# (exp(r) - 1 - r) / r^2, |r| <= 0.3475
_EXP = (0.5, 0.16666516661643982, 0.04166620224714279, 0.008369073271751404, 0.001395080704241991)
# (2^r - 1) / r, |r| <= 0.5003
_EXP2 = (
    *(0.6931471824645996, 0.24022647738456726, 0.055503323674201965),
    *(0.009618437848985195, 0.0013398951850831509, 0.00015353299386333674),
)
# (log(1 + f) - f + f^2 / 2) / f^3, 1 + f within 1 / sqrt(2) and sqrt(2)
_LOG = (
    *(0.3333331048488617, -0.24999986588954926, 0.20002226531505585, -0.16669251024723053, 0.14218656718730927),
    *(-0.12384346127510071, 0.11872981488704681, -0.11789825558662415, 0.0691537857055664),
)
# (tanh(x) / x - 1) / x^2 in x^2, |x| <= 0.625
_TANH = (-0.3333328366279602, 0.13331490755081177, -0.05374343693256378, 0.020650377497076988, -0.005716800689697266)
# erf(x) / x - 1 in x^2, |x| <= 1
_ERF = (
    *(2 / math.sqrt(math.pi) - 1, -0.3761262595653534, 0.11283600330352783, -0.026854440569877625),
    *(0.0051895263604819775, -0.0008020751411095262, 7.888792606536299e-05),
)
# exp(z^2) erfc(z), 0 <= z <= 10.3: a ratio of two polynomials
_ERFCX_ABOVE = (1.0, 1.2400351762771606, 0.7333060503005981, 0.23003003001213074, 0.03296677768230438)
_ERFCX_BELOW = (1.0, 2.368414878845215, 2.405766487121582, 1.3285454511642456, 0.4077432155609131, 0.05843142047524452)


def number(k: Function, value: float, type: Type) -> Value:
    """A number as the nearest of a float type, infinite where it is too large for f32."""
    if type.bits == 32 and abs(value) > _MOST:
        value = math.copysign(math.inf, value)
    return k.const(value, type)


def polynomial(k: Function, x: Value, coefficients: Sequence[float]) -> Value:
    """`c[0] + c[1] x + c[2] x^2 + ...`, the highest power first."""
    total = k.as_type(coefficients[-1], x.type)
    for c in reversed(coefficients[:-1]):
        total = k.fma(total, x, c)
    return total


def exp(k: Function, x: Value) -> Value:
    if x.type.bits == 64:
        return _by_library(k, "exp", x)
    return _scaled(k, *_exp_parts(k, k.max(k.min(x, 89.0), -104.0)))


def exp2_nonpositive(k: Function, x: Value) -> Value:
    """`2^x` of an f32 that is at most 0 (or NaN), as soft-max takes it: 0 below -126, and so never subnormal."""
    shifted = x + _TO_WHOLE
    r = x - (shifted - _TO_WHOLE)
    power = ((shifted.bits_as(I32.x(x.lanes)) << 23) + _bits(1.0)).bits_as(x.type)  # of the whole number in the low bits
    return k.select(x.lt(-126.0), 0.0, k.fma(r, polynomial(k, r, _EXP2), 1.0) * power)


def expm1(k: Function, x: Value) -> Value:
    if x.type.bits == 64:
        return _by_library(k, "expm1", x)
    n, r = _reduced(k, k.max(k.min(x, 89.0), -30.0))
    part = k.fma(r * r, polynomial(k, r, _EXP), r)
    half = _power(k, n - 1)  # of 2^n, which may be too large for a float
    return _with_sign(k, k.select(n.eq(0), part, k.fma(half, part, half - 0.5) * 2.0), x)


def log(k: Function, x: Value) -> Value:
    if x.type.bits == 64:
        return _by_library(k, "log", x)
    tiny = x.lt(2.0**-126)
    found = _log_of_normal(k, k.select(tiny, x * 2.0**23, x), k.select(tiny, -23.0, k.zero(x.type)))
    found = k.select(x.lt(math.inf), found, x)  # infinite and NaN as they are
    return k.select(x.le(0.0), k.select(x.eq(0.0), k.const(-math.inf, x.type), math.nan), found)


def softplus(k: Function, x: Value) -> Value:
    """`log(1 + exp(x))`."""
    u = exp(k, -k.unary("fabs", x))
    if x.type.bits == 64:
        return k.max(x, 0.0) + _by_library(k, "log1p", u)
    whole = u + 1.0
    lost = u - (whole - 1.0)
    return k.max(x, 0.0) + (_log_of_normal(k, whole, k.zero(x.type)) + lost / whole)


def tanh(k: Function, x: Value) -> Value:
    if x.type.bits == 64:
        return _by_library(k, "tanh", x)
    size, square = k.unary("fabs", x), x * x
    small = k.fma(size * square, polynomial(k, square, _TANH), size)
    large = 1.0 - 2.0 / (exp(k, k.min(size, 10.0) * 2.0) + 1.0)
    return _with_sign(k, k.select(size.lt(0.625), small, large), x)


def sigmoid(k: Function, x: Value) -> Value:
    """`1 / (1 + exp(-x))`."""
    e = exp(k, -k.unary("fabs", x))
    small = e / (e + 1.0)
    return k.select(x.lt(0.0), k.fma(-e, small, e), 1.0 - small)  # both forget most of what the quotient lost


def silu(k: Function, x: Value) -> Value:
    """`x * sigmoid(x)`; NaN for minus infinity, as that product is."""
    if x.type.bits == 64:
        return x * sigmoid(k, x)
    n, m = _exp_parts(k, k.max(-k.unary("fabs", x), -176.2))
    below = x.lt(0.0)
    part = x * k.select(below, m, 1.0) / (_scaled(k, n, m) + 1.0)  # scaled last, so that no subnormal number is multiplied
    return _scaled(k, k.select(below, n, 0), part)


def erf(k: Function, x: Value) -> Value:
    if x.type.bits == 64:
        return _by_library(k, "erf", x)
    size, square = k.unary("fabs", x), x * x
    small = k.fma(x, polynomial(k, square, _ERF), x)
    z = k.min(size, 5.0)
    n, m = _exp_parts(k, -(z * z))
    large = 1.0 - _scaled(k, n, m * _erfcx(k, z))
    return k.select(size.lt(1.0), small, _with_sign(k, large, x))


def gelu(k: Function, x: Value) -> Value:
    """`x P(X < x)` of a normal X, which is `x (1 + erf(x / sqrt(2))) / 2`; NaN for minus infinity, as that product is."""
    if x.type.bits == 64:
        return x * _by_library(k, "erfc", x * -math.sqrt(0.5)) * 0.5
    size = k.min(k.unary("fabs", x), 18.74)
    high = (size.bits_as(I32.x(x.lanes)) & -0x1000).bits_as(x.type)  # its square is exact
    low = (size - high) * (size + high) * -0.5
    n, m = _exp_parts(k, high * high * -0.5, low)
    tail = m * _erfcx(k, size * math.sqrt(0.5)) * 0.5
    below = x.lt(0.0)
    return _scaled(k, k.select(below, n, 0), x * k.select(below, tail, 1.0 - _scaled(k, n, tail)))


def sin(k: Function, x: Value) -> Value:
    return _by_library(k, "sin", x)


def cos(k: Function, x: Value) -> Value:
    return _by_library(k, "cos", x)


def _by_library(k: Function, name: str, x: Value) -> Value:
    """A function of the C library in f64, one lane after another."""
    found = k.each_lane(k.convert(x, F64), lambda lane: k.call(name, F64, lane))
    return k.convert(found, x.type.scalar)


def _bits(number: float) -> int:
    """A number's bits as f32."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def _reduced(k: Function, x: Value) -> tuple[Value, Value]:
    """n (i32) and r with x = n log(2) + r, |r| <= log(2) / 2 and a little; for |x| up to 200."""
    shifted = k.fma(x, 1 / math.log(2), _TO_WHOLE)
    whole = shifted - _TO_WHOLE
    n = shifted.bits_as(I32.x(x.lanes)) - _bits(_TO_WHOLE)
    return n, k.fma(whole, -_LN2_LOW, k.fma(whole, -_LN2_HIGH, x))


def _exp_parts(k: Function, x: Value, low: Value | None = None) -> tuple[Value, Value]:
    """n and m with exp(x + low) = m 2^n, m near 1; `low` is small."""
    n, r = _reduced(k, x)
    if low is not None:
        r = r + low
    return n, k.fma(r * r, polynomial(k, r, _EXP), r) + 1.0


def _power(k: Function, n: Value) -> Value:
    """2^n for n (i32) from -126 to 127, 0 for -127."""
    return ((n + 127) << 23).bits_as(F32.x(n.lanes))


def _scaled(k: Function, n: Value, m: Value) -> Value:
    """m 2^n, rounded once; n (i32) from -254 to 254, and 0 times m where m 2^n is far below any f32."""
    half = n >> 1
    return m * _power(k, half) * _power(k, n - half)


def _log_of_normal(k: Function, x: Value, exponent: Value) -> Value:
    """log(x 2^exponent) of a positive normal number; the exponent is a whole f32."""
    least = _bits(math.sqrt(0.5))
    above = x.bits_as(I32.x(x.lanes)) - least
    exponent = exponent + k.convert(above >> 23, F32)
    f = ((above & 0x7FFFFF) + least).bits_as(x.type) - 1.0
    square = f * f
    small = k.fma(exponent, _LN2_LOW, f * square * polynomial(k, f, _LOG))
    return k.fma(exponent, _LN2_HIGH, f + k.fma(square, -0.5, small))


def _erfcx(k: Function, z: Value) -> Value:
    return polynomial(k, z, _ERFCX_ABOVE) / polynomial(k, z, _ERFCX_BELOW)


def _with_sign(k: Function, value: Value, like: Value) -> Value:
    """A number that is positive, or has the sign of another already, with that sign; -0 too."""
    whole = I32.x(value.lanes)
    return (value.bits_as(whole) | like.bits_as(whole) & _SIGN).bits_as(value.type)
