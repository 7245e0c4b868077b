"""Formulas of the operators of one number on the CPU."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu import functions
from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.ops.elementwise import unary

for _op, _formula in (
    (unary.exp, functions.exp),
    (unary.expm1, functions.expm1),
    (unary.log, functions.log),
    (unary.sin, functions.sin),
    (unary.cos, functions.cos),
    (unary.tanh, functions.tanh),
    (unary.sigmoid, functions.sigmoid),
    (unary.silu, functions.silu),
    (unary.gelu_erf, functions.gelu),
    (unary.softplus, functions.softplus),
):
    cpu_formula(_op)(_formula)


@cpu_formula(unary.abs)
def emit_abs(k: Kernel, x: Value) -> Value:
    return k.unary("fabs", x)


@cpu_formula(unary.neg)
def emit_neg(k: Kernel, x: Value) -> Value:
    return -x


@cpu_formula(unary.sgn)
def emit_sgn(k: Kernel, x: Value) -> Value:
    return k.select(x.gt(0.0), 1.0, k.select(x.lt(0.0), k.const(-1.0, x.type), x))  # zero and NaN stay


@cpu_formula(unary.step)
def emit_step(k: Kernel, x: Value) -> Value:
    return k.select(x.gt(0.0), k.const(1.0, x.type), 0.0)


@cpu_formula(unary.sqr)
def emit_sqr(k: Kernel, x: Value) -> Value:
    return x * x


@cpu_formula(unary.sqrt)
def emit_sqrt(k: Kernel, x: Value) -> Value:
    return k.unary("sqrt", x)


@cpu_formula(unary.floor)
def emit_floor(k: Kernel, x: Value) -> Value:
    return k.unary("floor", x)


@cpu_formula(unary.ceil)
def emit_ceil(k: Kernel, x: Value) -> Value:
    return k.unary("ceil", x)


@cpu_formula(unary.trunc)
def emit_trunc(k: Kernel, x: Value) -> Value:
    return k.unary("trunc", x)


@cpu_formula(unary.round)
def emit_round(k: Kernel, x: Value) -> Value:
    whole = k.unary("trunc", x)
    away = k.select(x.lt(0.0), k.const(-1.0, x.type), 1.0)
    return k.select(k.unary("fabs", x - whole).ge(0.5), whole + away, whole)


@cpu_formula(unary.relu)
def emit_relu(k: Kernel, x: Value) -> Value:
    return k.max(x, 0.0)


@cpu_formula(unary.leaky_relu)
def emit_leaky_relu(k: Kernel, x: Value, *, negative_slope: float) -> Value:
    return k.select(x.gt(0.0), x, x * functions.number(k, negative_slope, x.type))


@cpu_formula(unary.elu)
def emit_elu(k: Kernel, x: Value) -> Value:
    return k.select(x.gt(0.0), x, functions.expm1(k, k.min(x, 0.0)))


@cpu_formula(unary.hardsigmoid)
def emit_hardsigmoid(k: Kernel, x: Value) -> Value:
    return k.min(k.max((x + 3.0) / 6.0, 0.0), 1.0)


@cpu_formula(unary.hardswish)
def emit_hardswish(k: Kernel, x: Value) -> Value:
    return x * emit_hardsigmoid(k, x)


@cpu_formula(unary.gelu)
def emit_gelu(k: Kernel, x: Value) -> Value:
    """`(1 + tanh(u)) / 2` is `sigmoid(2 u)`, which keeps what the sum would cancel."""
    twice = x * (2 * math.sqrt(2 / math.pi))
    return x * functions.sigmoid(k, twice * k.fma(x * 0.044715, x, 1.0))


@cpu_formula(unary.gelu_quick)
def emit_gelu_quick(k: Kernel, x: Value) -> Value:
    return x * functions.sigmoid(k, x * 1.702)


@cpu_formula(unary.xielu)
def emit_xielu(k: Kernel, x: Value, *, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Value:
    positive, negative = (functions.number(k, a, x.type) for a in unary.xielu_factors(alpha_n, alpha_p, beta))
    below = (functions.expm1(k, k.min(x, functions.number(k, eps, x.type))) - x) * negative
    return k.select(x.gt(0.0), x * x * positive, below) + x * functions.number(k, beta, x.type)
