"""Elements by number along one axis on the CPU: bits moved, none changed."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.ir import Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, cpu_kernel, row_work
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.rows.gather import gather, scatter
from tensorgraph.ops.rows.index_cpu import checked
from tensorgraph.ops.shape.cont_cpu import copy_call


def _along(node: Node) -> bool:
    """Whether elements stay in their rows."""
    return int(node.attrs["axis"]) % node.ndim > 0


def _place(k: Kernel, x: Operand, index: Sequence[Value], axis: int, number: Value, i: Value) -> Value:
    """The address of x's element `number` along an axis, at index and i along the others."""
    at = [*index, i]
    at[axis] = number
    return x.at(at)


@cpu_kernel(gather, by_row=_along)
def emit_gather(k: Kernel, x: Operand, ids: Operand, y: Operand, *, axis: int) -> None:
    item = stored_type(y.dtype)
    with k.rows(y.shape[:-1]) as index:
        numbers, to = ids.row(index), y.at(index)
        with k.loop(0, y.shape[-1]) as loop:
            number, named = checked(k, "gather", numbers.load(loop.i), x.shape[axis])
            place = _place(k, x, index, axis, number, loop.i)
            (value,) = k.either(named, lambda: [k.load(place, item)], lambda: [k.zero(item)])
            k.store(value, to + loop.i * item.size_bytes)
            loop.next()


def emit_scatter(k: Kernel, operands: dict[str, Operand], *, axis: int) -> None:
    ids, src, y = operands["ids"], operands["src"], operands["y"]
    item = stored_type(y.dtype)
    with k.rows(ids.shape[:-1]) as index:
        numbers = ids.row(index)
        with k.loop(0, ids.shape[-1]) as loop:
            number, named = checked(k, "scatter", numbers.load(loop.i), y.shape[axis])
            with k.when(named):
                k.store(k.load(src.at([*index, loop.i]), item), _place(k, y, index, axis, number, loop.i))
            loop.next()


def _scatter_calls(node: Node, context: Context) -> Sequence[Call]:
    x, ids, src = node.inputs
    refs = {"ids": Ref(ids), "src": Ref(src), "y": Ref(node)}
    grain = max(1, CHUNK // max(row_work(ids), 1))
    write = Call(emit_scatter, refs, dict(node.attrs), items=product(ids.shape[:-1]), grain=grain, nodes=(node,))
    return [copy_call(node, x, unless_same=True), write]


scatter.kernels["cpu"] = NodeKernel(_scatter_calls, by_row=_along, portable=True)
