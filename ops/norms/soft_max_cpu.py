"""soft_max on the CPU: logits and sums in f64, exponentials in f32 (in f64 where the result is)."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu.functions import exp
from tensorgraph.backends.cpu.ir import F64, I64, Int, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand, Row
from tensorgraph.ops.norms.soft_max import soft_max


@cpu_kernel(soft_max, by_row=lambda node: len(node.inputs) == 1)
def emit_soft_max(
    k: Kernel, x: Operand, mask: Operand | None, sinks: Operand | None, y: Operand, *, scale: float, max_bias: float
) -> None:
    width, lanes = y.shape[-1], k.lanes
    kept = y.type.bits == 8 * y.dtype.block_bytes  # exponentials can lie in the result until the sum is known
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)
        head = index[-2] if len(index) > 1 else k.i64(0)
        added = _mask_row(mask, index) if mask is not None else None
        slope = _slope(k, head, y.shape[-3], max_bias) if mask is not None and max_bias > 0 and y.ndim > 2 else None
        if slope is None and max_bias > 0:
            slope = k.const(2.0**-max_bias, F64)  # of one head alone

        def logit(i: Value, lanes_in: Value | None) -> Value:
            z = k.convert(row.load(i, lanes, lanes_in), F64) * scale
            if added is None:
                return z
            m = k.convert(added.load(i, lanes, lanes_in), F64)
            return z + (m if slope is None else m * slope)

        def highest(i: Value, lanes_in: Value | None, peaks: list[Value]) -> list[Value]:
            z = logit(i, lanes_in)
            return [k.max(peaks[0], z if lanes_in is None else k.select(lanes_in, z, -math.inf))]

        (peaks,) = k.sweep(width, highest, [k.const(-math.inf, F64.x(lanes))])
        peak = k.fold(peaks, k.max)
        sink = k.convert(sinks.load([head]), F64) if sinks is not None else None
        if sink is not None:
            peak = k.max(peak, sink)
        peak = k.select(peak.eq(-math.inf), 0.0, peak)

        def power(z: Value) -> Value:
            return exp(k, k.convert(z - peak, y.type))

        def add(i: Value, lanes_in: Value | None, sums: list[Value]) -> list[Value]:
            e = power(logit(i, lanes_in))
            if kept:
                out.store(i, e, lanes_in)
            e = k.convert(e, F64)
            return [sums[0] + (e if lanes_in is None else k.select(lanes_in, e, 0.0))]

        (sums,) = k.sweep(width, add, [k.zero(F64.x(lanes))])
        total = k.sum(sums)
        if sink is not None:
            total = total + k.convert(power(sink), F64)
        share = k.convert(1.0 / k.select(total.eq(0.0), 1.0, total), y.type)

        def write(i: Value, lanes_in: Value | None, _: list[Value]) -> None:
            e = out.load(i, lanes, lanes_in) if kept else power(logit(i, lanes_in))
            out.store(i, e * share, lanes_in)

        k.sweep(width, write)


def _mask_row(mask: Operand, index: list[Value]) -> Row:
    """The row of a mask whose leading axes are tiled."""
    if mask.ndim == 1:
        return mask.row([])
    lead = index[len(index) - mask.ndim + 1 : -1]
    return mask.row([*(i % n for i, n in zip(lead, mask.shape, strict=False)), index[-1]])


def _slope(k: Kernel, head: Value, n_heads: Int, max_bias: float) -> Value:
    """ALiBi's: of heads beyond the last power of two, those between."""
    n = k.i64(n_heads)
    low = k.const(1, I64) << (63 - k.leading_zeros(n))
    beyond = head.ge(low)
    step = k.select(beyond, (head - low) * 2 + 1, head + 1)
    of = k.select(beyond, low * 2, low)
    return k.call("exp2", F64, k.convert(step, F64) / k.convert(of, F64) * -max_bias)
