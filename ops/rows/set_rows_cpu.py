"""Rows written by number on the CPU: the destination copied, unless it is the result's own memory, and then the rows."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import product
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node
from tensorgraph.ops.elementwise.cast_cpu import emit_cast
from tensorgraph.ops.formats.writable_cpu import ROUNDINGS, round_block
from tensorgraph.ops.rows.index_cpu import checked
from tensorgraph.ops.rows.set_rows import set_rows
from tensorgraph.ops.shape.cont_cpu import copy_call


def supports(node: Node) -> bool:
    return node.dtype.name in ROUNDINGS or not node.dtype.is_block


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, b, ids = node.inputs
    refs = {"b": Ref(b), "ids": Ref(ids), "y": Ref(node)}
    grain = max(1, CHUNK // max(row_work(node), 1))
    write = Call(emit_set_rows, refs, dict(node.attrs), items=product(b.shape[:-1]), grain=grain, nodes=(node,))
    return [copy_call(node, a, unless_same=True), write]


def emit_set_rows(k: Kernel, operands: dict[str, Operand], *, block: DType | None) -> None:
    b, ids, y = operands["b"], operands["ids"], operands["y"]
    with k.rows(b.shape[:-1]) as [*batch, r]:
        mine = [i % n for i, n in zip(batch[b.ndim - 1 - ids.ndim :], ids.shape[:-1], strict=True)]
        number, named = checked(k, "set_rows", ids.load([*mine, r]), y.shape[-2])
        with k.when(named):
            row, out = b.row([*batch, r]), y.row([*batch, number])
            if block is not None:
                with k.loop(0, k.i64(y.shape[-1]), block.block_size) as loop:
                    round_block(k, block.name, row, out, loop.i)
                    loop.next()
            elif b.dtype == y.dtype:
                k.move(stored_type(y.dtype), out.address, 1, row.address, row.stride, y.shape[-1])
            else:

                def convert(i: Value, mask: Value | None, _: list[Value]) -> None:
                    out.store(i, emit_cast(k, row.load(i, k.lanes, mask), dtype=y.dtype), mask)

                k.sweep(y.shape[-1], convert)


set_rows.kernels["cpu"] = NodeKernel(calls, supports, portable=True)
