"""Tiling on the CPU: a copy from an input whose every axis stands beside one along which it repeats."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.kernel import Call, Context, NodeKernel
from tensorgraph.dims import Extent, divide_exact
from tensorgraph.graph import Node
from tensorgraph.ops.shape.cont_cpu import copy_call
from tensorgraph.ops.shape.repeat import repeat
from tensorgraph.views import IndexMap


def calls(node: Node, context: Context) -> Sequence[Call]:
    (x,) = node.inputs
    lead = node.ndim - x.ndim
    shape: list[Extent] = list(node.shape[:lead])
    strides: list[Extent] = [0] * lead
    for n, m, stride in zip(node.shape[lead:], x.shape, x.index_map.strides, strict=True):
        times = 1 if n == m else divide_exact(n, m)
        assert times is not None  # the op's shape rule has seen to it
        shape += (times, m)
        strides += (0, stride)
    source = IndexMap(tuple(shape), tuple(strides), x.index_map.offset)
    return [copy_call(node, x, source, IndexMap.dense(tuple(shape)))]


repeat.kernels["cpu"] = NodeKernel(calls, portable=True)
