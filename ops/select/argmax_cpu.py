"""argmax on the CPU: each lane keeps the last of its largest elements, and the highest of those is taken."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu.ir import I32, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel, row_work
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.select.argmax import argmax


@cpu_kernel(argmax, rows=lambda node: node.shape, work=lambda node: row_work(node.inputs[0]))
def emit_argmax(k: Kernel, x: Operand, y: Operand) -> None:
    lanes, none = k.lanes, k.const(-1, I32.x(k.lanes))
    with k.rows(y.shape) as index:
        row = x.row(index)

        def look(i: Value, mask: Value | None, best: list[Value]) -> list[Value]:
            v = row.load(i, lanes, mask)
            taken = v.ge(best[0])  # not where v is NaN
            if mask is not None:
                taken = taken & mask
            places = k.lane_numbers(lanes) + k.narrow(i, I32)
            return [k.select(taken, v, best[0]), k.select(taken, places, best[1])]

        peaks, places = k.sweep(x.shape[-1], look, [k.const(-math.inf, x.type.x(lanes)), none])
        y.store(index, k.fold(k.select(peaks.eq(k.fold(peaks, k.max)), places, none), k.max))
