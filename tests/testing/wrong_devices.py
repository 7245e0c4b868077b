"""Devices with a mistake planted: in one node, in nodes computed together, in rows of state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.device import Part, Run, StateAccess, Values
from tensorgraph.graph import Node
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
    """

    def __init__(self, name: str, joined: Callable[[Node, Node], bool], least: int = 0) -> None:
        super().__init__(name)
        self.joined, self.least = joined, least

    def compile(self, part: Part) -> Compute:
        joins = len(part.nodes) >= self.least and (part.options is None or part.options.fuse)

        def finish(node: Node, slots: Slots, y: Array, step: Run) -> Array:
            together = any(self.joined(node, i) and i in part.nodes and i not in part.keep for i in node.inputs)
            return y * 1.1 if joins and together else y

        return KernelDevice(self.name, finish=finish).compile(part)


@dataclass(frozen=True)
class WrongState:
    """Access to state that changes what is appended to a stream; with `earlier`, what was there before as well."""

    real: Any
    stream: str
    change: Callable[[Array], Array]
    earlier: bool = False

    def append(self, stream: str, rows: Array) -> None:
        self.real.append(stream, self.change(np.asarray(rows)) if stream == self.stream and not self.earlier else rows)
        if stream == self.stream and self.earlier:
            seen = self.real.classes[self.real.store.specs[stream].stream_class].seen
            if len(seen) > len(rows):
                self.real.store._write(stream, seen.slots[:1], self.change(self.real.read(stream)[:1]))

    def read(self, stream: str) -> Array:
        found: Array = self.real.read(stream)
        return found


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
