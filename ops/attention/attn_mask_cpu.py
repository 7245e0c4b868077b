"""attn_mask on the CPU, and the rule of visibility for vectors of rows."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu.ir import F32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.attention.attn_mask import attn_mask


def visible(k: Kernel, q_pos: Value, q_seq: Value, k_pos: Value, k_seq: Value, *, every: int, window: int | None = None) -> Value:
    """Whether rows are visible to a token, as `visibility.visible` says; i64 all, one token, a vector of rows."""
    lanes = k_pos.lanes
    at = k.splat(q_pos, lanes)
    last = (k_pos + 1) * every - 1 if every != 1 else k_pos
    seen = k_seq.eq(k.splat(q_seq, lanes)) & last.le(at)
    return seen if window is None else seen & k_pos.gt(at - window)


@cpu_kernel(attn_mask)
def emit_attn_mask(
    k: Kernel, q_pos: Operand, q_seq: Operand, k_pos: Operand, k_seq: Operand, y: Operand, *, every: int, window: int | None
) -> None:
    with k.rows(y.shape[:1]) as index:
        at, seq, out = (k.convert(q_pos.load(index), I64), k.convert(q_seq.load(index), I64), y.row(index))

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            pos, row_seq = (k.convert(rows.row([]).load(i, k.lanes, mask), I64) for rows in (k_pos, k_seq))
            seen = visible(k, at, seq, pos, row_seq, every=every, window=window)
            out.store(i, k.select(seen, k.zero(F32.x(k.lanes)), -math.inf), mask)

        k.sweep(y.shape[1], write)
