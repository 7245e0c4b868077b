"""Cuts of a graph: values laid open as outputs, and nodes apart from what computes their inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tensorgraph.dims import Bindings
from tensorgraph.graph import STRUCTURAL, Graph, Node, input
from tensorgraph.op import node_bytes
from tensorgraph.passes import rewrite

STATE = ("append", "read")


def label(graph: Graph, node: Node) -> str:
    """What a node's value is called, as an output of one run and an input of another: its number as `print` shows it."""
    return f"%{graph.number[node]}"


def taken(node: Node, dims: Bindings) -> Node:
    """The form that a choice has in a step."""
    return next(form for form, guard in zip(node.inputs, node.attrs["guards"], strict=True) if guard.holds(dims))


def values(graph: Graph, dims: Bindings) -> tuple[Node, ...]:
    """What a step of these extents computes, in order: results of ops, and rows of state.

    Not views and choices, which are another's value, nor values of block types, which no run gives as they are.
    """
    found = needed([*graph.effects, *graph.outputs.values()], (), dims)
    return tuple(n for n in graph.nodes if n in found and (n.op not in STRUCTURAL or n.op in STATE) and not n.dtype.is_block)


def needed(wanted: Iterable[Node], given: Collection[Node], dims: Bindings) -> set[Node]:
    """What a step of these extents computes `wanted` by, from the values of `given`; `wanted` among it, `given` not."""
    found = set(wanted)
    stack = list(found)
    while stack:
        node = stack.pop()
        for source in (taken(node, dims),) if node.op == "choose" else node.inputs:
            if source not in given and source not in found:
                found.add(source)
                stack.append(source)
    return found


def sources(node: Node, computed: Collection[Node], dims: Bindings) -> set[Node]:
    """The computed values that a node takes, through views and choices."""
    found: set[Node] = set()
    stack = list(node.inputs)
    while stack:
        source = stack.pop()
        if source in computed:
            found.add(source)
        else:
            stack.extend((taken(source, dims),) if source.op == "choose" else source.inputs)
    return found


def tapped(graph: Graph, nodes: Iterable[Node]) -> Graph:
    """The graph with nodes as outputs, too, by `label`; rows of state are there without."""
    return graph.with_outputs({**graph.outputs, **{label(graph, n): n for n in nodes if n.op not in STATE}})


def apart(graph: Graph, wanted: Collection[Node], given: Collection[Node], dims: Bindings) -> Graph:
    """`wanted` as outputs, by `label`, computed from the values of `given`, which are inputs by `label`.

    A node may be both: what reads it takes the input. A choice is the form that it has in a step of these extents.
    """
    inside = needed(wanted, given, dims)
    read: dict[Node, Node] = {}
    made: dict[Node, Node] = {}
    for node in graph.nodes:
        if node in given:
            read[node] = input(label(graph, node), node.shape, node.dtype)
        if node in inside:
            if node.op == "choose":
                made[node] = read[taken(node, dims)]
            else:
                inputs = tuple(read[source] for source in node.inputs)
                made[node] = node if inputs == node.inputs else replace(node, inputs=inputs)
            read.setdefault(node, made[node])
    return Graph({label(graph, n): made[n] for n in wanted}, effects=[n for n in made.values() if n.op == "append"])


def kept_name(name: str) -> str:
    """What an input or output called by `label` is called in a graph that is kept, whose nodes have other numbers."""
    return f"value {name[1:]}" if name.startswith("%") else name


def kept(graph: Graph) -> Graph:
    """A graph whose inputs and outputs no label is like."""

    def renamed(node: Node, _: Node) -> Node | None:
        name = kept_name(node.name)
        return None if node.op != "input" or name == node.name else input(name, node.shape, node.dtype)

    done = rewrite(graph, renamed)
    return done.with_outputs({kept_name(name): node for name, node in done.outputs.items()})


@dataclass(frozen=True, eq=False)
class Cut:
    """Some values of a graph, each to be computed from the values of others.

    Attributes:
        nodes: in order.
        sources: other values, of which `nodes` are computed.
        tapped: the graph that gives all of these.
        apart: `nodes`, computed from those.
    """

    nodes: tuple[Node, ...]
    sources: tuple[Node, ...]
    tapped: Graph
    apart: Graph


def cuts(graph: Graph, dims: Bindings, limit_bytes: int) -> list[Cut]:
    """All values of a step, in parts that take so many bytes at most: what both sides give, and weights in float64."""
    nodes = values(graph, dims)
    given = frozenset(nodes)
    found = []
    for part in _parts(nodes, dims, limit_bytes):
        alone = apart(graph, part, given, dims)
        own = set(part)
        more = tuple(n for n in nodes if n not in own and label(graph, n) in alone.inputs)
        found.append(Cut(tuple(part), more, tapped(graph, [*more, *part]), alone))
    return found


def _parts(nodes: Sequence[Node], dims: Bindings, limit_bytes: int) -> Iterator[list[Node]]:
    part: list[Node] = []
    total, weights = 0, set[Node]()
    for node in nodes:
        new = {i.base for i in node.inputs if i.base.op == "constant"} - weights
        size = 2 * node_bytes(node, dims) + sum(8 * node_bytes(w) * w.dtype.block_size // w.dtype.block_bytes for w in new)
        if part and total + size > limit_bytes:
            yield part
            part, total, weights = [], 0, set()
        part.append(node)
        total, weights = total + size, weights | new
    if part:
        yield part
