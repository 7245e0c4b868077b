"""A group of nodes on the CPU: what is computed in one go, and the calls that do it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tensorgraph.backends.cpu.kernel import Buffer, Call
from tensorgraph.dims import Bindings, maximum
from tensorgraph.graph import Node
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

    def kernels(self, dims: Bindings) -> int:
        return sum(call.guard.holds(dims) for call in self.calls)

    def size_of(self, node: Node) -> int:
        return stored_bytes(node)

    def divided(self) -> CpuGroup:
        """The same with its work cut into as many chunks as it can be."""
        return replace(self, calls=divided(self.calls))


@dataclass(frozen=True, eq=False)
class PlainGroup(Group):
    """A node alone, whose calls are made when they are wanted: a plan of a large model has thousands."""

    make: Callable[[], Sequence[Call]] = tuple

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        return tuple(self.make())

    def kernels(self, dims: Bindings) -> int:
        return sum(call.guard.holds(dims) for call in self.calls)

    def size_of(self, node: Node) -> int:
        return stored_bytes(node)

    def divided(self) -> PlainGroup:
        """As of a `CpuGroup`."""
        return replace(self, make=lambda: divided(self.calls))


def divided(calls: Sequence[Call]) -> tuple[Call, ...]:
    return tuple(replace(call, grain=1) for call in calls)


def stored_bytes(node: Node) -> int:
    """Bytes of a value in the arena, at the largest extents; block types are held as f32."""
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
