"""fwht on the CPU: runs of a few registers first, then passes over the row."""

from __future__ import annotations

import math

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.graph import Node
from tensorgraph.ops.products.fwht import fwht

_REGISTERS = 8


def _row_bytes(node: Node) -> int:
    width = node.shape[-1]
    assert isinstance(width, int)
    return 8 * width


@cpu_kernel(fwht, known=True, scratch=_row_bytes, vectors=("x",))
def emit_fwht(k: Kernel, x: Operand, y: Operand) -> None:
    n = y.shape[-1]
    assert isinstance(n, int)
    lanes = min(k.lanes, n)
    run = min(n, lanes * _REGISTERS)
    type, scratch = x.type.x(lanes), k.scratch()
    scale = 1 / math.sqrt(n)
    with k.rows(y.shape[:-1]) as index:
        row, out = x.row(index), y.row(index)

        def held(i: Value) -> Value:
            return scratch + i * type.scalar.size_bytes

        def put(i: Value, v: Value, last: bool) -> None:
            if last:
                out.store(i, v)
            else:
                k.store(v, held(i))

        with k.loop(0, n, run) as loop:
            loop.next()
            parts = [_within(k, row.load(loop.i + at, lanes) * scale) for at in range(0, run, lanes)]
            for i, v in enumerate(_between(parts)):
                put(loop.i + i * lanes, v, run == n)
        half = run
        while half < n:
            with k.loop(0, n // 2, lanes) as loop:
                loop.next()
                at = (loop.i & -half) + loop.i  # the first halves' elements, in order
                a, b = k.load(held(at), type), k.load(held(at + half), type)
                put(at, a + b, 2 * half == n)
                put(at + half, a - b, 2 * half == n)
            half *= 2


def _within(k: Kernel, v: Value) -> Value:
    """The transform of each lane with the others of its register, not scaled."""
    half = 1
    while half < v.lanes:
        signs = k.vector([-1.0 if i & half else 1.0 for i in range(v.lanes)], v.type.scalar)
        v = v * signs + v.shuffle([i ^ half for i in range(v.lanes)])
        half *= 2
    return v


def _between(parts: list[Value]) -> list[Value]:
    """The transform over registers, lane by lane, not scaled."""
    half = 1
    while half < len(parts):
        pairs = {i: (parts[i], parts[i + half]) for i in range(len(parts)) if not i & half}
        for i, (a, b) in pairs.items():
            parts[i], parts[i + half] = a + b, a - b
        half *= 2
    return parts
