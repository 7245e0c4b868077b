"""argsort on the CPU: integers that stand in the order of the floats, sorted by bytes."""

from __future__ import annotations

from tensorgraph.backends.cpu.ir import I32, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel, row_work
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.backends.cpu.sorting import AHEAD, key_type, ordered_key, sort_bytes, sorted_positions
from tensorgraph.graph import Node
from tensorgraph.ops.select.argsort import argsort


def _scratch(node: Node) -> int:
    n = row_work(node)
    return 8 * (n + AHEAD) + sort_bytes(n)


@cpu_kernel(argsort, scratch=_scratch, work=lambda node: 8 * row_work(node))
def emit_argsort(k: Kernel, x: Operand, y: Operand, *, descending: bool) -> None:
    n, keys, type = y.shape[-1], k.scratch(), key_type(x.type)
    memory = keys + (k.i64(n) + AHEAD) * 8
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def write(i: Value, mask: Value | None, _: list[Value]) -> None:
            k.store(ordered_key(k, row.load(i, k.lanes, mask), descending=descending), keys + i * type.size_bytes, mask=mask)

        k.sweep(n, write)
        order = sorted_positions(k, keys, type, n, n, memory)

        def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
            out.store(i, k.load(order + i * 4, I32.x(k.lanes), mask=mask), mask)

        k.sweep(n, copy)
