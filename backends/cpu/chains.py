"""Chains: element-wise nodes of one size that read one another, in one call that keeps what only they use in registers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.elementwise import Read, common_shape, elementwise_call, kernel_of
from tensorgraph.backends.cpu.group import CpuGroup, make_group
from tensorgraph.dims import product
from tensorgraph.graph import Graph, Node

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
    nodes: Sequence[Node], graph: Graph, condition: Mapping[Node, Hashable], taken: Collection[Node] = ()
) -> list[list[Node]]:
    """Chains of two nodes and more, each in order, with the views through which its nodes read one another.

    Each node is joined with the chains that it reads, where that leaves an order in which all groups can be computed, in which
    every other node stands for itself.

    Args:
        nodes: in an order in which they can be computed.
        condition: only nodes of the same one are joined.
        taken: nodes that are in other groups.
    """
    search = Search(nodes, condition)
    for node in nodes:
        kernel = kernel_of(node) if node not in taken else None
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
        is_one: whether nodes, in order, may be one chain; that of element-wise nodes where None.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        condition: Mapping[Node, Hashable],
        is_one: Callable[[Sequence[Node]], bool] | None = None,
    ) -> None:
        self.place = {node: i for i, node in enumerate(nodes)}
        self.condition, self.is_one = condition, is_one or self._is_one
        self.chain: dict[Node, _Chain] = {}
        self.reads: dict[Node, tuple[Read, ...]] = {}

    def add(self, node: Node, reads: tuple[Read, ...]) -> None:
        place = self.place[node]
        self.chain[node], self.reads[node] = _Chain([node], place, place), reads
        for read in reads:
            source = self.chain.get(read.node.base)
            if source is not None and source is not self.chain[node] and self._may_join(source, self.chain[node]):
                self._join(source, self.chain[node])

    def views_of(self, chain: _Chain) -> list[Node]:
        inside = set(chain.nodes)
        reads = (read.node for node in chain.nodes for read in self.reads[node])
        return list(dict.fromkeys(n for n in reads if n.op == "view" and n.base in inside))

    def _join(self, a: _Chain, b: _Chain) -> None:
        a.nodes = sorted((*a.nodes, *b.nodes), key=self.place.__getitem__)
        a.first, a.last = min(a.first, b.first), max(a.last, b.last)
        for node in b.nodes:
            self.chain[node] = a

    def _may_join(self, a: _Chain, b: _Chain) -> bool:
        nodes = sorted((*a.nodes, *b.nodes), key=self.place.__getitem__)
        return self.is_one(nodes) and not self._goes_round(a, b)

    def _is_one(self, nodes: Sequence[Node]) -> bool:
        """Whether one call can compute them: one size and condition, and all read of one another is read in row order."""
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
        """Whether b, which reads a, also reads something else that needs a."""
        seen: set[Node] = set()
        stack = [i for i in self._inputs(b) if self.chain.get(i) not in (a, b)]
        while stack:
            node = stack.pop()
            if node in seen or node not in self.place:
                continue
            seen.add(node)
            chain = self.chain.get(node)
            if chain is a:
                return True
            if (chain.last if chain is not None else self.place[node]) > a.first:
                stack.extend(self._inputs(chain) if chain is not None else node.inputs)
        return False

    def _inputs(self, chain: _Chain) -> Iterator[Node]:
        """What a chain needs, views left out: they are computed by nothing."""
        return (i.base for node in chain.nodes for i in node.inputs)


def _in_row_order(read: Read) -> bool:
    """Whether all elements of a base are read one after another."""
    return read.index_map.is_dense and not read.index_map.within and product(read.index_map.shape) == read.node.base.size
