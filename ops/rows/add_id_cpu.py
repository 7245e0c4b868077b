"""A row of a table added to each row, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import F32, F64, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand, computed_type
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.rows.add_id import add_id
from tensorgraph.ops.rows.index_cpu import checked


def calls(node: Node, context: Context) -> Sequence[Call]:
    refs = {slot: Ref(value) for slot, value in zip(node.slots, node.inputs, strict=True)} | {"y": Ref(node)}
    grain = max(1, CHUNK // max(row_work(node), 1))
    return [Call(emit_add_id, refs, items=product(node.shape[:-1]), grain=grain, nodes=(node,))]


def emit_add_id(k: Kernel, operands: dict[str, Operand]) -> None:
    a, b, ids, y = (operands[name] for name in ("a", "b", "ids", "y"))
    summed = F64 if F64 in (computed_type(a.dtype), computed_type(b.dtype)) else F32
    with k.rows(y.shape[:-1]) as index:
        number, named = checked(k, "add_id", ids.load(index), b.shape[0])
        x, row, out = a.row(index), b.row([number]), y.row(index)

        def add(i: Value, mask: Value | None, _: list[Value]) -> None:
            terms = [k.convert(each.load(i, k.lanes, mask), summed) for each in (x, row)]
            out.store(i, k.convert(terms[0] + terms[1], out.type), mask)

        def copy(i: Value, mask: Value | None, _: list[Value]) -> None:
            out.store(i, x.load(i, k.lanes, mask), mask)

        with k.when(named):
            k.sweep(y.shape[-1], add)
        with k.when(named.invert()):
            k.sweep(y.shape[-1], copy)


add_id.kernels["cpu"] = NodeKernel(calls, portable=True)
