"""Devices with a mistake planted: in one node, in nodes computed together, in rows of state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.backends.cpu.group import CpuGroup
from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.device import Part, Run, StateAccess, Values
from tensorgraph.dtypes import DType
from tensorgraph.graph import Graph, Node
from tensorgraph.memory import Group
from tests.ops.kernel_devices import KernelDevice, Slots

Array = np.ndarray[Any, Any]
Compute = Callable[[Values, Run], None]


def reads(weight: str) -> Callable[[Node], bool]:
    """Nodes that read a weight."""
    return lambda node: any(i.base.op == "constant" and i.base.name == weight for i in node.inputs)


def wrong_node(name: str, chosen: Callable[[Node], bool], change: Callable[[Array], Array]) -> KernelDevice:
    """The reference, but that some nodes' values are changed."""

    def finish(node: Node, slots: Slots, y: Array, step: Run) -> Array:
        return change(y) if chosen(node) else y

    return KernelDevice(name, finish=finish)


def last_element_off(y: Array) -> Array:
    """One element of many, by a hundredth of the largest."""
    y = np.array(y)
    y.reshape(-1)[-1:] += 0.01 * np.abs(y).max()
    return y


class JoiningDevice(ReferenceDevice):
    """Computes some nodes together with one of their inputs, wrongly, where that input's value is not asked for.

    Args:
        joined: whether a node is, with an input.
        least: only in runs of so many nodes: as if memory were given away too early.
        rounds: products are in float32, in another order.
    """

    def __init__(self, name: str, joined: Callable[[Node, Node], bool], least: int = 0, *, rounds: bool = False) -> None:
        super().__init__(name)
        self.joined, self.least, self.rounds = joined, least, rounds

    def compile(self, part: Part) -> Compute:
        rng = np.random.default_rng(0)
        joins = len(part.nodes) >= self.least and (part.options is None or part.options.fuse)

        def finish(node: Node, slots: Slots, y: Array, step: Run) -> Array:
            if self.rounds and node.op == "mul_mat":
                y = y * (1 + 1e-7 * rng.standard_normal(y.shape))
            together = any(self.joined(node, i) and i in part.nodes and i not in part.keep for i in node.inputs)
            return y * 1.1 if joins and together else y

        return KernelDevice(self.name, finish=finish).compile(part)


class WrongCpu(CpuDevice):
    """The CPU with a mistake.

    Args:
        weight: a weight's values, of which two rows are exchanged when it is put into its layout.
        gated: of which weights the fused call takes the gate for what is gated, and the reverse; in steps of few tokens only.
    """

    def __init__(self, name: str, weight: Array | None = None, gated: str = "") -> None:
        super().__init__(name)
        self.weight, self.gated = weight, gated

    def upload(self, array: Array, dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        if constant and self.weight is not None and array.shape == self.weight.shape and np.array_equal(array, self.weight):
            array = np.array(array)
            array[[5, 6]] = array[[6, 5]]
        return super().upload(array, dtype, constant=constant, layout=layout)

    def groups(self, nodes: Sequence[Node], graph: Graph, options: Any) -> Sequence[Group]:
        return [self._wrong(group) if isinstance(group, CpuGroup) else group for group in super().groups(nodes, graph, options)]

    def _wrong(self, group: CpuGroup) -> CpuGroup:
        calls = []
        for call in group.calls:
            w, v = (call.operands.get(name) for name in ("w0", "v0"))
            few = call.guard.bounds and call.guard.bounds[0][2] is not None  # an upper bound of tokens
            if self.gated and few and w is not None and v is not None and self.gated in f"{w.of} {v.of}":
                call = replace(call, operands={**call.operands, "w0": v, "v0": w})
            calls.append(call)
        return replace(group, calls=tuple(calls))


@dataclass(frozen=True)
class WrongState:
    """Access to a stream that is wrong: `what` is "append", "earlier" (what was there before is changed) or "read"."""

    real: Any
    stream: str
    change: Callable[[Array], Array]
    what: str = "append"

    def append(self, stream: str, rows: Array) -> None:
        self.real.append(stream, self._changed(stream, np.asarray(rows), "append"))
        if stream == self.stream and self.what == "earlier":
            seen = self.real.classes[self.real.store.specs[stream].stream_class].seen
            if len(seen) > len(rows):
                self.real.store._write(stream, seen.slots[:1], self.change(self.real.read(stream)[:1]))

    def read(self, stream: str) -> Array:
        return self._changed(stream, self.real.read(stream), "read")

    def _changed(self, stream: str, rows: Array, what: str) -> Array:
        return self.change(rows) if stream == self.stream and what == self.what else rows


class WrongStateDevice(ReferenceDevice):
    """The reference, over a state that is written wrongly."""

    def __init__(self, name: str, wrong: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.wrong = wrong

    def compile(self, part: Part) -> Compute:
        right = super().compile(part)

        def run(values: Values, step: Run) -> None:
            state: StateAccess | None = WrongState(step.state, **self.wrong) if step.state is not None else None
            right(values, Run(step.dims, state))

        return run
