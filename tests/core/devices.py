"""Reference devices for tests of scheduling: strict about whose values they are given, and limited in what they run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorgraph.backends.reference.device import ReferenceDevice
from tensorgraph.device import Part, Run, Values
from tensorgraph.dtypes import DType
from tensorgraph.graph import Node


@dataclass(frozen=True)
class Held:
    """A value that only its device can look into."""

    owner: Any
    value: np.ndarray[Any, Any]


class StrictDevice(ReferenceDevice):
    """Values are its own or an error: what another device computed must have been copied, what is needed later kept.

    `refused` are ops that it does not support.
    """

    def __init__(self, name: str, refused: Collection[str] = ()) -> None:
        super().__init__(name)
        self.refused = frozenset(refused)

    def supports(self, node: Node) -> bool:
        return node.op not in self.refused and super().supports(node)

    def upload(self, array: np.ndarray[Any, Any], dtype: DType, *, constant: bool = False, layout: str = "dense") -> Any:
        return Held(self, super().upload(array, dtype, constant=constant))

    def download(self, value: Any, dtype: DType) -> np.ndarray[Any, Any]:
        return super().download(self._own(value), dtype)

    def compile(self, part: Part) -> Callable[[Values, Run], None]:
        compute = super().compile(part)
        inside = set(part.nodes)
        assert all(self.supports(n) for n in part.nodes) and part.keep <= inside

        def run(values: Values, step: Run) -> None:
            chosen = [(n, n.inputs[part.taken[n]]) for n in part.nodes if n.op == "choose"]
            wanted = {i for n in part.nodes if n.op != "choose" for i in n.inputs} | {i for _, i in chosen}
            local: Values = {i: self._own(values[i]) for i in wanted - inside}
            compute(local, step)
            values.update({n: Held(self, local[n]) for n in part.keep})

        return run

    def _own(self, held: Held) -> np.ndarray[Any, Any]:
        assert held.owner is self, f"{self.name} was given a value of {held.owner.name}"
        return held.value


def pair(refused: Collection[str] = ()) -> tuple[StrictDevice, StrictDevice]:
    """Two devices, the first of which refuses some ops."""
    return StrictDevice("reference:0", refused), StrictDevice("reference:1")
