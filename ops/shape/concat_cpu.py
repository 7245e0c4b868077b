"""Joining along an axis on the CPU: each input is copied to its slice of the result."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.kernel import Call, Context, NodeKernel
from tensorgraph.dims import Extent
from tensorgraph.graph import Node
from tensorgraph.ops.shape.concat import concat
from tensorgraph.ops.shape.cont_cpu import copy_call


def calls(node: Node, context: Context) -> Sequence[Call]:
    axis, start = node.attrs["axis"], 0
    found: list[Call] = []
    for x in node.inputs:
        stop: Extent = start + x.shape[axis]
        index_map = node.index_map.slice(axis, start, stop)
        part = Node("view", (node,), index_map.shape, node.dtype, {"map": index_map}, ("x",), where=node.where)
        if 0 not in x.shape:
            found.append(copy_call(node, x, part))
        start = stop
    return found


concat.kernels["cpu"] = NodeKernel(calls)
