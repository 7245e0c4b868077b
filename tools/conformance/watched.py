"""A node run in memory that is watched, and run again in every other way that must not change a bit.

A plan's values are moved apart in its arena, the gaps filled, and each input lies in the middle of memory of its own, aligned
to its elements only. What is not the node's result, or the scratch of a kernel, must be there unchanged when the run is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dims import Bindings
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.memory import Buffer, MemoryPlan
from tensorgraph.op import node_bytes
from tensorgraph.plan import Executable, Plan
from tensorgraph.tools.conformance.evaluate import OPTIONS

Array = np.ndarray[Any, Any]

GUARD_BYTES = 256
PATTERN = 0xFF
"""Everywhere where nothing is to be read or written: NaN as any float, -1 as any integer."""
THREADS = (1, 3)


@dataclass
class Watched:
    """A graph of one result `y` on one device, bound to its constants; `wrong` says what was written that should not be."""

    graph: Graph
    arrays: Mapping[str, Array]
    device: Device
    dims: Bindings
    options: CompileOptions = OPTIONS
    wrong: str = field(default="", init=False)

    def __post_init__(self) -> None:
        plan = compile(self.graph, self.device, self.options)
        self.plan = replace(plan, memory={name: apart(memory) for name, memory in plan.memory.items()})
        self.bound: Executable = self.plan.bind({k: v for k, v in self.arrays.items() if k in self.graph.constants})
        given = {name: _surrounded(x) for name, x in self.arrays.items() if name in self.plan.graph.inputs}
        self._inputs = {name: x for name, (x, _) in given.items()}
        self._memory = {name: (memory, memory.copy()) for name, (_, memory) in given.items()}

    def run(self) -> Array:
        """The result; once more memory is filled before, and looked through after it."""
        memory = self.plan.memory.get(self.device.name, MemoryPlan())
        arena: Array = getattr(self.device, "arena", np.zeros(0, np.uint8))[: memory.peak_bytes]
        arena[...] = PATTERN
        result = np.array(self.bound.run(self._inputs, dims=self.dims)["y"])
        if len(arena) == memory.peak_bytes:  # else it was too short before the run, and is another one now
            self._look(arena, memory)
        for name, (now, before) in self._memory.items():
            if not np.array_equal(now, before):
                where = np.flatnonzero(now != before) - GUARD_BYTES - as_dtype(self.arrays[name].dtype).block_bytes
                self.wrong = f"byte {int(where[0])} of the input {name} has changed (it has {self.arrays[name].nbytes})"
        return result

    def _look(self, arena: Array, memory: MemoryPlan) -> None:
        touched = arena != PATTERN
        for thing, buffer in memory.buffers.items():
            plain = isinstance(thing, Node) and not thing.dtype.is_block
            used = min(node_bytes(thing, self.dims), buffer.size_bytes) if plain else buffer.size_bytes  # type: ignore[arg-type]
            touched[buffer.offset : buffer.offset + used] = False
        if touched.any():
            at = int(np.flatnonzero(touched)[0])
            before = [(b.offset, t) for t, b in memory.buffers.items() if b.offset <= at and isinstance(t, Node)]
            offset, node = max(before, key=lambda found: found[0], default=(0, None))
            what = f"the result of {node.op} ({node_bytes(node, self.dims)} bytes)" if node is not None else "the arena"
            self.wrong = f"{int(touched.sum())} bytes outside of results were written, the first at byte {at - offset} of {what}"


def apart(memory: MemoryPlan) -> MemoryPlan:
    """The same values with a gap before and after each; in-place results stay where their input is."""
    at: dict[tuple[int, int], int] = {}
    top = GUARD_BYTES
    for place in sorted({(b.offset, b.size_bytes) for b in memory.buffers.values()}):
        at[place] = top
        top += place[1] + GUARD_BYTES
    moved = {t: Buffer(at[b.offset, b.size_bytes], b.size_bytes, b.start, b.end) for t, b in memory.buffers.items()}
    return MemoryPlan(moved, top if at else 0, memory.total_bytes)


def _surrounded(x: Array) -> tuple[Array, Array]:
    """A dense copy of an array in the middle of other memory, and all of that memory as bytes."""
    start = GUARD_BYTES + x.itemsize
    memory = np.full(start + x.nbytes + GUARD_BYTES, PATTERN, np.uint8)
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy, memory


def on_other_threads(watched: Watched) -> Iterator[tuple[int, Array]]:
    """The result with other numbers of threads; nothing of a device that has none. The device goes on as before."""
    before = getattr(watched.device, "threads", None)
    if before is None:
        return
    try:
        for threads in THREADS:
            watched.device.set_threads(threads)
            yield threads, watched.run()
    finally:
        watched.device.set_threads(before)


def in_place(node: Node, slot: str, arrays: Mapping[str, Array], device: Device, dims: Bindings) -> tuple[Array, Array] | None:
    """The result where it takes an input's memory, and where it does not; None where the planner keeps them apart anyway."""
    source = node.at(slot)
    assert source is not None
    if source.shape != node.shape or source.op in STRUCTURAL - {"view", "input"}:
        return None
    copied = registry.ops.get("cont")(source)
    inputs = tuple(copied if i is source and s == slot else i for s, i in zip(node.slots, node.inputs, strict=True))
    over = replace(node, inputs=inputs)
    if not (device.supports(copied) and device.supports(over)):
        return None
    shared, both = Graph(y=over), Graph(y=over, kept=copied)
    plan = compile(shared, device, OPTIONS)
    if not _share(plan, device):
        return None
    return Watched(shared, arrays, device, dims).run(), Watched(both, arrays, device, dims).run()


def _share(plan: Plan, device: Device) -> bool:
    places = [b.offset for t, b in plan.memory.get(device.name, MemoryPlan()).buffers.items() if isinstance(t, Node)]
    return len(set(places)) < len(places)
