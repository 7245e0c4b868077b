"""What devices have in common whose nodes are computed by the kernels that ops declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.backends.cpu.grouping import context_of, group_nodes
from tensorgraph.backends.cpu.kernel import kernel_of
from tensorgraph.backends.cpu.operands import is_stored
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cpu.weights import tile_readers
from tensorgraph.device import Device
from tensorgraph.dtypes import DType
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.memory import Group


class KernelDevice(Device):
    """A device whose nodes are computed by kernels of a backend, `family`.

    Attributes:
        target: the processor, or what stands for it, that code is made for.
        weight_layouts: beside "dense", in which constants may be held, the best first.
    """

    takes_constants = False
    family: str
    target: Target
    weight_layouts: Sequence[str] = ()

    def supports(self, node: Node) -> bool:
        if node.op in STRUCTURAL:
            return True
        kernel = kernel_of(node, self.family)
        return kernel is not None and all(is_stored(v.dtype) for v in (node, *node.inputs)) and kernel.supports(node)

    def reads(self, user: Node, slot: str) -> tuple[str, ...]:
        """The layouts beside "dense" and "rows" that a node reads a slot in."""
        kernel = kernel_of(user, self.family)
        return kernel.reads(user, slot) if kernel is not None else ()

    def constant_layout(self, constant: Node, graph: Graph) -> str:
        able = [self.reads(user, slot) for user, slot in tile_readers(graph, constant)]
        return next((layout for layout in self.weight_layouts if able and all(layout in each for each in able)), "dense")

    def groups(self, nodes: Sequence[Node], graph: Graph, options: Any) -> Sequence[Group]:
        context = context_of(self, graph, options, self.target, self.reads, self.family)
        return group_nodes(nodes, graph, context, fuse=options is None or options.fuse)


def held_array(array: np.ndarray, dtype: DType) -> np.ndarray:
    """An array as a device holds it that is not in a layout of weights: block types as f32."""
    value = np.asarray(array)
    if not dtype.is_block:
        return value if value.dtype == dtype.numpy else value.astype(dtype.numpy)
    decoded: np.ndarray = registry.decoders.get(dtype.name)(value) if value.dtype == np.uint8 else value.astype(np.float32)
    return decoded
