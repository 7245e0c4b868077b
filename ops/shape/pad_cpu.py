"""Padding on the CPU: the middle is copied, then the ends of one axis after another, as long as the axes before have become."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.kernel import Call, Context, NodeKernel
from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call, zero_call
from tensorgraph.ops.shape.pad import pad
from tensorgraph.views import IndexMap


def calls(node: Node, context: Context) -> Sequence[Call]:
    (x,), before, after, mode = node.inputs, node.attrs["before"], node.attrs["after"], node.attrs["mode"]
    middle = node.index_map
    for axis, (low, n) in enumerate(zip(before, x.shape, strict=True)):
        middle = middle.slice(axis, low, low + n)
    found = [copy_call(node, x, target=middle)]
    for axis, (low, n, high) in enumerate(zip(before, x.shape, after, strict=True)):
        whole = node.index_map
        for other in range(axis + 1, node.ndim):
            whole = whole.slice(other, before[other], before[other] + x.shape[other])
        ends = ((0, low, n, 2 * low), (low + n, low + n + high, low, low + n - 2))  # from, to, and the first in either mode
        for start, stop, circular, reflect in ends:
            if stop == start:
                continue
            end = whole.slice(axis, start, stop)
            if mode == "zeros":
                found.append(zero_call(node, end))
            elif mode == "circular":
                found.append(copy_call(node, node, whole.slice(axis, circular, circular + (stop - start)), end))
            else:
                found.append(copy_call(node, node, backwards(whole, axis, reflect, stop - start), end))
    return found


def backwards(index_map: IndexMap, axis: int, first: Extent, n: Extent) -> IndexMap:
    """n elements of an axis, from one on toward the first."""
    shape, strides, step = list(index_map.shape), list(index_map.strides), index_map.strides[axis]
    shape[axis], strides[axis] = n, -1 * step
    return IndexMap(tuple(shape), tuple(strides), index_map.offset + first * step)


pad.kernels["cpu"] = NodeKernel(calls, portable=True)
