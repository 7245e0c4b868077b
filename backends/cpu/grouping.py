"""Which nodes one call (or a few) computes: each by itself, or joined by a fusion."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tensorgraph import registry
from tensorgraph.backends.cpu.fusion import Scope, conditions, finders, in_order
from tensorgraph.backends.cpu.kernel import Buffer, Call, Context, NodeKernel
from tensorgraph.backends.cpu.state_calls import state_calls
from tensorgraph.dims import maximum
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group
from tensorgraph.op import node_bytes


@dataclass(frozen=True, eq=False)
class CpuGroup(Group):
    """A group and the calls that compute it."""

    calls: tuple[Call, ...] = ()

    @cached_property
    def reads(self) -> tuple[Node, ...]:
        if not self.calls:
            return () if self.nodes[0].op == "view" else super().reads
        own = set(self.nodes)
        refs = (ref.of for call in self.calls for ref in call.operands.values() if ref is not None)
        return tuple(dict.fromkeys(n for n in refs if isinstance(n, Node) and n not in own))

    def size_of(self, node: Node) -> int:
        """Block types are held as f32."""
        if not node.dtype.is_block:
            return node_bytes(node)
        n = 4
        for extent in node.shape:
            n *= maximum(extent)
        return n


def make_group(nodes: Sequence[Node], stored: Sequence[Node], calls: Sequence[Call]) -> CpuGroup:
    """The group of some calls: their buffers are its scratch."""
    scratch: dict[Hashable, int] = {}
    for call in calls:
        for ref in call.operands.values():
            if ref is not None and isinstance(ref.of, Buffer):
                scratch[ref.of] = maximum(ref.of.size_bytes)
    return CpuGroup(tuple(nodes), tuple(stored), scratch, tuple(calls))


def single(node: Node, context: Context) -> CpuGroup:
    """A node by itself."""
    if node.op in ("view", "choose", "copy"):
        return CpuGroup((node,), ())
    if node.op in ("append", "read"):
        dense = context.layout(node) == "dense"
        return make_group((node,), (node,) if dense else (), state_calls(node, context))
    kernel: NodeKernel = registry.ops.get(node.op).kernel("cpu")
    return make_group((node,), (node,), kernel.calls(node, context))


def group_nodes(nodes: Sequence[Node], graph: Graph, context: Context, *, fuse: bool) -> list[CpuGroup]:
    """Every node of a split in a group, in an order in which they can be computed."""
    if not fuse:
        return [single(node, context) for node in nodes]
    here = set(nodes)
    conditioned = {n: c for n, c in conditions(graph).items() if n in here}
    scope = Scope(nodes, graph, context, frozenset(graph.outputs.values()), conditioned)
    found: list[Group] = []
    for find in finders():
        for group in find(scope):
            found.append(group)
            scope.taken.update(group.nodes)
    alone = {n: single(n, context) for n in nodes if n not in scope.taken}
    ordered = in_order(_listed(nodes, found, alone), graph)
    while ordered is None:  # two fusions need each other's results: without the last ones
        dropped = found.pop()
        alone |= {n: single(n, context) for n in dropped.nodes}
        ordered = in_order(_listed(nodes, found, alone), graph)
    return ordered  # type: ignore[return-value]


def _listed(nodes: Sequence[Node], found: Sequence[Group], alone: Mapping[Node, Group]) -> list[Group]:
    """All groups, each where its first node stands."""
    joined = {node: group for group in found for node in group.nodes}
    return list(dict.fromkeys(joined.get(n) or alone[n] for n in nodes))
