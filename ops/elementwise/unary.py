"""Operators of one number: a table of formulas, in float64, and of what holds for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorgraph.op import Attr, Op

Array = NDArray[Any]
Law = Callable[..., None]

_erfc_of_one = np.frompyfunc(math.erfc, 1, 1)


def _unary(name: str, formula: Callable[..., Array], *laws: Law, attrs: Mapping[str, Attr] | None = None) -> Op:
    op = Op(name, "x[...]: real -> y[...]: x", attrs=attrs, inplace={"y": "x"}, source=f"ggml_{name}")

    @op.reference
    def reference(x: Array, **given: Any) -> Array:
        return formula(x, **given)

    for law in laws:
        op.law(law)
    return op


# Laws.


def idempotent(run: Callable[..., Array], x: Array, **attrs: Any) -> None:
    y = run(x, **attrs)
    np.testing.assert_array_equal(run(y, **attrs), y)


def odd(run: Callable[..., Array], x: Array) -> None:
    np.testing.assert_array_equal(run(-x), -run(x))


def even(run: Callable[..., Array], x: Array) -> None:
    np.testing.assert_array_equal(run(-x), run(x))


def _precision(x: Array) -> tuple[float, float]:
    """Four units in the last place of x's type, relative, and its smallest normal number."""
    info = ml_dtypes.finfo(x.dtype)  # type: ignore[no-untyped-call]
    return 4 * float(info.eps), float(info.tiny)


def complementary(run: Callable[..., Array], x: Array) -> None:
    """f(x) + f(-x) = 1."""
    total = run(x).astype(np.float64) + run(-x).astype(np.float64)
    np.testing.assert_allclose(total, 1.0, rtol=_precision(x)[0])


def gated_identity(run: Callable[..., Array], x: Array) -> None:
    """f(x) - f(-x) = x, as for every x * s(x) with s(x) + s(-x) = 1."""
    difference = run(x).astype(np.float64) - run(-x).astype(np.float64)
    relative, absolute = _precision(x)
    np.testing.assert_allclose(difference, x.astype(np.float64), rtol=relative, atol=absolute)


def _at(at: float, value: float) -> Law:
    """f(at) = value, exactly."""

    def law(run: Callable[..., Array], x: Array) -> None:
        np.testing.assert_array_equal(run(np.full_like(x, at)), np.full_like(x, value))

    law.__name__ = f"of_{at:g}_is_{value:g}"
    return law


def keeps_positive(run: Callable[..., Array], x: Array, **attrs: Any) -> None:
    """f(x) = x for x >= 0."""
    np.testing.assert_array_equal(run(np.abs(x), **attrs), np.abs(x))


def above_relu(run: Callable[..., Array], x: Array) -> None:
    """f(x) >= x, and >= 0."""
    assert (run(x) >= np.maximum(x, 0)).all()


def undoes_squares(run: Callable[..., Array], x: Array) -> None:
    """f(x * x) = |x|, exactly for small whole numbers, whose squares every type holds."""
    whole = np.clip(np.round(x.astype(np.float64)), -11, 11).astype(x.dtype)
    np.testing.assert_array_equal(run(whole * whole), np.abs(whole))


def curved_below_alone(run: Callable[..., Array], x: Array, *, alpha_n: float, **attrs: float) -> None:
    """What alpha_n says shows below zero alone."""
    above = np.abs(x) + np.ones_like(x)
    np.testing.assert_array_equal(run(above, alpha_n=alpha_n, **attrs), run(above, alpha_n=alpha_n + 1, **attrs))


# Formulas that take more than a NumPy function.


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _hardsigmoid(x: Array) -> Array:
    return np.clip((x + 3.0) / 6.0, 0.0, 1.0)


def _gelu(x: Array) -> Array:
    return x / (1.0 + np.exp(-2.0 * math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)))  # 1 + tanh would cancel


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * np.asarray(_erfc_of_one(x * -math.sqrt(0.5)), np.float64)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


def _softplus(x: Array) -> Array:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20.0))))


def _round(x: Array) -> Array:
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= 0.5, np.sign(x), 0.0)


def _xielu(x: Array, *, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Array:
    above, below = xielu_factors(alpha_n, alpha_p, beta)
    return np.where(x > 0, above * x * x, (np.expm1(np.minimum(x, eps)) - x) * below) + beta * x


def xielu_factors(alpha_n: float, alpha_p: float, beta: float) -> tuple[float, float]:
    """What multiplies the square above zero, and the exponential below."""
    positive, negative = (max(a, 0.0) + math.log1p(math.exp(-math.fabs(a))) for a in (alpha_p, alpha_n))
    return positive, beta + negative


# The table.

abs = _unary("abs", np.abs, even, idempotent)
neg = _unary("neg", np.negative, odd)
sgn = _unary("sgn", np.sign, odd, idempotent)
step = _unary("step", lambda x: np.where(x > 0, 1.0, 0.0), idempotent)
sqr = _unary("sqr", np.square, even)
sqrt = _unary("sqrt", np.sqrt, undoes_squares)
exp = _unary("exp", np.exp, _at(0, 1))
expm1 = _unary("expm1", np.expm1, _at(0, 0))
log = _unary("log", np.log, _at(1, 0))
sin = _unary("sin", np.sin, odd)
cos = _unary("cos", np.cos, even)
tanh = _unary("tanh", np.tanh, odd)
floor = _unary("floor", np.floor, idempotent)
ceil = _unary("ceil", np.ceil, idempotent)
trunc = _unary("trunc", np.trunc, idempotent, odd)
round = _unary("round", _round, idempotent, odd)
"""Nearest whole number; halves away from zero (-2.5 gives -3, 0.5 gives 1), unlike `numpy.round`."""
relu = _unary("relu", lambda x: np.maximum(x, 0.0), idempotent)
leaky_relu = _unary(
    "leaky_relu",
    lambda x, negative_slope: np.where(x > 0, x, negative_slope * x),
    keeps_positive,
    attrs={"negative_slope": Attr(float)},
)
elu = _unary("elu", _elu, keeps_positive)
sigmoid = _unary("sigmoid", _sigmoid, complementary)
silu = _unary("silu", lambda x: x * _sigmoid(x), gated_identity)
gelu = _unary("gelu", _gelu, gated_identity)
"""The tanh approximation; `gelu_erf` is the exact one."""
gelu_quick = _unary("gelu_quick", lambda x: x * _sigmoid(1.702 * x), gated_identity)
gelu_erf = _unary("gelu_erf", _gelu_erf, gated_identity)
hardsigmoid = _unary("hardsigmoid", _hardsigmoid, complementary)
hardswish = _unary("hardswish", lambda x: x * _hardsigmoid(x), gated_identity)
softplus = _unary("softplus", _softplus, above_relu)
"""`log(1 + exp(x))`; x itself above 20, as in ggml."""
xielu = _unary(
    "xielu",
    _xielu,
    curved_below_alone,
    attrs={"alpha_n": Attr(float), "alpha_p": Attr(float), "beta": Attr(float), "eps": Attr(float)},
)
"""arXiv:2411.13010: `softplus(alpha_p) x^2 + beta x` above zero, and else
`(expm1(min(x, eps)) - x) (beta + softplus(alpha_n)) + beta x`."""
