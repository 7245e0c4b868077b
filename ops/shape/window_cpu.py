"""Windows on the CPU: a copied, unless it is the result's own memory, and then b to its place, or the sum."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call
from tensorgraph.ops.shape.window import acc, set
from tensorgraph.views import IndexMap


def _place(node: Node) -> IndexMap:
    """Where b goes in the result."""
    place = node.index_map
    for axis, (start, n) in enumerate(zip(node.attrs["offset"], node.inputs[1].shape, strict=True)):
        place = place.slice(axis, start, start + n)
    return place


def _set_calls(node: Node, context: Context) -> Sequence[Call]:
    a, b = node.inputs
    return [copy_call(node, a, unless_same=True), copy_call(node, b, target=_place(node))]


def _acc_calls(node: Node, context: Context) -> Sequence[Call]:
    a, b = node.inputs
    refs = {"b": Ref(b), "y": Ref(node, index_map=_place(node))}
    grain = max(1, CHUNK // max(row_work(b), 1))
    return [
        copy_call(node, a, unless_same=True),
        Call(emit_add, refs, items=product(b.shape[:-1]), grain=grain, nodes=(node,)),
    ]


def emit_add(k: Kernel, operands: dict[str, Operand]) -> None:
    b, y = operands["b"], operands["y"]
    if not b.ndim:
        with k.rows(()):
            y.store([], y.load([]) + b.load([]))
        return
    with k.rows(b.shape[:-1]) as index:
        row, out = b.row(index), y.row(index)

        def add(i: Value, mask: Value | None, _: list[Value]) -> None:
            out.store(i, out.load(i, k.lanes, mask) + row.load(i, k.lanes, mask), mask)

        k.sweep(b.shape[-1], add)


set.kernels["cpu"] = NodeKernel(_set_calls, portable=True)
acc.kernels["cpu"] = NodeKernel(_acc_calls, portable=True)
