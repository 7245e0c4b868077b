"""The memory planner: an offset in one arena for every intermediate, from its lifetime."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush

from tensorgraph import registry
from tensorgraph.dims import Bindings
from tensorgraph.graph import STRUCTURAL, Node
from tensorgraph.op import node_bytes

ALIGNMENT = 64


@dataclass(frozen=True)
class Buffer:
    """Where a node's elements lie. `start` and `end` are the first and last position in the order that need them."""

    offset: int
    size_bytes: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that a device computes in one go: what it leaves in memory, and what else it needs there while it runs, in bytes."""

    nodes: tuple[Node, ...]
    stored: tuple[Node, ...]
    scratch: Mapping[Hashable, int] = field(default_factory=dict)

    @staticmethod
    def of(node: Node) -> Group:
        """A node by itself."""
        return Group((node,), (node,) if needs_storage(node) else ())

    @cached_property
    def reads(self) -> tuple[Node, ...]:
        """The values of others that it takes."""
        own = set(self.nodes)
        return tuple(dict.fromkeys(i for n in self.nodes for i in n.inputs if i not in own))

    def kernels(self, dims: Bindings) -> int:
        """How many kernels compute it in a step of these extents."""
        return int(any(node.op not in STRUCTURAL for node in self.nodes))

    def size_of(self, node: Node) -> int:
        """Bytes that a stored node takes, at the largest extents."""
        return node_bytes(node)


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets of one device's intermediates, for the largest extents; in-place results share their input's.

    `peak_bytes` is the arena's size, `total_bytes` what the intermediates would take without sharing.
    """

    buffers: dict[Hashable, Buffer] = field(default_factory=dict)  # of nodes, and of the scratch of groups by its keys
    peak_bytes: int = 0
    total_bytes: int = 0


def needs_storage(node: Node) -> bool:
    """Whether a node's value lies in the arena: constants, inputs and state lie elsewhere, views and choices in another's."""
    return node.op not in STRUCTURAL or node.op == "copy"


def storage_roots(node: Node) -> list[Node]:
    """The nodes whose storage a node's value may lie in."""
    if node.op == "view":
        return storage_roots(node.base)
    if node.op == "choose":
        return [root for i in node.inputs for root in storage_roots(i)]
    return [node]


def plan_memory(order: Sequence[Group | Node], kept: Sequence[Node] = (), held: Collection[Node] | None = None) -> MemoryPlan:
    """Offsets for what the groups of `order` (a node alone is one) store; `kept` nodes stay readable to the end.

    Of several devices, `order` is what all of them do and `held` what lies on one: a copy to another is a use here.

    First position to last use, best fit among the free ranges, neighbours joined again when they fall free; in order, or from
    the last position to the first where that takes less, as where the largest value is the last.
    """
    groups = [item if isinstance(item, Group) else Group.of(item) for item in order]
    last = _last_uses(groups, kept)
    pieces: dict[Hashable, _Piece] = {}
    lives: dict[Hashable, tuple[int, int]] = {}
    for position, group in enumerate(groups):
        wanted: dict[Hashable, int] = {n: group.size_of(n) for n in group.stored if held is None or n in held}
        if held is None or group.nodes[0] in held:
            wanted |= group.scratch
        for thing, n_bytes in wanted.items():
            size_bytes = -(-n_bytes // ALIGNMENT) * ALIGNMENT
            end = last.get(thing, position) if isinstance(thing, Node) else position
            taken = _inplace_input(group, thing, position, last, pieces, size_bytes)
            pieces[thing] = _Piece(size_bytes, position, end) if taken is None else pieces[taken]
            pieces[thing].end = end
            lives[thing] = position, end
    ordered = list(dict.fromkeys(pieces.values()))
    peak, offsets = _offsets([(p.size_bytes, p.start, p.end) for p in ordered])
    other, from_last = _offsets([(p.size_bytes, -p.end, -p.start) for p in ordered])
    if other < peak:
        peak, offsets = other, from_last
    at = dict(zip(ordered, offsets, strict=True))
    buffers = {thing: Buffer(at[piece], piece.size_bytes, *lives[thing]) for thing, piece in pieces.items()}
    return MemoryPlan(buffers, peak, sum(piece.size_bytes for piece in pieces.values()))


@dataclass(eq=False)
class _Piece:
    """Memory for a value and for the in-place results that follow it, from its first position to its last."""

    size_bytes: int
    start: int
    end: int


def _offsets(pieces: Sequence[tuple[int, int, int]]) -> tuple[int, list[int]]:
    """An arena's size and where each piece (bytes, first and last position) lies."""
    arena, offsets = _Arena(), [0] * len(pieces)
    living: list[tuple[int, int]] = []  # last position, number
    for n in sorted(range(len(pieces)), key=lambda n: pieces[n][1]):
        size_bytes, start, end = pieces[n]
        while living and living[0][0] < start:
            dead = heappop(living)[1]
            arena.give(offsets[dead], pieces[dead][0])
        offsets[n] = arena.take(size_bytes)
        heappush(living, (end, n))
    return arena.peak, offsets


def _last_uses(groups: Sequence[Group], kept: Sequence[Node]) -> dict[Hashable, int]:
    last: dict[Hashable, int] = {}
    for position, group in enumerate(groups):
        for source in group.reads if group.nodes[0].op != "view" else ():
            for root in storage_roots(source):
                last[root] = position
    for node in kept:
        for root in storage_roots(node):
            last[root] = len(groups)
    return last


def _inplace_input(
    group: Group, node: Hashable, position: int, last: dict[Hashable, int], held: Mapping[Hashable, _Piece], size_bytes: int
) -> Node | None:
    """An input whose memory the result may take: declared so, dense, as large, and not needed afterwards."""
    if not isinstance(node, Node) or node.op in STRUCTURAL or len(group.nodes) > 1:
        return None
    for slot in registry.ops.get(node.op).inplace:
        source = node.at(slot)
        if source is None or not source.index_map.is_dense or source.shape != node.shape:
            continue
        roots = storage_roots(source)
        others = [r for s, i in zip(node.slots, node.inputs, strict=True) if s != slot for r in storage_roots(i)]
        root = roots[0]
        alone = len(roots) == 1 and root in held and root not in others
        if alone and last.get(root) == position and held[root].size_bytes == size_bytes:
            return root
    return None


class _Arena:
    """Free ranges as sorted (offset, size) pairs; grows at the end."""

    def __init__(self) -> None:
        self.free: list[tuple[int, int]] = []
        self.top = 0
        self.peak = 0

    def take(self, size_bytes: int) -> int:
        fitting = [(size, at) for at, size in self.free if size >= size_bytes]
        if fitting and size_bytes:
            size, at = min(fitting)
            self.free.remove((at, size))
            if size > size_bytes:
                insort(self.free, (at + size_bytes, size - size_bytes))
            return at
        at = self.top
        if self.free and size_bytes and sum(self.free[-1]) == self.top:
            at = self.free.pop()[0]
        self.top = at + size_bytes
        self.peak = max(self.peak, self.top)
        return at

    def give(self, at: int, size_bytes: int) -> None:
        if not size_bytes:
            return
        index = bisect_left(self.free, (at, 0))
        if index < len(self.free) and self.free[index][0] == at + size_bytes:
            size_bytes += self.free.pop(index)[1]
        if index and sum(self.free[index - 1]) == at:
            index -= 1
            before, size = self.free.pop(index)
            at, size_bytes = before, size + size_bytes
        self.free.insert(index, (at, size_bytes))
