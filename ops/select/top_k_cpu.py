"""top_k on the CPU: a row is looked through once, and what is not below the k-th largest so far is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorgraph.backends.cpu.ir import I32, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref, row_work
from tensorgraph.backends.cpu.operands import Operand, Row, computed_type
from tensorgraph.backends.cpu.sorting import TILE, Least, key_type, least_bytes, lowest_key, ordered_key
from tensorgraph.dims import product
from tensorgraph.graph import Node
from tensorgraph.ops.select.top_k import top_k


def _calls(node: Node, context: Context) -> Sequence[Call]:
    (x,), best = node.inputs, node.attrs["k"]
    return [
        Call(
            _emit,
            {"x": Ref(x), "y": Ref(node)},
            {"best": best},
            items=product(node.shape[:-1]),
            grain=max(1, CHUNK // (4 * max(row_work(x) + best, 1))),
            scratch_bytes=least_bytes(best, key_type(computed_type(x.dtype))),
            nodes=(node,),
        )
    ]


def _emit(k: Kernel, operands: Mapping[str, Operand], *, best: int) -> None:
    x, y = operands["x"], operands["y"]
    least = Least(k, k.scratch(), best, key_type(x.type))
    with k.rows(y.shape[:-1]) as index:
        select_best(k, least, x.row(index), k.i64(x.shape[-1]), y.row(index))


def select_best(k: Kernel, least: Least, row: Row, n: Value, out: Row) -> None:
    """`top_k` of the n elements of a row."""
    with k.loop(0, n, TILE, least.begin(lowest_key(least.type))) as loop:
        start, left = loop.i, n - loop.i

        def key(i: Value, mask: Value | None) -> tuple[Value, Value]:
            v = row.load(start + i, least.lanes, mask)
            return ordered_key(k, v, descending=True), k.lane_numbers(least.lanes) + k.narrow(start + i, I32)

        state = least.offer(k.min(left, TILE), key, loop.values)
        loop.next(*least.cut(state, left.le(TILE)))
    least.write(loop.results, out.store)


top_k.kernels["cpu"] = NodeKernel(_calls)
