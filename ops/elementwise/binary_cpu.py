"""Formulas of add, sub, mul and div on the CPU; in f64 where an input is f64."""

from __future__ import annotations

from collections.abc import Callable
from operator import add, mul, sub, truediv

from tensorgraph.backends.cpu.elementwise import cpu_formula
from tensorgraph.backends.cpu.ir import F32, F64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.op import Op
from tensorgraph.ops.elementwise import binary


def _declare(op: Op, combine: Callable[[Value, Value], Value]) -> None:
    @cpu_formula(op)
    def formula(k: Kernel, a: Value, b: Value) -> Value:
        wide = F64 if 64 in (a.type.bits, b.type.bits) else F32
        return combine(k.convert(a, wide), k.convert(b, wide))


for _op, _combine in ((binary.add, add), (binary.sub, sub), (binary.mul, mul), (binary.div, truediv)):
    _declare(_op, _combine)
