"""Normalisations on the CPU, in f64 but for what is loaded and stored."""

from __future__ import annotations

from collections.abc import Callable

from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.norms.norms import l2_norm, norm, rms_norm


@cpu_kernel(rms_norm)
def emit_rms_norm(k: Kernel, x: Operand, weight: Operand | None, y: Operand, *, eps: float) -> None:
    _normalise(k, x, weight, None, y, centred=False, divisor=lambda squares, length: k.unary("sqrt", squares / length + eps))


@cpu_kernel(norm)
def emit_norm(k: Kernel, x: Operand, weight: Operand | None, bias: Operand | None, y: Operand, *, eps: float) -> None:
    _normalise(k, x, weight, bias, y, centred=True, divisor=lambda squares, length: k.unary("sqrt", squares / length + eps))


@cpu_kernel(l2_norm)
def emit_l2_norm(k: Kernel, x: Operand, y: Operand, *, eps: float) -> None:
    _normalise(k, x, None, None, y, centred=False, divisor=lambda squares, _: k.max(k.unary("sqrt", squares), eps))


def _normalise(
    k: Kernel,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    y: Operand,
    *,
    centred: bool,
    divisor: Callable[[Value, Value], Value],
) -> None:
    """`divisor` is what a row is divided by, from the sum of its squares and its length."""
    width, lanes = y.shape[-1], k.lanes
    length = k.convert(k.i64(width), F64)
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def add(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
            return [sums[0] + k.convert(row.load(i, lanes, mask), F64)]

        def centre(i: Value, mask: Value | None) -> Value:
            v = k.convert(row.load(i, lanes, mask), F64)
            return v - mean if centred else v

        def square(i: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
            v = centre(i, mask)
            if mask is not None and centred:
                v = k.select(mask, v, 0.0)
            return [k.fma(v, v, sums[0])]

        zero = k.zero(F64.x(lanes))
        if centred:
            (total,) = k.sweep(width, add, [zero])
            mean = k.sum(total) / length
        (squares,) = k.sweep(width, square, [zero])
        scale = 1.0 / divisor(k.sum(squares), length)

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            v = centre(i, mask) * scale
            if weight is not None:
                v = v * k.convert(weight.row([]).load(i, lanes, mask), F64)
            if bias is not None:
                v = v + k.convert(bias.row([]).load(i, lanes, mask), F64)
            out.store(i, k.convert(v, y.type), mask)

        k.sweep(width, write)
