"""Rows by number on the CPU, decoded on the way where they are held interleaved."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.codes import ROWS
from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.backends.cpu.weights import load_r16_row, n_tiles
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.rows.get_rows import get_rows
from tensorgraph.ops.rows.index_cpu import checked

_AT_ONCE = 16  # elements of an interleaved row


def reads(node: Node, slot: str) -> tuple[str, ...]:
    """A table that products read too is held once, as they hold it."""
    a = node.at("a")
    held = a is not None and a.op == "constant" and a.dtype.is_float and a.dtype.name != "f64"
    return ("r16",) if slot == "a" and held else ()


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, ids = node.inputs
    refs = {"a": Ref(a, context.layout(a)), "ids": Ref(ids), "y": Ref(node)}
    grain = max(1, CHUNK // max(row_work(node), 1))
    return [Call(emit_get_rows, refs, items=product(node.shape[:-1]), grain=grain, nodes=(node,))]


def emit_get_rows(k: Kernel, operands: dict[str, Operand]) -> None:
    a, ids, y = operands["a"], operands["ids"], operands["y"]
    with k.rows(y.shape[:-1]) as index:
        number, named = checked(k, "get_rows", ids.load(index), a.shape[-2])
        with k.when(named):
            if a.layout == "r16":
                _decode_row(k, a, y, index, number)
            else:
                _move_row(k, a, y, index, number)
        with k.when(named.invert()):
            k.clear(y.at(index), k.i64(y.shape[-1]) * stored_type(y.dtype).size_bytes)


def _move_row(k: Kernel, a: Operand, y: Operand, index: Sequence[Value], number: Value) -> None:
    row, out = a.row([*index[:-1], number]), y.row(index)
    if a.dtype == y.dtype or a.dtype.is_block:
        k.move(stored_type(y.dtype), out.address, 1, row.address, row.stride, y.shape[-1])
        return

    def convert(i: Value, mask: Value | None, _: list[Value]) -> None:
        out.store(i, row.load(i, k.lanes, mask), mask)

    k.sweep(y.shape[-1], convert)


def _decode_row(k: Kernel, a: Operand, y: Operand, index: Sequence[Value], number: Value) -> None:
    out = y.row(index)
    *batch, rows, width = a.shape
    assert isinstance(rows, int) and isinstance(width, int)
    matrix = k.i64(0)
    for i, n in zip(index, batch, strict=False):
        matrix = matrix * n + i
    row = matrix * (n_tiles(rows) * ROWS) + number
    whole = width // _AT_ONCE * _AT_ONCE
    for start, stop, lanes in ((0, whole, _AT_ONCE), (whole, width, 1)):
        if start < stop:
            with k.loop(start, stop, lanes) as loop:
                out.store(loop.i, load_r16_row(a, row, loop.i, lanes))
                loop.next()


get_rows.kernels["cpu"] = NodeKernel(calls, reads=reads, portable=True)
