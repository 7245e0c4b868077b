"""Parts of matrices on the CPU: each row is cut at a column."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu.ir import I32, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.ops.shape.triangle import KINDS, diag_mask_inf, diag_mask_zero, tri

_FAR = 1 << 62


@cpu_kernel(tri)
def emit_tri(k: Kernel, x: Operand, y: Operand, *, kind: str) -> None:
    lower, right = KINDS[kind]
    _keep(k, x, y, lower, right, 0.0)


@cpu_kernel(diag_mask_inf)
def emit_diag_mask_inf(k: Kernel, x: Operand, y: Operand, *, n_past: int) -> None:
    _keep(k, x, y, True, n_past, -math.inf)


@cpu_kernel(diag_mask_zero)
def emit_diag_mask_zero(k: Kernel, x: Operand, y: Operand, *, n_past: int) -> None:
    _keep(k, x, y, True, n_past, 0.0)


def _keep(k: Kernel, x: Operand, y: Operand, lower: bool, right: int, other: float) -> None:
    """Columns up to, or from, so many to the right of the diagonal."""
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)
        end = k.min(k.i64(y.shape[-1]), index[-1] + min(right, _FAR))  # before it is cut to 32 bits
        edge = k.splat(k.narrow(end, I32), k.lanes)

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            columns = k.lane_numbers(k.lanes) + k.narrow(i, I32)
            kept = columns.le(edge) if lower else columns.ge(edge)
            out.store(i, k.select(kept, row.load(i, k.lanes, mask), other), mask)

        k.sweep(y.shape[-1], write)
