"""The memory planner: an offset in one arena for every intermediate, from its lifetime."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tensorgraph import registry
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


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets of one device's intermediates, for the largest extents; in-place results share their input's.

    `peak_bytes` is the arena's size, `total_bytes` what the intermediates would take without sharing.
    """

    buffers: dict[Node, Buffer] = field(default_factory=dict)
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


def plan_memory(order: Sequence[Node], kept: Sequence[Node] = (), held: Collection[Node] | None = None) -> MemoryPlan:
    """Offsets for the nodes of `order` that need storage; `kept` nodes stay readable to the end.

    Of several devices, `order` is what all of them do and `held` what lies on one: a copy to another is a use here.

    First position to last use, best fit among the free ranges, neighbours joined again when they fall free.
    """
    last = _last_uses(order, kept)
    arena = _Arena()
    buffers: dict[Node, Buffer] = {}
    dying: dict[int, list[Node]] = {}
    total = 0
    for position, node in enumerate(order):
        if needs_storage(node) and (held is None or node in held):
            size_bytes = -(-node_bytes(node) // ALIGNMENT) * ALIGNMENT
            total += size_bytes
            end = last.get(node, position)
            taken = _inplace_input(node, position, last, buffers, size_bytes)
            if taken is not None:
                offset = buffers[taken].offset
                dying[position].remove(taken)
            else:
                offset = arena.take(size_bytes)
            buffers[node] = Buffer(offset, size_bytes, position, end)
            dying.setdefault(end, []).append(node)
        for dead in dying.pop(position, ()):
            arena.give(buffers[dead].offset, buffers[dead].size_bytes)
    return MemoryPlan(buffers, arena.peak, total)


def _last_uses(order: Sequence[Node], kept: Sequence[Node]) -> dict[Node, int]:
    last: dict[Node, int] = {}
    for position, node in enumerate(order):
        for source in node.inputs if node.op != "view" else ():
            for root in storage_roots(source):
                last[root] = position
    for node in kept:
        for root in storage_roots(node):
            last[root] = len(order)
    return last


def _inplace_input(node: Node, position: int, last: dict[Node, int], buffers: dict[Node, Buffer], size_bytes: int) -> Node | None:
    """An input whose memory the result may take: declared so, dense, as large, and not needed afterwards."""
    if node.op in STRUCTURAL:
        return None
    for slot in registry.ops.get(node.op).inplace:
        source = node.at(slot)
        if source is None or not source.index_map.is_dense or source.shape != node.shape:
            continue
        roots = storage_roots(source)
        others = [r for s, i in zip(node.slots, node.inputs, strict=True) if s != slot for r in storage_roots(i)]
        root = roots[0]
        alone = len(roots) == 1 and root in buffers and root not in others
        if alone and last.get(root) == position and buffers[root].size_bytes == size_bytes:
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
