"""Formulas of scale and clamp on the CPU."""

from __future__ import annotations

from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.functions import number
from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.ops.elementwise.affine import clamp, scale


@cpu_formula(scale)
def emit_scale(k: Kernel, x: Value, *, scale: float, bias: float) -> Value:
    """A product alone in x's type; with a bias in f64, since what is left of a difference may be the rounding of the numbers."""
    if bias == 0.0 and 1e-30 < abs(scale) < 1e30:
        return x * scale
    return k.convert(x, F64) * scale + bias


@cpu_formula(clamp)
def emit_clamp(k: Kernel, x: Value, *, min: float, max: float) -> Value:
    return k.max(k.min(x, number(k, max, x.type)), number(k, min, x.type))
