"""Chains: element-wise nodes of one size that read one another, in one call that keeps what only they use in registers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.elementwise import Read, common_shape, elementwise_call, kernel_of
from tensorgraph.backends.cpu.group import CpuGroup, make_group
from tensorgraph.dims import product
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group

MOST_STEPS = 32
MOST_READS = 16


def chain_group(nodes: Sequence[Node], graph: Graph) -> CpuGroup:
    """One call that computes a chain as `find_chains` gives it; what other nodes read, and outputs, are stored."""
    own, outputs = set(nodes), set(graph.outputs.values())
    wanted = {n.base for n in nodes if n in outputs or any(user not in own for user in graph.users[n])}
    steps = [n for n in nodes if n.op != "view"]
    stored = [n for n in steps if n in wanted]
    return make_group(nodes, stored, [elementwise_call(steps, stored)])


def find_chains(
    nodes: Sequence[Node], graph: Graph, condition: Mapping[Node, Hashable], taken: Mapping[Node, Group] | None = None
) -> list[list[Node]]:
    """Chains of two nodes and more, each in order, with the views through which its nodes read one another.

    Each node is joined with the chains that it reads, where that leaves an order in which all groups can be computed.

    Args:
        nodes: in an order in which they can be computed.
        condition: only nodes of the same one are joined.
        taken: nodes that are in other groups, and which.
    """
    search = Search(nodes, condition, taken or {})
    for node in nodes:
        kernel = kernel_of(node) if node not in search.taken else None
        if kernel is not None:
            search.add(node, kernel.operands(node))
    found = dict.fromkeys(chain for chain in search.chain.values() if len(chain.nodes) > 1)
    return [sorted((*chain.nodes, *search.views_of(chain)), key=search.place.__getitem__) for chain in found]


@dataclass(eq=False)
class _Chain:
    nodes: list[Node]
    first: int  # places in the order
    last: int


class Search:
    """The chains so far; every node that may be in one is in some, alone at first.

    Args:
        taken: nodes that are in other groups, and which: those are computed in one go.
        is_one: whether the nodes of two chains may be one; that of element-wise nodes where None.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        condition: Mapping[Node, Hashable],
        taken: Mapping[Node, Group],
        is_one: Callable[[Sequence[Node], Sequence[Node]], bool] | None = None,
    ) -> None:
        self.place = {node: i for i, node in enumerate(nodes)}
        self.condition, self.taken, self.is_one = condition, taken, is_one or self._is_one
        self.chain: dict[Node, _Chain] = {}
        self.reads: dict[Node, tuple[Read, ...]] = {}

    def add(self, node: Node, reads: tuple[Read, ...]) -> None:
        place = self.place[node]
        self.chain[node], self.reads[node] = _Chain([node], place, place), reads
        for read in reads:
            source = self.chain.get(read.node.base)
            chain = self.chain[node]
            if source not in (None, chain) and self.is_one(source.nodes, chain.nodes) and not self._goes_round(source, chain):
                self._join(source, chain)

    def add_neighbours(self, may_join: Callable[[Sequence[Node], Sequence[Node]], bool]) -> None:
        """Join chains that read the same chain, group or node, each with the one before it in order that also does."""
        before: dict[object, Node] = {}
        for node in self.place:
            chain = self.chain.get(node)
            if chain is None or node is not chain.nodes[0]:
                continue
            for source in dict.fromkeys(self._owner(i) for i in self._inputs(chain) if i in self.place):
                other = self.chain[before.setdefault(source, node)]
                chain = self.chain[node]
                if other is not chain and may_join(other.nodes, chain.nodes) and self.is_one(other.nodes, chain.nodes):
                    if not self._goes_round(other, chain) and not self._goes_round(chain, other):
                        self._join(other, chain)
                before[source] = node

    def views_of(self, chain: _Chain) -> list[Node]:
        inside = set(chain.nodes)
        reads = (read.node for node in chain.nodes for read in self.reads[node])
        return list(dict.fromkeys(n for n in reads if n.op == "view" and n.base in inside))

    def _join(self, a: _Chain, b: _Chain) -> None:
        both = (*a.nodes, *b.nodes)
        a.nodes = list(both) if a.last < b.first else sorted(both, key=self.place.__getitem__)
        a.first, a.last = min(a.first, b.first), max(a.last, b.last)
        for node in b.nodes:
            self.chain[node] = a

    def _is_one(self, a: Sequence[Node], b: Sequence[Node]) -> bool:
        """Whether one call can compute them: one size and condition, and all read of one another is read in row order."""
        nodes = sorted((*a, *b), key=self.place.__getitem__)
        inside, outside, last = set(nodes), set(), nodes[-1]
        for node in nodes:
            if node.size != last.size or self.condition[node] != self.condition[last]:
                return False
            for read in self.reads[node]:
                if read.node.base in inside:
                    if not _in_row_order(read) or self.condition.get(read.node) != self.condition[last]:
                        return False
                else:
                    outside.add(read)
        return len(nodes) <= MOST_STEPS and len(outside) <= MOST_READS and common_shape(nodes, self.reads.__getitem__) is not None

    def _goes_round(self, a: _Chain, b: _Chain) -> bool:
        """Whether b needs a not only by reading it, but through something else."""
        seen: set[object] = set()
        stack = [i for i in self._inputs(b) if self.chain.get(i) not in (a, b)]
        while stack:
            node = stack.pop()
            owner = self._owner(node)
            if owner in seen or node not in self.place:
                continue
            seen.add(owner)
            if owner is a:
                return True
            if owner is not b and self._last(owner) > a.first:
                stack.extend(self._inputs(owner))
        return False

    def _owner(self, node: Node) -> _Chain | Group | Node:
        """What a node is computed in."""
        return self.chain.get(node) or self.taken.get(node) or node

    def _last(self, owner: _Chain | Group | Node) -> int:
        if isinstance(owner, _Chain):
            return owner.last
        return max(map(self.place.__getitem__, owner.nodes)) if isinstance(owner, Group) else self.place[owner]

    def _inputs(self, owner: _Chain | Group | Node) -> Iterator[Node]:
        """What a chain, a group or a node needs, views left out: they are computed by nothing."""
        nodes = (owner,) if isinstance(owner, Node) else owner.nodes
        return (i.base for node in nodes for i in node.inputs)


def _in_row_order(read: Read) -> bool:
    """Whether all elements of a base are read one after another."""
    return read.index_map.is_dense and not read.index_map.within and product(read.index_map.shape) == read.node.base.size
