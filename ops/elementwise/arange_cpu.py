"""Numbers at equal distances on the CPU, in f64."""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dtypes import DType
from tensorgraph.ops.elementwise.arange import arange


@cpu_kernel(arange)
def emit_arange(k: Kernel, y: Operand, *, start: float, stop: float, step: float, dtype: DType) -> None:
    with k.rows(()):
        row = y.row([])

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            numbers = k.lane_numbers(k.lanes, F64) + k.splat(k.convert(i, F64), k.lanes)
            row.store(i, k.convert(numbers * step + start, y.type), mask)

        k.sweep(y.shape[-1], write)
