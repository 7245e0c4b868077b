"""Passes: functions from one graph to the next. Dead nodes vanish by themselves: a graph is what its outputs reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tensorgraph import registry
from tensorgraph.dims import ALWAYS
from tensorgraph.graph import STRUCTURAL, Graph, Node, choose, constant, structure_line, topological
from tensorgraph.op import node_bytes

Rewrite = Callable[[Node, Node], Node | None]
Supports = Callable[[Node], bool]


def rewrite(graph: Graph, replacement: Rewrite) -> Graph:
    """Rebuild a graph; `replacement(node, original)` sees each node with its new inputs and may give another for it."""
    new: dict[Node, Node] = {}
    for node in graph.nodes:
        inputs, node_now = tuple(map(new.__getitem__, node.inputs)), node
        if inputs != node.inputs:
            rest = node.shape, node.dtype, node.attrs, node.slots, node.name, node.where, node.data  # `replace` takes far longer
            node_now = _on_base(node, inputs[0]) if node.op == "view" else Node(node.op, inputs, *rest)
        new[node] = replacement(node_now, node) or node_now
    if all(node is now for node, now in new.items()):
        return graph
    return Graph({name: new[node] for name, node in graph.outputs.items()}, effects=[new[node] for node in graph.effects])


def _on_base(view: Node, base: Node) -> Node:
    """The same view of another node of the same value."""
    if base.op == "view":
        index_map = base.index_map.reshape(view.index_map.shape) if view.index_map.is_dense else None
        if index_map is not None:
            return replace(view, inputs=(base.base,), dtype=base.dtype, attrs={"map": index_map})
        base = registry.ops.get("cont")(base)
    return replace(view, inputs=(base,), dtype=base.dtype)  # a folded base of a block type has become f32


def _with_name(value: Node, name: str) -> Node:
    """What takes a named node's place carries its name, unless it has its own."""
    return value.named(name) if name and not value.name else value


@dataclass(frozen=True)
class EliminateCommon:
    """Two nodes that compute the same -> one. Appends are effects and stay."""

    def __call__(self, graph: Graph) -> Graph:
        seen: dict[str, Node] = {}
        identity: dict[Node, int] = {}

        def merge(node: Node, _: Node) -> Node | None:
            if node.op == "append" or node.data is not None:
                return None
            line = structure_line(node, [identity.setdefault(i, len(identity)) for i in node.inputs])
            return seen.setdefault(line, node)

        return rewrite(graph, merge)


@dataclass(frozen=True)
class Folded:
    """A graph whose constant parts are constants, and the prologue that computes those from the weights, once."""

    graph: Graph
    prologue: Graph | None


@dataclass(frozen=True)
class FoldConstants:
    """op(constant, ...) -> constant `fold:N`, computed by the prologue when a plan is bound.

    Views of constants stay views. A folded value of a block type becomes f32: folding never re-quantises.
    """

    def __call__(self, graph: Graph) -> Folded:
        constant_nodes: set[Node] = set()
        for node in graph.nodes:
            static = node.op == "constant" or (node.op == "view" and node.base in constant_nodes)
            computed = node.op not in STRUCTURAL and all(i in constant_nodes for i in node.inputs)
            if static or (computed and len(_static(node)) == node.ndim):
                constant_nodes.add(node)
        needed = set(graph.outputs.values()) | set(graph.effects)
        for node in graph.nodes:
            if node not in constant_nodes:
                needed.update(i.base for i in node.inputs)
        folded = [n for n in graph.nodes if n in constant_nodes and n in needed and n.op not in ("constant", "view")]
        if not folded:
            return Folded(graph, None)
        names = {node: f"fold:{i}" for i, node in enumerate(folded)}

        def replacement(node: Node, original: Node) -> Node | None:
            if original not in names:
                return None
            return constant(names[original], shape=_static(node), dtype="f32" if node.dtype.is_block else node.dtype)

        return Folded(rewrite(graph, replacement), Graph({name: node for node, name in names.items()}))


def _static(node: Node) -> list[int]:
    return [e for e in node.shape if isinstance(e, int)]


@dataclass(frozen=True)
class ExpandFused:
    """A fused op that a device cannot run -> its expansion into plain ops, again until every node can be run."""

    supports: Supports

    def __call__(self, graph: Graph) -> Graph:
        def expand(node: Node, _: Node) -> Node | None:
            if self.supports(node):
                return None
            op = registry.ops.get(node.op)
            return _with_name(op.rebuild(op.expansion, node), node.name) if op.expansion is not None else None

        while (expanded := rewrite(graph, expand)) is not graph:
            graph = expanded
        return graph


@dataclass(frozen=True)
class LowerGuarded:
    """A node of an op with lowerings -> `choose` between them (and itself, last); forms over the scratch limit are dropped."""

    scratch_bytes: int = 1 << 31  # the most that the intermediates of one form may take at the largest extents
    force: tuple[str, ...] = ()  # names of forms to take wherever they exist, whatever their guards

    def __call__(self, graph: Graph) -> Graph:
        offered = rewrite(graph, self._offer)
        return rewrite(offered, self._prune) if any(n.op == "choose" for n in offered) else offered

    def _offer(self, node: Node, _: Node) -> Node | None:
        if node.op in STRUCTURAL:
            return None
        op = registry.ops.get(node.op)
        if not op.lowerings:
            return None
        forms = {low.name: (op.rebuild(low.build, node), low.guard(node)) for low in op.lowerings}
        return replace(choose(forms | {node.op: (node, ALWAYS)}, node.name), where=node.where)

    def _prune(self, node: Node, _: Node) -> Node | None:
        if node.op != "choose":
            return None
        forms = dict(zip(node.slots, zip(node.inputs, node.attrs["guards"], strict=True), strict=True))
        forced = [name for name in self.force if name in forms]
        if forced:
            return _with_name(forms[forced[0]][0], node.name)
        *guarded, last = forms
        kept = [name for name in guarded if self._scratch(node, name) <= self.scratch_bytes]
        if not kept:
            return _with_name(forms[last][0], node.name)
        return replace(choose({name: forms[name] for name in (*kept, last)}, node.name), where=node.where)

    def _scratch(self, node: Node, form: str) -> int:
        """Bytes, at the largest extents, of what this form computes and the last, which stays in any case, does not."""
        root = node.inputs[node.slots.index(form)]
        shared = set(topological([node.inputs[-1]]))
        return sum(node_bytes(n) for n in topological([root]) if n not in shared and n.op not in STRUCTURAL)
