"""Which nodes one call (or a few) computes: each by itself, or joined by a fusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from tensorgraph.backends.cpu.chains import chain_group, find_chains
from tensorgraph.backends.cpu.elementwise import kernel_on
from tensorgraph.backends.cpu.fusion import Scope, conditions, finders, in_order
from tensorgraph.backends.cpu.group import CpuGroup, PlainGroup, make_group
from tensorgraph.backends.cpu.kernel import Context, Reads
from tensorgraph.backends.cpu.row_programs import find_row_programs
from tensorgraph.backends.cpu.state_calls import state_calls
from tensorgraph.backends.cpu.target import Target
from tensorgraph.backends.cpu.weights import same_tiles
from tensorgraph.compiler import CompileOptions
from tensorgraph.device import Device, readers
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group


def context_of(
    device: Device, graph: Graph, options: CompileOptions | None, target: Target, reads: Reads, backend: str
) -> Context:
    """What calls on a device may depend on."""
    layouts: Mapping[str, str] = options.layouts if options is not None else {}
    found: dict[Node, str] = {}

    def layout(node: Node) -> str:
        if node not in found:
            if (held := same_tiles(node)) is not None:
                found[node] = layout(held) if held is not node else device.constant_layout(node, graph)
            elif node.op in ("append", "read"):
                kept = layouts.get(node.attrs["stream"], "rows")
                users = readers(graph, node)
                direct = node not in graph.outputs.values() and all(kept in reads(u, s) for u, s in users)
                found[node] = kept if direct else "dense"
            else:
                found[node] = "dense"
        return found[node]

    exact, forced = (options.exact, options.lowerings) if options is not None else (False, ())
    return Context(target, exact, layout, layouts, forced, backend)


def single(node: Node, context: Context) -> Group:
    """A node by itself."""
    if node.op in ("view", "choose", "copy"):
        return CpuGroup((node,), ())
    if node.op in ("append", "read"):
        dense = context.layout(node) == "dense"
        return make_group((node,), (node,) if dense else (), state_calls(node, context))
    kernel = kernel_on(node, context.backend)
    assert kernel is not None
    if kernel.plain:
        return PlainGroup((node,), (node,), make=partial(kernel.calls, node, context))
    return make_group((node,), (node,), kernel.calls(node, context))


def group_nodes(nodes: Sequence[Node], graph: Graph, context: Context, *, fuse: bool) -> list[Group]:
    """Every node of a split in a group, in an order in which they can be computed."""
    if not fuse:
        return [single(node, context) for node in nodes]
    here = set(nodes)
    conditioned = {n: c for n, c in conditions(graph).items() if n in here}
    scope = Scope(nodes, graph, context, frozenset(graph.outputs.values()), conditioned)
    found: list[Group] = []
    for find in finders(context.backend):
        for group in find(scope):
            found.append(group)
            scope.taken.update(group.nodes)
    owner = {node: group for group in found for node in group.nodes}
    for group in find_row_programs(nodes, graph, conditioned, owner, context, partial(group_nodes, fuse=True)):
        found.append(group)
        scope.taken.update(group.nodes)
        owner |= dict.fromkeys(group.nodes, group)
    for chain in find_chains(nodes, graph, conditioned, owner):
        found.append(chain_group(chain, graph))
        scope.taken.update(chain)
    alone: dict[Node, Group] = {n: single(n, context) for n in nodes if n not in scope.taken}
    ordered = in_order(_listed(nodes, found, alone), graph)
    while ordered is None:  # two fusions need each other's results: without the last ones
        dropped = found.pop()
        alone |= {n: single(n, context) for n in dropped.nodes}
        ordered = in_order(_listed(nodes, found, alone), graph)
    return ordered


def _listed(nodes: Sequence[Node], found: Sequence[Group], alone: Mapping[Node, Group]) -> list[Group]:
    """All groups, each where its first node stands."""
    joined = {node: group for group in found for node in group.nodes}
    return list(dict.fromkeys(joined.get(n) or alone[n] for n in nodes))
