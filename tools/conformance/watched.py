"""A node run in memory that is watched, and run again in every other way that must not change a bit.

The plan is an ordinary one, but that values lie apart in its arena with gaps around them, inputs are copied into it, and work is
cut into as many chunks as it can be. All of it is filled before a run; what is not the node's result, or the scratch of a kernel,
must be there unchanged when it is over. So must be what was copied, and the arrays that were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import Device
from tensorgraph.dims import Bindings
from tensorgraph.dtypes import as_dtype
from tensorgraph.graph import STRUCTURAL, Graph, Node
from tensorgraph.memory import Buffer, Group, MemoryPlan
from tensorgraph.op import node_bytes
from tensorgraph.passes import rewrite
from tensorgraph.plan import Plan
from tensorgraph.tools.conformance.evaluate import OPTIONS

Array = np.ndarray[Any, Any]

GUARD_BYTES = 256
PATTERNS = (0xFF, 0x5A)
"""By turns, what lies where nothing is to be read or written: NaN as any float, and -1, which an op may mean; and neither."""
THREADS = (1, 3)


class Overwritten(AssertionError):
    """Something was written that should not be; the message says where."""


class Watched:
    """A node on one device, bound to its constants.

    Args:
        copied: its inputs are copied into the arena, where kernels read them, and kept to be compared.
        kept: another value that is needed after it.
    """

    def __init__(
        self,
        node: Node,
        arrays: Mapping[str, Array],
        device: Device,
        dims: Bindings,
        options: CompileOptions = OPTIONS,
        *,
        copied: bool = True,
        kept: Node | None = None,
    ) -> None:
        self.device, self.dims = device, dims
        graph = Graph({"y": node} if kept is None else {"y": node, "kept": kept})
        if copied and all(device.supports(_copy(i)) for i in graph.inputs.values()):
            graph = rewrite(graph, lambda now, original: _copy(now) if original.op == "input" else None)
            graph = Graph({**graph.outputs, **{f"{name} copied": _copy(i) for name, i in graph.inputs.items()}})
        plan = compile(graph, device, options)
        memory = {name: apart(each) for name, each in plan.memory.items()}
        self.plan = replace(plan, memory=memory, groups=tuple(tuple(map(_divided, split)) for split in plan.groups))
        self.bound = self.plan.bind({k: v for k, v in arrays.items() if k in graph.constants})
        self._given = {name: np.array(arrays[name]) for name in self.plan.graph.inputs}
        self._before = {name: x.copy() for name, x in self._given.items()}
        self._patterns = cycle(PATTERNS)

    def run(self) -> Array:
        """The result, every NaN in it the same.

        Raises: Overwritten.
        """
        memory, pattern = self.plan.memory.get(self.device.name, MemoryPlan()), next(self._patterns)
        fill, look = getattr(self.device, "fill_arena", None), getattr(self.device, "arena_bytes", None)
        if fill is not None and not fill(memory.peak_bytes, pattern):
            self.bound.run(self._given, dims=self.dims)  # which makes room
            fill(memory.peak_bytes, pattern)
        results = self.bound.run(self._given, dims=self.dims)
        if look is not None:
            self._look(look(memory.peak_bytes) != pattern, memory)
        for name, before in self._before.items():
            found = {"the array of the input": self._given[name], "the copy of the input": results.get(f"{name} copied", before)}
            for what, now in found.items():
                if now.tobytes() != before.tobytes():
                    at = np.flatnonzero(np.frombuffer(now.tobytes(), np.uint8) != np.frombuffer(before.tobytes(), np.uint8))
                    raise Overwritten(f"byte {int(at[0])} of {what} {name} has changed (it has {before.nbytes})")
        return one_nan(results["y"])

    def _look(self, touched: Array, memory: MemoryPlan) -> None:
        for thing, buffer in memory.buffers.items():
            plain = isinstance(thing, Node) and not thing.dtype.is_block
            used = min(node_bytes(thing, self.dims), buffer.size_bytes) if plain else buffer.size_bytes  # type: ignore[arg-type]
            touched[buffer.offset : buffer.offset + used] = False
        if touched.any():
            at = int(np.flatnonzero(touched)[0])
            before = [(b.offset, t) for t, b in memory.buffers.items() if b.offset <= at and isinstance(t, Node)]
            offset, node = max(before, key=lambda found: found[0], default=(0, None))
            what = f"the result of {node.op} ({node_bytes(node, self.dims)} bytes)" if node is not None else "the arena"
            raise Overwritten(
                f"{int(touched.sum())} bytes outside of results were written, the first at byte {at - offset} of {what}"
            )


def one_nan(x: Array) -> Array:
    """A copy in which every NaN is the same: their signs are nobody's to promise."""
    result = np.array(x)
    if as_dtype(x.dtype).is_float:
        result[np.isnan(result)] = np.nan
    return result


def _copy(node: Node) -> Node:
    return registry.ops.get("cont")(node)


def _divided(group: Group) -> Group:
    """A group cut into as many chunks as it can be, where its device cuts work at all."""
    cut = getattr(group, "divided", None)
    found: Group = cut() if cut is not None else group
    return found


def apart(memory: MemoryPlan) -> MemoryPlan:
    """The same values with a gap before and after each; in-place results stay where their input is."""
    at: dict[tuple[int, int], int] = {}
    top = GUARD_BYTES
    for place in sorted({(b.offset, b.size_bytes) for b in memory.buffers.values()}):
        at[place] = top
        top += place[1] + GUARD_BYTES
    moved = {t: Buffer(at[b.offset, b.size_bytes], b.size_bytes, b.start, b.end) for t, b in memory.buffers.items()}
    return MemoryPlan(moved, top if at else 0, memory.total_bytes)


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
    copied = _copy(source)
    inputs = tuple(copied if i is source and s == slot else i for s, i in zip(node.slots, node.inputs, strict=True))
    over = replace(node, inputs=inputs)
    if not (device.supports(copied) and device.supports(over)):
        return None
    shared = Watched(over, arrays, device, dims, copied=False)
    if not _share(shared.plan, device):
        return None
    return shared.run(), Watched(over, arrays, device, dims, copied=False, kept=copied).run()


def _share(plan: Plan, device: Device) -> bool:
    places = [b.offset for t, b in plan.memory.get(device.name, MemoryPlan()).buffers.items() if isinstance(t, Node)]
    return len(set(places)) < len(places)
