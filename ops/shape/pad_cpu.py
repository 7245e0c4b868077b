"""Padding on the CPU: the middle is copied, then the ends of one axis after another, as long as the axes before have become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.lines import join_axes
from tensorgraph.backends.cpu.operands import Operand, stored_type
from tensorgraph.dims import maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call, zero_bytes
from tensorgraph.ops.shape.pad import pad
from tensorgraph.views import IndexMap


def calls(node: Node, context: Context) -> Sequence[Call]:
    (x,), before, after = node.inputs, node.attrs["before"], node.attrs["after"]
    middle = node.index_map
    for axis, (low, n) in enumerate(zip(before, x.shape, strict=True)):
        middle = middle.slice(axis, low, low + n)
    found = [copy_call(node, x, target=middle)]
    for axis, (low, n, high) in enumerate(zip(before, x.shape, after, strict=True)):
        whole = node.index_map
        for other in range(axis + 1, node.ndim):
            whole = whole.slice(other, before[other], before[other] + x.shape[other])
        for start, stop, there in ((0, low, n), (low + n, low + n + high, low)):
            if stop == start:
                continue
            end = whole.slice(axis, start, stop)
            if node.attrs["circular"]:
                found.append(copy_call(node, node, whole.slice(axis, there, there + (stop - start)), end))
            else:
                found.append(_zero_call(node, end))
    return found


def _zero_call(node: Node, target: IndexMap) -> Call:
    axes = join_axes(target.shape, (target,))
    index_map = IndexMap(tuple(n for n, _ in axes), tuple(s for _, (s,) in axes), target.offset)
    grain = max(1, CHUNK // max(maximum(index_map.shape[-1]), 1))
    y = Ref(node, index_map=index_map)
    return Call(emit_zeros, {"y": y}, items=product(index_map.shape[:-1]), grain=grain, nodes=(node,))


def emit_zeros(k: Kernel, operands: Mapping[str, Operand]) -> None:
    """Row by row."""
    y = operands["y"]
    size = stored_type(y.dtype).size_bytes
    with k.rows(y.shape[:-1]) as index:
        row = y.row(index)
        if isinstance(row.stride, int) and row.stride == 1:
            zero_bytes(k, row.address, k.i64(y.shape[-1]) * size)
            return
        with k.loop(0, k.i64(y.shape[-1])) as loop:
            k.store(k.zero(stored_type(y.dtype)), row.address + loop.i * row.stride * size)
            loop.next()


pad.kernels["cpu"] = NodeKernel(calls)
