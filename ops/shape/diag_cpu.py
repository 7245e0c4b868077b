"""Diagonals on the CPU: zeros, and then a copy to places that lie a row and an element apart."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.kernel import Call, Context, NodeKernel
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call, zero_call
from tensorgraph.ops.shape.diag import diag
from tensorgraph.views import IndexMap


def calls(node: Node, context: Context) -> Sequence[Call]:
    (x,), strides = node.inputs, node.index_map.strides
    along = IndexMap(x.shape, (*strides[:-1], strides[-2] + strides[-1]), node.index_map.offset)
    return [zero_call(node, node.index_map), copy_call(node, x, target=along)]


diag.kernels["cpu"] = NodeKernel(calls, portable=True)
