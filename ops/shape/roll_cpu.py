"""Rolling on the CPU: each axis is cut in two, and every part copied to its place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from tensorgraph.backends.cpu.kernel import Call, Context, NodeKernel
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call
from tensorgraph.ops.shape.roll import roll


def calls(node: Node, context: Context) -> Sequence[Call]:
    (x,) = node.inputs
    parts = []
    for n, shift in zip(node.shape, node.attrs["shifts"], strict=True):
        by = shift % n if shift and n else 0
        parts.append([(0, n - by, by), (n - by, n, 0)] if by else [(0, n, 0)])  # from, to, and where it goes
    found = []
    for cut in product(*parts):
        source, target = x.index_map, node.index_map
        for axis, (start, stop, there) in enumerate(cut):
            source, target = source.slice(axis, start, stop), target.slice(axis, there, there + (stop - start))
        found.append(copy_call(node, x, source, target))
    return found


roll.kernels["cpu"] = NodeKernel(calls, portable=True)
