"""Normalisations on the CPU, in f64 but for what is loaded and stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tensorgraph.backends.cpu.emit import Values
from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.ops.norms.norms import l1_norm, l2_norm, norm, rms_norm

Visit = Callable[[Row, Row, Value, "Value | None", list[Value]], "Values | None"]
Divisor = Callable[[Value, Value], Value]


@cpu_kernel(rms_norm, vectors=("x",))
def emit_rms_norm(k: Kernel, x: Operand, weight: Operand | None, y: Operand, *, eps: float) -> None:
    _by_rows(k, x, weight, None, y, centred=False, divisor=root_of_mean(k, eps))


@cpu_kernel(norm, vectors=("x",))
def emit_norm(k: Kernel, x: Operand, weight: Operand | None, bias: Operand | None, y: Operand, *, eps: float) -> None:
    _by_rows(k, x, weight, bias, y, centred=True, divisor=root_of_mean(k, eps))


@cpu_kernel(l1_norm, vectors=("x",))
def emit_l1_norm(k: Kernel, x: Operand, y: Operand, *, eps: float) -> None:
    width = y.shape[-1]
    lanes = min(k.lanes, 1 << (width - 1).bit_length()) if isinstance(width, int) and width > 1 else k.lanes
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def add(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
            return [sums[0] + k.unary("fabs", k.convert(row.load(i, lanes, mask), F64))]

        (total,) = k.sweep(width, add, [k.zero(F64.x(lanes))], lanes)
        scale = 1.0 / (k.sum(total) + eps)

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            out.store(i, k.convert(k.convert(row.load(i, lanes, mask), F64) * scale, out.type), mask)

        k.sweep(width, write, lanes=lanes)


@cpu_kernel(l2_norm, vectors=("x",))
def emit_l2_norm(k: Kernel, x: Operand, y: Operand, *, eps: float) -> None:
    _by_rows(k, x, None, None, y, centred=False, divisor=lambda squares, _: k.max(k.unary("sqrt", squares), eps))


def root_of_mean(k: Kernel, eps: float) -> Divisor:
    return lambda squares, length: k.unary("sqrt", squares / length + eps)


def _by_rows(
    k: Kernel,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    y: Operand,
    *,
    centred: bool,
    divisor: Divisor,
) -> None:
    width = y.shape[-1]

    def finish(v: Value, i: Value, mask: Value | None) -> Value:
        if weight is not None:
            v = v * k.convert(weight.row([]).load(i, k.lanes, mask), F64)
        if bias is not None:
            v = v + k.convert(bias.row([]).load(i, k.lanes, mask), F64)
        return v

    length = k.convert(k.i64(width), F64)
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def walk(visit: Visit, carried: Values) -> list[Value]:
            return k.sweep(width, partial(visit, row, out), carried)

        normalise(k, walk, length, centred=centred, divisor=divisor, finish=finish)


def normalise(
    k: Kernel,
    walk: Callable[[Visit, Values], list[Value]],
    length: Value,
    *,
    centred: bool,
    divisor: Divisor,
    finish: Callable[[Value, Value, Value | None], Value] = lambda v, i, mask: v,
) -> None:
    """All that `walk(visit, carried)` goes over, with `visit(row, out, i, mask, carried)` for each vector, as one group.

    Args:
        length: how many elements that are, as f64.
        divisor: what they are divided by, from the sum of their squares and their number.
        finish: the result from what was divided, the place in its row, and the lanes that are in the row.
    """
    lanes = k.lanes

    def add(row: Row, out: Row, i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
        return [sums[0] + k.convert(row.load(i, lanes, mask), F64)]

    def centre(row: Row, i: Value, mask: Value | None) -> Value:
        v = k.convert(row.load(i, lanes, mask), F64)
        return v - mean if centred else v

    def square(row: Row, out: Row, i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
        v = centre(row, i, mask)
        if mask is not None and centred:
            v = k.select(mask, v, 0.0)
        return [k.fma(v, v, sums[0])]

    zero = k.zero(F64.x(lanes))
    if centred:
        (total,) = walk(add, [zero])
        mean = k.sum(total) / length
    (squares,) = walk(square, [zero])
    scale = 1.0 / divisor(k.sum(squares), length)

    def write(row: Row, out: Row, i: Value, mask: Value | None, _: list[Value]) -> None:
        out.store(i, k.convert(finish(centre(row, i, mask) * scale, i, mask), out.type), mask)

    walk(write, [])
