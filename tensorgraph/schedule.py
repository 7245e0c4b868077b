"""The scheduler: which device computes each node, the copies at the seams, and the order in splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tensorgraph.device import Device
from tensorgraph.errors import UnsupportedError
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.passes import rewrite
from tensorgraph.text import node_text

Placement = Mapping[str, str]
"""Name patterns of weights, streams and nodes (`"blk.1?.*"`) to device names; the first that matches counts."""


@dataclass(frozen=True)
class Split:
    """Nodes that one device computes one after another."""

    device: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Schedule:
    """A graph with its copies, cut into splits."""

    graph: Graph
    splits: tuple[Split, ...]
    device: Mapping[Node, str]  # by node
    moved: tuple[tuple[Node, str, str], ...] = ()  # nodes that the device wanted for them cannot run, with the device that does

    @property
    def copies(self) -> tuple[Node, ...]:
        return tuple(n for s in self.splits for n in s.nodes if n.op == "copy")


def schedule(graph: Graph, devices: Sequence[Device], placement: Placement | None = None) -> Schedule:
    """Place every node, insert copies where a value crosses devices, and cut the order into splits.

    A node runs where its name is placed, else where its weights or state are placed, else where the input that is computed
    last belongs (of `x + f(x)`, f); if that device does not support it, on the first that does, and only it: what follows
    belongs where it did. Inputs and constants are held wherever they are used.

    Raises: UnsupportedError: no device supports a node.
    """
    where, moved = _place(graph, devices, placement or {})
    if len(devices) == 1:
        return Schedule(graph, _cut(graph, where), where)
    copied, device, became = _insert_copies(graph, where)
    return Schedule(copied, _cut(copied, device), device, tuple((became[n], wanted, got) for n, wanted, got in moved))


def _place(graph: Graph, devices: Sequence[Device], placement: Placement) -> tuple[dict[Node, str], list[tuple[Node, str, str]]]:
    by_name = {d.name: d for d in devices}
    where: dict[Node, str] = {}
    home: dict[Node, str] = {}
    moved = []

    def placed(name: str) -> str | None:
        found = next((d for pattern, d in placement.items() if fnmatchcase(name, pattern)), None)
        if found is not None and found not in by_name:
            raise UnsupportedError(f"[schedule] {name!r} is placed on {found!r}; the devices are {', '.join(by_name)}")
        return found

    for node in graph.nodes:
        anchors = [i.base for i in node.inputs if i.base.op in ("constant", "read", "append") and placed(i.base.name)]
        computed = [i for i in node.inputs if i.base.op not in ("constant", "input") and i in home]
        wanted = placed(node.name) if node.name else None
        if wanted is None and node.op not in ("constant", "input"):
            last = max(computed, key=graph.number.__getitem__, default=None)
            wanted = placed(anchors[0].name) if anchors else home[last] if last is not None else None
        if wanted or node.inputs or node.op in STRUCTURAL:
            home[node] = wanted or devices[0].name
    for node in graph.nodes:
        if node not in home:  # computed from nothing: where it is used first
            home[node] = next((home[user] for user in graph.users[node] if user in home), devices[0].name)
        where[node] = wanted = home[node]
        if node.op in STRUCTURAL or by_name[wanted].supports(node):
            continue
        able = next((d.name for d in devices if d.supports(node)), None)
        if able is None:
            line = node_text(node, graph.number)
            raise UnsupportedError(f"[schedule] no device of {', '.join(by_name)} supports {line}")
        where[node] = able
        moved.append((node, wanted, able))
    return where, moved


def _insert_copies(graph: Graph, where: Mapping[Node, str]) -> tuple[Graph, dict[Node, str], dict[Node, Node]]:
    """The graph with copies, the device of each of its nodes, and what the given nodes became."""
    device: dict[Node, str] = {}
    copies: dict[tuple[Node, str], Node] = {}
    became: dict[Node, Node] = {}

    def bring(node: Node, source: Node, to: str) -> Node:
        if source.op in ("constant", "input") or device[source] == to:
            return source
        key = (source, to)
        if key not in copies:
            if source.base.op in ("constant", "input"):  # held on both: each has a view of its own
                copies[key] = replace(source)
            else:
                attrs = {"device": to}
                copies[key] = Node("copy", (source,), source.shape, source.dtype, attrs, ("x",), source.name, node.where)
            device[copies[key]] = to
        return copies[key]

    def connect(node: Node, original: Node) -> Node:
        to = where[original.base] if original.op == "view" else where[original]
        inputs = node.inputs if node.op == "view" else tuple(bring(node, i, to) for i in node.inputs)
        became[original] = node if inputs == node.inputs else replace(node, inputs=inputs)
        device[became[original]] = to
        return became[original]

    return rewrite(graph, connect), device, became


def _cut(graph: Graph, device: Mapping[Node, str]) -> tuple[Split, ...]:
    """Maximal runs on one device: whatever is ready there goes before the next device has its turn."""
    order = [n for n in graph.nodes if n.op not in ("constant", "input")]
    if len({device[n] for n in order}) <= 1:
        return (Split(device[order[0]], tuple(order)),) if order else ()
    import networkx as nx  # takes longer to import than all of the core

    coarse = nx.DiGraph()
    coarse.add_nodes_from(range(len(order)))
    number = {n: i for i, n in enumerate(order)}
    coarse.add_edges_from((number[s], number[n]) for n in order for s in n.inputs if s in number)
    waiting = dict(coarse.in_degree())
    ready: dict[str, list[int]] = {}
    for i in (i for i, degree in waiting.items() if not degree):
        ready.setdefault(device[order[i]], []).append(i)
    splits = []
    while any(ready.values()):
        name = min((queue[0], d) for d, queue in ready.items() if queue)[1]
        run = []
        queue = ready[name]
        while queue:
            queue.sort()
            i = queue.pop(0)
            run.append(order[i])
            for user in coarse.successors(i):
                waiting[user] -= 1
                if not waiting[user]:
                    ready.setdefault(device[order[user]], []).append(user)
        run.sort(key=lambda n: n.op != "copy")  # what other devices computed is brought first
        splits.append(Split(name, tuple(run)))
    return tuple(splits)
