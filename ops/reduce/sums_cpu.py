"""Sums on the CPU, in f64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tensorgraph.backends.cpu.ir import F64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel, row_work
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.backends.cpu.sorting import running
from tensorgraph.graph import Node
from tensorgraph.ops.reduce.sums import cumsum, mean, sum, sum_rows


def _add_row(k: Kernel, row: Row, n: Int, total: Value) -> Value:
    """A vector of sums, with the elements of a row."""

    def add(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
        return [sums[0] + k.convert(row.load(i, k.lanes, mask), F64)]

    return k.sweep(n, add, [total])[0]


@cpu_kernel(sum, rows=lambda node: ())  # in one piece: no number of chunks changes the order
def emit_sum(k: Kernel, x: Operand, y: Operand) -> None:
    with k.rows(()):
        total = k.zero(F64.x(k.lanes))
        if x.ndim:
            with k.loop(0, k.i64(k.size(x.shape[:-1])), 1, [total]) as loop:
                row = x.row(k.unflatten(loop.i, x.shape[:-1]))
                loop.next(_add_row(k, row, x.shape[-1], loop.values[0]))
            total = k.sum(loop.results[0])
        else:
            total = k.convert(x.load([]), F64)
        y.store([0], k.convert(total, y.type))


def _emit_rows(k: Kernel, x: Operand, y: Operand, *, finish: Callable[[Kernel, Value, Int], Value]) -> None:
    with k.rows(x.shape[:-1]) as index:
        total = k.sum(_add_row(k, x.row(index), x.shape[-1], k.zero(F64.x(k.lanes))))
        y.store([*index, 0], k.convert(finish(k, total, x.shape[-1]), y.type))


def _input_row(node: Node) -> int:
    return row_work(node.inputs[0])


def _total(k: Kernel, total: Value, n: Int) -> Value:
    return total


def _part(k: Kernel, total: Value, n: Int) -> Value:
    return total / k.convert(k.i64(n), F64)


emit_sum_rows = cpu_kernel(sum_rows, work=_input_row)(partial(_emit_rows, finish=_total))
emit_mean = cpu_kernel(mean, work=_input_row)(partial(_emit_rows, finish=_part))


@cpu_kernel(cumsum)
def emit_cumsum(k: Kernel, x: Operand, y: Operand) -> None:
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def add(i: Value, mask: Value | None, before: list[Value]) -> list[Value]:
            sums = running(k, k.convert(row.load(i, k.lanes, mask), F64)) + before[0]
            out.store(i, k.convert(sums, y.type), mask)
            return [sums[k.lanes - 1]]

        k.sweep(y.shape[-1], add, [k.zero(F64)])
